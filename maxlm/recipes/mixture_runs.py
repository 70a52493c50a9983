"""Small runs on the same data sets in other weights, each measured on every one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from maxlm.config import DataConfig, Pretrain, RunConfig, UserError
from maxlm.config.prediction_rules import default_prediction
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.prepare import ensure_prepared
from maxlm.data.shards import Split
from maxlm.evaluation.perplexity import held_out
from maxlm.training.step import make_trainer


def losses_of_mixtures(config: RunConfig, mixtures: Sequence[Sequence[float]]) -> Iterator[tuple[float, ...]]:
    """For each mixture the held-out loss of every data set, in nats a token, after `train.steps` steps.

    All runs begin with the same parameters, and one compiled step trains them all, one after the other; nothing is
    saved. A data set is measured by itself, over `train.eval_batches`.

    Args:
        config: of the runs, but for the weights of their data sets.
        mixtures: weights of the data sets.

    Raises:
        UserError: the config is refused, or of another task than `Pretrain` or with phases; a data set is not there, or
            has nothing held out; or a loss is not finite.
    """
    if not isinstance(config.task, Pretrain) or config.train.phases or config.checkpoint.init_from is not None:
        raise UserError(
            "mixtures are tried in runs that train on text from the start, in one phase; use a config whose task is "
            "Pretrain(), without train.phases and checkpoint.init_from"
        )
    ensure_prepared(config.data)
    trainer, train = make_trainer(config), config.train
    sharding = trainer.layout.sharding(trainer.layout.activation("batch", "seq"))

    def opened(data: DataConfig, split: Split) -> Batches:
        return open_batches(
            data,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
            split=split,
            virtual=config.model.virtual_tokens,
            predict=default_prediction(config.task),
        )

    def of_one(dataset: int) -> Batches:
        alone = dataclasses.replace(config.data.datasets[dataset], weight=1.0)
        return opened(dataclasses.replace(config.data, datasets=(alone,), past=()), Split.VALIDATION)

    measured = [of_one(i) for i in range(len(config.data.datasets))]
    step, state = trainer.start()
    for number, weights in enumerate(mixtures):
        if number:
            state = trainer.init()
        pairs = zip(config.data.datasets, weights, strict=True)
        datasets = tuple(dataclasses.replace(one, weight=float(weight)) for one, weight in pairs)
        batches = opened(dataclasses.replace(config.data, datasets=datasets), Split.TRAIN)
        with contextlib.closing(global_batches(batches, sharding, batches.first)) as feed:
            for batch in itertools.islice(feed, train.steps):
                state, _ = step(state, batch)
        losses = []
        for held in measured:
            assert held.n_batches is not None, "a validation split has an end"
            with contextlib.closing(global_batches(held, sharding, 0)) as feed:
                some = itertools.islice(feed, train.held_out_batches(held.n_batches))
                losses.append(held_out(trainer.evaluate, state.parameters, some, bytes_per_token=None).loss)
        if not all(map(math.isfinite, losses)):
            raise UserError(f"weights {tuple(weights)} end with losses {tuple(losses)}; lower optimizer.learning_rate")
        yield tuple(losses)
