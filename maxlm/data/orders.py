"""In which order the items of several sets, numbered through all of them, are drawn."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
import numpy.typing as npt

from maxlm.config import Stretch

_LABEL = 1 << 40
"""More than any number of items that are drawn."""


def endless(
    firsts: npt.NDArray[np.int64], weights: Sequence[float], seed: int, behind: Sequence[int] | None = None
) -> grain.MapDataset[int]:
    """Each set shuffled anew for every epoch, with epochs of its own; the sets alternate as `mix` says.

    Args:
        firsts: `[sets + 1]`: the number of each set's first item, and at the end that of all items.
        weights: of the sets.
        seed: of the shuffling.
        behind: items of each set's own order that are left out; None: none.
    """
    sets = [one.seed(_seed_of(seed, i)).shuffle().repeat() for i, one in enumerate(ranges(firsts))]
    if behind is not None and any(behind):
        sets = [one[n:] for one, n in zip(sets, behind, strict=True)]
    return mix(sets, weights)


def ranges(firsts: npt.NDArray[np.int64]) -> list[grain.MapDataset[int]]:
    """The numbers of each set's items, in order."""
    return [grain.MapDataset.range(int(first), int(end)) for first, end in itertools.pairwise(firsts)]


def mix(sets: Sequence[grain.MapDataset[int]], weights: Sequence[float]) -> grain.MapDataset[int]:
    """In proportion to their weights, which Grain rounds down to hundredths of the smallest, until one is used up. One
    of weight 0 is left out."""
    there = [(one, weight) for one, weight in zip(sets, weights, strict=True) if weight]
    sets, weights = zip(*there, strict=True)
    return grain.MapDataset.mix(sets, weights) if len(sets) > 1 else sets[0]


def proportions(weights: Sequence[float]) -> list[int]:
    """Of how many windows of each set a round of the mixture consists, as Grain rounds the weights."""
    hundredths = 100 / min(weight for weight in weights if weight)
    return [int(weight * hundredths) for weight in weights]


class Onward(NamedTuple):
    """Where a mixture is to be read on."""

    behind: tuple[int, ...]
    """Windows of each set's own order that were read before this mixture began."""
    drawn: int
    """Windows of this mixture that were read."""


def place_after(past: Sequence[Stretch], seq_len: int, weights: Sequence[float]) -> Onward:
    """Where windows of `seq_len` tokens, drawn by `weights`, begin after those of the past.

    As long as length and weights stay, nothing happens to the order. Where one of them changes, the mixture begins
    anew, and each set goes on in its own order of windows of the new length, at the first that begins no earlier, in
    tokens, than where it was: so a set that is half read is half read, and its epochs end where they would have.
    """
    tokens, windows = [0] * len(weights), 0
    mixtures = [(one.seq_len, one.weights) for one in past] + [(seq_len, tuple(weights))]
    numbers = [one.windows for one in past] + [0]
    for i, ((T, shares), n) in enumerate(zip(mixtures, numbers, strict=True)):
        if i and mixtures[i - 1] != (T, shares):
            length, before = mixtures[i - 1]
            read = zip(tokens, drawn_of_each(windows, before), strict=True)
            tokens, windows = [_up(t, length) + count * length if count else t for t, count in read], 0
        windows += n
    return Onward(tuple(_up(t, seq_len) // seq_len for t in tokens), windows)


def drawn_of_each(n: int, weights: Sequence[float]) -> list[int]:
    """How many of the first n items of a mixture are of each set."""
    sets = [grain.MapDataset.range(i * _LABEL, (i + 1) * _LABEL) for i in range(len(weights))]
    order, counts = mix(sets, weights), dict[int, int]()
    for k in range(n - 1, -1, -1):  # the last item of each
        which, number = divmod(order[k], _LABEL)
        counts.setdefault(which, number + 1)
        if len(counts) == sum(map(bool, weights)):
            break
    return [counts.get(i, 0) for i in range(len(weights))]


def _up(tokens: int, length: int) -> int:
    """To a multiple of the length."""
    return -(-tokens // length) * length


def _seed_of(seed: int, source: int) -> int:
    """A 32-bit seed for one data set.

    Grain adds the epoch's number to the seed, so neighbouring seeds would give data sets each other's orders.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:4], "little")
