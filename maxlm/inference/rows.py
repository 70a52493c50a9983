"""Plans of a step as the rows that the device reads, and which of its answers are whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maxlm.inference.scheduler import Sequence, StepPlan
from maxlm.inference.step import StepRows


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

    def places(self, tokens: Any) -> list[tuple[int, int]]:
        """Step and row of each token that is the text's, of int [n, R] that were drawn."""
        if not self.drafts:
            return [(step, self.row) for step in range(self.steps)]
        wrong = (n for n, draft in enumerate(self.drafts) if tokens[0, self.row + n] != draft)
        return [(0, self.row + n) for n in range(next(wrong, len(self.drafts)) + 1)]


def fill(rows: StepRows, plan: StepPlan, *, row: int, scored: int, slot: int) -> list[Read]:
    """Write what a shard's plan reads into its part of the rows, and tell what is to be read of the answer.

    Args:
        rows: numpy arrays, of all shards, that read nothing yet.
        plan: of the shard.
        row: its first one.
        scored: its first scored one.
        slot: its first slot.
    """
    reads = []
    for chunk in plan.chunks:
        sequence, end = chunk.sequence, row + chunk.count
        after = end + len(chunk.drafts)
        rows.slots[row:after] = slot + sequence.slot
        rows.positions[row:after] = range(chunk.first, chunk.first + after - row)
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
            steps = min(plan.n_steps, sequence.end - sequence.length)
            reads.append(Read(sequence, scored, True, steps, chunk.drafts))
            scored += n
        if chunk.drafts:
            rows.drafts[end:after] = chunk.drafts
        row = after
    return reads
