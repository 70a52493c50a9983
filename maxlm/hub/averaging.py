"""The mean of the parameters of several checkpoints, of one run or of several, and the averages that runs keep."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.checkpoint import retention
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reference import run_and_step
from maxlm.checkpoint.store import Deferred
from maxlm.config import CheckpointConfig, UserError
from maxlm.config.changes import changes
from maxlm.hub.converting import Opened, open_run, write_run
from maxlm.models import declared

Layer = Callable[[shapes.Array, int | None], npt.NDArray[Any]]
"""As `Opened.layer`."""


def checkpoints(runs: Sequence[str], *, steps: Sequence[int], last: int | None) -> list[Path]:
    """The folders of the checkpoints that are meant: of each run those of `steps`, the newest `last`, or the newest; a
    run may be a checkpoint itself.

    Raises:
        UserError: one of them is not there.
    """
    found = []
    for place in runs:
        run, step = run_and_step(place)
        there, folder = retention.finished(run / "checkpoints"), run / "checkpoints"
        if not there:
            raise UserError(
                f"{run}: no finished checkpoint; name a run_dir that has saved, or RUN_DIR/checkpoints/STEP"
            )
        if step is not None and (steps or last):
            raise UserError(f"{place} is one checkpoint, and --steps and --last choose several; name {run}")
        wanted = [step] if step is not None else list(steps) if steps else there[-(last or 1) :]
        if missing := [one for one in wanted if one not in there]:
            raise UserError(f"{run}: has no checkpoint of step {missing[0]}; there are {_listed(there)}")
        if last is not None and len(there) < last:
            raise UserError(
                f"{run}: --last {last}, and there are only checkpoints of {_listed(there)}; a run keeps more with "
                "checkpoint.keep_last"
            )
        found += [folder / str(one) for one in wanted]
    return found


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def write_mean(places: Sequence[Path], out: Path, *, weights: Sequence[float] = (), ema: bool = False) -> None:
    """A run folder whose parameters are the mean of those of several checkpoints, each number summed in float64.

    The rest of it, such as its config, is the first one's; its step is the latest.

    Args:
        places: RUN_DIR/checkpoints/STEP.
        out: new.
        weights: of each, divided by their sum; empty: equal ones.
        ema: take the averages that their optimizers kept (`optimizer.average`) in place of the parameters.

    Raises:
        UserError: they are of different models or tokenizers, quantised, or adapters; they keep no average; or nothing
            can be written.
    """
    opened = [open_run(place) for place in places]
    for place, one in zip(places, opened, strict=True):
        _refuse_other(places[0], opened[0], place, one)
    layers = [_kept_average(place, one) if ema else one.layer for place, one in zip(places, opened, strict=True)]
    shares = [weight / math.fsum(weights) for weight in weights] or [1 / len(layers)] * len(layers)

    def mean(array: shapes.Array, number: int | None) -> npt.NDArray[np.float32]:
        parts = (
            share * np.asarray(layer(array, number), np.float64) for share, layer in zip(shares, layers, strict=True)
        )
        return np.asarray(functools.reduce(np.add, parts), np.float32)

    def deferred(array: shapes.Array) -> Deferred:
        stacked, read = array.dims[0] == "layers", functools.partial(mean, array)
        return Deferred(shape=array.shape, dtype=np.dtype(np.float32), by_layer=stacked, read=read)

    write_run(
        dataclasses.replace(opened[0], step=max(one.step for one in opened)),
        out,
        parameters=jax.tree.map(deferred, declared(opened[0].model)),
        more={"mean_of": dict(zip(map(str, places), shares, strict=True)), "ema": ema},
    )


def _refuse_other(first_place: Path, first: Opened, place: Path, one: Opened) -> None:
    if one.quantised is not None:
        raise UserError(f"{place}: its weights are quantised; take the run that it was made of")
    if one.model.adapter is not None:
        raise UserError(
            f"{place}: has an adapter; merge it (python -m maxlm.convert --from run:{one.place} --to hf:DIR), and "
            "take a run that starts from that"
        )
    if (change := next(changes(first.model, one.model, "model."), None)) is not None:
        raise UserError(
            f"{place}: another model than {first_place}: {change}; a mean is of checkpoints of the same model"
        )
    assert first.tokenizer is not None and one.tokenizer is not None
    if first.tokenizer.fingerprint != one.tokenizer.fingerprint:
        raise UserError(
            f"{place}: another tokenizer ({one.tokenizer.fingerprint[:12]}...) than {first_place} "
            f"({first.tokenizer.fingerprint[:12]}...); a mean is of checkpoints with the same"
        )


def _kept_average(place: Path, opened: Opened) -> Layer:
    """That of a checkpoint's optimizer; parameters that were not trained are as they are."""
    with Checkpointer(place.parent, CheckpointConfig()) as saved:
        saved.verify(step := int(place.name), skip=("params",))  # whoever opened the run has looked at those
        stored = saved.record(step).items["optimizer"]
        names = {
            array.name: name
            for array in shapes.arrays(opened.model)
            for name in stored
            if name.endswith(f"/average/{array.name}")
        }
        if not names:
            raise UserError(
                f"{place}: keeps no average of parameters; train with optimizer.average, or leave out --ema"
            )
        averages = saved.deferred_parameters(step, names.values(), item="optimizer")

    def layer(array: shapes.Array, number: int | None) -> npt.NDArray[Any]:
        if array.name not in names:
            return opened.layer(array, number)
        return averages[names[array.name]].read(number)

    return layer
