"""Flash attention written in XLA operations: online softmax over key blocks, recomputed in the backward pass.

Forward: Dao et al. 2022 (arXiv:2205.14135), algorithm 1, with the loop order of FlashAttention-2 (arXiv:2307.08691).
Nothing of size T x S ever exists: memory beyond the arguments is one block of scores, [B, N, block, block] float32.
Blocks that the mask hides altogether are not computed, so that causal attention costs half of full attention.

Letters: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention.masks import Causal

_MASKED = -1e30  # finite, so that a row without any visible key gives 0 and not NaN


class _Blocks(NamedTuple):
    query: int
    key: int


class _Where(NamedTuple):
    """What decides visibility: positions of the first query of each row, and the segments of both sides."""

    q_offset: jax.Array  # [B] int32
    q_segments: jax.Array | None  # [B, T] int32
    k_segments: jax.Array | None  # [B, S] int32


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Causal = Causal(),
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v, differentiable in q, k and v.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], where K divides N; query heads n * N/K .. (n + 1) * N/K - 1 share key head n.
        mask: which positions see which; key s has position s, query t position q_offset + t.
        segment_ids: [B, T] int; a query sees only keys of its own segment. None: no segments.
        kv_segment_ids: [B, S] int; defaults to segment_ids.
        q_offset: position of the first query, one for all rows or [B].
        scale: defaults to H ** -0.5.

    Returns:
        [B, T, N, H] in q's dtype. Scores and softmax are float32; a query that sees no key gives 0.

    Raises:
        ValueError: shapes do not fit.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != H or N % K:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: k and v must be [{B}, S, K, {H}] where K divides {N} query heads"
        )
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    if (segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("kv_segment_ids is given without segment_ids; give both or neither")
    if segment_ids is not None and kv_segment_ids is not None:
        if (segment_ids.shape, kv_segment_ids.shape) != ((B, T), (B, S)):
            raise ValueError(
                f"segment_ids {segment_ids.shape} must be {(B, T)}, kv_segment_ids {kv_segment_ids.shape} must be {(B, S)}"
            )
    scale = H**-0.5 if scale is None else scale
    blocks = _Blocks(_block_size(T), _block_size(S))

    # Heads go outside the sequence, [B, K, G, T, H]: each block of scores is then one plain batched product.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * jnp.asarray(scale, q.dtype)
    q_blocks = _pad(grouped, 3, blocks.query)
    k_blocks, v_blocks = (_pad(x.transpose(0, 2, 1, 3), 2, blocks.key) for x in (k, v))
    where = _Where(
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,)),
        None if segment_ids is None else _pad(segment_ids, 1, blocks.query),
        None if kv_segment_ids is None else _pad(kv_segment_ids, 1, blocks.key),
    )
    out = _attention(mask, blocks, (T, S), q_blocks, k_blocks, v_blocks, where)
    return out[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _block_size(length: int) -> int:
    """128 keeps a block of scores in a CPU's cache; long sequences take 512 to have fewer, larger products."""
    return min(length, 128 if length <= 4096 else 512)


def _pad(x: jax.Array, dim: int, multiple: int) -> jax.Array:
    missing = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, missing if d == dim else 0) for d in range(x.ndim)]) if missing else x


def _block(x: jax.Array, index: jax.Array, size: int, dim: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)


def _scores(
    mask: Causal, blocks: _Blocks, S: int, q: jax.Array, k: jax.Array, where: _Where, i: jax.Array, j: jax.Array
) -> jax.Array:
    """Float32 scores of query block i against key block j, [B, K, G, query, key], hidden pairs at _MASKED."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    queries = where.q_offset[:, None] + i * blocks.query + jnp.arange(blocks.query)
    keys = j * blocks.key + jnp.arange(blocks.key)
    seen = mask.visible(queries[:, :, None], keys) & (keys < S)
    if where.q_segments is not None and where.k_segments is not None:
        own = _block(where.q_segments, i, blocks.query, 1)
        seen &= own[:, :, None] == _block(where.k_segments, j, blocks.key, 1)[:, None, :]
    return jnp.where(seen[:, None, None], scores, _MASKED)


def _key_blocks(mask: Causal, blocks: _Blocks, S: int, where: _Where, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Key blocks [start, stop) that query block i needs, over all rows of the batch."""
    first = i * blocks.query
    start, stop = mask.key_range(jnp.min(where.q_offset) + first, jnp.max(where.q_offset) + first + blocks.query - 1)
    return start // blocks.key, -(-jnp.minimum(stop, S) // blocks.key)


