"""Lines, paragraphs and words of a text, found once for all the steps that look at it.

Words are those of word_splitting.py, as they are written. Datatrove takes a tokenizer's words, in which every comma is
one.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict

import numpy as np

from maxlm.data.cleaning.word_splitting import WordForm, split_words

_LETTER = re.compile(r"[^\W\d_]")
END_MARKS = tuple(".!?\"'\u2026\u201d\u2019\xbb\u3002\uff01\uff1f\uff1b\u300d\u300f")
"""A line that ends in one of them ends as a sentence does."""


class TextFeatures:
    """Each is found when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def stripped(self) -> list[str]:
        """All lines, without white space around them."""
        return [line.strip() for line in self.text.split("\n")]

    @functools.cached_property
    def lines(self) -> list[str]:
        """Those that are not empty."""
        return [line for line in self.stripped if line]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        """Runs of lines between empty ones."""
        return ["\n".join(run) for full, run in itertools.groupby(self.stripped, bool) if full]

    @functools.cached_property
    def _numbered(self) -> tuple[dict[str, int], np.ndarray]:
        numbers = defaultdict[str, int]()
        numbers.default_factory = numbers.__len__
        ids = np.fromiter(map(numbers.__getitem__, split_words(self.text, WordForm.WRITTEN)), np.int32)
        return dict(numbers), ids

    @property
    def vocabulary(self) -> dict[str, int]:
        """Each different word and its number, in the order in which they come."""
        return self._numbered[0]

    @property
    def ids(self) -> np.ndarray:
        """Of the words, their numbers: int32 [words]."""
        return self._numbered[1]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How often each different word occurs: int64 [vocabulary]."""
        return np.bincount(self.ids, minlength=len(self.vocabulary))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each different word: int64 [vocabulary]."""
        return np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))

    @functools.cached_property
    def word_characters(self) -> int:
        """Of all words together."""
        return int(self.lengths @ self.counts)

    @functools.cached_property
    def alphabetic_words(self) -> int:
        """Those with a letter."""
        has_letter = (_LETTER.search(word) is not None for word in self.vocabulary)
        return int(self.counts @ np.fromiter(has_letter, bool, len(self.vocabulary)))

    @functools.cached_property
    def duplicate_line_characters(self) -> float:
        """Share of characters in lines that stood before."""
        return duplicates(self.lines)[1]

    @functools.cached_property
    def punctuated_lines(self) -> float:
        """Share of lines that end in a mark of punctuation."""
        return sum(line.endswith(END_MARKS) for line in self.lines) / max(1, len(self.lines))


@functools.lru_cache(maxsize=1)
def features(text: str) -> TextFeatures:
    """Those of the latest text are kept: steps ask one after the other."""
    return TextFeatures(text)


def duplicates(parts: list[str]) -> tuple[float, float]:
    """Of parts of a text the share of those that stood before, and the share of their characters."""
    distinct = set(parts)
    again = len(parts) - len(distinct)
    characters = sum(map(len, parts))
    return again / max(1, len(parts)), (characters - sum(map(len, distinct))) / max(1, characters)
