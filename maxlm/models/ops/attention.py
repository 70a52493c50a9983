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
    """Attention on the mesh, within sequences; differentiable in q, k, v, and the bias table and sinks of `scores`.

    Args:
        q: [B, T, N, H]; sharded over rows, queries and heads.
        k, v: [B, T, K, H]. Where the seq axis cuts the sequence, `layout.config.context` says how its keys come to the
            queries; with a ring, the columns of q, k, v and of what is [B, T] are in `ring.zigzag_order`.
        scores: of all N heads; its arrays are cut as the heads are.
        segment_ids: [B, T] int32; queries see only their own segment.
        visible_to: [B, T] int32, where the keys that each query sees end, in place of the mask's upper bound; counted
            in the whole row, in the sequence's order. None: the mask alone.
        backend: what it runs as.

    Returns:
        [B, T, N, H].

    Raises:
        UserError: the named backend cannot do this, or the context cannot cut these heads or this mask.
    """
    devices = layout.mesh.shape["seq"]
    if devices == 1:
        return _all_gathered(layout, backend, q, k, v, segment_ids, visible_to, scores)
    match layout.config.context:
        case Context.ALL_GATHER:
            return _all_gathered(layout, backend, q, k, v, segment_ids, visible_to, scores)
        case Context.RING:
            ring = make_ring(scores.mask, devices, q.shape[1] // devices, backend.value, visible_to is not None)
            local = functools.partial(ring_attention, ring)
        case Context.ULYSSES:
            local = functools.partial(ulysses_attention, devices, backend.value)
        case _:
            assert_never(layout.config.context)
    return _exchanged(layout, local, backend, q, k, v, segment_ids, visible_to, scores)


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
) -> jax.Array:
    """Attention to the keys of one layer of a cache, on a mesh whose seq axis is 1.

    A few queries read the cache in place. Many take a copy of the layer's part to the kernel that suits them.

    Args:
        q: [B, T, N, H].
        k, v: [L', B, K, S, H], slot s for position s.
        layer: int32 scalar.
        first_position: int32 [B], of the first query.
        scores, visible_to: as in `attention`; keys are counted in the cache.

    Returns:
        [B, T, N, H].
    """
    rows, by_head = layout.activation("batch"), layout.activation("heads")
    heads, cache = (
        layout.activation("batch", None, "heads", None),
        layout.activation(None, "batch", "kv_heads", None, None),
    )

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
        if q.shape[1] <= _FEW_QUERIES:
            return cached_attention(q, k, v, layer, first, scores, visible_to)
        k, v = k[layer].swapaxes(1, 2), v[layer].swapaxes(1, 2)
        return flash_attention(q, k, v, **vars(scores), q_offset=first, visible_to=visible_to)

    return local(q, k, v, layer, first_position, visible_to, scores)


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
    visible_to: jax.Array | None,
    scores: Scores,
) -> jax.Array:
    """Each device brings its part of the sequence; `local` sends to the others what they need of it."""
    queries, keys = (layout.activation("batch", "seq", heads, None) for heads in ("heads", "kv_heads"))
    rows = layout.activation("batch", "seq")
    in_specs = queries, keys, keys, rows, rows, layout.activation("heads")
    with blaming("attention", backend):
        return layout.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)(
            q, k, v, segment_ids, visible_to, scores
        )


def _all_gathered(
    layout: Layout,
    backend: Backend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    visible_to: jax.Array | None,
    scores: Scores,
) -> jax.Array:
    """Every device has all keys; its queries begin at their own position."""
    one_device_seq = layout.mesh.shape["seq"] == 1

    @functools.partial(
        layout.shard_map,
        in_specs=(
            layout.activation("batch", "seq", "heads", None),
            layout.activation("batch", None, "kv_heads", None),
            layout.activation("batch", None, "kv_heads", None),
            layout.activation("batch", None),
            layout.activation("batch", "seq"),
            layout.activation("heads"),
        ),
        out_specs=layout.activation("batch", "seq", "heads", None),
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )
    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None,
        visible_to: jax.Array | None,
        scores: Scores,
    ) -> jax.Array:
        T = q.shape[1]
        start = 0 if one_device_seq else jax.lax.axis_index("seq") * T
        own = None if segments is None else jax.lax.dynamic_slice_in_dim(segments, start, T, 1)
        with blaming("attention", backend):
            return flash_attention(
                q,
                k,
                v,
                **vars(scores),
                segment_ids=own,
                kv_segment_ids=segments,
                visible_to=visible_to,
                q_offset=start,
                backend=backend.value,
            )

    return local(q, k, v, segment_ids, visible_to, scores)
