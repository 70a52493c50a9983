"""A phase that begins early: once the held-out loss is back where it was before the phase that is under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from maxlm.config import RunConfig
from maxlm.training.state import TrainState


class Recovery:
    """Measures as `Recovered` says, and finds the step at which the next phase begins.

    Every rank measures the same, and so comes to the same end. What it remembers is in checkpoints, as are the starts
    of phases that began early: a run that was killed decides what it would have.
    """

    def __init__(
        self, config: RunConfig, meta: Mapping[str, Any], held_out: Callable[[RunConfig, int, TrainState], float]
    ) -> None:
        """
        Args:
            config: with the starts that phases have by now.
            meta: of the checkpoint that the run goes on from; empty in a new run.
            held_out: the loss by a config without phases, of the state after so many steps.
        """
        self.config, self._held_out = config, held_out
        self.remember(meta)

    def remember(self, meta: Mapping[str, Any]) -> None:
        """What the checkpoint has of it, to which the run has gone back."""
        self.memory: dict[str, Any] = meta.get("recovery", {})
        """For checkpoints, as JSON: when the phase began that is under way, the loss before it, and in how many batches
        that was measured, however many a run that goes on measures else."""

    def begins(self, step: int, state: TrainState, say: Callable[[str], None]) -> None:
        """Measure what is to be come back to, if a phase begins here and the one after it may be early."""
        starts = [phase.start for phase in self.config.train.phases]
        if step not in starts or not self._next_is_early(starts.index(step) + 1):
            return
        before = self.config.at(step - 1)
        loss = self._held_out(before, step, state)
        self.memory = {"began": step, "loss": loss, "batches": before.train.eval_batches}
        say(f"held-out loss before the phase of step {step:,}: {loss:.4f}")

    def asks(self, step: int) -> bool:
        """Whether it measures after so many steps."""
        found = self._next(step)
        if found is None or self.memory.get("began") != found[0]:
            return False
        began, number = found
        early = self.config.train.phases[number].early
        return early is not None and step > began and (step - began) % early.every == 0

    def look(self, step: int, state: TrainState, say: Callable[[str], None]) -> RunConfig | None:
        """Measure, as it `asks`: the config in which the next phase begins here, if it is to."""
        found = self._next(step)
        assert found is not None, "it has asked"
        began, number = found
        phases = self.config.train.phases
        before, early = self.config.at(began - 1), phases[number].early
        assert early is not None, "it has asked"
        as_before = dataclasses.replace(
            before,
            model=self.config.at(began).model,
            train=dataclasses.replace(before.train, eval_batches=self.memory["batches"]),
        )
        loss, wanted = self._held_out(as_before, step, state), self.memory["loss"] + early.tolerance
        recovered = loss <= wanted
        say(
            f"held-out loss after step {step:,}, measured as before step {began:,}: {loss:.4f}; the next phase "
            f"{'begins' if recovered else f'waits for {wanted:.4f}'}"
        )
        if not recovered:
            return None
        moved = (*phases[:number], dataclasses.replace(phases[number], start=step), *phases[number + 1 :])
        train = dataclasses.replace(self.config.train, phases=moved)
        return dataclasses.replace(self.config, train=train)

    def _next(self, step: int) -> tuple[int, int] | None:
        """When the phase began that is under way, and the number of the one that comes; None: there are not both."""
        phases = self.config.train.phases
        number = next((i for i, phase in enumerate(phases) if phase.start > step), 0)
        return (phases[number - 1].start, number) if number else None

    def _next_is_early(self, number: int) -> bool:
        phases = self.config.train.phases
        return number < len(phases) and phases[number].early is not None
