"""Attention of a few new queries to keys in a cache that several layers share, read where it lies.

A slice of one layer's keys would be copied for every token before anything reads it. Here the loop over blocks of keys
takes each block from the whole cache, and stops at the newest key: the time of a token does not depend on the room that
the cache has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.problem import MASKED, AttentionProblem, Operands
from kernels_pallas.attention.scores import Scores
from kernels_pallas.attention.xla import make_tiles, product

KEYS = 128
"""Keys of a block. A cache for more positions has room for a multiple of this."""


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    q_offset: jax.Array,
    scores: Scores,
    visible_to: jax.Array | None = None,
) -> jax.Array:
    """`flash_attention` to the keys of one layer of a cache; no gradient. XLA operations, on every device.

    Args:
        q: [B, T, N, H], few queries: scores are [B, N, T, 128].
        k: [L, B, K, S, H], slot s for position s, where S is a multiple of 128 or less than it. A head's keys lie one
            after the other, as the products take them.
        v: [L, B, K, S, Hv].
        layer: int32 scalar.
        q_offset: int32 [B], position of the first query; its own key is in the cache.
        scores, visible_to: as for `flash_attention`.

    Returns:
        [B, T, N, Hv] in q's dtype; 0 for a query that sees no key.
    """
    (B, T, N, H), (_, _, K, S, Hv) = q.shape, v.shape
    width = min(S, KEYS)
    if S % width:
        raise ValueError(f"a cache of {S} positions; make room for a multiple of {KEYS}")
    bias = scores.relative_bias
    problem = AttentionProblem(
        B=B,
        T=T,
        S=S,
        N=N,
        K=K,
        H=H,
        Hv=Hv,
        dtype=q.dtype,
        mask=scores.mask if visible_to is None else scores.mask.opened(),
        visible_to=visible_to is not None,
        scale=H**-0.5 if scores.scale is None else scores.scale,
        soft_cap=scores.soft_cap,
        buckets=None if bias is None else bias.buckets(N),
        q_offset=None,
    )
    table = None if bias is None else jnp.asarray(bias.table, jnp.float32)
    operands = Operands(q, k, v, None, None, q_offset, scores.alibi_slopes, table, visible_to)
    blocks = make_tiles(problem, T, width, operands)
    # [B, K, R, H]: the queries of all heads that share a key head are the rows of one product.
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)

    def block(cache: jax.Array, j: jax.Array) -> jax.Array:
        """[B, K, C, H], block j of the layer."""
        start = (layer, 0, 0, j * width, 0)
        return lax.dynamic_slice(cache, start, (1, B, K, width, cache.shape[-1]))[0]

    def add_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        seen = blocks.seen(jnp.int32(0), j)
        score = blocks.capped(product("bkrh,bkch->bkrc", rows, block(k, j)))
        if (bias := blocks.bias(jnp.int32(0), j)) is not None:
            score += bias
        score = jnp.where(seen, score, MASKED)
        new_top = jnp.maximum(top, score.max(-1))
        p = jnp.where(seen, jnp.exp(score - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        update = product("bkrc,bkch->bkrh", p.astype(v.dtype), block(v, j))
        return new_top, total * shrink + p.sum(-1), acc * shrink[..., None] + update

    zeros = jnp.zeros(rows.shape[:-1], jnp.float32)
    start = zeros + MASKED, zeros, jnp.zeros((*zeros.shape, Hv), jnp.float32)
    if scores.sinks is not None:  # one more key, whose value is 0
        sinks = jnp.repeat(scores.sinks.astype(jnp.float32).reshape(K, N // K), T, axis=1)
        start = zeros + sinks, zeros + 1, start[2]
    _, total, acc = lax.fori_loop(*blocks.key_blocks(jnp.int32(0)), add_block, start)
    out = (acc / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype)
    return out.reshape(B, K, N // K, T, Hv).transpose(0, 3, 1, 2, 4).reshape(B, T, N, Hv)


def cache_room(length: int) -> int:
    """Positions, at least `length`, for which `cached_attention` takes a cache."""
    return length if length <= KEYS else -(-length // KEYS) * KEYS
