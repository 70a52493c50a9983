"""What to say when a run's memory ran out: what takes the most of it, by arithmetic, and which keys make that less."""

from __future__ import annotations

import re

import jax

from maxlm.config import RunConfig
from maxlm.observe.text import gibibytes
from maxlm.plan.machines import Platform
from maxlm.plan.memory import estimate_memory

_KEYS = {
    "parameters": "sharding.fsdp, sharding.tensor or optimizer.parameter_format = bfloat16",
    "optimizer": "sharding.fsdp, or another optimizer (optimizer.moment_dtype, eight_bit, Adafactor)",
    "gradients": "sharding.fsdp",
    "copies": "sharding.fsdp",
    "reference": "sharding.fsdp, or task.reference_ahead = True of Preference",
    "critic": "sharding.fsdp, or Grpo, which has none",
    "engine": "task.rollouts.slots or sharding.fsdp",
    "batch": "train.batch_size",
    "activations": "train.micro_batches or execution.remat = full",
    "logits": "train.loss_chunk",
    "working": "train.micro_batches or sharding.tensor",
}
"""What makes each part of `MemoryEstimate.at_peak` less."""
_MOST = 3


def is_exhausted(error: BaseException) -> bool:
    """Whether this says that there was no more memory, of a device or of the host."""
    return isinstance(error, MemoryError) or bool(re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)))


def describe_exhausted(config: RunConfig, error: BaseException) -> str:
    """One line: what was asked for in vain, the largest parts of a step on a device, and the keys for them."""
    first = (" ".join(str(error).split()) or "MemoryError").removeprefix("RESOURCE_EXHAUSTED: ")[:200]
    parts = estimate_memory(config, jax.device_count(), Platform(jax.default_backend())).at_peak
    largest = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])[:_MOST]
    listed = "; ".join(f"{name} {gibibytes(parts[name])} (less with {_KEYS[name]})" for name in largest)
    return (
        f"out of memory ({first}); a device needs about {gibibytes(sum(parts.values()))} for a step, by arithmetic, "
        f"most of it for {listed}; python -m maxlm.plan says what would fit"
    )
