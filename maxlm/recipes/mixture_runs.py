"""Small runs on the same data sets in other weights, each measured on every one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax

from maxlm.config import Pretrain, RunConfig, UserError
from maxlm.config.prediction_rules import default_prediction
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.prepare import ensure_prepared
from maxlm.data.shards import Split
from maxlm.evaluation.perplexity import held_out
from maxlm.training.step import make_trainer


class MixtureRuns:
    """Runs that differ in the weights of their data sets alone.

    All begin with the same parameters and make `train.steps` steps of one program, which is compiled when the first of
    them begins; nothing is saved. A data set is measured by itself, over `train.eval_batches`.
    """

    def __init__(self, config: RunConfig) -> None:
        """`config`: of the runs, but for the weights of their data sets.

        Raises:
            UserError: it is refused, or of another task than `Pretrain` or with phases; a data set is not there, or has
                nothing held out.
        """
        if not isinstance(config.task, Pretrain) or config.train.phases or config.checkpoint.init_from is not None:
            raise UserError(
                "mixtures are tried in runs that train on text from the start, in one phase; use a config whose task "
                "is Pretrain(), without train.phases and checkpoint.init_from"
            )
        ensure_prepared(config.data)
        self._config, self._trainer = config, make_trainer(config)
        layout = self._trainer.layout
        self._sharding = layout.sharding(layout.activation("batch", "seq"))
        numbers = range(len(config.data.datasets))
        self._held_out = [self._opened([float(i == n) for i in numbers], Split.VALIDATION) for n in numbers]

    def losses(self, weights: Sequence[float]) -> tuple[float, ...]:
        """The held-out loss of every data set, in nats a token, of a run with these weights.

        Raises:
            UserError: a loss is not finite.
        """
        train, (step, state) = self._config.train, (self._step, self._trainer.init())
        batches = self._opened(weights, Split.TRAIN)
        with contextlib.closing(global_batches(batches, self._sharding, batches.first)) as feed:
            for batch in itertools.islice(feed, train.steps):
                state, _ = step(state, batch)
        losses = []
        for held in self._held_out:
            assert held.n_batches is not None, "a validation split has an end"
            with contextlib.closing(global_batches(held, self._sharding, 0)) as feed:
                some = itertools.islice(feed, train.held_out_batches(held.n_batches))
                losses.append(held_out(self._trainer.evaluate, state.parameters, some, bytes_per_token=None).loss)
        if not all(map(math.isfinite, losses)):
            raise UserError(f"weights {tuple(weights)} end with losses {tuple(losses)}; lower optimizer.learning_rate")
        return tuple(losses)

    @functools.cached_property
    def _step(self) -> jax.stages.Compiled:
        return self._trainer.start()[0]

    def _opened(self, weights: Sequence[float], split: Split) -> Batches:
        config = self._config
        pairs = zip(config.data.datasets, weights, strict=True)
        datasets = tuple(dataclasses.replace(one, weight=float(weight)) for one, weight in pairs)
        return open_batches(
            dataclasses.replace(config.data, datasets=datasets),
            batch_size=config.train.batch_size,
            seq_len=config.train.seq_len,
            split=split,
            virtual=config.model.virtual_tokens,
            predict=default_prediction(config.task),
        )
