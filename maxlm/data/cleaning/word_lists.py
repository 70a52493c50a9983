"""Lists of words and addresses that are not wanted, and documents that have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import assert_never

from maxlm.config import UserError
from maxlm.config.cleaning.rule_steps import UrlList, UrlPart, WordList
from maxlm.config.fields import shown
from maxlm.data.cleaning.findings import Finding, Limit, Page
from maxlm.data.cleaning.text_features import features
from maxlm.data.cleaning.word_splitting import WordForm, split_words

_DOMAIN = re.compile(r"[^\s/:@?#*]+\.[^\s/:@?#*.]+")
_HOST = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?(?://)?(?:[^/?#@]*@)?([^/?#:]*)")
_LONGEST_HOST = 254
"""Characters of a name, with a point at its end (RFC 1035, section 2.3.4)."""
_WORDS = re.compile(r"[^\W_]+")


class UrlRules:
    """See `UrlList`."""

    def __init__(self, config: UrlList) -> None:
        self._part, self._tag = config.part, config.tag
        self._entries = frozenset(read_list(config.file, _CHECKS[config.part]))
        self.limits = (Limit(f"entries of {Path(config.file).name}", most=config.most, unit="entries"),)

    def __call__(self, page: Page) -> Finding:
        address = page.tags.get(self._tag)
        if address is None:
            return Finding()
        found = sorted(self._found(str(address).lower()))
        return Finding((float(len(found)),), seen=", ".join(found))

    def _found(self, address: str) -> set[str]:
        match self._part:
            case UrlPart.DOMAIN:
                host = _HOST.match(address)
                labels = host[1].rstrip(".").split(".") if host and len(host[1]) <= _LONGEST_HOST else []
                return {end for i in range(len(labels)) if (end := ".".join(labels[i:])) in self._entries}
            case UrlPart.WORD:
                return set(_WORDS.findall(address)) & self._entries
            case UrlPart.SUBSTRING:
                return {entry for entry in self._entries if entry in address}
            case _:
                assert_never(self._part)


class WordRules:
    """See `WordList`. A phrase is found where its words follow one another, whatever stands between them; each
    word of it counts."""

    def __init__(self, config: WordList) -> None:
        self._phrases: dict[str, list[tuple[str, ...]]] = {}
        for entry in read_list(config.file, _words_problem):
            first, *_ = words = tuple(split_words(entry, WordForm.WRITTEN))
            self._phrases.setdefault(first, []).append(words)
        self.limits = (Limit(f"words of {Path(config.file).name}", most=config.most),)

    def __call__(self, page: Page) -> Finding:
        found = features(page.text)
        lowered = [word.lower() for word in found.vocabulary]
        if self._phrases.keys().isdisjoint(lowered):
            return Finding((0.0,))
        words = [lowered[i] for i in found.ids.tolist()]
        hits = list(self._hits(words))
        covered = {i for at, phrase in hits for i in range(at, at + len(phrase))}
        seen = " ".join(min((phrase for _, phrase in hits), default=()))
        return Finding((len(covered) / len(words),), seen=seen)

    def _hits(self, words: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
        for i, word in enumerate(words):
            for phrase in self._phrases.get(word, ()):
                if tuple(words[i : i + len(phrase)]) == phrase:
                    yield i, phrase


def read_list(file: str, problem: Callable[[str], str | None]) -> tuple[str, ...]:
    """The entries of a list, in lower case, in their order.

    Args:
        file: UTF-8, an entry a line; empty lines and those that begin with `#` are passed over.
        problem: what is wrong with an entry, and what to do about it; None: nothing.

    Raises:
        UserError: the file is missing, is not UTF-8, has no entry, or one that cannot be meant.
    """
    try:
        content = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a list with an entry a line") from error
    entries = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            entry = raw.decode().strip().lower()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8; convert it: "
                "iconv -f latin1 -t UTF-8 FILE > NEW"
            ) from error
        if not entry or entry.startswith("#"):
            continue
        if wrong := problem(entry):
            raise UserError(f"{file}:{number}: {shown(entry)} {wrong}")
        entries.append(entry)
    if not entries:
        raise UserError(f"{file}: has no entry; write one a line, or leave the step out")
    return tuple(entries)


def _domain_problem(entry: str) -> str | None:
    return None if _DOMAIN.fullmatch(entry) else "is not a domain; write it like example.org, without https:// and path"


def _url_word_problem(entry: str) -> str | None:
    return None if _WORDS.fullmatch(entry) else "is not one word of letters and figures; use part SUBSTRING for pieces"


def _words_problem(entry: str) -> str | None:
    return None if _WORDS.search(entry) else "has no letter or figure, so that it is no word; remove the line"


def _no_problem(entry: str) -> None:
    """Any piece of an address may be meant."""


_CHECKS: dict[UrlPart, Callable[[str], str | None]] = {
    UrlPart.DOMAIN: _domain_problem,
    UrlPart.WORD: _url_word_problem,
    UrlPart.SUBSTRING: _no_problem,
}
