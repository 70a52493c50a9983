"""Words that a text must have, and how far a text is from having all of them.

A word is some runs of ids, one of which must stand in the text: its spellings. Words may share ids: "no" and "one" both
stand in "none" if their ids do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from maxlm.config import UserError
from maxlm.data.tokenizers import Tokenizer
from maxlm.inference.settings import MAX_TOLD

MAX_WORDS = 8
"""The number of states grows as 2 to the power of this."""

Spelling = tuple[int, ...]


class Had(NamedTuple):
    """What counts of a text that has come so far."""

    words: frozenset[int] = frozenset()
    """Those that it has, by number."""
    tail: tuple[int, ...] = ()
    """The longest end of it with which a spelling of another word begins."""


class ForcedWords:
    """Of one search. Each question is answered once and remembered."""

    def __init__(self, words: Sequence[Sequence[Spelling]], ends: Sequence[int] = ()) -> None:
        """
        Args:
            words: the spellings of each, as ids of new tokens.
            ends: ids that end a text. A spelling with one of them cannot stand in it.

        Raises:
            UserError: a word cannot come, or there are too many.
        """
        if len(words) > MAX_WORDS:
            raise UserError(f"force has {len(words)} words; use at most {MAX_WORDS}")
        self._spellings: list[tuple[int, Spelling]] = []
        for number, word in enumerate(words):
            possible = {tuple(one) for one in word if one and not set(one) & set(ends)}
            if not possible:
                raise UserError(f"force: word {number} has no ids that may stand within a text; leave it out")
            # One that holds another of the same word asks for more than need be.
            least = [one for one in possible if not any(_holds(one, other) for other in possible if other != one)]
            self._spellings += [(number, one) for one in sorted(least)]
        if len(self._spellings) > MAX_TOLD:
            raise UserError(f"force: {len(self._spellings)} spellings; use at most {MAX_TOLD}")
        self._all = frozenset(range(len(words)))
        self._missing: dict[Had, int] = {}
        self._after: dict[tuple[Had, int], Had] = {}

    def after(self, had: Had, token: int) -> Had:
        """With one more token."""
        if (had, token) not in self._after:
            text = (*had.tail, token)
            words = had.words | {number for number, one in self._spellings if text[-len(one) :] == one}
            overlaps = [_overlap(text, one, whole=True) for number, one in self._spellings if number not in words]
            self._after[had, token] = Had(words, text[len(text) - max(overlaps, default=0) :])
        return self._after[had, token]

    def missing(self, had: Had) -> int:
        """The fewest tokens after which a text has all words.

        Of the spellings that a shortest way has, in their order and without those that lie in others, each begins as
        early as the one before lets it. So the least is that over the next spelling, which is then written out.
        """
        if had not in self._missing:
            ways = []
            for number, one in self._spellings:
                if number not in had.words:
                    within = {other for other, part in self._spellings if _holds(one, part)}
                    rest = self.missing(Had(had.words | within, one))
                    ways.append(len(one) - _overlap(had.tail, one) + rest)
            self._missing[had] = min(ways, default=0)
        return self._missing[had]

    def nearer(self, had: Had) -> list[int]:
        """The ids after which one token less is missing; none where nothing is."""
        ids = {one[_overlap(had.tail, one)] for number, one in self._spellings if number not in had.words}
        return sorted(i for i in ids if self.missing(self.after(had, i)) < self.missing(had))


def spellings(tokenizer: Tokenizer, word: str) -> list[Spelling]:
    """The ids of a word, with a space before it and without, at the beginning of a text and within one.

    Raises:
        UserError: it has none.
    """
    line = tokenizer.encode("\n")  # a tokenizer may put a space before all texts, and then none within them
    found = []
    for text in (word, f" {word}"):
        within = tokenizer.encode(f"\n{text}")
        found += [tokenizer.encode(text), within[len(line) :] if within[: len(line)] == line else []]
    spelt = [tuple(ids) for ids in found if word and word in tokenizer.decode(ids)]
    if not spelt:
        raise UserError(f"force = {word!r} has no tokens that spell it; leave it out")
    return spelt


def shares(places: int, counts: Sequence[int]) -> list[int]:
    """Places for groups that could fill so many each: as equal as may be, with what is left over for the first ones."""
    given = [0] * len(counts)
    while places and (open_ := [i for i, count in enumerate(counts) if given[i] < count]):
        for i in open_[:places]:
            given[i] += 1
        places -= min(places, len(open_))
    return given


def _holds(text: Spelling, part: Spelling) -> bool:
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


def _overlap(text: tuple[int, ...], word: Spelling, *, whole: bool = False) -> int:
    """Spelling of the longest end of a text that begins a word; not all of the word, unless `whole`."""
    most = min(len(text), len(word) if whole else len(word) - 1)
    return next((n for n in range(most, 0, -1) if text[-n:] == word[:n]), 0)
