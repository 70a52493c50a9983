"""Attention on the mesh: each device has its own rows, heads and queries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import assert_never

import jax

from kernels_pallas import Scores, cached_attention, flash_attention, masks
from kernels_pallas.masks import Mask
from maxlm.config import Backend, Context
from maxlm.models.ops.backends import blaming
from maxlm.models.ops.ring import make_ring, ring_attention
from maxlm.models.ops.ulysses import ulysses_attention
from maxlm.sharding import Layout

_FEW_QUERIES = 16
"""Up to here the keys of a cache are read in place; above, a copy of a layer's keys is small beside the work on it."""


def attention(
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: Scores,
    *,
    segment_ids: jax.Array | None = None,
    visible_to: jax.Array | None = None,
    backend: Backend = Backend.AUTO,
) -> jax.Array:
    """Attention on the mesh, within sequences.

    Args:
        q: [B, T, N, H]; sharded over rows, queries and heads.
        k, v: [B, T, K, H]. Where the seq axis cuts the sequence, `layout.config.context` says how its keys come to the
            queries; with a ring, the columns of q, k, v and segment_ids are in `ring.zigzag_order`.
        window: keys a query sees, itself included; None: all earlier ones.
        segment_ids: [B, T] int32; queries see only their own segment.
        backend: what it runs as.

    Returns:
        [B, T, N, H].

    Raises:
        UserError: the named backend cannot do this, or the context cannot cut these heads.
    """
    assert visible_to is None  # until merged
    mask, window = scores.mask, None
    devices = layout.mesh.shape["seq"]
    if devices == 1:
        return _all_gathered(layout, scores, backend, q, k, v, segment_ids)
    match layout.config.context:
        case Context.ALL_GATHER:
            return _all_gathered(layout, scores, backend, q, k, v, segment_ids)
        case Context.RING:
            ring = make_ring(mask, window, devices, q.shape[1] // devices, backend.value)
            local = functools.partial(ring_attention, ring)
        case Context.ULYSSES:
            local = functools.partial(ulysses_attention, mask, devices, backend.value)
        case _:
            assert_never(layout.config.context)
    return _exchanged(layout, local, backend, q, k, v, segment_ids)


def attention_to_cache(
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    first_position: jax.Array,
    scores: Scores,
) -> jax.Array:
    """Attention to the keys of one layer of a cache, on a mesh whose seq axis is 1.

    A few queries read the cache in place. Many take a copy of the layer's part to the kernel that suits them.

    Args:
        q: [B, T, N, H].
        k, v: [L', B, K, S, H], slot s for position s.
        layer: int32 scalar.
        first_position: int32 [B], of the first query.
        window: keys a query sees, itself included; None: all earlier ones.

    Returns:
        [B, T, N, H].
    """
    by_head = jax.tree.map(lambda _: layout.activation("heads"), scores)
    heads, cache = (
        layout.activation("batch", None, "heads", None),
        layout.activation(None, "batch", "kv_heads", None, None),
    )

    @functools.partial(
        layout.shard_map,
        in_specs=(heads, cache, cache, layout.activation(), layout.activation("batch"), by_head),
        out_specs=heads,
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )
    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, first: jax.Array, scores: Scores
    ) -> jax.Array:
        if q.shape[1] <= _FEW_QUERIES:
            return cached_attention(q, k, v, layer, first, scores)
        k, v = k[layer].swapaxes(1, 2), v[layer].swapaxes(1, 2)
        return flash_attention(q, k, v, **vars(scores), q_offset=first)

    return local(q, k, v, layer, first_position, scores)


def causal(window: int | None) -> Mask:
    """Who sees whom: keys a query sees, itself included; None: all earlier ones."""
    return masks.causal if window is None else masks.local(window - 1, 0)


def _exchanged(
    layout: Layout,
    local: Callable[..., jax.Array],
    backend: Backend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Each device brings its part of the sequence; `local` sends to the others what they need of it."""
    queries, keys = (layout.activation("batch", "seq", heads, None) for heads in ("heads", "kv_heads"))
    segments = None if segment_ids is None else layout.activation("batch", "seq")
    in_specs = queries, keys, keys, segments
    with blaming("attention", backend):
        return layout.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)(q, k, v, segment_ids)


def _all_gathered(
    layout: Layout,
    scores: Scores,
    backend: Backend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Every device has all keys; its queries begin at their own position."""
    one_device_seq = layout.mesh.shape["seq"] == 1

    @functools.partial(
        layout.shard_map,
        in_specs=(
            layout.activation("batch", "seq", "heads", None),
            layout.activation("batch", None, "kv_heads", None),
            layout.activation("batch", None, "kv_heads", None),
            None if segment_ids is None else layout.activation("batch", None),
            jax.tree.map(lambda _: layout.activation("heads"), scores),
        ),
        out_specs=layout.activation("batch", "seq", "heads", None),
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )
    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, scores: Scores) -> jax.Array:
        T = q.shape[1]
        start = 0 if one_device_seq else jax.lax.axis_index("seq") * T
        own = None if segments is None else jax.lax.dynamic_slice_in_dim(segments, start, T, 1)
        with blaming("attention", backend):
            return flash_attention(
                q, k, v, **vars(scores), segment_ids=own, kv_segment_ids=segments, q_offset=start, backend=backend.value
            )

    return local(q, k, v, segment_ids, scores)
