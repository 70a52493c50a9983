"""Which characters make words: one definition for rules, signatures, n-grams and evaluations.

A word is a run of letters, figures and `_`; in scripts that set no blanks between words each letter is a word.
Combining marks (vowels of Indic scripts, Arabic harakat, accents written apart) and characters that are not seen
(joiners as in Persian and Sinhala, soft hyphens) belong to what stands before them and part nothing, as in UAX #29,
rule WB4; where nothing stands before them they are no word.
"""

from __future__ import annotations

import enum
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import assert_never

import numpy as np
import numpy.typing as npt

_ALONE = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Chinese, Japanese
_ALONE += "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
"""Blocks of scripts without blanks, and those of which UAX #14 says SA: Thai, Lao, Burmese, Khmer, Tai."""
_IN_ALONE = re.compile(f"[{_ALONE}]")
_ZERO_WIDTH_SPACE = "\u200b"
_LAST = 0x323AF
"""Letters end here (Unicode 15); selectors of variants lie behind."""
_SELECTORS = range(0xE0000, 0xE01F0)
_BEYOND = "[\U00010000-\U0010ffff]"


class CharacterKind(enum.IntEnum):
    """What a character is between words."""

    BLANK = 0
    LETTER = 1
    """Also figures and `_`."""
    ALONE = 2
    """A word by itself."""
    MARK = 3
    """Belongs to the character before it."""
    UNSEEN = 4
    """The same; punctuation that is removed takes it along."""
    PUNCTUATION = 5
    SIGN = 6
    """Symbols, emoji, and what is no character."""


_PIECE = 1 << 16
_BLANK = re.compile(r"\s")
_MARKS = (CharacterKind.MARK, CharacterKind.UNSEEN)
_APOSTROPHES = "'\u2019"


class WordForm(enum.Enum):
    """What is a word beside runs of letters."""

    WRITTEN = enum.auto()
    """Apostrophes inside words are of them, and other signs that stand alone between white space are words: for rules,
    as datatrove counts a dash."""
    LETTERS = enum.auto()
    """Nothing: punctuation makes no two documents different."""


def split_words(text: str, form: WordForm) -> Iterator[str]:
    """The words of a text, in their order."""
    return itertools.chain.from_iterable(_in_piece(piece, form) for piece in _pieces(text))


def _in_piece(text: str, form: WordForm) -> list[str]:
    found = _pattern(form).findall(text)
    if form is WordForm.WRITTEN and ("'" in text or "\u2019" in text):
        return [part for word in found for part in (_parts(word) if "'" in word or "\u2019" in word else (word,))]
    return found


def _pieces(text: str) -> Iterator[str]:
    """The text, cut after white space, where no word goes on: the words of a long one are never there all at once."""
    at = 0
    while len(text) - at > _PIECE and (blank := _BLANK.search(text, at + _PIECE)) is not None:
        yield text[at : blank.end()]
        at = blank.end()
    yield text[at:]


def _parts(found: str) -> list[str]:
    """The words in a run of letters, marks and apostrophes: those inside are of a word. Signs alone are one. (A pattern
    that repeats a group for each apostrophe takes gigabytes for a text of nothing else.)"""
    if found[0].isalnum() or found[0] == "_":
        return [part for part in _outside().split(found) if part]
    return [found]


@functools.cache
def _outside() -> re.Pattern[str]:
    marks = "".join(class_of(*_MARKS, beyond=beyond) for beyond in (False, True))
    return re.compile(rf"[{_APOSTROPHES}][{_APOSTROPHES}{marks}]+|[{_APOSTROPHES}]\Z")


@functools.cache
def _pattern(form: WordForm) -> re.Pattern[str]:
    """No quantifier is possessive, as `re` of Python 3.11.2 has them wrong. Up to U+FFFF a class is one lookup; beyond,
    it is a comparison with each of its ranges, made only where such a character stands."""
    letter, alone = CharacterKind.LETTER, CharacterKind.ALONE
    first = f"(?:[{class_of(letter)}]|(?={_BEYOND})[{class_of(letter, beyond=True)}])"
    single = f"[{class_of(alone)}{class_of(alone, beyond=True)}]{_any(*_MARKS)}"
    match form:
        case WordForm.WRITTEN:
            return re.compile(rf"{first}{_any(letter, *_MARKS, more=_APOSTROPHES)}|{single}|(?<!\S)[^\w\s]+(?!\S)")
        case WordForm.LETTERS:
            return re.compile(f"{first}{_any(letter, *_MARKS)}|{single}")
        case _:
            assert_never(form)


def _any(*wanted: CharacterKind, more: str = "") -> str:
    """As many characters of these kinds, or of `more`, as there are."""
    below, beyond = class_of(*wanted) + more, class_of(*wanted, beyond=True)
    return f"[{below}]*(?:(?={_BEYOND})[{below}{beyond}]+)?"


def class_of(*wanted: CharacterKind, beyond: bool = False) -> str:
    """The inside of a class of `re`: all characters of these kinds up to U+FFFF, or beyond."""
    inside = np.isin(kinds(), wanted)
    if beyond:
        inside[:0x10000] = False
    else:
        inside[0x10000:] = False
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False)).reshape(-1, 2)
    return "".join(f"\\U{first:08x}-\\U{stop - 1:08x}" for first, stop in edges.tolist())


@functools.cache
def kinds() -> npt.NDArray[np.uint8]:
    """[0x110000]; of each character its `CharacterKind`."""
    table = np.full(0x110000, CharacterKind.SIGN, np.uint8)
    for code in (*range(_LAST + 1), *_SELECTORS):
        table[code] = _kind(chr(code))
    return table


def _kind(character: str) -> CharacterKind:
    category = unicodedata.category(character)
    if character.isalnum() or character == "_":
        return CharacterKind.ALONE if category != "Nd" and _IN_ALONE.match(character) else CharacterKind.LETTER
    if character.isspace() or category == "Cc" or character == _ZERO_WIDTH_SPACE:
        return CharacterKind.BLANK
    if category[0] == "M":
        return CharacterKind.MARK
    if category == "Cf":
        return CharacterKind.UNSEEN
    return CharacterKind.PUNCTUATION if category[0] == "P" else CharacterKind.SIGN
