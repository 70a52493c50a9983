"""Clusters of what is joined by pairs, each known by its smallest member, in whatever order the pairs come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class SmallestMembers:
    """Union-find over 0 to n - 1, in 8 bytes for each."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def join(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> None:
        """Join each a[i] with b[i]."""
        while len(a):
            a, b = self.of(a), self.of(b)
            apart = a != b
            a, b = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            np.minimum.at(self._parent, b, a)  # of several smaller ones the smallest; the others join in the next round
            while np.any((above := self._parent[self._parent[b]]) != self._parent[b]):
                self._parent[b] = above  # chains shrink by half each time

    def of(self, members: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The smallest member of the cluster of each."""
        found = self._parent[members]
        while np.any((above := self._parent[found]) != found):
            found = above
        self._parent[members] = found
        return found

    def together(self) -> npt.NDArray[np.int64]:
        """Members of clusters of two or more, in their order."""
        alone = self._parent == np.arange(len(self._parent))
        alone[self._parent[~alone]] = False
        return np.flatnonzero(~alone)
