"""How much of a document repeats itself: lines, paragraphs, and n-grams of words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from maxlm.config.cleaning.rule_steps import GopherRepetition
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.cleaning.text_features import TextFeatures, duplicates, features


class GopherRepetitionRules:
    """See `GopherRepetition`.

    Shares of n-grams are of the characters of words, and no word counts twice. The most frequent n-gram must occur
    twice to count; of several that occur equally often it is the longest. Duplicates are all but the first.
    """

    def __init__(self, config: GopherRepetition) -> None:
        top = (config.most_top_2gram, config.most_top_3gram, config.most_top_4gram)
        duplicate = (
            *(config.most_duplicate_5grams, config.most_duplicate_6grams, config.most_duplicate_7grams),
            *(config.most_duplicate_8grams, config.most_duplicate_9grams, config.most_duplicate_10grams),
        )
        self.limits = (
            Limit("duplicate lines", most=config.most_duplicate_lines),
            Limit("duplicate paragraphs", most=config.most_duplicate_paragraphs),
            Limit("characters of duplicate lines", most=config.most_duplicate_line_characters),
            Limit("characters of duplicate paragraphs", most=config.most_duplicate_paragraph_characters),
            *(Limit(f"most frequent {n}-gram", most=most) for n, most in enumerate(top, start=2)),
            *(Limit(f"duplicate {n}-grams", most=most) for n, most in enumerate(duplicate, start=5)),
        )

    def __call__(self, page: Page) -> Finding:
        return Finding(measured(self.limits, self._values(features(page.text))))

    @staticmethod
    def _values(found: TextFeatures) -> Iterator[float]:
        lines, line_characters = duplicates(found.lines)
        paragraphs, paragraph_characters = duplicates(found.paragraphs)
        yield from (lines, paragraphs, line_characters, paragraph_characters)
        for n, repeated in enumerate(repeated_ngrams(found.ids), start=2):
            if n > 10:
                return
            yield share(found, n, most_frequent(found, n, repeated) if n < 5 else repeated.starts[repeated.again])


class Repeated(NamedTuple):
    """The n-grams of a text that occur more than once."""

    starts: np.ndarray
    """Where they begin, in rising order: int32 [occurrences], counted in words."""
    names: np.ndarray
    """Equal for equal n-grams: int32 [occurrences], from 0 on, without gaps."""
    again: np.ndarray
    """Whether the same n-gram stood before: bool [occurrences]."""


def repeated_ngrams(ids: np.ndarray) -> Iterator[Repeated]:
    """Of n = 2, 3, and so on without end. An n-gram is two (n-1)-grams, both of which repeat if it does, so that each n
    looks only at what the one before it has left: little, in most texts.

    Args:
        ids: int32 [words], equal for equal words.
    """
    found = _repeated(np.arange(len(ids), dtype=np.int32), ids)
    while True:
        starts, names, _ = found
        follows = starts[1:] - starts[:-1] == 1
        keys = names[:-1][follows].astype(np.int64)
        keys *= int(names.max(initial=0)) + 1
        keys += names[1:][follows]
        found = _repeated(starts[:-1][follows], keys)
        yield found


def _repeated(starts: np.ndarray, keys: np.ndarray) -> Repeated:
    """Those whose key is another's too."""
    if not len(keys):
        return Repeated(starts, keys, np.empty(0, bool))
    order = keys.argsort(kind="stable").astype(np.int32)
    ordered = keys[order]
    first = np.empty(len(keys), bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    del ordered
    single = first.copy()
    single[:-1] &= first[1:]
    names = np.empty(len(keys), np.int32)
    names[order] = (first & ~single).cumsum(dtype=np.int32) - 1
    kept = np.empty(len(keys), bool)
    kept[order] = ~single
    again = np.empty(len(keys), bool)
    again[order] = ~first
    return Repeated(starts[kept], names[kept], again[kept])


def most_frequent(found: TextFeatures, n: int, repeated: Repeated) -> np.ndarray:
    """Where the most frequent n-gram begins: int32 [occurrences]. Of several the longest, then the first."""
    if not len(repeated.starts):
        return repeated.starts
    counts = np.bincount(repeated.names)
    often = counts[repeated.names] == counts.max()
    starts, names = repeated.starts[often], repeated.names[often]
    lengths = sum(found.lengths[found.ids[starts + i]] for i in range(n))
    return starts[names == names[lengths.argmax()]]


def share(found: TextFeatures, n: int, starts: np.ndarray) -> float:
    """Of the characters of words those in the n-grams that begin there, each once."""
    if not len(starts):
        return 0.0
    edges = np.zeros(len(found.ids) + 1, np.int32)
    edges[starts] += 1
    edges[starts + n] -= 1
    covered = edges[:-1].cumsum(dtype=np.int32) > 0
    return int(found.lengths[found.ids[covered]].sum()) / found.word_characters
