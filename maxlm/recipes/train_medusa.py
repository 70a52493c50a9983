"""Medusa heads on a trained model: what they learn, and how often they guess right on held-out text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maxlm.config import RunConfig, TrainMedusa
from maxlm.data.loader import global_batches, open_batches
from maxlm.data.shards import Split
from maxlm.inference.load import LoadedRun
from maxlm.recipes import pretrain
from maxlm.sharding import Layout
from maxlm.training.later_tokens import LaterTokens
from maxlm.training.loop import Measure, Recipe
from maxlm.training.state import TrainState

_BEST = 4
"""Guesses of a head that are looked at."""


def recipe(config: RunConfig, task: TrainMedusa, layout: Layout) -> Recipe[LoadedRun]:
    """As of pre-training, with another objective, and with the heads measured where that has the held-out loss.

    Raises:
        UserError: as of pre-training.
    """
    objective = LaterTokens(config, task, layout)
    data = pretrain.batches(config)
    pretrain.refuse_bad_answers(config.data)
    made = pretrain.recipe_on(config, layout, objective, data)
    measures: list[Measure] = [HeldOutHeads(config, layout, objective)] if config.train.eval_batches != 0 else []
    measures += [measure for measure in made.measures if measure.name != pretrain.HeldOutText.name]
    return dataclasses.replace(made, measures=tuple(measures))


class HeldOutHeads:
    """How often what came was among a head's first guesses, over the validation split or its first batches, as
    `train.eval_batches` says, every `train.eval_every` steps."""

    name = "head"

    def __init__(self, config: RunConfig, layout: Layout, objective: LaterTokens) -> None:
        train = config.train
        self.every = train.eval_every
        self._batches = open_batches(
            config.data, batch_size=train.batch_size, seq_len=train.seq_len, split=Split.VALIDATION
        )
        assert self._batches.n_batches is not None, "a validation split has an end"
        self._n_batches = train.held_out_batches(self._batches.n_batches)
        self._sharding = layout.sharding(layout.activation("batch", "seq"))
        self._ranks = jax.jit(functools.partial(objective.ranks, most=_BEST), out_shardings=layout.sharding())

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float]:
        with contextlib.closing(global_batches(self._batches, self._sharding, 0)) as feed:
            batches = itertools.islice(feed, self._n_batches)
            ranks = np.sum([np.asarray(self._ranks(state.parameters, batch)) for batch in batches], axis=0)
        shares = ranks[:, :-1] / np.maximum(ranks[:, -1:], 1)
        return {
            f"head_{k}_guess_{n}": float(share)
            for k, of_head in enumerate(shares, start=1)
            for n, share in enumerate(of_head, start=1)
        }

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        heads = itertools.takewhile(lambda k: f"head_{k}_guess_1" in row, itertools.count(1))
        said = [", ".join(f"{row[f'head_{k}_guess_{n}']:.3f}" for n in range(1, _BEST + 1)) for k in heads]
        return f"step {step:,}  right of the first {_BEST} guesses of each head: {';  '.join(said)}"
