"""Guesses at what comes next in texts that are decoded, so that one step reads several tokens of each.

What is guessed decides how many tokens a step gives, and never which: see `maxlm.inference.step.came_true`.
"""

from __future__ import annotations

import weakref
from typing import Protocol, assert_never

from maxlm.config import PromptLookup, Speculation
from maxlm.inference.scheduler import Sequence


class Drafter(Protocol):
    """Where an engine's drafts come from."""

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """Ids that may follow each text in this order, at most so many of each; none where the number is 0."""
        ...


def drafter_of(speculation: Speculation | None) -> Drafter | None:
    """What the config asks for."""
    match speculation:
        case None:
            return None
        case PromptLookup():
            return Lookup(speculation)
        case _:
            assert_never(speculation)


class Lookup:
    """What followed the text's last tokens where they stood before; see `PromptLookup`."""

    def __init__(self, config: PromptLookup) -> None:
        self._config = config
        self._followed: weakref.WeakKeyDictionary[Sequence, Followed] = weakref.WeakKeyDictionary()

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """As `Drafter`."""
        return [self._of(sequence, most) if most else [] for sequence, most in asked]

    def _of(self, sequence: Sequence, most: int) -> list[int]:
        known = self._followed.setdefault(sequence, Followed(self._config.shortest, self._config.ngram))
        return known.guess(sequence.tokens, most)


class Followed:
    """Of a text that grows: where each run of tokens stood last, but for the end."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        """Run -> the place after it."""
        self._n = 0
        """Tokens that were looked at."""

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """What followed the longest run that the text ends with when it stood there last. Where that reaches the text's
        end, the guess goes on with itself: a text that repeats itself does so again.

        Args:
            tokens: of the text, as far as it was and more.
            most: of the guess.
        """
        for end in range(self._n, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._n = len(tokens)
        runs = (tuple(tokens[len(tokens) - size :]) for size in self._sizes if size <= len(tokens))
        start = next((self._after[run] for run in runs if run in self._after), None)
        if start is None:
            return []
        guess: list[int] = []
        for place in range(start, start + most):
            guess.append(tokens[place] if place < len(tokens) else guess[place - len(tokens)])
        return guess
