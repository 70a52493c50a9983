"""Words as numbers of 64 bits, and runs of words: arithmetic of their bytes, the same on every machine.

Which characters make words, word_splitting.py says; here they are in small letters, and `_` is punctuation like other
marks of ASCII. Each symbol beyond ASCII is treated as a mark. All of it is done on arrays: Python sees no single word.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.data.cleaning.word_splitting import CharacterKind, kinds

Hashes = npt.NDArray[np.uint64]

_CHUNK = 1 << 16  # bytes at a time: the arrays stay in the cache, and a huge document takes no huge arrays
_ASCII_PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_PUNCTUATION_BYTE = np.zeros(256, bool)
_PUNCTUATION_BYTE[list(_ASCII_PUNCTUATION)] = True
_WORD_BYTE = np.ones(256, bool)
_WORD_BYTE[:33] = _WORD_BYTE[127] = False
_SINGLE = (CharacterKind.ALONE, CharacterKind.PUNCTUATION, CharacterKind.SIGN)


class Punctuation(enum.Enum):
    """What becomes of it."""

    WORDS = enum.auto()
    """Each mark is a word."""
    REMOVED = enum.auto()
    """What it stood between is one word: `don't` is `dont` (GPT-3's decontamination, arXiv:2005.14165, appendix C)."""


class FoundWords(NamedTuple):
    """The words of a text in their order."""

    hashes: Hashes
    """[n]; another word has another hash, but for one pair in 2^64."""
    starts: npt.NDArray[np.int64]
    """[n]; the byte at which each begins, of `folded(text)` in UTF-8, which has as many characters as the text."""
    ends: npt.NDArray[np.int64]
    """[n]; the byte after each."""


def mixed(values: Hashes) -> Hashes:
    """Each number turned into one whose bits all depend on all of its bits (the last steps of SplitMix64: Steele, Lea &
    Flood 2014, figure 17). No two numbers become the same one."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _powers(base: int, count: int) -> Hashes:
    """[count]; base^0, base^1, ... modulo 2^64."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


_BYTE_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95  # odd, so that they have inverses
_UP, _DOWN = (_powers(base, _CHUNK + 1) for base in (_BYTE_BASE, pow(_BYTE_BASE, -1, 2**64)))
_RUN_UP, _RUN_DOWN = (_powers(base, _CHUNK + 1) for base in (_WORD_BASE, pow(_WORD_BASE, -1, 2**64)))
_BYTE_VALUE = mixed(np.arange(1, 257, dtype=np.uint64))
_ONE_DIGIT = _BYTE_VALUE.copy()
_ONE_DIGIT[ord("0") : ord("9") + 1] = _BYTE_VALUE[ord("0")]


def folded(text: str) -> str:
    """In small letters, with blanks and punctuation of other scripts as ASCII's; as many characters as before."""
    small = text.lower()
    if len(small) != len(text):  # one letter has two characters when it is small
        small = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)
    if small.isascii():
        return small
    points = _points(small).copy()
    kind = _kind_table()[points]
    points[(points > 127) & (kind == CharacterKind.BLANK)] = ord(" ")
    points[(points > 127) & (kind == CharacterKind.PUNCTUATION)] = ord(".")
    return points.tobytes().decode("utf-32-le", errors="surrogatepass")


def _points(text: str) -> npt.NDArray[np.uint32]:
    """[characters]"""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")


@functools.cache
def _kind_table() -> npt.NDArray[np.uint8]:
    """`kinds`, with those of ASCII as they are here."""
    table = kinds().copy()
    table[:128] = np.where(_WORD_BYTE[:128], CharacterKind.LETTER, CharacterKind.BLANK)
    table[:128][_PUNCTUATION_BYTE[:128]] = CharacterKind.PUNCTUATION
    return table


