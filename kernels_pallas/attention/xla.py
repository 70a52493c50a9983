"""Flash attention written in XLA operations: the body for every device, and the fast one on a CPU.

Forward: Dao et al. 2022 (arXiv:2205.14135), algorithm 1, with the loop order of FlashAttention-2 (arXiv:2307.08691).
Nothing of size T x S ever exists: memory beyond the arguments is one block of scores, [B, N, block, block] float32.
Blocks that the mask hides altogether are not computed, so that causal attention costs half of full attention.

Letters: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H and Hv widths; inside, C queries or keys
in a block, and R = G * C rows: the queries of one block of all heads that share a key head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.problem import (
    MASKED,
    AttentionBlocks,
    AttentionProblem,
    Buckets,
    Operands,
    first_and_last,
    least_and_most,
)
from kernels_pallas.masks import END, Place
from kernels_pallas.targets import Family, Target

_CACHED = 2**19
"""Bytes of scores: with what is computed of them they fit 2 MiB, the second cache of a server's core."""


def unsupported(problem: AttentionProblem, target: Target) -> str | None:
    """None: this body does everything everywhere."""
    return None


def default_blocks(problem: AttentionProblem, target: Target) -> AttentionBlocks:
    """128, or 512 for long sequences to have fewer, larger products; on a CPU so many rows that the scores of a block
    stay in the cache beside a core."""
    q, k = (min(length, 128 if length <= 4096 else 512) for length in (problem.T, problem.S))
    rows = max(1, _CACHED // (4 * problem.N * q * k)) if target.family is Family.CPU else END
    return AttentionBlocks(q=q, k=k, q_backward=q, k_backward=k, rows=rows)


def on_chip_bytes(problem: AttentionProblem, blocks: AttentionBlocks) -> int:
    """0: XLA places its own buffers."""
    return 0


def forward(
    problem: AttentionProblem, blocks: AttentionBlocks, operands: Operands, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype, and the logsumexp of each query's scores, float32 [B, N, T].

    A query that sees no key has output 0 and logsumexp MASKED. There is nothing to interpret here.
    """
    return _by_rows(functools.partial(_forward, problem, blocks), blocks.rows, operands)


def _forward(problem: AttentionProblem, blocks: AttentionBlocks, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`forward` of all rows that the operands have."""
    tiles = make_tiles(problem, blocks.q, blocks.k, operands)
    q = _rows(problem, operands.q, blocks.q)
    k, v = _columns(operands.k, blocks.k), _columns(operands.v, blocks.k)
    zero = _zero(operands)

    def query_block(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, qi = block

        def add_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            seen = tiles.seen(i, j)
            scores = tiles.capped(product("bkrh,bkch->bkrc", qi, k[j]))
            if (bias := tiles.bias(i, j)) is not None:
                scores += bias
            scores = jnp.where(seen, scores, MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            # A fully hidden row has top = MASKED, where exp(score - top) would be 1 for hidden keys.
            p = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            update = product("bkrc,bkch->bkrh", p.astype(v.dtype), v[j])
            return new_top, total * shrink + p.sum(-1), acc * shrink[..., None] + update

        zeros = jnp.broadcast_to(zero, qi.shape[:-1])
        start = zeros + MASKED, zeros, jnp.broadcast_to(zero, (*zeros.shape, problem.Hv))
        top, total, acc = lax.fori_loop(*tiles.key_blocks(i), add_key_block, start)
        total = jnp.where(total == 0, 1.0, total)
        return (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = lax.map(query_block, (jnp.arange(q.shape[0], dtype=jnp.int32), q))
    return _from_rows(problem, out), _from_rows(problem, lse[..., None])[..., 0].swapaxes(1, 2)


def backward(
    problem: AttentionProblem,
    blocks: AttentionBlocks,
    operands: Operands,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of q, k, v and the bias table: FlashAttention's dS = P * (dP - delta), one key block at a time.

    Scores are formed as [key, query] here: the sums over queries, for dk and dv, then run along the last dim.

    Args:
        lse: [B, N, T] float32 from `forward`.
        delta: [B, N, T] float32, rowsum(d_out * out) less the cotangent of lse.
        d_out: [B, T, N, Hv].
    """
    run = functools.partial(_backward, problem, blocks)
    dq, dk, dv, d_table = _by_rows(run, blocks.rows, operands, lse, delta, d_out)
    return dq, dk, dv, None if d_table is None else d_table.sum(0)


def _backward(
    problem: AttentionProblem,
    blocks: AttentionBlocks,
    operands: Operands,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """`backward` of all rows that the operands have; the bias table's gradient with a leading dim of 1, to be added."""
    tiles = make_tiles(problem, blocks.q_backward, blocks.k_backward, operands)
    zero = _zero((operands, lse, delta, d_out))
    q, d_out = (_rows(problem, x, blocks.q_backward) for x in (operands.q, d_out))
    k, v = _columns(operands.k, blocks.k_backward), _columns(operands.v, blocks.k_backward)
    # Queries that only fill the last block have scores too: this logsumexp makes their weights 0.
    lse = _rows(problem, lse.swapaxes(1, 2)[..., None], blocks.q_backward, fill=-MASKED)[..., 0]
    delta = _rows(problem, delta.swapaxes(1, 2)[..., None], blocks.q_backward)[..., 0]

    def key_block(carry: tuple, block: tuple[jax.Array, ...]) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        j, kj, vj = block

        def add_query_block(i: jax.Array, carry: tuple) -> tuple:
            dq, d_table, dk, dv = carry
            qi, d_out_i = q[i], d_out[i]
            capped = tiles.capped(product("bkch,bkrh->bkcr", kj, qi))
            bias = tiles.bias(i, j)
            scores = capped if bias is None else capped + bias.swapaxes(2, 3)
            p = jnp.where(tiles.seen(i, j).swapaxes(2, 3), jnp.exp(scores - lse[i][:, :, None]), 0.0)
            dp = product("bkch,bkrh->bkcr", vj, d_out_i)
            ds = p * (dp - delta[i][:, :, None])
            if problem.buckets is not None:
                d_table += tiles.table_gradient(ds.swapaxes(2, 3), i, j)
            if problem.soft_cap is not None:
                ds *= 1 - (capped / problem.soft_cap) ** 2
            ds = ds.astype(q.dtype)
            dv += product("bkcr,bkrh->bkch", p.astype(q.dtype), d_out_i)
            dk += product("bkcr,bkrh->bkch", ds, qi)
            return dq.at[i].add(product("bkcr,bkch->bkrh", ds, kj)), d_table, dk, dv

        zeros = jnp.broadcast_to(zero, kj.shape), jnp.broadcast_to(zero, vj.shape)
        *carry, dk, dv = lax.fori_loop(*tiles.query_blocks(j), add_query_block, (*carry, *zeros))
        return tuple(carry), ((dk * problem.scale).astype(k.dtype), dv.astype(v.dtype))

    table = operands.bias_table
    start = jnp.broadcast_to(zero, q.shape), None if table is None else jnp.broadcast_to(zero, table.shape)
    (dq, d_table), (dk, dv) = lax.scan(key_block, start, (jnp.arange(k.shape[0], dtype=jnp.int32), k, v))
    dq = _from_rows(problem, (dq * problem.scale).astype(q.dtype))
    return dq, _from_columns(dk, problem.S), _from_columns(dv, problem.S), None if d_table is None else d_table[None]


def _by_rows(function: Callable[..., Any], rows: int, operands: Operands, *arrays: jax.Array) -> Any:
    """function(operands, *arrays) for at most `rows` rows of the batch at a time; results joined along the first dim.

    A smaller block of scores stays in a CPU's cache, and each row skips the blocks that it does not see itself.
    """
    B = operands.q.shape[0]
    rows = max(n for n in range(1, min(rows, B) + 1) if B % n == 0)
    if rows == B:
        return function(operands, *arrays)
    shared = operands.alibi_slopes, operands.bias_table
    batched = operands._replace(alibi_slopes=None, bias_table=None), arrays
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batched)

    def part(batched: tuple[Operands, tuple[jax.Array, ...]]) -> Any:
        operands, arrays = batched
        return function(operands._replace(alibi_slopes=shared[0], bias_table=shared[1]), *arrays)

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(part, parts))


class _Tiles(NamedTuple):
    """The score matrix cut into blocks, i of queries and j of keys: what to add to a block, and what to see of it."""

    problem: AttentionProblem
    q_size: int
    k_size: int
    q_offset: jax.Array  # [B]
    q_segments: jax.Array | None  # [q blocks, B, C]
    k_segments: jax.Array | None  # [k blocks, B, C]
    alibi_slopes: jax.Array | None  # [N]
    bias_table: jax.Array | None  # [N, n]
    visible_to: jax.Array | None  # [q blocks, B, C]
    furthest: jax.Array | None  # [q blocks], the largest of visible_to

    def positions(self, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the queries of block i, [B, C, 1], and the keys of block j, [C]."""
        queries = self.q_offset[:, None, None] + i * self.q_size + jnp.arange(self.q_size)[:, None]
        return queries, j * self.k_size + jnp.arange(self.k_size)

    def key_blocks(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Key blocks [start, stop) that query block i needs, over all rows of the batch."""
        first = i * self.q_size
        last = first + self.q_size - 1
        start, stop = self.problem.mask.key_range(jnp.min(self.q_offset) + first, jnp.max(self.q_offset) + last)
        if self.furthest is not None:
            stop = jnp.clip(self.furthest[i], 0, stop)
        return _bounds(start // self.k_size, -(-jnp.minimum(stop, self.problem.S) // self.k_size))

    def query_blocks(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query blocks [start, stop) that need key block j, over all rows of the batch."""
        first = j * self.k_size
        last = jnp.minimum(first + self.k_size, self.problem.S) - 1
        start, stop = self.problem.mask.query_range(first, last)
        n_blocks = -(-self.problem.T // self.q_size)
        start = jnp.clip((start - jnp.max(self.q_offset)) // self.q_size, 0, n_blocks)
        stop = jnp.clip(-(-(stop - jnp.min(self.q_offset)) // self.q_size), 0, n_blocks)
        if self.furthest is None:
            return _bounds(start, stop)
        first_reaching, after_reaching = first_and_last(self.furthest > first)
        return _bounds(jnp.maximum(start, first_reaching), jnp.minimum(stop, after_reaching))

    def seen(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Which keys the rows of the block see: boolean [B, 1, R, C]."""
        queries, keys = self.positions(i, j)
        seen = self.problem.mask.visible(queries, keys) & (keys < self.problem.S)
        if self.q_segments is not None and self.k_segments is not None:
            seen &= self.q_segments[i][:, :, None] == self.k_segments[j][:, None, :]
        if self.visible_to is not None:
            seen &= keys < self.visible_to[i][:, :, None]
        return jnp.tile(seen, (1, self.problem.group, 1))[:, None]

    def capped(self, products: jax.Array) -> jax.Array:
        """Scores out of float32 products."""
        return capped(products, self.problem.scale, self.problem.soft_cap)

    def bias(self, i: jax.Array, j: jax.Array) -> jax.Array | None:
        """What the distance alone adds to the scores: float32 [B, K, R, C], or None."""
        if self.alibi_slopes is None and self.bias_table is None:
            return None
        queries, keys = self.positions(i, j)
        distance = (keys - queries)[:, None]  # [B, 1, C, C]
        bias = jnp.zeros((), jnp.float32)
        if self.alibi_slopes is not None:
            bias -= self.alibi_slopes.astype(jnp.float32)[:, None, None] * jnp.abs(distance)
        if self.bias_table is not None:
            bias += self.bias_table[:, self._bucket(distance[:, 0])].swapaxes(0, 1)
        return bias.reshape(distance.shape[0], self.problem.K, -1, self.k_size)

    def table_gradient(self, ds: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """[N, n]: the block's ds [B, K, R, C] summed by bucket.

        First along its diagonals, each of one distance. Rows of width w + 1, laid end to end and cut again at width w,
        stand shifted by one against each other: with the last query first, the diagonals have become columns.
        """
        B, C, width = ds.shape[0], self.q_size, self.q_size + self.k_size - 1
        rows = jnp.pad(ds.reshape(B, -1, C, self.k_size)[:, :, ::-1], [(0, 0), (0, 0), (0, 0), (0, C)])
        diagonals = rows.reshape(B, -1, C * (width + 1))[..., : C * width].reshape(B, -1, C, width).sum(2)
        queries, keys = self.positions(i, j)
        distance = keys[0] - queries[:, -1] + jnp.arange(width)  # [B, width]
        assert self.problem.buckets is not None
        one_hot = jax.nn.one_hot(self._bucket(distance), self.problem.buckets.n, dtype=jnp.float32)
        return product("bnd,bdz->nz", diagonals, one_hot)

    def _bucket(self, distance: jax.Array) -> jax.Array:
        assert self.problem.buckets is not None
        return bucket_of(self.problem.buckets, distance)


def make_tiles(problem: AttentionProblem, q_size: int, k_size: int, operands: Operands) -> _Tiles:
    q_segments, k_segments, visible_to = operands.q_segments, operands.k_segments, operands.visible_to
    return _Tiles(
        problem,
        q_size,
        k_size,
        operands.q_offset,
        None if q_segments is None else _cut(q_segments, q_size),
        None if k_segments is None else _cut(k_segments, k_size),
        operands.alibi_slopes,
        operands.bias_table,
        None if visible_to is None else _cut(visible_to, q_size),
        None if visible_to is None else least_and_most(visible_to, q_size)[1].max(0),
    )


def _bounds(start: Place, stop: Place) -> tuple[jax.Array, jax.Array]:
    """Of a loop, which takes two of one type: with jax_enable_x64 they are a mixture."""
    return jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)


def _zero(arrays: Any) -> jax.Array:
    """Where loops start: inside `shard_map` a carry must vary over every mesh axis that what is added to it does."""
    return sum((jnp.zeros_like(x[(0,) * x.ndim], jnp.float32) for x in jax.tree.leaves(arrays)), jnp.float32(0))


def capped(products: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Scores out of float32 products: queries scaled in bfloat16 would lose up to 2^-9 of every score."""
    scores = products * scale
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def bucket_of(buckets: Buckets, distance: jax.Array) -> jax.Array:
    """The bucket of each distance, key position - query position: int32 in distance's shape."""
    (_, lowest), *steps = buckets.steps()
    bucket = jnp.full_like(distance, lowest)
    for start, number in steps:
        bucket = jnp.where(distance >= start, number, bucket)
    return bucket


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # Left to itself a TPU rounds float32 to bfloat16 for products, and a GPU to 10 bits.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32, precision=precision)


def _cut(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    """[B, length, ...] to [blocks, B, size, ...], padded at the end."""
    missing = -x.shape[1] % size
    if missing:
        x = jnp.pad(x, [(0, missing if dim == 1 else 0) for dim in range(x.ndim)], constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _rows(problem: AttentionProblem, x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    """[B, T, N, H] to [q blocks, B, K, R, H]: one matrix for all heads of a key head, so that a step is one product."""
    B, T, _, H = x.shape
    blocks = _cut(x.reshape(B, T, problem.K, problem.group, H), size, fill)
    return blocks.transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, problem.K, problem.group * size, H)


def _from_rows(problem: AttentionProblem, x: jax.Array) -> jax.Array:
    """[q blocks, B, K, R, H] to [B, T, N, H]."""
    n_blocks, B, K, R, H = x.shape
    x = x.reshape(n_blocks, B, K, problem.group, R // problem.group, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, problem.N, H)[:, : problem.T]


def _columns(x: jax.Array, size: int) -> jax.Array:
    """[B, S, K, H] to [k blocks, B, K, C, H]."""
    return _cut(x, size).swapaxes(2, 3)


def _from_columns(x: jax.Array, length: int) -> jax.Array:
    """[k blocks, B, K, C, H] to [B, S, K, H]."""
    n_blocks, B, K, C, H = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, n_blocks * C, K, H)[:, :length]
