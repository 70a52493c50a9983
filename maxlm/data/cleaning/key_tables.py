"""A set of numbers of 64 bits in two arrays, in which many are looked up at once; in memory, or mapped from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.data.cleaning.hashed_words import Hashes


class KeyTable(NamedTuple):
    """Sorted numbers, and where those begin that have the same first bits: numbers that are hashes are spread evenly,
    so that a few comparisons find one."""

    keys: Hashes
    """[m], each once."""
    buckets: npt.NDArray[np.uint32]
    """[2^bits + 1]; the index in `keys` at which the numbers with each beginning start."""

    @classmethod
    def of(cls, keys: Hashes, spread: int = 1) -> KeyTable:
        """
        Args:
            keys: sorted, each once; fewer than 2^32.
            spread: buckets for each key, about: with more, what is not there is passed over faster.
        """
        bits = max(1, (spread * len(keys)).bit_length() - 1)
        counts = np.bincount((keys >> np.uint64(64 - bits)).astype(np.int64), minlength=1 << bits)
        return cls(keys, np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32))

    @property
    def nbytes(self) -> int:
        """Of both arrays."""
        return self.keys.nbytes + self.buckets.nbytes

    def find(self, wanted: Hashes) -> npt.NDArray[np.int64]:
        """The index of each in `keys`; -1: it is not there."""
        found = np.full(len(wanted), -1, np.int64)
        shift = np.uint64(64 - (len(self.buckets) - 1).bit_length() + 1)
        bucket = (wanted >> shift).astype(np.int64)
        at, stop = (self.buckets[bucket + i].astype(np.int64) for i in (0, 1))
        left = np.flatnonzero(at < stop)
        while len(left):
            hit = self.keys[at[left]] == wanted[left]
            found[left[hit]] = at[left[hit]]
            left = left[~hit]
            at[left] += 1
            left = left[at[left] < stop[left]]
        return found

    def save(self, folder: Path, name: str) -> None:
        """As `name.keys.npy` and `name.buckets.npy`."""
        np.save(folder / f"{name}.keys.npy", self.keys, allow_pickle=False)
        np.save(folder / f"{name}.buckets.npy", self.buckets, allow_pickle=False)

    @classmethod
    def mapped(cls, folder: Path, name: str) -> KeyTable:
        """What `save` wrote; its pages are read when they are needed, and shared by processes."""
        return cls(mapped(folder / f"{name}.keys.npy"), mapped(folder / f"{name}.buckets.npy"))


def mapped(file: Path) -> npt.NDArray[Any]:
    """An array that is read where it is needed.

    Raises:
        OSError, ValueError: it is not there, or no array.
    """
    return np.load(file, mmap_mode="r", allow_pickle=False)
