"""Plans of a step as the rows that the device reads, and which of its answers are whose."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.inference.scheduler import Sequence, StepPlan
from maxlm.inference.step import Branches, StepRows


@dataclass(frozen=True)
class Read:
    """A scored row of a step, or several that are drafts of one text."""

    sequence: Sequence
    row: int
    sample: bool
    """Tokens were drawn; else one of the prompt was scored."""
    steps: int
    """Tokens drawn at most, one after the other."""
    drafts: tuple[int, ...] = ()
    """What the rows after this one read."""
    parents: tuple[int, ...] = ()
    """Of each draft, the one that it follows; -1: this row."""

    def places(self, tokens: Any) -> list[tuple[int, int]]:
        """Step and row of each token that is the text's, of int [n, R] that were drawn."""
        if not self.drafts:
            return [(step, self.row) for step in range(self.steps)]
        nodes, found = {(parent, draft): n for n, (parent, draft) in enumerate(self._both)}, [-1]
        while (node := nodes.get((found[-1], int(tokens[0, self.row + 1 + found[-1]])))) is not None:
            found.append(node)
        return [(0, self.row + 1 + node) for node in found]

    @property
    def _both(self) -> Iterable[tuple[int, int]]:
        return zip(self.parents, self.drafts, strict=True)


def in_place(places: list[tuple[int, int]]) -> int:
    """Of the drafts that came true, how many have their keys where the text has them: those of a tree's other paths
    are read again."""
    (_, first), *drafts = places
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1][1], enumerate(drafts, first + 1)))


def fill(
    rows: StepRows, plan: StepPlan, *, row: int, scored: int, slot: int, parents: tuple[int, ...] | None = None
) -> list[Read]:
    """Write what a shard's plan reads into its part of the rows, and tell what is to be read of the answer.

    Args:
        rows: numpy arrays, of all shards, that read nothing yet.
        plan: of the shard.
        row: its first one.
        scored: its first scored one.
        slot: its first slot.
        parents: of drafts that may stand in a tree, as `EngineConfig.parents`.
    """
    reads, places = [], dict[Sequence, int]()
    for chunk in plan.chunks:
        sequence, end = chunk.sequence, row + chunk.count
        after = end + len(chunk.drafts)
        rows.slots[row:after] = slot + sequence.slot
        rows.positions[row:after] = range(chunk.first, chunk.first + after - row)
        if rows.branches is not None:
            for node in rows.branches.nodes[:2]:
                node[row:after] = rows.positions[row:after]
            rows.branches.nodes.path[row:after] = 1
        wanted: list[int] = []
        if sequence.request.prompt_logprobs is not None:  # of the token after each that is read
            wanted = list(range(row, row + min(chunk.count, len(sequence.request.prompt) - 1 - chunk.first)))
        for one in wanted:
            rows.scored[scored] = one
            reads.append(Read(sequence, scored, False, 1))
            scored += 1
        if chunk.samples:
            n = 1 + len(chunk.drafts)
            rows.scored[scored : scored + n], rows.samples[scored : scored + n] = range(end - 1, after), True
            before = tuple(range(-1, len(chunk.drafts) - 1)) if parents is None else parents[: len(chunk.drafts)]
            if rows.branches is not None:
                _branch(rows.branches, rows.positions, before, row=end - 1, scored=scored)
            if sequence.leader is None:
                steps = min(plan.n_steps, sequence.end - sequence.length)
                reads.append(Read(sequence, scored, True, steps, chunk.drafts, before))
                places[sequence] = scored
            else:  # a twin's stand behind
                rows.follows[scored] = places[sequence.leader]
            scored += n
        if chunk.drafts:
            rows.drafts[end:after] = chunk.drafts
        row = after
    return reads


def _branch(
    branches: Branches, positions: npt.NDArray[np.int32], parents: tuple[int, ...], *, row: int, scored: int
) -> None:
    """Make a tree of the drafts behind a row, of whose places in the cache each has one of its own."""
    first = positions[row]
    paths, depths = [1], [0]
    for n, parent in enumerate(parents, start=1):
        paths.append(paths[parent + 1] | 1 << n)
        depths.append(depths[parent + 1] + 1)
        branches.parents[scored + n] = scored + 1 + parent
    end = row + len(paths)
    positions[row:end] = first + np.array(depths)
    branches.nodes.first[row:end] = first
    branches.nodes.path[row:end] = np.array(paths, np.uint32).view(np.int32)
