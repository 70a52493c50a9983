"""What a device does in a step: how often it runs which layers, and the loss, and on how many tokens each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.config import (
    ACTIVATION_DIMS,
    BlockConfig,
    Embed,
    Kto,
    ModelConfig,
    Ppo,
    Preference,
    Remat,
    RunConfig,
    ScalarHead,
    pipeline_ticks,
)
from maxlm.config.task_rules import asks_reference


@dataclass(frozen=True, kw_only=True)
class LayerRuns:
    """How often a device runs the layers of one block config in a step, forward, and on how much each time."""

    block: BlockConfig
    runs: float
    """Layers times micro-batches, or turns of the pipeline; those on empty micro-batches count."""
    tokens: int
    """Of a device, in each run."""
    forwards: int
    """2 where the pipeline runs its stages again for the backward pass; what `execution.remat` repeats is on top."""


def layer_runs(config: RunConfig, sizes: Mapping[str, int]) -> list[LayerRuns]:
    """What a device runs of each block config. The layers before the pattern, and those of `model.mtp`, are in no
    pipeline."""
    model, stages = config.model, sizes["stage"]
    outside, tokens = loss_tokens(config, sizes)
    first = [LayerRuns(block=one, runs=outside, tokens=tokens, forwards=1) for one in model.first_blocks]
    if model.mtp is not None:
        first.append(LayerRuns(block=model.blocks[-1], runs=outside * model.mtp.depth, tokens=tokens, forwards=1))
    runs, forwards = turns(config, sizes) * model.repeats / stages, 1 + (stages > 1 and config.sharding.remat_stages)
    rows = local_tokens(config, sizes) * stages // config.train.micro_batches  # stages share a batch out, not its parts
    return first + [LayerRuns(block=one, runs=runs, tokens=rows, forwards=forwards) for one in model.blocks]


def turns(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """How often a device runs each of its layers in a step: micro-batches, and the pipeline's empty turns."""
    groups = config.sharding.virtual_stages
    return pipeline_ticks(sizes["stage"], groups, config.train.micro_batches) / groups


def local_tokens(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Tokens of a step that a device has outside of a pipeline."""
    shards = math.prod(sizes[axis] for dim in ("batch", "seq") for axis in ACTIVATION_DIMS[dim])
    return config.train.batch_size * config.train.seq_len // shards


def loss_tokens(config: RunConfig, sizes: Mapping[str, int]) -> tuple[int, int]:
    """How often a device runs embedding and loss in a step, and on how many tokens: on all micro-batches of a pipeline
    at one time, cut over its stages."""
    parts = 1 if sizes["stage"] > 1 else config.train.micro_batches
    return parts, local_tokens(config, sizes) // parts


def critic_of(model: ModelConfig) -> ModelConfig:
    """The critic beside a policy, as far as a config tells: of the policy's own kind."""
    return dataclasses.replace(model, adapter=None, head=ScalarHead())


def unembeddings(model: ModelConfig) -> int:
    """How often a step makes logits of the same tokens: for the next one, and in the modules of `model.mtp`; or in
    Medusa heads."""
    return lookups(model) if model.medusa is None else model.medusa.n_heads


def lookups(model: ModelConfig) -> int:
    """How often a step looks the same tokens' embeddings up: for the first layer, and in the modules of `model.mtp`."""
    return 1 if model.mtp is None else 1 + model.mtp.depth


def trained(config: RunConfig) -> list[RunConfig]:
    """A config for each model that a step learns from its batch: its own, and the critic of PPO."""
    if not isinstance(config.task, Ppo):
        return [config]
    return [config, dataclasses.replace(config, model=critic_of(config.model))]


def only_read(config: RunConfig, sizes: Mapping[str, int]) -> list[RunConfig]:
    """A config for each time that a step puts its batch through a model and learns nothing of it: forward alone, with
    nothing computed again.

    That is the reference, of the model's own kind. And where a loss must know what the model says of the whole batch,
    of Kto the reference too, they are asked before the first micro-batch (`training/text_objective.py`).
    """
    task, sharding = config.task, dataclasses.replace(config.sharding, remat_stages=False)
    execution = dataclasses.replace(config.execution, remat=Remat.NONE)
    own = dataclasses.replace(config, sharding=sharding, execution=execution)
    reference = dataclasses.replace(own, model=dataclasses.replace(config.model, adapter=None))
    found = [reference] if asks_reference(task) else []
    asks_first = isinstance(task, Embed) or (isinstance(task, Preference) and isinstance(task.loss, Kto))
    if asks_first and config.train.micro_batches > 1 and sizes["stage"] == 1:
        found += [own, *found]
    return found
