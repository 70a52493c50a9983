"""A short run: its loss falls on one batch, its checkpoint is what it was, and going on from that is going on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.checking.small_batches import small_batch
from maxlm.checking.verdicts import CheckRow
from maxlm.checkpoint.store import named_leaves
from maxlm.config import RunConfig
from maxlm.sharding import Layout
from maxlm.training.keeper import Keeper
from maxlm.training.objective import NextToken
from maxlm.training.spikes import Spikes
from maxlm.training.state import TrainState
from maxlm.training.step import Trainer, make_trainer

STEPS = 20
_AFTER = 2
_FALL = 0.02
"""Nats a token by which the loss falls at least; rounding moves it by a few thousandths."""

StateArrays = dict[str, npt.NDArray[Any]]


def going_on(config: RunConfig, layout: Layout) -> Iterator[CheckRow]:
    """On one device, with the config's optimizer at its peak learning rate."""
    with tempfile.TemporaryDirectory(prefix="maxlm-check-") as folder:
        config = replace(config, run_dir=folder)
        trainer = make_trainer(config, layout, NextToken(config, layout))
        step, state = trainer.start()
        losses: list[float] = []
        batch = small_batch(config, 0)
        for _ in range(STEPS):
            state, output = step(state, trainer.place(batch))
            losses.append(float(output.figures["loss"]))
        yield CheckRow.more_than(
            "loss falls on one batch", losses[0] - losses[-1], _FALL,
            f"nats: {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps",
        )  # fmt: skip
        yield from checkpointed(config, layout, trainer, step, state)


def checkpointed(
    config: RunConfig, layout: Layout, trainer: Trainer, step: jax.stages.Compiled, state: TrainState
) -> Iterator[CheckRow]:
    """Save a state, and go on from what is saved and without it; in `config.run_dir`, which is new."""
    warnings: list[str] = []

    def keeper() -> Keeper:
        return Keeper(config, layout, {"data": "", "tokenizer": None}, allow_change=(), warn=warnings.append)

    def go_on(state: TrainState) -> StateArrays:
        for number in range(_AFTER):
            state, _ = step(state, trainer.place(small_batch(config, 1 + number)))
        return arrays(state)

    with keeper() as saving:
        saving.restore(trainer.state)
        saving.begin()
        saving.save(state, STEPS, {}, Spikes(config, {}), {})
        saving.wait()
    before = arrays(state)
    undisturbed = go_on(state)
    with keeper() as reading:
        restored = reading.restore(trainer.state)
    assert restored is not None, "a step was saved"
    after = arrays(restored)
    said = f"; {warnings[0]}" if warnings else ""
    yield _same("checkpoint: restored = saved", after, before, said)
    yield _same(f"checkpoint: {_AFTER} steps after it", go_on(restored), undisturbed, said)


def arrays(state: TrainState) -> StateArrays:
    """A copy of everything in a state, by name."""
    return {name: np.array(leaf) for name, leaf in named_leaves(state).items()}


def _same(name: str, some: StateArrays, others: StateArrays, said: str) -> CheckRow:
    """Bit for bit."""
    differ = [key for key in {**some, **others} if not _equal(some.get(key), others.get(key))]
    first = f", first {differ[0]}" if differ else ""
    return CheckRow.at_most(name, len(differ), 0, f"of {len(others)} arrays, those with other bits{first}{said}")


def _equal(one: npt.NDArray[Any] | None, other: npt.NDArray[Any] | None) -> bool:
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
