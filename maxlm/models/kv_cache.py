"""What decoding keeps of the tokens before, for each kind of attention: in blocks that any text may use."""

from __future__ import annotations

from typing import NamedTuple, assert_never

import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import BlockConfig, CacheFormat, GroupedQuery, LatentAttention, ModelConfig
from maxlm.models.execution import Execution
from maxlm.models.ops import CacheBlocks


class KeyValueBlocks(NamedTuple):
    """Keys and values of L' equal layers. Layers change them in place: they are never taken apart."""

    k: CacheBlocks
    v: CacheBlocks


class LatentBlocks(NamedTuple):
    """What keys and values of L' equal layers are made from."""

    latents: CacheBlocks
    """One head, kv_rank + rope_head_dim wide: the latent, and the rotated key of all heads."""


LayerCache = KeyValueBlocks | LatentBlocks
Cache = tuple[LayerCache, ...]
"""One for each of the first blocks, L' = 1, then one for each entry of the block pattern, of all its repeats."""


def empty_cache(
    model: ModelConfig,
    blocks: dict[int, int],
    block_size: int,
    how: Execution,
    kept_in: CacheFormat = CacheFormat.DTYPE,
) -> Cache:
    """Room for so many blocks of `block_size` positions on each shard of the batch.

    Args:
        model: what is cached for.
        blocks: window -> P of a shard, for each of `shapes.windows(model)`.
        block_size: C.
        how: mesh and compute dtype.
        kept_in: number format of the cache.

    Raises:
        ValueError: the model looks at later tokens.
    """
    if not model.decodes:
        raise ValueError(f"{model.looks_ahead}: such a model looks at later tokens and has no cache")

    def empty(block: BlockConfig, layers: int) -> LayerCache:
        n_blocks = blocks[shapes.window_of(block.attention)] * how.layout.batch_shards

        def zeros(kept: shapes.Kept) -> CacheBlocks:
            shape = layers, n_blocks, kept.heads, block_size
            place = lambda array: how.layout.constrain(array, None, "batch", kept.dim, *[None] * (array.ndim - 3))
            match kept_in:
                case CacheFormat.DTYPE:
                    return CacheBlocks(place(jnp.zeros((*shape, kept.width), how.dtype)))
                case CacheFormat.INT8:
                    values = place(jnp.zeros((*shape, kept.width), jnp.int8))
                    return CacheBlocks(values, place(jnp.zeros(shape, jnp.bfloat16)))
                case _:
                    assert_never(kept_in)

        arrays = [zeros(kept) for kept in shapes.kept(block.attention)]
        match block.attention:
            case GroupedQuery():
                return KeyValueBlocks(*arrays)
            case LatentAttention():
                return LatentBlocks(*arrays)
            case _:
                assert_never(block.attention)

    kinds = [(block, 1) for block in model.first_blocks] + [(block, model.repeats) for block in model.blocks]
    return tuple(empty(*kind) for kind in kinds)
