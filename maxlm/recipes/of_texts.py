"""What tasks about whole texts share: their batches, and what is measured of those that are held out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import Conversations, DataConfig, Purpose, RunConfig, UserError
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.prepare import ensure_prepared
from maxlm.data.shards import CHAT, Split, open_prepared
from maxlm.evaluation.judgements import TextArrays
from maxlm.inference.load import LoadedRun
from maxlm.processes.joining import on_rank_0
from maxlm.recipes import pretrain
from maxlm.recipes.taught import taught
from maxlm.sharding import Layout
from maxlm.training.loop import Measure, Recipe
from maxlm.training.objective import Batch, Params
from maxlm.training.state import TrainState
from maxlm.training.text_objective import TextObjective

JudgeTexts = Callable[[TextArrays], Mapping[str, Any]]
"""Figures of held-out texts, beside the means of the loss: numbers, or lists of points [x, y] for the report."""
Make = Callable[[RunConfig, int], TextObjective]
"""The objective of a config, for so many texts in a row."""


class Splits(NamedTuple):
    """Batches with as many texts in a row of either."""

    train: Batches
    held_out: Batches | None

    @property
    def texts(self) -> int:
        assert self.train.texts is not None
        return self.train.texts


def purposes(data: DataConfig) -> set[Purpose | None]:
    """What the folders were prepared for; None: to be running text.

    Raises:
        UserError: a folder is not finished or damaged.
    """
    opened = [open_prepared(Path(one.path), verify=False).info.prepare.documents for one in data.datasets]
    return {documents.purpose if isinstance(documents, Conversations) else None for documents in opened}


def open_splits(config: RunConfig, purpose: Purpose) -> Splits:
    """Prepares the data first, if the config says how and nobody has. Held-out texts, if `train.eval_batches` is not 0.

    Raises:
        UserError: the data is not there, is damaged, too small, or was prepared for another purpose.
    """
    on_rank_0("prepare the data", lambda: ensure_prepared(config.data))
    train = config.train
    open_split = lambda split: open_batches(
        config.data,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        split=split,
        purpose=purpose,
        virtual=config.model.virtual_tokens,
    )
    found = Splits(open_split(Split.TRAIN), None if train.eval_batches == 0 else open_split(Split.VALIDATION))
    opened = [split for split in found if split is not None]
    most = max(split.texts or 0 for split in opened)
    for split in opened:
        split.texts = most
    return found


def recipe_of_texts(
    config: RunConfig,
    layout: Layout,
    splits: Splits,
    make: Make,
    judge: JudgeTexts,
    *,
    frozen: Any = None,
) -> Recipe[LoadedRun]:
    """As of pre-training, with another objective and other figures of held-out texts.

    Raises:
        UserError: as of pre-training.
    """
    objective = make(config, splits.texts)
    without_loss = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=0))
    talks = any((Path(one.path) / CHAT).is_dir() for one in config.data.datasets)
    made = pretrain.recipe_on(
        without_loss,
        layout,
        objective,
        splits.train,
        taught(config.data, splits.train.tokenizer) if talks else None,
    )
    loaded = lambda step, state: dataclasses.replace(made.outcome(step, state), config=config)
    measures: tuple[Measure, ...] = made.measures
    if splits.held_out is not None:
        measures = (HeldOutRecords(config, layout, make, splits.held_out, judge), *measures)
    return dataclasses.replace(made, measures=measures, frozen=frozen, outcome=loaded)


def measure_held_out(
    recipe: Recipe[LoadedRun], parameters: Params, step: int, saved: dict[str, Any] | None
) -> tuple[Mapping[str, Any], str]:
    """The figures of held-out texts for these parameters, and how the console says them. `saved`: what the step's
    checkpoint says of what is frozen.

    Raises:
        UserError: the reference cannot be read; or there is nothing held out.
    """
    [measure] = [one for one in recipe.measures if isinstance(one, HeldOutRecords)]
    frozen = None if recipe.frozen is None else recipe.frozen(recipe.objective.frozen, saved)[0]
    nothing = jnp.int32(0)
    state = TrainState(
        step=nothing, parameters=parameters, optimizer=None, skipped=nothing, skipped_in_row=nothing, frozen=frozen
    )
    row = measure(step, state)
    return row, measure.line(step, row)


class HeldOutRecords:
    """The loss, its figures and what a judge makes of each text, over the validation split or its first batches, as
    `train.eval_batches` says, every `train.eval_every` steps."""

    name = "eval"

    def __init__(self, config: RunConfig, layout: Layout, make: Make, batches: Batches, judge: JudgeTexts) -> None:
        train = config.train
        self.every, self._batches, self._judge = train.eval_every, batches, judge
        self._tokens_per_step = train.batch_size * train.seq_len
        assert batches.n_batches is not None and batches.texts is not None, "a validation split has an end"
        self._n_batches = train.held_out_batches(batches.n_batches)
        self._sharding = layout.sharding(layout.activation("batch", "seq"))
        # Nothing is kept for a backward pass, so that the batch need not be cut; a pipeline cuts it itself.
        at_once = dataclasses.replace(train, micro_batches=1) if layout.mesh.shape["stage"] == 1 else train
        objective = make(dataclasses.replace(config, train=at_once), batches.texts)

        def measure(params: Params, frozen: Any, batch: Batch) -> Any:
            sums = objective.loss(params, frozen, batch, objective.counted(params, frozen, batch))
            means = {"loss": sums.objective} | sums.means
            return means, sums.weight, objective.by_text(params, frozen, batch)

        self._measure = jax.jit(measure, out_shardings=layout.sharding())

    def __call__(self, step: int, state: TrainState) -> Mapping[str, Any]:
        with contextlib.closing(global_batches(self._batches, self._sharding, 0)) as feed:
            found = [
                jax.device_get(self._measure(state.parameters, state.frozen, batch))
                for batch in itertools.islice(feed, self._n_batches)
            ]
        weight = sum(float(weight) for _, weight, _ in found)
        if not weight:
            raise UserError("no held-out record to measure; prepare the data with a larger prepare.validation_fraction")
        means = {name: sum(float(means[name]) for means, _, _ in found) / weight for name in found[0][0]}
        texts = {name: np.concatenate([of_texts[name] for _, _, of_texts in found]) for name in found[0][2]}
        row: dict[str, Any] = {"tokens": step * self._tokens_per_step}
        return row | {f"eval_{name}": value for name, value in (means | dict(self._judge(texts))).items()}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "tokens"}
        loss = numbers.pop("eval_loss")
        said = [f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
        return "  ".join([f"step {step:,}", f"held-out loss {loss:.4f}", *said])
