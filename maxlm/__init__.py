"""maxlm: language models in JAX, from text to a served model, for TPUs, GPUs and one's own laptop.

From Python: `maxlm.load_config`, `run`, `load_run`, `load_model`, `save_model`, `batches`,
`make_trainer`; docs/api.md has an example of each.
Nothing is loaded before its name is used.

__main__.py: command: list the commands
train.py: command: train
average.py: command: one model of several checkpoints
compare.py: command: runs side by side
launch.py: command: train somewhere else
quantize.py: command: smaller weights, and what they cost
generate.py: command: continue a text
serve.py: command: answer requests over HTTP
chat.py: command: talk with a model
convert.py: command: published models to run folders, and back
evaluate.py: command: held-out loss
check.py: command: a self-test of a config on this machine
synthesize.py: command: records that a model writes
inspect.py: command: list, verify, hash
sharding.py: the mesh, and jax shardings of the table in config/dims.py
hardware.py: every chip: FLOP/s, memory, links, with sources
compile_cache.py: compiled programs kept between runs
surroundings.py: where caches lie, and terminals
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxlm.config import RunConfig, SamplingConfig, ShardingConfig, UserError
    from maxlm.config.cli import load_config
    from maxlm.hub.models import load_model, load_run, save_model
    from maxlm.inference.load import LoadedRun
    from maxlm.recipes.pretrain import batches
    from maxlm.train import main as run
    from maxlm.training.loop import Result
    from maxlm.training.step import Trainer, make_trainer

__version__ = "0.1.0"

__all__ = [
    "LoadedRun",
    "Result",
    "RunConfig",
    "SamplingConfig",
    "ShardingConfig",
    "Trainer",
    "UserError",
    "batches",
    "load_config",
    "load_model",
    "load_run",
    "make_trainer",
    "run",
    "save_model",
]

_HOMES = {
    "LoadedRun": "maxlm.inference.load.LoadedRun",
    "Result": "maxlm.training.loop.Result",
    "RunConfig": "maxlm.config.RunConfig",
    "SamplingConfig": "maxlm.config.SamplingConfig",
    "ShardingConfig": "maxlm.config.ShardingConfig",
    "Trainer": "maxlm.training.step.Trainer",
    "UserError": "maxlm.config.UserError",
    "batches": "maxlm.recipes.pretrain.batches",
    "load_config": "maxlm.config.cli.load_config",
    "load_model": "maxlm.hub.models.load_model",
    "load_run": "maxlm.hub.models.load_run",
    "make_trainer": "maxlm.training.step.make_trainer",
    "run": "maxlm.train.main",
    "save_model": "maxlm.hub.models.save_model",
}
"""Where each name is at home."""


if not TYPE_CHECKING:  # a type checker that saw it would take any name

    def __getattr__(name: str) -> Any:
        """A name of `__all__`, from its module, which is loaded now (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOMES[name].rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
