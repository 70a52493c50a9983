"""In which order the items of several sets, numbered through all of them, are drawn."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import grain
import numpy as np
import numpy.typing as npt


def endless(firsts: npt.NDArray[np.int64], weights: Sequence[float], seed: int) -> grain.MapDataset[int]:
    """Each set shuffled anew for every epoch, with epochs of its own; the sets alternate as `mix` says.

    Args:
        firsts: `[sets + 1]`: the number of each set's first item, and at the end that of all items.
        weights: of the sets.
        seed: of the shuffling.
    """
    return mix([one.seed(_seed_of(seed, i)).shuffle().repeat() for i, one in enumerate(ranges(firsts))], weights)


def ranges(firsts: npt.NDArray[np.int64]) -> list[grain.MapDataset[int]]:
    """The numbers of each set's items, in order."""
    return [grain.MapDataset.range(int(first), int(end)) for first, end in itertools.pairwise(firsts)]


def mix(sets: list[grain.MapDataset[int]], weights: Sequence[float]) -> grain.MapDataset[int]:
    """In proportion to their weights, which Grain rounds down to hundredths of the smallest, until one is used up."""
    return grain.MapDataset.mix(sets, weights) if len(sets) > 1 else sets[0]


def _seed_of(seed: int, source: int) -> int:
    """A 32-bit seed for one data set.

    Grain adds the epoch's number to the seed, so neighbouring seeds would give data sets each other's orders.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:4], "little")
