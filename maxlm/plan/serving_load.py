"""What a plan of serving is asked about."""

from __future__ import annotations

from maxlm.config import CacheFormat, EngineConfig, WeightFormat
from maxlm.config.fields import Positive, config


@config("--")
class ServingLoad:
    """What is served at once; what `maxlm.serve` calls --engine.NAME has the same name here."""

    slots: Positive[int] = EngineConfig().slots
    """Texts that are decoded at once, of each shard of the batch: data x fsdp x expert devices cut the texts, tensor
    cuts weights and heads."""
    context: Positive[int] | None = None
    """Tokens of each text so far, the one that is decoded included; None: model.max_seq_len."""
    prompt: Positive[int] | None = None
    """Tokens of a prompt; None: as many as the context."""
    weights: WeightFormat = WeightFormat.DTYPE
    """Format in which weights are held."""
    kv_cache: CacheFormat = EngineConfig().kv_cache
    """Number format of the cache."""
    block_size: Positive[int] = EngineConfig().block_size
    """Positions of a block of the cache."""
    tokens_per_step: Positive[int] | None = None
    """The most tokens of a step, by which prompts are read in pieces; None: 512, and at least the slots."""
