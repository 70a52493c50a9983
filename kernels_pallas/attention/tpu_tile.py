"""What the Mosaic TPU attention kernels share: which blocks a kernel visits, and one tile of scores.

Every kernel holds one outer block and walks over the inner blocks that it needs. Forward and dq: outer are queries,
inner keys; dk and dv: outer are keys, inner queries. A tile is always [outer rows, inner columns], so that what belongs
to the inner block is a row of the tile and needs no transposing.

Scores are kept in base 2 (times log2 e), because the chip computes exp2: a multiplication less for each element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import AttentionProblem, Operands, first_and_last, least_and_most
from kernels_pallas.masks import END, Bound, Interval, Mask, Place

LOG2E = math.log2(math.e)

Scalars = dict[str, Any]
"""What a kernel knows before it starts, in scalar memory: "offset" [B], the position of each row's first query. With
`visible_to` also, flat over rows and blocks: "least" and "most" of each block of queries, and "start" and "stop", the
inner blocks that each outer block needs by it."""

Ranges = list[tuple[Place, Place]]
"""Inner blocks [start, stop), one range for each interval of the mask; they may overlap."""


@dataclass(frozen=True)
class Walk:
    """The inner blocks that each outer block needs, in ascending order."""

    problem: AttentionProblem
    q: int
    """Queries in a block."""
    k: int
    """Keys in a block."""
    outer_is_q: bool

    @property
    def outer(self) -> int:
        return self.q if self.outer_is_q else self.k

    @property
    def inner(self) -> int:
        return self.k if self.outer_is_q else self.q

    @property
    def outer_length(self) -> int:
        return self.problem.T if self.outer_is_q else self.problem.S

    @property
    def inner_length(self) -> int:
        return self.problem.S if self.outer_is_q else self.problem.T

    @property
    def n_outer(self) -> int:
        return pl.cdiv(self.outer_length, self.outer)

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many inner blocks each outer block needs; an upper bound where the offset is known only at run time."""
        if self.problem.q_offset is None:
            n_inner = pl.cdiv(self.inner_length, self.inner)
            spans = [self._span(interval) for interval in self.problem.mask.intervals]
            # A span that begins anywhere in a block reaches one block more than one that is aligned.
            blocks = sum(n_inner if span is None else (span - 2) // self.inner + 2 for span in spans)
            return [min(n_inner, blocks)] * self.n_outer
        return [_count(self._ranges(self.problem.q_offset, i)) for i in range(self.n_outer)]

    @property
    def steps(self) -> int:
        """The length of the grid's last dimension: the most inner blocks that any outer block needs."""
        return max(1, *self.counts)

    @property
    def area(self) -> int:
        """Elements of all tiles that are computed, for one row and head."""
        return sum(self.counts) * self.q * self.k

    def visit(self, scalars: Scalars, b: Any, i: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inner block that outer block i of row b visits at a step, and whether there is one.

        After the last block that is needed the answer stays at it, so that nothing more is fetched.
        """
        block, seen, end = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        ranges = _in_order(self._ranges(scalars["offset"][b], i))
        if self.problem.visible_to:
            first, last = (scalars[name][b * self.n_outer + i] for name in ("start", "stop"))
            ranges = [(jnp.maximum(start, first), jnp.minimum(stop, last)) for start, stop in ranges]
        for start, stop in ranges:
            start = jnp.maximum(start, end)
            n = jnp.maximum(stop - start, 0)
            block = jnp.where((step >= seen) & (n > 0), start + jnp.minimum(step - seen, n - 1), block)
            seen, end = seen + n, jnp.maximum(end, stop)
        return block, step < seen

    def _ranges(self, offset: Place, i: Place) -> Ranges:
        masks = [Mask((interval,), "") for interval in self.problem.mask.intervals]
        first, last = _extent(i, self.outer, self.outer_length)
        if self.outer_is_q:
            ends = [mask.key_range(offset + first, offset + last) for mask in masks]
        else:
            positions = [mask.query_range(first, last) for mask in masks]
            ends = [(start - offset, stop - offset) for start, stop in positions]
        return [self._blocks(_clip(a, self.inner_length), _clip(b, self.inner_length)) for a, b in ends]

    def _blocks(self, start: Place, stop: Place) -> tuple[Place, Place]:
        """The inner blocks that hold the indices [start, stop)."""
        first, end = start // self.inner, pl.cdiv(stop, self.inner)
        if isinstance(start, int) and isinstance(stop, int):
            return first, end if start < stop else first
        return first, jnp.where(start < stop, end, first)

    def _span(self, interval: Interval) -> int | None:
        """The most positions from the first to the last that a whole outer block needs; None: no bound."""

        def width(start: Bound, stop: Bound) -> int | None:
            if stop.step == 0 and self.outer_is_q:
                return stop.offset
            if start.step == 0 or stop.step == 0:
                return None
            return self.outer - 1 + stop.offset - start.offset + start.step - 1

        pairs = [(a, b) for a in (*interval.starts, Bound(0, 0)) for b in interval.stops]
        return min((w for a, b in pairs if (w := width(a, b)) is not None), default=None)


def _extent(i: Place, size: int, length: int) -> tuple[Place, Place]:
    """First and last index in block i of `size`, where the last block may be ragged."""
    end = (i + 1) * size
    return i * size, (min(end, length) if isinstance(i, int) else jnp.minimum(end, length)) - 1


def _clip(x: Place, length: int) -> Place:
    return max(0, min(x, length)) if isinstance(x, int) else jnp.clip(x, 0, length)


def _count(ranges: Ranges) -> int:
    """How many blocks the ranges cover together."""
    count: Any = 0
    end: Any = 0
    for start, stop in sorted(ranges):
        count += max(0, stop - max(start, end))
        end = max(end, stop)
    return count


def _in_order(ranges: Ranges) -> Ranges:
    """Sorted by where they start (a bubble sort of scalars; masks have one to three intervals)."""
    ranges = list(ranges)
    for last in range(len(ranges) - 1, 0, -1):
        for n in range(last):
            (a, a_stop), (b, b_stop) = ranges[n], ranges[n + 1]
            swap = a > b
            ranges[n] = jnp.where(swap, b, a), jnp.where(swap, b_stop, a_stop)
            ranges[n + 1] = jnp.where(swap, a, b), jnp.where(swap, a_stop, b_stop)
    return ranges


@dataclass(frozen=True)
class Tile:
    """One tile of scores, inside a kernel: where it lies, and what is done to it."""

    walk: Walk
    scalars: Scalars
    b: jax.Array
    """The row of the batch."""
    head: jax.Array
    """The query head."""
    i: jax.Array
    """The outer block."""
    j: jax.Array
    """The inner block."""
    refs: dict[str, Any]

    @property
    def problem(self) -> AttentionProblem:
        return self.walk.problem

    @property
    def offset(self) -> jax.Array:
        """Position of the row's first query."""
        return self.scalars["offset"][self.b]

    def _ends(self, which: str) -> jax.Array:
        """The "least" or "most" of the tile's queries' `visible_to`."""
        n_blocks = pl.cdiv(self.problem.T, self.walk.q)
        return self.scalars[which][self.b * n_blocks + (self.i if self.walk.outer_is_q else self.j)]

    def start(self) -> None:
        """Turn what every tile of the outer block needs as a column, once."""
        for name in ("segments", "ends"):
            if f"outer_{name}" in self.refs:
                self.refs[f"outer_{name}"][...] = column(self.refs[f"outer_{name}_row"][...])

    def _extents(self) -> tuple[Place, Place, Place, Place]:
        """Positions of the first and last query and of the first and last key that the tile has."""
        outer = _extent(self.i, self.walk.outer, self.walk.outer_length)
        inner = _extent(self.j, self.walk.inner, self.walk.inner_length)
        (first_q, last_q), (first_k, last_k) = (outer, inner) if self.walk.outer_is_q else (inner, outer)
        return self.offset + first_q, self.offset + last_q, first_k, last_k

    def _positions(self) -> tuple[jax.Array, jax.Array]:
        """Positions of queries and of keys, one as a column and one as a row of the tile."""
        outer = self.i * self.walk.outer + lax.broadcasted_iota(jnp.int32, (self.walk.outer, 1), 0)
        inner = self.j * self.walk.inner + lax.broadcasted_iota(jnp.int32, (1, self.walk.inner), 1)
        q, k = (outer, inner) if self.walk.outer_is_q else (inner, outer)
        return self.offset + q, k

    def _distances(self) -> jax.Array:
        q, k = self._positions()
        return k - q

    def when_needed(self, needed: jax.Array, add: Callable[[bool], None]) -> None:
        """Call add(masked) if the tile is needed; masked is False where every query of it sees every key of it."""
        p = self.problem
        _, _, first_k, last_k = self._extents()
        if p.visible_to and not self.walk.outer_is_q:
            needed &= self._ends("most") > first_k  # of the blocks between the first that is needed and the last
        if p.segments:
            pl.when(needed)(lambda: add(True))
            return
        clear = p.mask.covers(*self._extents())
        if p.visible_to:
            clear &= self._ends("least") > last_k
        if p.T % self.walk.q or p.S % self.walk.k:
            clear &= self._is_whole()
        pl.when(needed & clear)(lambda: add(False))
        pl.when(needed & jnp.logical_not(clear))(lambda: add(True))

    def _is_whole(self) -> jax.Array:
        """Whether both blocks lie inside the arrays; what lies beyond is arbitrary, in the simulator NaN."""
        walk = self.walk
        return ((self.i + 1) * walk.outer <= walk.outer_length) & ((self.j + 1) * walk.inner <= walk.inner_length)

    def seen(self) -> jax.Array:
        """Which elements count: boolean, the whole tile."""
        p, (q, k) = self.problem, self._positions()
        seen = p.mask.visible(q, k)
        if p.T % self.walk.q:
            seen &= q < self.offset + p.T
        if p.S % self.walk.k:
            seen &= k < p.S
        if p.segments:
            seen &= self.refs["outer_segments"][...] == self.refs["inner_segments"][...]
        if p.visible_to:
            seen &= k < self.refs["outer_ends" if self.walk.outer_is_q else "inner_ends"][...]
        return seen

    def inner_rows(self, x: jax.Array) -> jax.Array:
        """The inner block [inner, width] with zeros beyond the array's end: in a product, 0 x NaN would be NaN."""
        if self.walk.inner_length % self.walk.inner == 0:
            return x
        rows = self.j * self.walk.inner + lax.broadcasted_iota(jnp.int32, (self.walk.inner, 1), 0)
        # By way of float32: not every chip has 16-bit vector selects.
        return jnp.where(rows < self.walk.inner_length, x.astype(jnp.float32), 0.0).astype(x.dtype)

    def scores(self, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """From q.k the scores in base 2, unmasked, and with a soft cap its slope at each."""
        p = self.problem
        slope = None
        if p.soft_cap is None:
            scores = product * (p.scale * LOG2E)
        else:
            bent = jnp.tanh(product * (p.scale / p.soft_cap))
            scores, slope = bent * (p.soft_cap * LOG2E), 1 - bent * bent
        if p.alibi:
            scores -= self.refs["slopes"][self.head] * LOG2E * jnp.abs(self._distances()).astype(jnp.float32)
        if p.buckets is not None:
            scores += self._bias()
        return scores, slope

    def _bias(self) -> jax.Array:
        """The learned bias in base 2, from the table's row in scalar memory.

        Only steps inside the tile cost anything: far from the diagonal all of it lies in one bucket.
        """
        steps, table, bias = self.refs["steps"], self.refs["table"], self.refs["bias"]
        start, stop = self._steps_inside()
        value = lambda n: table[self.head, steps[1, n]] * LOG2E
        bias[...] = jnp.full(bias.shape, value(start))

        @pl.loop(start + 1, stop)
        def _add_step(n: jax.Array) -> None:
            bias[...] = jnp.where(self._distances() >= steps[0, n], value(n), bias[...])

        return bias[...]

    def add_bias_gradient(self, ds: jax.Array, total: Any) -> None:
        """Add to total [1, steps of the buckets] the sums of ds over each step's elements."""
        steps = self.refs["steps"]

        @pl.loop(*self._steps_inside())
        def _add_step(n: jax.Array) -> None:
            distances = self._distances()
            part = jnp.where((steps[0, n] <= distances) & (distances < steps[0, n + 1]), ds, 0.0)
            part = part.sum(0, keepdims=True).sum(1, keepdims=True)
            total[...] += jnp.where(lax.broadcasted_iota(jnp.int32, total.shape, 1) == n, part, 0.0)

    def _steps_inside(self) -> tuple[jax.Array, jax.Array]:
        """The steps of the buckets [start, stop) that the tile's distances reach."""
        first_q, last_q, first_k, last_k = self._extents()
        distances = [] if self.problem.buckets is None else [start for start, _ in self.problem.buckets.steps()]
        reached = lambda last: sum((last >= distance).astype(jnp.int32) for distance in distances)
        return reached(first_k - last_q) - 1, reached(last_k - first_q)


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over one dim of each, accumulated in float32; float32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


At = Callable[..., tuple[Any, ...]]
"""From the grid's indices and the scalars: which row of the batch, head and block."""


def wide(at: At, rows: int, width: int) -> pl.BlockSpec:
    """Blocks [rows, width] of an array [B, heads, length, width]."""

    def index(*ids: Any) -> tuple[Any, ...]:
        return *at(*ids), 0

    return pl.BlockSpec((None, None, rows, width), index)


def row(at: At, rows: int) -> pl.BlockSpec:
    """Blocks [1, rows] of an array [B, heads, 1, length]."""

    def index(*ids: Any) -> tuple[Any, ...]:
        b, head, block = at(*ids)
        return b, head, 0, block

    return pl.BlockSpec((None, None, 1, rows), index)


def inputs(walk: Walk, operands: Operands, q_at: At, k_at: At) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """Arrays and specs of what every kernel reads; q_at and k_at say which blocks of queries and keys."""
    p = walk.problem
    one_head = lambda at: lambda *ids: (at(*ids)[0], 0, at(*ids)[2])
    found: dict[str, Any] = {
        "q": (operands.q.swapaxes(1, 2), wide(q_at, walk.q, p.H)),
        "k": (operands.k.swapaxes(1, 2), wide(k_at, walk.k, p.H)),
        "v": (operands.v.swapaxes(1, 2), wide(k_at, walk.k, p.Hv)),
    }
    if operands.q_segments is not None and operands.k_segments is not None:
        q = operands.q_segments[:, None, None, :], row(one_head(q_at), walk.q)
        k = operands.k_segments[:, None, None, :], row(one_head(k_at), walk.k)
        found["outer_segments_row"], found["inner_segments"] = (q, k) if walk.outer_is_q else (k, q)
    if operands.visible_to is not None:
        name = "outer_ends_row" if walk.outer_is_q else "inner_ends"
        found[name] = operands.visible_to[:, None, None, :], row(one_head(q_at), walk.q)
    if operands.alibi_slopes is not None:
        found["slopes"] = operands.alibi_slopes, pl.BlockSpec(memory_space=pltpu.SMEM)
    if p.buckets is not None:
        found["table"] = operands.bias_table, pl.BlockSpec(memory_space=pltpu.SMEM)
        distances, buckets = zip(*p.buckets.steps(), (END, 0), strict=True)
        found["steps"] = jnp.array([distances, buckets], jnp.int32), pl.BlockSpec(memory_space=pltpu.SMEM)
    return found


def scalars(walk: Walk, operands: Operands) -> Scalars:
    """What the kernel's walk needs before it starts."""
    found = {"offset": operands.q_offset}
    if operands.visible_to is not None:
        p = walk.problem
        least, most = least_and_most(operands.visible_to, walk.q)
        if walk.outer_is_q:
            stop = pl.cdiv(jnp.clip(most, 0, p.S), walk.k)
            start = jnp.zeros_like(stop)
        else:
            first_keys = jnp.arange(walk.n_outer) * walk.k
            start, stop = first_and_last(most[:, None, :] > first_keys[:, None])
        found |= {"least": least, "most": most, "start": start, "stop": stop}
    return {name: x.reshape(-1) for name, x in found.items()}


def scratch(walk: Walk) -> dict[str, Any]:
    """What `Tile` needs of VMEM."""
    p = walk.problem
    found = {}
    if p.segments:
        found["outer_segments"] = pltpu.VMEM((walk.outer, 1), jnp.int32)
    if p.visible_to and walk.outer_is_q:
        found["outer_ends"] = pltpu.VMEM((walk.outer, 1), jnp.int32)
    if p.buckets is not None:
        found["bias"] = pltpu.VMEM((walk.outer, walk.inner), jnp.float32)
    return found


def column(row: jax.Array) -> jax.Array:
    """[1, n] to [n, 1]."""
    return row.swapaxes(0, 1)


def fit(name: str, block: int, length: int, interpret: Any) -> int:
    """The block of a dimension: all of it where the block would be larger.

    Raises:
        ValueError: not a multiple of the chip's 128 lanes (the interpreters take any).
    """
    if block < 1 or (block % 128 and block < length and not interpret):
        raise ValueError(
            f"blocks.{name} = {block} must be a multiple of 128, or at least the length, {length}; "
            f"use {max(128, round(block / 128) * 128)}"
        )
    return min(block, length)
