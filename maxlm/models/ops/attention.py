"""Attention on the mesh: each device has its own rows, heads and queries."""

from __future__ import annotations

import functools
from typing import assert_never

import jax

from kernels_pallas import Scores, flash_attention, masks
from kernels_pallas.masks import Mask
from maxlm.config import Backend, Context, FixedPattern, StridedPattern
from maxlm.models.ops.backends import blaming
from maxlm.models.ops.ring import make_ring, ring_attention
from maxlm.models.ops.ulysses import ulysses_attention
from maxlm.sharding import Layout


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
    context = layout.config.context if devices > 1 else Context.ALL_GATHER
    key_columns = None if context is Context.ALL_GATHER else "seq"
    match context:
        case Context.ALL_GATHER:
            local = functools.partial(_to_all_keys, devices, backend.value)
        case Context.RING:
            ring = make_ring(scores.mask, devices, q.shape[1] // devices, backend.value, visible_to is not None)
            local = functools.partial(ring_attention, ring)
        case Context.ULYSSES:
            local = functools.partial(ulysses_attention, devices, backend.value)
        case _:
            assert_never(context)
    queries = layout.activation("batch", "seq", "heads", None)
    keys = layout.activation("batch", key_columns, "kv_heads", None)
    columns = layout.activation("batch", key_columns), layout.activation("batch", "seq")
    on_mesh = layout.shard_map(
        local,
        in_specs=(queries, keys, keys, *columns, layout.activation("heads")),
        out_specs=queries,
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )
    with blaming("attention", backend):
        return on_mesh(q, k, v, segment_ids, visible_to, scores)


def causal(window: int | None = None, pattern: StridedPattern | FixedPattern | None = None) -> Mask:
    """Who sees whom: keys a query sees, itself included; None: all earlier ones. Or those of the pattern."""
    match pattern:
        case None:
            return masks.causal if window is None else masks.local(window - 1, 0)
        case StridedPattern(stride=stride):
            return masks.local(stride - 1, 0) | (masks.causal & masks.strided(stride))
        case FixedPattern(chunk=chunk, summary=summary):
            return masks.causal & (masks.chunked(chunk) | masks.summaries(chunk, summary))
        case _:
            assert_never(pattern)


def _to_all_keys(
    devices: int,
    backend: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    visible_to: jax.Array | None,
    scores: Scores,
) -> jax.Array:
    """Attention of one device's queries [B, T/n, N, H] to all keys [B, T, K, H], with the segments [B, T] of all."""
    T = q.shape[1]
    start = 0 if devices == 1 else jax.lax.axis_index("seq") * T
    own = None if segments is None else jax.lax.dynamic_slice_in_dim(segments, start, T, 1)
    return flash_attention(
        q, k, v, segment_ids=own, kv_segment_ids=segments, visible_to=visible_to, q_offset=start, backend=backend,
        **vars(scores),
    )  # fmt: skip
