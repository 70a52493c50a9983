"""Paged attention written in XLA operations: the body for every device.

Softmax over one tile of keys after the other (Milakov & Gimelshein 2018, arXiv:1805.02867), from each row's first
visible block to its last. Tiles are counted from that block, and one that a row does not see leaves its sums as they
are, bit for bit: a row's result does not depend on its neighbours, nor on where its blocks lie.

Letters: R rows at a time, K key heads, G = N / K, W keys of a tile in blocks of C, H and Hv widths.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.problem import MASKED
from kernels_pallas.attention.xla import bucket_of, capped, product
from kernels_pallas.paged.problem import PagedBlocks, PagedOperands, PagedProblem, TokenTree
from kernels_pallas.targets import Family, Target


def unsupported(problem: PagedProblem, target: Target) -> str | None:
    """None: this body does everything everywhere."""
    return None


def default_blocks(problem: PagedProblem, target: Target) -> PagedBlocks:
    """On a CPU one row after the other, each as long as its own text, with small tiles, since the last is half in vain;
    elsewhere all rows abreast, as long as the longest."""
    return PagedBlocks(keys=64, rows=1) if target.family is Family.CPU else PagedBlocks(keys=128)


def on_chip_bytes(problem: PagedProblem, blocks: PagedBlocks) -> int:
    """0: XLA places its own buffers."""
    return 0


def forward(problem: PagedProblem, blocks: PagedBlocks, operands: PagedOperands, *, interpret: Any = None) -> jax.Array:
    """[T, N, Hv] in q's dtype; there is nothing to interpret here."""
    T, K, G = problem.T, problem.K, problem.group
    rows = max(n for n in range(1, min(blocks.rows, T) + 1) if T % n == 0)
    each = operands.q.reshape(T, K, G, -1), operands.tables[operands.slots], operands.positions, operands.tree
    run = functools.partial(_rows, problem, blocks.count(problem.C), operands)
    if rows == T:
        out = run(*each)
    else:
        out = lax.map(lambda part: run(*part), jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), each))
    return out.reshape(T, problem.N, problem.Hv)


def _rows(
    problem: PagedProblem,
    n_blocks: int,
    operands: PagedOperands,
    q: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    tree: TokenTree | None,
) -> jax.Array:
    """[R, K, G, Hv] of queries [R, K, G, H] at positions [R], whose texts lie in the blocks [R, M]."""
    first, last = problem.blocks_of(positions, tree)
    of_row = jax.tree.map(lambda x: x[:, None], tree)
    per_head = lambda x: x.astype(jnp.float32).reshape(problem.K, problem.group, -1)

    def add_tile(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        entries = first[:, None] + j * n_blocks + jnp.arange(n_blocks)  # [R, blocks]; those past the table are hidden
        blocks = jnp.take_along_axis(tables, jnp.minimum(entries, problem.M - 1), axis=1)
        keys = (entries[..., None] * problem.C + jnp.arange(problem.C)).reshape(len(entries), -1)  # [R, W] positions
        seen = problem.seen(positions[:, None], keys, of_row)
        k, v = (_tile(cache, operands.layer, blocks) for cache in (operands.k, operands.v))
        scales = None if operands.scales is None else [_tile(x, operands.layer, blocks) for x in operands.scales]
        products = product("rkgh,rkch->rkgc", q, k.astype(q.dtype))
        if scales is not None:  # of what a sum is over, all numbers have one scale: it comes after
            products *= scales[0].astype(jnp.float32)[:, :, None]
        scores = capped(products, problem.scale, problem.soft_cap)
        distance = keys - positions[:, None]
        if operands.alibi_slopes is not None:
            scores -= per_head(operands.alibi_slopes) * jnp.abs(distance)[:, None, None]
        if operands.bias_table is not None:
            assert problem.buckets is not None
            bias = operands.bias_table[:, bucket_of(problem.buckets, distance)]  # [N, R, W]
            scores += bias.swapaxes(0, 1).reshape(scores.shape)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        # Before the first visible key top = MASKED, and hidden ones weigh 1: it shrinks that to 0, and where none comes
        # the values below are 0.
        p = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        # What lies where nothing was written, or another text was, may be no number.
        v = jnp.where(seen[:, None, :, None], v.astype(q.dtype), jnp.zeros((), q.dtype))
        weights = p
        if scales is not None:
            weights = p * jnp.where(seen[:, None], scales[1].astype(jnp.float32), 0)[:, :, None]
        update = product("rkgc,rkch->rkgh", weights.astype(v.dtype), v)
        return new_top, total * shrink + p.sum(-1), acc * shrink[..., None] + update

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    start = zeros + MASKED, zeros, jnp.zeros((*zeros.shape, problem.Hv), jnp.float32)
    if operands.sinks is not None:  # one more key, whose value is 0
        start = zeros + per_head(operands.sinks)[..., 0], zeros + 1, start[2]
    n_tiles = jnp.max(-(-(last - first) // n_blocks))
    _, total, acc = lax.fori_loop(jnp.int32(0), n_tiles, add_tile, start)
    return (acc / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype)


def _tile(cache: jax.Array, layer: jax.Array, blocks: jax.Array) -> jax.Array:
    """[R, K, W, ...]: blocks [R, n] of the layer of cache [L, P, K, C, ...], read where they lie."""
    of_block = cache.shape[2:]
    if len(blocks) == 1:  # on a CPU faster than a gather
        rest = (0,) * len(of_block)
        block = lambda n: lax.dynamic_slice(cache, (layer, n, *rest), (1, 1, *of_block))[0]
        return jnp.concatenate([block(blocks[0, i]) for i in range(blocks.shape[1])], axis=2)
    gathered = cache.at[layer, blocks].get(mode="promise_in_bounds")  # [R, n, K, C, ...]
    return gathered.swapaxes(1, 2).reshape(len(blocks), of_block[0], -1, *of_block[2:])
