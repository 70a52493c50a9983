"""Words as numbers of 64 bits, and runs of words: arithmetic of their bytes, the same on every machine.

A word is what stands between white space and punctuation, in small letters; where words are not parted by blanks
(Chinese characters, kana), a character is one. All of it is done on arrays: Python sees no single word.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_CHUNK = 1 << 16  # bytes at a time: the arrays stay in the cache, and a huge document takes no huge arrays
_ASCII_PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_BLANK = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_PUNCTUATION = re.compile(
    "[\xa1-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb-\xbf\xd7\xf7\u0589\u05be\u060c\u061b\u061f\u06d4\u0964\u0965"
    "\u200b-\u200f\u2010-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u206f\u3001-\u3004\u3008-\u3020\u3030\u30fb"
    "\ufe10-\ufe6f\ufeff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_PUNCTUATION_BYTE = np.zeros(256, bool)
_PUNCTUATION_BYTE[list(_ASCII_PUNCTUATION)] = True
_WORD_BYTE = np.ones(256, bool)
_WORD_BYTE[:33] = _WORD_BYTE[127] = False


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
    return small if small.isascii() else _PUNCTUATION.sub(".", _BLANK.sub(" ", small))


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


def _words_of_chunk(content: bytes, first: int, stop: int, punctuation: Punctuation, values: Hashes) -> FoundWords:
    letters = np.frombuffer(content, np.uint8, stop - first, first)
    places: npt.NDArray[np.int64] | None = None
    if punctuation is Punctuation.REMOVED and (mark := _PUNCTUATION_BYTE[letters]).any():
        places = np.flatnonzero(~mark)
        letters = letters[places]
    if not len(letters):
        return FoundWords(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
    inside = _WORD_BYTE[letters]
    alone = _PUNCTUATION_BYTE[letters] if punctuation is Punctuation.WORDS else np.zeros(len(letters), bool)
    begins, belongs = alone, alone
    if not content.isascii():
        three, four = (letters >= 0xE3) & (letters <= 0xE9), letters == 0xF0
        if three.any() or four.any():
            begins, belongs = alone | three | four, alone | three | four
            for lead, length in ((three, 3), (four, 4)):
                for i in range(1, length):
                    belongs[i:] |= lead[:-i]
    starting = inside.copy()
    starting[1:] &= ~inside[:-1] | begins[1:] | (belongs[:-1] & ~belongs[1:])
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
