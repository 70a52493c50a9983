"""What decoding keeps of the tokens before, for each kind of attention."""

from __future__ import annotations

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import BlockConfig, GroupedQuery, LatentAttention, ModelConfig
from maxlm.models import ops
from maxlm.models.execution import Execution


class Contiguous(NamedTuple):
    """Keys and values of L' equal layers, slot s for position s. Layers change it in place: it is never taken apart."""

    k: jax.Array  # [L', B, K, S, H]
    v: jax.Array  # [L', B, K, S, H]

    def add(self, layer: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> Contiguous:
        """With keys and values [B, T, K, H] of one layer, row b from slot first[b] on."""
        return Contiguous(_write(self.k, layer, k, first), _write(self.v, layer, v, first))


class Latents(NamedTuple):
    """What keys and values of L' equal layers are made from, in slots as those of `Contiguous`."""

    latents: jax.Array  # [L', B, 1, S, kv_rank + rope_head_dim]: the latent, and the rotated key of all heads

    def add(self, layer: jax.Array, latents: jax.Array, first: jax.Array) -> Latents:
        """With those [B, T, kv_rank + rope_head_dim] of one layer, row b from slot first[b] on."""
        return Latents(_write(self.latents, layer, latents[:, :, None], first))


LayerCache = Contiguous | Latents
Cache = tuple[LayerCache, ...]
"""One for each of the first blocks, L' = 1, then one for each entry of the block pattern, of all its repeats."""


def empty_cache(model: ModelConfig, batch: int, length: int, how: Execution) -> Cache:
    """Room for at least `length` positions of `batch` sequences, in the compute dtype.

    Raises:
        ValueError: the model looks at later tokens.
    """
    if not model.decodes:
        raise ValueError(f"{model.looks_ahead}: such a model looks at later tokens and has no cache")
    room = ops.cache_room(length)

    def empty(block: BlockConfig, layers: int) -> LayerCache:
        def zeros(kept: shapes.Kept) -> jax.Array:
            array = jnp.zeros((layers, batch, kept.heads, room, kept.width), how.dtype)
            return how.layout.constrain(array, None, "batch", kept.dim, None, None)

        arrays = [zeros(kept) for kept in shapes.kept(block.attention)]
        match block.attention:
            case GroupedQuery():
                return Contiguous(*arrays)
            case LatentAttention():
                return Latents(*arrays)
            case _:
                assert_never(block.attention)

    kinds = [(block, 1) for block in model.first_blocks] + [(block, model.repeats) for block in model.blocks]
    return tuple(empty(*kind) for kind in kinds)


def _write(cache: jax.Array, layer: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Put new [B, T, K, H] into one layer of a cache [L', B, K, S, H], row b from slot first[b] on."""
    # Rows are a batching dim, so that devices that each have some of the rows write their own.
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    places = jnp.stack([jnp.broadcast_to(layer, first.shape), first], -1)
    new = new.swapaxes(1, 2).astype(cache.dtype)
    return jax.lax.scatter(cache, places, new, dims, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP)