def _query_blocks(
    mask: Causal, blocks: _Blocks, lengths: tuple[int, int], where: _Where, j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Query blocks [start, stop) that need key block j, over all rows of the batch."""
    low, high = jnp.min(where.q_offset), jnp.max(where.q_offset)
    first, end = j * blocks.key, high + lengths[0]
    start, stop = mask.query_range(first, first + blocks.key - 1, end)
    n_blocks = -(-lengths[0] // blocks.query)
    return (
        jnp.clip((start - high) // blocks.query, 0, n_blocks),
        jnp.clip(-(-(stop - low) // blocks.query), 0, n_blocks),
    )


def _forward(
    mask: Causal, blocks: _Blocks, S: int, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where
) -> tuple[jax.Array, jax.Array]:
    """Output in q's dtype and the logsumexp of the scores, float32 [B, K, G, T]."""

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        qi = _block(q, i, blocks.query, 3)

        def add_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            scores = _scores(mask, blocks, S, qi, _block(k, j, blocks.key, 2), where, i, j)
            new_top = jnp.maximum(top, scores.max(-1))
            # A fully hidden row has top = _MASKED, where exp(score - top) would be 1 for hidden keys.
            p = jnp.where(scores > _MASKED, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            update = jnp.einsum(
                "bkgts,bksh->bkgth", p.astype(v.dtype), _block(v, j, blocks.key, 2), preferred_element_type=jnp.float32
            )
            return new_top, total * shrink + p.sum(-1), acc * shrink[..., None] + update

        zeros = jnp.zeros_like(qi[..., 0], jnp.float32)
        start = zeros + _MASKED, zeros, jnp.zeros_like(qi, jnp.float32)
        top, total, acc = lax.fori_loop(*_key_blocks(mask, blocks, S, where, i), add_key_block, start)
        total = jnp.where(total == 0, 1.0, total)
        return (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = lax.map(query_block, jnp.arange(q.shape[3] // blocks.query))
    return _join(out, 3), _join(lse, 3)


def _join(stacked: jax.Array, dim: int) -> jax.Array:
    """[blocks, ..., size, ...] from a loop to [..., blocks * size, ...]."""
    moved = jnp.moveaxis(stacked, 0, dim)
    return moved.reshape(*moved.shape[:dim], -1, *moved.shape[dim + 2 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    mask: Causal,
    blocks: _Blocks,
    lengths: tuple[int, int],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: _Where,
) -> jax.Array:
    return _forward(mask, blocks, lengths[1], q, k, v, where)[0]


def _attention_fwd(
    mask: Causal, blocks: _Blocks, lengths: tuple[int, int], q: jax.Array, k: jax.Array, v: jax.Array, where: _Where
) -> tuple[jax.Array, tuple]:
    out, lse = _forward(mask, blocks, lengths[1], q, k, v, where)
    # Named, so that a remat policy can save them and never run the loop above twice.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, where, out, lse)


def _attention_bwd(mask: Causal, blocks: _Blocks, lengths: tuple[int, int], residuals: tuple, d_out: jax.Array) -> tuple:
    """FlashAttention's backward: dS = P * (dP - rowsum(dO * O)), one key block at a time."""
    q, k, v, where, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)

    def key_block(dq: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        kj, vj = _block(k, j, blocks.key, 2), _block(v, j, blocks.key, 2)

        def add_query_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            qi, d_out_i = _block(q, i, blocks.query, 3), _block(d_out, i, blocks.query, 3)
            scores = _scores(mask, blocks, lengths[1], qi, kj, where, i, j)
            p = jnp.where(scores > _MASKED, jnp.exp(scores - _block(lse, i, blocks.query, 3)[..., None]), 0.0)
            dp = jnp.einsum("bkgth,bksh->bkgts", d_out_i, vj, preferred_element_type=jnp.float32)
            ds = (p * (dp - _block(delta, i, blocks.query, 3)[..., None])).astype(q.dtype)
            dv += jnp.einsum("bkgts,bkgth->bksh", p.astype(q.dtype), d_out_i, preferred_element_type=jnp.float32)
            dk += jnp.einsum("bkgts,bkgth->bksh", ds, qi, preferred_element_type=jnp.float32)
            dqi = jnp.einsum("bkgts,bksh->bkgth", ds, kj, preferred_element_type=jnp.float32)
            dq = lax.dynamic_update_slice_in_dim(dq, _block(dq, i, blocks.query, 3) + dqi, i * blocks.query, 3)
            return dq, dk, dv

        zeros = jnp.zeros_like(kj, jnp.float32)
        dq, dk, dv = lax.fori_loop(
            *_query_blocks(mask, blocks, lengths, where, j), add_query_block, (dq, zeros, zeros)
        )
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros_like(q, jnp.float32), jnp.arange(k.shape[2] // blocks.key))
    return dq.astype(q.dtype), _join(dk, 2), _join(dv, 2), None


_attention.defvjp(_attention_fwd, _attention_bwd)
