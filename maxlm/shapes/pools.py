"""What decoding keeps of texts: blocks of a few positions, in one pool for all layers that look back equally far.

`maxlm/models/kv_cache.py` makes the arrays, `maxlm/inference/` gives blocks to texts, `maxlm/plan/` counts bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from maxlm.config import Attention, CacheFormat, Dtype, GroupedQuery, LatentAttention, ModelConfig
from maxlm.shapes.arrays import kept

CACHE_SHARE = 0.8
"""Of the memory that weights leave on a device, what the cache may take: a step needs some too."""


def window_of(config: Attention) -> int:
    """How far back a layer looks, as the key of its table: 0 is to the beginning."""
    match config:
        case GroupedQuery():
            return config.window or 0
        case LatentAttention():
            return 0
        case _:
            assert_never(config)


def windows(model: ModelConfig) -> tuple[int, ...]:
    """The keys of the tables that a model has."""
    return tuple(sorted({window_of(block.attention) for block in model.layers}))


def cache_blocks(
    model: ModelConfig, *, positions: int, slots: int, tokens_per_step: int, block_size: int
) -> dict[int, int]:
    """The pools of one shard of the batch: window -> blocks, with the one that is nobody's.

    Layers with a window have twice what all slots use at once, so that beginnings stay for others; never more than
    layers without.

    Args:
        model: what is cached for.
        positions: of all texts together.
        slots: texts at once.
        tokens_per_step: that a step reads, at most.
        block_size: positions of a block.
    """
    wanted = -(-positions // block_size)
    of_window = lambda window: 2 * slots * (-(-(window + tokens_per_step) // block_size) + 2)
    return {window: (min(wanted, of_window(window)) if window else wanted) + 1 for window in windows(model)}


def block_bytes(
    model: ModelConfig,
    window: int,
    block_size: int,
    *,
    dtype: Dtype,
    tensor: int,
    kept_in: CacheFormat = CacheFormat.DTYPE,
) -> int:
    """Of a block of all layers with that window, on one device.

    Args:
        model: what is cached for.
        window: of `windows(model)`.
        block_size: its positions.
        dtype: of computing.
        tensor: devices that share the heads.
        kept_in: number format of the cache.
    """
    attentions = [block.attention for block in model.layers if window_of(block.attention) == window]
    parts = [part for attention in attentions for part in kept(attention)]
    heads = lambda n, dim: n if dim is None else -(-n // tensor)
    return block_size * sum(heads(part.heads, part.dim) * kept_in.bytes_of(part.width, dtype) for part in parts)


def pools_bytes(
    model: ModelConfig,
    blocks: Mapping[int, int],
    block_size: int,
    *,
    dtype: Dtype,
    tensor: int,
    kept_in: CacheFormat = CacheFormat.DTYPE,
) -> int:
    """Of so many blocks for each window, on one device; arguments as `block_bytes`."""
    size = lambda window: block_bytes(model, window, block_size, dtype=dtype, tensor=tensor, kept_in=kept_in)
    return sum(n * size(window) for window, n in blocks.items())