def words(text: str, punctuation: Punctuation, *, one_digit: bool = False) -> FoundWords:
    """The words of a text; `one_digit`: 1999 is the same word as 2024 (CCNet, arXiv:1911.00359, its normalisation)."""
    content = folded(text).encode(errors="surrogatepass")
    values = _ONE_DIGIT if one_digit else _BYTE_VALUE
    found = [
        _words_of_chunk(content, first, stop, punctuation, values) for first, stop in _chunks(content)
    ]  # most documents have one
    return found[0] if len(found) == 1 else FoundWords(*map(np.concatenate, zip(*found, strict=True)))


def _chunks(content: bytes) -> Iterator[tuple[int, int]]:
    """Parts that end where a word does, if there is such a place."""
    first = 0
    while True:
        stop = first + _CHUNK
        if stop >= len(content):
            yield first, len(content)
            return
        blank = max(content.rfind(b" ", first, stop), content.rfind(b"\n", first, stop))
        if blank > first:
            stop = blank
        else:
            while content[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
        yield first, stop
        first = stop


class _Places(NamedTuple):
    """Of each byte of a text what stands there: bool [bytes]."""

    inside: npt.NDArray[np.bool_]
    """Something of a word."""
    begins: npt.NDArray[np.bool_]
    """The first byte of a character that is a word by itself."""
    single: npt.NDArray[np.bool_]
    """Such a character, or a mark of it."""
    removable: npt.NDArray[np.bool_]
    """Punctuation, and what is not seen."""


def _places_of_ascii(letters: npt.NDArray[np.uint8]) -> _Places:
    mark = _PUNCTUATION_BYTE[letters]
    return _Places(_WORD_BYTE[letters], mark, mark, mark)


def _places(text: str) -> _Places:
    points = _points(text)
    own = _kind_table()[points]
    follows = (own == CharacterKind.MARK) | (own == CharacterKind.UNSEEN)
    before = np.maximum.accumulate(np.where(follows, -1, np.arange(len(own))))  # whose mark it is
    kind = np.where(before < 0, np.uint8(CharacterKind.BLANK), own[before])
    single = np.isin(kind, _SINGLE)
    length = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    begins = np.zeros(int(length.sum()), bool)
    begins[(length.cumsum() - length)[single & ~follows]] = True
    removable = (single & (kind != CharacterKind.ALONE)) | (own == CharacterKind.UNSEEN)
    inside = kind != CharacterKind.BLANK
    return _Places(inside.repeat(length), begins, single.repeat(length), removable.repeat(length))


def _words_of_chunk(content: bytes, first: int, stop: int, punctuation: Punctuation, values: Hashes) -> FoundWords:
    letters = np.frombuffer(content, np.uint8, stop - first, first)
    of = _places_of_ascii(letters) if content.isascii() else _places(content[first:stop].decode(errors="surrogatepass"))
    places: npt.NDArray[np.int64] | None = None
    if punctuation is Punctuation.REMOVED and of.removable.any():
        places = np.flatnonzero(~of.removable)
        letters, of = letters[places], _Places(*(one[places] for one in of))
    if not len(letters):
        return FoundWords(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
    inside = of.inside
    starting = inside.copy()
    starting[1:] &= ~inside[:-1] | of.begins[1:] | (of.single[:-1] & ~of.single[1:])
    ending = inside.copy()
    ending[:-1] &= ~inside[1:] | starting[1:]
    starts, ends = np.flatnonzero(starting), np.flatnonzero(ending) + 1
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(values[letters] * _UP[: len(letters)], out=sums[1:])
    hashes = mixed((sums[ends] - sums[starts]) * _DOWN[starts])
    if places is not None:
        starts, ends = places[starts], places[ends - 1] + 1
    return FoundWords(hashes, starts + first, ends + first)


def runs(hashes: npt.NDArray[Any], length: int) -> Hashes:
    """[n - length + 1]; the hash of each run of so many words, from those of the n words."""
    count = len(hashes) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    up, down = _RUN_UP, _RUN_DOWN
    if len(hashes) > len(up):
        up, down = (_powers(base, len(hashes)) for base in (_WORD_BASE, pow(_WORD_BASE, -1, 2**64)))
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * up[: len(hashes)], out=sums[1:])
    return mixed((sums[length:] - sums[:count]) * down[:count])
