"""Flash attention written in XLA operations: online softmax over key blocks, recomputed in the backward pass.

Forward: Dao et al. 2022 (arXiv:2205.14135), algorithm 1, with the loop order of FlashAttention-2 (arXiv:2307.08691).
Nothing of size T x S ever exists: memory beyond the arguments is one block of scores, [B, N, block, block] float32.
Blocks that the mask hides altogether are not computed, so that causal attention costs half of full attention.

Letters: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim; inside, C queries or keys in a
block, and R = G * C rows: the queries of one block of all heads that share a key head.
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


class _Static(NamedTuple):
    """What is known at compile time."""

    mask: Causal
    T: int
    S: int
    q_block: int
    k_block: int
    scale: float


class _Where(NamedTuple):
    """What decides visibility beside the mask: the position of each row's first query, and the segments."""

    q_offset: jax.Array  # [B] int32
    q_segments: jax.Array | None  # [q blocks, B, C] int32
    k_segments: jax.Array | None  # [k blocks, B, C] int32


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
    for name, ids, shape in (("segment_ids", segment_ids, (B, T)), ("kv_segment_ids", kv_segment_ids, (B, S))):
        if ids is not None and ids.shape != shape:
            raise ValueError(f"{name} {ids.shape} must be {shape}")
    scale = H**-0.5 if scale is None else scale
    static = _Static(mask, T, S, _block_size(T), _block_size(S), scale)
    # Queries of one block and one key head become the rows of one matrix, so that each step is a plain batched product.
    q_rows = _cut(q.reshape(B, T, K, N // K, H), static.q_block).transpose(0, 1, 3, 4, 2, 5)
    q_rows = q_rows.reshape(-1, B, K, N // K * static.q_block, H)
    k_rows, v_rows = (_cut(x, static.k_block).transpose(0, 1, 3, 2, 4) for x in (k, v))
    where = _Where(
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,)),
        None if segment_ids is None else _cut(segment_ids, static.q_block),
        None if kv_segment_ids is None else _cut(kv_segment_ids, static.k_block),
    )
    out = _attention(static, q_rows, k_rows, v_rows, where)
    out = out.reshape(-1, B, K, N // K, static.q_block, H).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(B, -1, N, H)[:, :T]


def _block_size(length: int) -> int:
    """128 keeps a block of scores in a CPU's cache; long sequences take 512 to have fewer, larger products."""
    return min(length, 128 if length <= 4096 else 512)


def _cut(x: jax.Array, size: int) -> jax.Array:
    """[B, length, ...] to [blocks, B, size, ...], padded with zeros at the end."""
    missing = -x.shape[1] % size
    if missing:
        x = jnp.pad(x, [(0, missing if dim == 1 else 0) for dim in range(x.ndim)])
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _visible(static: _Static, where: _Where, i: jax.Array, j: jax.Array, n_rows: int) -> jax.Array:
    """Which keys of block j the rows of query block i see: boolean [B, 1, R, C]."""
    queries = where.q_offset[:, None] + i * static.q_block + jnp.arange(static.q_block)
    keys = j * static.k_block + jnp.arange(static.k_block)
    seen = static.mask.visible(queries[:, :, None], keys) & (keys < static.S)
    if where.q_segments is not None and where.k_segments is not None:
        seen &= where.q_segments[i][:, :, None] == where.k_segments[j][:, None, :]
    return jnp.tile(seen, (1, n_rows // static.q_block, 1))[:, None]


def _key_blocks(static: _Static, where: _Where, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Key blocks [start, stop) that query block i needs, over all rows of the batch."""
    first = i * static.q_block
    last = first + static.q_block - 1
    start, stop = static.mask.key_range(jnp.min(where.q_offset) + first, jnp.max(where.q_offset) + last)
    return start // static.k_block, -(-jnp.minimum(stop, static.S) // static.k_block)


def _query_blocks(static: _Static, where: _Where, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Query blocks [start, stop) that need key block j, over all rows of the batch."""
    low, high = jnp.min(where.q_offset), jnp.max(where.q_offset)
    first = j * static.k_block
    start, stop = static.mask.query_range(first, first + static.k_block - 1, high + static.T)
    n_blocks = -(-static.T // static.q_block)
    return (
        jnp.clip((start - high) // static.q_block, 0, n_blocks),
        jnp.clip(-(-(stop - low) // static.q_block), 0, n_blocks),
    )


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _forward(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where) -> tuple[jax.Array, jax.Array]:
    """Output [q blocks, B, K, R, H] in q's dtype and the logsumexp of the scores, float32 [q blocks, B, K, R]."""

    def query_block(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, qi = block

        def add_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            seen = _visible(static, where, i, j, qi.shape[2])
            # The scale multiplies float32 scores: queries scaled in bfloat16 would lose up to 2^-9 of every score.
            scores = jnp.where(seen, _product("bkrh,bkch->bkrc", qi, k[j]) * static.scale, _MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            # A fully hidden row has top = _MASKED, where exp(score - top) would be 1 for hidden keys.
            p = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            update = _product("bkrc,bkch->bkrh", p.astype(v.dtype), v[j])
            return new_top, total * shrink + p.sum(-1), acc * shrink[..., None] + update

        zeros = jnp.zeros_like(qi[..., 0], jnp.float32)
        start = zeros + _MASKED, zeros, jnp.zeros_like(qi, jnp.float32)
        top, total, acc = lax.fori_loop(*_key_blocks(static, where, i), add_key_block, start)
        total = jnp.where(total == 0, 1.0, total)
        return (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)

    return lax.map(query_block, (jnp.arange(q.shape[0]), q))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where) -> jax.Array:
    return _forward(static, q, k, v, where)[0]


def _attention_fwd(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where) -> tuple[jax.Array, tuple]:
    out, lse = _forward(static, q, k, v, where)
    # Named, so that a remat policy can save them and never run the loop above twice.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, where, out, lse)


def _attention_bwd(static: _Static, residuals: tuple, d_out: jax.Array) -> tuple:
    """FlashAttention's backward, dS = P * (dP - rowsum(dO * O)), one key block at a time.

    Scores are formed as [key, query] here: the sums over queries, for dk and dv, then run along the last dim.
    """
    q, k, v, where, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)

    def key_block(dq: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        j, kj, vj = block

        def add_query_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            qi, d_out_i = q[i], d_out[i]
            seen = _visible(static, where, i, j, qi.shape[2]).swapaxes(2, 3)
            scores = _product("bkch,bkrh->bkcr", kj, qi) * static.scale
            p = jnp.where(seen, jnp.exp(scores - lse[i][:, :, None]), 0.0)
            dp = _product("bkch,bkrh->bkcr", vj, d_out_i)
            ds = (p * (dp - delta[i][:, :, None])).astype(q.dtype)
            dv += _product("bkcr,bkrh->bkch", p.astype(q.dtype), d_out_i)
            dk += _product("bkcr,bkrh->bkch", ds, qi)
            return dq.at[i].add(_product("bkcr,bkch->bkrh", ds, kj)), dk, dv

        zeros = jnp.zeros_like(kj, jnp.float32)
        dq, dk, dv = lax.fori_loop(*_query_blocks(static, where, j), add_query_block, (dq, zeros, zeros))
        return dq, ((dk * static.scale).astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros_like(q, jnp.float32), (jnp.arange(k.shape[0]), k, v))
    return (dq * static.scale).astype(q.dtype), dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)
