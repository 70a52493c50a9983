"""Spikes of the loss, noticed in the figures of steps; and what a run passes over that goes back from one."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from maxlm.config import RunConfig, serialize
from maxlm.config.phases import Skip
from maxlm.training.finite import Diverged
from maxlm.training.step import StepOutput


class Spike(NamedTuple):
    """High steps in a row, as `Rollback` says."""

    first: int
    """Steps done before the first of them."""
    found: int
    """Steps done with the last of them."""
    wanted: int
    """Steps that the checkpoint to go back to should have done, at most."""
    what: str
    """In words."""


class Spikes:
    """Looks at each step's figures, once. Every rank sees the same figures, and so comes to the same end.

    What it remembers is a function of the steps before, and is in checkpoints: so a run that was killed notices what it
    would have noticed.
    """

    def __init__(self, config: RunConfig, meta: Mapping[str, Any]) -> None:
        """`meta`: of the checkpoint that the run goes on from; empty in a new run."""
        self.config, self._rule = config, config.train.rollback
        self._remember(meta)
        self._undone: int = meta.get("spikes", {}).get("undone", 0)
        self.skipped = tuple(Skip(*one) for one in meta.get("data", {}).get("skipped", ()))
        """What the run has passed over."""

    def _remember(self, meta: Mapping[str, Any]) -> None:
        memory = meta.get("spikes", {})
        window = 0 if self._rule is None else self._rule.window
        self._losses = deque[float](memory.get("losses", ()), maxlen=window)
        self._high: int = memory.get("high", 0)
        self._phase: int = memory.get("phase", 0)
        self._seen: int = meta.get("data", {}).get("next_batch", 0)

    @property
    def memory(self) -> dict[str, Any]:
        """For checkpoints, as JSON."""
        if self._rule is None:
            return {"undone": self._undone} if self._undone else {}
        losses = list(self._losses)
        return {"losses": losses, "high": self._high, "phase": self._phase, "undone": self._undone}

    def look(self, step: int, output: StepOutput, where: Callable[[int], str]) -> Spike | None:
        """At the figures of step number `step`, counted from 1; waits for them. None: no spike, or looked at before.
        `where` says what in a step was not finite first.

        Raises:
            Diverged: train.max_skipped_steps steps in a row were skipped, or there is a spike, and `train.rollback`
                does not go back, or has done so often enough.
        """
        if step <= self._seen:
            return None
        self._seen, in_row = step, int(output.skipped_in_row)
        gone = in_row >= self.config.train.max_skipped_steps
        if (rule := self._rule) is None:
            if gone:
                raise _diverged(self.config, output, step, in_row, where(step))
            return None
        phase = max((one.start for one in self.config.train.phases if one.start < step), default=0)
        if phase != self._phase:
            self._losses.clear()
            self._phase, self._high = phase, 0
        loss = float(output.figures["loss"])
        usual = statistics.median(self._losses) if len(self._losses) == rule.window else math.inf
        if in_row == 0 and math.isfinite(loss) and loss <= usual + rule.margin:
            self._losses.append(loss)
            self._high = 0
            return None
        self._high += 1
        if not gone and self._high < rule.patience:
            return None
        first = step - self._high
        what = f"steps {first + 1:,} to {step:,} had a loss more than {rule.margin:g} above {usual:.4g}, or not finite"
        if self._undone == rule.at_most:
            raise Diverged(
                f"{what}; the run has gone back from {self._undone} spikes already (train.rollback.at_most = "
                f"{rule.at_most}), the checkpoints before are as they were; lower optimizer.learning_rate, look at the "
                f"data of these steps, or raise train.rollback.at_most"
            )
        return Spike(first, step, first - rule.before, what)

    def go_back(self, spike: Spike, step: int, meta: Mapping[str, Any]) -> Skip:
        """The run is at `step` again, whose checkpoint has `meta`. What it passes over now: all that it has read or
        passed over since that step, to the end of the spike, and `Rollback.skip` batches."""
        assert self._rule is not None, "without it there are no spikes"
        self._remember(meta)
        self._undone += 1
        now = self.config.at(step).train
        tokens = self.config.tokens(spike.found) - self.config.tokens(step)
        for one in self.skipped:
            if one.start >= step:
                tokens += one.windows * self.config.at(one.start).train.seq_len
        skip = Skip(step, -(-tokens // now.seq_len) + self._rule.skip * now.batch_size)
        self.skipped = (*(one for one in self.skipped if one.start < step), skip)
        return skip


def _diverged(config: RunConfig, output: StepOutput, step: int, in_row: int, first: str) -> Diverged:
    """With a report in the run folder."""
    report = Path(config.run_dir) / "diverged.json"
    values = {name: str(value) for name, value in jax.device_get(output.figures).items()}
    facts = {
        "step": step,
        "skipped_in_row": in_row,
        "first_not_finite": first,
        "metrics_of_last_step": values,
        "config": serialize.to_dict(config),
    }
    where = f"the report is {report}"
    if jax.process_index() == 0:
        try:
            report.write_text(json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            where = f"the report {report} cannot be written ({error.strerror})"
    return Diverged(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']} or update norm "
        f"{values['update_norm']} was not finite for {in_row} steps in a row (train.max_skipped_steps = "
        f"{config.train.max_skipped_steps}); first not finite: {first}; parameters are as before them, {where}; "
        f"lower optimizer.learning_rate or look at the data from batch {step - in_row} on"
    )
