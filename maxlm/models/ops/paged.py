"""Attention to blocks of a cache on the mesh: each device has its own texts, with their blocks, and heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import CacheScales, Scores, TokenTree, paged_attention
from maxlm.models.weights.by_group import nearest_bytes
from maxlm.sharding import Layout


class CacheBlocks(NamedTuple):
    """Keys or values, or what both are made of, of L' layers in P blocks of C positions, K heads each."""

    values: jax.Array
    """[L', P, K, C, H], in the compute dtype or int8."""
    scales: jax.Array | None = None
    """bfloat16 [L', P, K, C]: what int8 values are multiplied with, for each head of each token."""


def attention_to_blocks(
    layout: Layout,
    q: jax.Array,
    new: Sequence[jax.Array],
    cache: Sequence[CacheBlocks],
    layer: jax.Array,
    table: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    scores: Scores,
    *,
    tree: TokenTree | None = None,
    one_head_for_all: bool = False,
) -> tuple[jax.Array, list[CacheBlocks]]:
    """Write what is new into one layer of a cache, and attend to what it then holds.

    A row is one token of the text in its slot; tokens of a text may be several rows of a batch, in any order.

    Args:
        layout: whose seq axis is 1.
        q: [T, 1, N, H].
        new: keys [T, 1, K, H] and values [T, 1, K, Hv]; or latents alone, which are both.
        cache: keys and values, or the latents alone.
        layer: int32 scalar.
        table: int32 [S, M], blocks of the texts.
        slots: int32 [T].
        positions: int32 [T]; -1: the row is padding, is written nowhere that is read, and gets 0.
        scores: as in `attention`.
        tree: where rows are nodes of trees: written at their places, which are then not their positions.
        one_head_for_all: K is 1 on every device, whatever the tensor axis cuts.

    Returns:
        [T, 1, N, Hv], and the cache with the new.
    """
    rows = layout.activation("batch")
    heads = layout.activation("batch", None, "heads", None)
    kv_heads = None if one_head_for_all else "kv_heads"
    in_new = [layout.activation("batch", None, kv_heads, None)] * len(new)
    in_cache = [layout.activation(None, "batch", kv_heads)] * len(cache)

    @functools.partial(
        layout.shard_map,
        in_specs=(heads, in_new, in_cache, layout.activation(), layout.activation("batch", None), rows, rows, rows,
                  layout.activation("heads")),
        out_specs=(heads, in_cache),
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )  # fmt: skip
    def local(
        q: jax.Array,
        new: list[jax.Array],
        cache: list[CacheBlocks],
        layer: jax.Array,
        table: jax.Array,
        slots: jax.Array,
        positions: jax.Array,
        tree: TokenTree | None,
        scores: Scores,
    ) -> tuple[jax.Array, list[CacheBlocks]]:
        slots = slots % table.shape[0]
        places = positions if tree is None else tree.places
        cache = [_write(old, layer, x[:, 0], table, slots, places) for old, x in zip(cache, new, strict=True)]
        k, v = cache[0], cache[-1]
        scales = None if k.scales is None else CacheScales(k.scales, v.scales)
        of_rows = table, slots, positions
        out = paged_attention(q[:, 0], k.values, v.values, layer, *of_rows, scores, tree=tree, scales=scales)
        return out[:, None], cache

    return local(q, list(new), list(cache), layer, table, slots, positions, tree, scores)


def _write(
    cache: CacheBlocks, layer: jax.Array, new: jax.Array, table: jax.Array, slots: jax.Array, places: jax.Array
) -> CacheBlocks:
    """Put new [T, K, H] into one layer of a cache, each row at its own place; -1: nowhere."""
    _, P, K, C, _ = cache.values.shape
    nowhere, places = places < 0, places.clip(0)
    blocks = jnp.where(nowhere, 0, table[slots, places // C])
    # As rows of all layers, blocks and heads: with indices for some dims alone a TPU turns the whole cache round.
    rows = (((layer * P + blocks)[:, None] * K) + jnp.arange(K)) * C + (places % C)[:, None]

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        flat = old.reshape(-1, *old.shape[4:])
        return flat.at[rows].set(x.astype(old.dtype), mode="promise_in_bounds").reshape(old.shape)

    if cache.scales is None:
        return CacheBlocks(put(cache.values, new))
    codes, scales = nearest_bytes(new, -1)
    return CacheBlocks(put(cache.values, codes), put(cache.scales, scales))
