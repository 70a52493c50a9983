"""Rules for single lines: some go, and the document with them if little remains."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

from maxlm.config.cleaning.text_steps import C4Lines, WebLines
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.cleaning.quality import ELLIPSES
from maxlm.data.cleaning.text_features import END_MARKS

POLICIES = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)
"""Of C4's published code, as datatrove has them."""
_CITATION = re.compile(r"\[\d*+\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(
    r"[.!?\u2026]++[\"'\u201d\u2019\xbb)\]]*+[^\S\n]++(?=[^\sa-z])|[\u3002\uff01\uff1f]++[\u201d\u2019\u300d\u300f]*+(?=\S)"
)
"""The end of a sentence after which another one begins in the same line; not that of `e.g. this`."""
_MANY_EMPTY = re.compile(r"\n{3,}")
_LETTERS = re.compile(r"[^\W\d_]+")
_COUNTER = re.compile(
    r"(?:\d[\d.,]*+ ?[km]?|no|one)\s*+(?:likes?|shares?|comments?|retweets?|reposts?|views?|reactions?|repl(?:y|ies)"
    r"|followers?|votes?|points?|downloads?)\W*+",
    re.IGNORECASE,
)
_PHRASE = re.compile(
    r"^(?:sign[ -]?in|sign[ -]?up|log[ -]?in)\b\W*+|\b(?:read more|see more|continue reading)\W*+$"
    r"|\bitems? in cart\b\W*+",
    re.IGNORECASE,
)


class C4LineRules:
    """See `C4Lines`. Empty lines between those that stay remain, so that paragraphs can be told."""

    def __init__(self, config: C4Lines) -> None:
        self._config = config
        self.limits = (
            Limit("lorem ipsum", most=0 if config.lorem_ipsum else math.inf, unit="times"),
            Limit("curly brackets", most=0 if config.curly_bracket else math.inf, unit="times"),
            Limit("sentences", config.least_sentences, unit="sentences"),
        )

    def __call__(self, page: Page) -> Finding:
        lowered = page.text.lower()
        values = measured(self.limits, (lowered.count(phrase) for phrase in ("lorem ipsum", "{")))
        if not self.limits[len(values) - 1].allows(values[-1]):
            return Finding(values)
        phrases = {"javascript": "JavaScript"} if self._config.javascript else {}
        phrases |= dict.fromkeys(POLICIES, "policy") if self._config.policies else {}
        phrases = {phrase: name for phrase, name in phrases.items() if phrase in lowered}
        cites = self._config.citations and "[" in lowered

        def edited(line: str) -> tuple[str, str | None]:
            if len(line) > self._config.longest_word and max(map(len, line.split())) > self._config.longest_word:
                return "", "too long a word"
            whole, line = line, _CITATION.sub("", line) if cites else line
            if self._config.terminal_punctuation and (not line.endswith(END_MARKS) or line.endswith(ELLIPSES)):
                return "", "no punctuation at the end"
            if len(line.split()) < self._config.least_words:
                return "", "too few words"
            lowered = line.lower() if phrases else ""
            for phrase, name in phrases.items():
                if phrase in lowered:
                    return "", name
            return line, None if line == whole else "citation"

        text, lines, changes, _ = _filtered(page.text, edited)
        sentences = lines + len(_SENTENCE_END.findall(text))
        return Finding((*values, float(sentences)), text=text if changes else None, changes=changes)


class WebLineRules:
    """See `WebLines`."""

    def __init__(self, config: WebLines) -> None:
        self._config = config
        self.limits = (Limit("words in removed lines", most=config.most_removed),)

    def __call__(self, page: Page) -> Finding:
        text, _, changes, removed = _filtered(page.text, self._edited)
        values = (removed / max(1, sum(map(len, map(str.split, page.text.split("\n"))))),)
        return Finding(values, text=text if changes else None, changes=changes)

    def _edited(self, line: str) -> tuple[str, str | None]:
        words = line.split(maxsplit=self._config.short_line)
        if len(words) == 1:
            return "", "one word"
        letters = len(line) if line.islower() else len("".join(_LETTERS.findall(line)))
        if not letters:
            return "", "no letters"
        if not line.islower() and sum(map(str.isupper, line)) > self._config.most_uppercase * letters:
            return "", "capitals"
        if len(words) <= self._config.short_line:
            if _COUNTER.fullmatch(line):
                return "", "counter"
            cut = _PHRASE.sub("", line).strip()
            if cut != line:
                return cut, "phrase"
        return line, None


def _filtered(text: str, edited: Callable[[str], tuple[str, str | None]]) -> tuple[str, int, Counter[str], int]:
    """Each line that is not empty as `edited` gives it, with why it is another one; those that are empty then, go.

    Returns:
        The text, its lines that are not empty, how often it was changed why, and the words of lines that were changed.
    """
    kept, lines, changes, words = [], 0, Counter[str](), 0
    for line in text.split("\n"):
        stripped = line.strip()
        if not stripped:
            kept.append("")
            continue
        new, reason = edited(stripped)
        if reason is None:
            new = line
        else:
            changes[reason] += 1
            words += len(stripped.split())
        if new:
            kept.append(new)
            lines += 1
    return _MANY_EMPTY.sub("\n\n", "\n".join(kept)).strip("\n"), lines, changes, words
