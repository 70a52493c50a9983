"""What single sources need: answers, books, articles, licences."""

from __future__ import annotations

import html
import json
import re
from typing import Any

from maxlm.config.cleaning.rule_steps import Licences
from maxlm.config.cleaning.source_steps import AnswersByScore, GutenbergText, WikiText
from maxlm.data.cleaning.findings import Finding, Limit, Page
from maxlm.data.cleaning.html_text import extractor

_TAGGED = re.compile(r"</?[a-zA-Z]|&#?\w+;")
_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*\n", re.MULTILINE | re.IGNORECASE)
_GUTENBERG_END = re.compile(
    r"^(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg)",
    re.MULTILINE | re.IGNORECASE,
)
_WIKI_GONE = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>(?:(?!<ref\b).)*?</ref>|<gallery\b[^<>]*>[^<]*</gallery>"
    r"|__[A-Z]+__",
    re.DOTALL,
)
_WIKI_INNER = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_WIKI_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_WIKI_OUTSIDE = re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]]*[ \t]*([^\[\]\n]*)\]")
_WIKI_NAMESPACE = re.compile(r"\s*(?:file|image|category|media|template|portal):", re.IGNORECASE)
_WIKI_HEADING = re.compile(r"^(={1,6})[ \t]*([^=\n].*?)[ \t]*\1[ \t]*$", re.MULTILINE)
_WIKI_QUOTES = re.compile("'{2,5}")
_HTML_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_MANY_EMPTY = re.compile(r"\n(?:[ \t]*\n){2,}")
_NESTED = 10
"""Links and templates inside one another; deeper ones stay."""


class AnswerSorter:
    """See `AnswersByScore`. Of equal scores the one that stood first is first."""

    limits = (Limit("answers that can be read", 1, unit="1: yes"),)

    def __init__(self, config: AnswersByScore) -> None:
        self._config = config
        self._extract = extractor()

    def __call__(self, page: Page) -> Finding:
        given = page.tags.get(self._config.tag)
        if given is None:
            return Finding((1.0,))
        try:
            listed: Any = json.loads(given) if isinstance(given, str) else given
            answers = [(float(one["score"]), self._plain(one["text"])) for one in listed]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return Finding((0.0,), seen=f"{type(error).__name__}: {error}")
        least = self._config.least_score
        kept = [one for one in answers if least is None or one[0] >= least]
        ordered = [text for _, text in sorted(kept, key=lambda one: -one[0])]
        text = "\n\n".join(part for part in (self._plain(page.text), *ordered) if part)
        return Finding((1.0,), text=text, changes={"answers": len(ordered)})

    def _plain(self, text: str) -> str:
        return (self._extract(text, main_content=False) if _TAGGED.search(text) else text).strip()


class GutenbergReader:
    """See `GutenbergText`."""

    limits: tuple[Limit, ...] = ()

    def __init__(self, config: GutenbergText) -> None:
        pass

    def __call__(self, page: Page) -> Finding:
        start = _GUTENBERG_START.search(page.text)
        end = _GUTENBERG_END.search(page.text, start.end() if start else 0)
        if not start and not end:
            return Finding()
        text = page.text[start.end() if start else 0 : end.start() if end else None].strip()
        return Finding(text=text, changes={"Gutenberg": 1})


class WikiReader:
    """See `WikiText`."""

    limits: tuple[Limit, ...] = ()

    def __init__(self, config: WikiText) -> None:
        pass

    def __call__(self, page: Page) -> Finding:
        text = _WIKI_GONE.sub("", page.text)
        for pattern, new in ((_WIKI_INNER, ""), (_WIKI_LINK, _label)):
            for _ in range(_NESTED):
                text, count = pattern.subn(new, text)
                if not count:
                    break
        text = _WIKI_QUOTES.sub("", _WIKI_OUTSIDE.sub(r"\1", text))
        text = html.unescape(_HTML_TAG.sub("", _WIKI_HEADING.sub(r"\2", text)))
        text = _MANY_EMPTY.sub("\n\n", text).strip()
        return Finding() if text == page.text else Finding(text=text, changes={"markup": 1})


def _label(link: re.Match[str]) -> str:
    """The words of a link; of a file or category, none."""
    return "" if _WIKI_NAMESPACE.match(link[1]) else link[1].rpartition("|")[2]


class LicenceRules:
    """See `Licences`."""

    def __init__(self, config: Licences) -> None:
        self._allowed = {name.lower() for name in config.allowed}
        self._tag, self._unknown = config.tag, config.unknown
        self.limits = (Limit("allowed licence", 1, unit="1: yes"),)

    def __call__(self, page: Page) -> Finding:
        licence = page.tags.get(self._tag)
        if licence is None:
            return Finding((float(self._unknown),), seen="none")
        return Finding((float(str(licence).lower() in self._allowed),), seen=str(licence))
