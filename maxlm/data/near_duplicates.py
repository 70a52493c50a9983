"""Texts that say nearly the same, by ROUGE-L: the words that two texts have in common in the same order."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())


def rouge_l(one: list[str], other: list[str]) -> float:
    """The F-measure of ROUGE-L (Lin 2004): 2 L / (m + n), where L is the length of the longest common subsequence of
    the m and n words. 1 for equal texts, and 0 if one has no words."""
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0  # of the row above, one to the left
        for n, also in enumerate(other, 1):
            above = row[n]
            row[n] = before + 1 if word == also else max(above, row[n - 1])
            before = above
    return 2 * row[-1] / (len(one) + len(other))


class Novelty:
    """Texts that are each unlike all that came before it."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: of `rouge_l`; from there on texts are nearly the same."""
        self._threshold = threshold
        self._known: list[tuple[list[str], Counter[str]]] = []

    def add(self, text: str) -> bool:
        """Whether it is unlike all others; then it is known from now on."""
        new = words(text)
        counts = Counter(new)
        for known, known_counts in self._known:
            # What two texts share in any order is an upper bound, and much faster.
            if 2 * (counts & known_counts).total() < self._threshold * (len(new) + len(known)):
                continue
            if rouge_l(new, known) >= self._threshold:
                return False
        self._known.append((new, counts))
        return True
