"""One file a task: a function from a config to a Recipe, which `maxlm/training/loop.py` runs.

pretrain.py: next token of prepared text
train_medusa.py: heads that guess at later tokens, on a trained model
starting.py: what a new run may start from: another run, or a published model
"""

from __future__ import annotations

from maxlm.config import Pretrain, RunConfig, TrainMedusa
from maxlm.inference.load import LoadedRun
from maxlm.recipes import pretrain, train_medusa
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe


def recipe(config: RunConfig, layout: Layout) -> Recipe[LoadedRun]:
    """The recipe of `config.task`, on the mesh of `layout`.

    Raises:
        UserError: the data or another run that it needs is not there or does not fit.
    """
    match config.task:
        case Pretrain():
            return pretrain.recipe(config, config.task, layout)
        case TrainMedusa():
            return train_medusa.recipe(config, config.task, layout)
