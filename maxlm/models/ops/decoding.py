"""Attention to a cache on the mesh: each device has its own rows and heads of it."""

from __future__ import annotations

import functools

import jax

from kernels_pallas import Scores, cached_attention, flash_attention
from maxlm.sharding import Layout

_FEW_QUERIES = 16
"""Up to here the keys of a cache are read in place; above, a copy of a layer's keys is small beside the work on it."""


def attention_to_cache(
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    first_position: jax.Array,
    scores: Scores,
    *,
    visible_to: jax.Array | None = None,
    one_head_for_all: bool = False,
) -> jax.Array:
    """Attention to the keys of one layer of a cache, on a mesh whose seq axis is 1.

    A few queries read the cache in place. Many take a copy of the layer's part to the kernel that suits them.

    Args:
        q: [B, T, N, H].
        k: [L', B, K, S, H], slot s for position s.
        v: [L', B, K, S, Hv].
        layer: int32 scalar.
        first_position: int32 [B], of the first query.
        scores, visible_to: as in `attention`; keys are counted in the cache.
        one_head_for_all: K is 1 on every device, whatever the tensor axis cuts.

    Returns:
        [B, T, N, Hv].
    """
    rows, by_head = layout.activation("batch"), layout.activation("heads")
    heads = layout.activation("batch", None, "heads", None)
    cache = layout.activation(None, "batch", None if one_head_for_all else "kv_heads", None, None)

    @functools.partial(
        layout.shard_map,
        in_specs=(heads, cache, cache, layout.activation(), rows, rows, by_head),
        out_specs=heads,
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )
    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        first: jax.Array,
        visible_to: jax.Array | None,
        scores: Scores,
    ) -> jax.Array:
        if reads_in_place(q.shape[1]):
            return cached_attention(q, k, v, layer, first, scores, visible_to)
        k, v = k[layer].swapaxes(1, 2), v[layer].swapaxes(1, 2)
        return flash_attention(q, k, v, **vars(scores), q_offset=first, visible_to=visible_to)

    return local(q, k, v, layer, first_position, visible_to, scores)


def attention_to_keys(
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_position: jax.Array,
    scores: Scores,
    *,
    visible_to: jax.Array | None = None,
) -> jax.Array:
    """As `attention_to_cache`, to keys [B, S, K, H] and values [B, S, K, Hv] that were made of a cache."""
    rows, by_head = layout.activation("batch"), layout.activation("heads")
    heads, keys = (layout.activation("batch", None, dim, None) for dim in ("heads", "kv_heads"))

    @functools.partial(
        layout.shard_map, in_specs=(heads, keys, keys, rows, rows, by_head), out_specs=heads, check_vma=False
    )
    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, visible_to: jax.Array | None, scores: Scores
    ) -> jax.Array:
        return flash_attention(q, k, v, **vars(scores), q_offset=first, visible_to=visible_to)

    return local(q, k, v, first_position, visible_to, scores)


def reads_in_place(n_queries: int) -> bool:
    """Whether so few new queries read the keys of a cache where they lie."""
    return n_queries <= _FEW_QUERIES
