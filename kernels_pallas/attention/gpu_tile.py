"""What the kernels for Hopper share: the sizes, which blocks of the other side a block needs, and tiles of scores.

A tile is [64, rows]: 64 rows of the side that the warpgroup keeps, in the layout of a wgmma result. What is computed of
one between two products is here for the backward kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.problem import AttentionProblem, first_and_last, least_and_most
from kernels_pallas.compat import load_row

ROWS = 64
"""Rows that a warpgroup keeps: what one wgmma instruction multiplies."""

WARPGROUPS = 2
"""Warpgroups that compute, beside the one that copies."""

LOG2_E = math.log2(math.e)


def blocks_sharing_ids(ids: jax.Array, size: int, other_ids: jax.Array, other_size: int) -> jax.Array:
    """From which to which block of the other side each block may have segment ids in common with it.

    A packed row is thus cut along its documents: their ids lie in order, and the blocks of others are not fetched.

    Args:
        ids: [B, blocks * size] int32.
        size: ids in a block.
        other_ids: [B, other blocks * other_size] int32.
        other_size: ids in a block of the other side.

    Returns:
        int32 [B, blocks, 2]: the blocks [start, stop), and (0, 0) where there are none.
    """
    own = ids.reshape(ids.shape[0], -1, 1, size)
    other = other_ids.reshape(other_ids.shape[0], 1, -1, other_size)
    overlap = (other.min(3) <= own.max(3)) & (other.max(3) >= own.min(3))
    return jnp.stack(first_and_last(overlap), 2)


def blocks_reached(ends: jax.Array, size: int, S: int, k_size: int) -> jax.Array:
    """The key blocks [0, stop) of which some query of each block sees a key, as its ends say: int32 [B, blocks, 2]."""
    stop = -(-jnp.clip(least_and_most(ends, size)[1], 0, S) // k_size)
    return jnp.stack([jnp.zeros_like(stop), stop], 2)


def both(ranges: jax.Array, others: jax.Array) -> jax.Array:
    """What two arrays of ranges [..., 2] have in common."""
    start = jnp.maximum(ranges[..., 0], others[..., 0])
    return jnp.stack([start, jnp.maximum(start, jnp.minimum(ranges[..., 1], others[..., 1]))], -1)


class BackwardInputs(NamedTuple):
    """Inputs of both backward kernels, padded to whole blocks."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    d_out: Any  # [B, T, N, Hv]
    statistics: Any  # [B, N, 2, T] float32: lse to base 2, delta
    q_marks: Any  # [B, 1 to 3, T] int32: position, and what there is of segment and end of the keys that it sees
    k_marks: Any  # [B, 1 or 2, S] int32: position, and segment
    q_offset: Any  # [B] int32
    slopes: Any  # [N] float32, or None
    ranges: Any  # [B, blocks, 2] int32: the blocks of the streamed side [start, stop) that a grid block needs


def pad(x: jax.Array, dim: int, amount: int, value: float = 0) -> jax.Array:
    return jnp.pad(x, [(0, amount if d == dim else 0) for d in range(x.ndim)], constant_values=value) if amount else x


def whole_width(width: int) -> int:
    """To whole swizzle rows of shared memory."""
    return -(-width // 64) * 64


def marks_of(positions: jax.Array, *others: jax.Array | None) -> jax.Array:
    """Positions [B, length] and those of the others that are there, their last repeated up to the length."""
    whole = (jnp.pad(x, ((0, 0), (0, positions.shape[1] - x.shape[1])), "edge") for x in others if x is not None)
    return jnp.stack([positions, *whole], 1)


def query_blocks(problem: AttentionProblem, arrays: BackwardInputs, kept: int, rows: int) -> jax.Array:
    """The blocks of queries [start, stop) that see some key of each block of `kept` keys: int32 [B, blocks, 2]."""
    first = jnp.arange(0, arrays.k.shape[1], kept)
    start, stop = problem.mask.query_range(first, first + kept - 1)
    offset = arrays.q_offset[:, None]
    ranges = _blocks((problem.B, len(first)), start - offset, stop - offset, problem.T, rows)
    if problem.visible_to:
        _, most = least_and_most(arrays.q_marks[:, -1], rows)
        ranges = both(ranges, jnp.stack(first_and_last(most[:, None] > first[:, None]), -1))
    return _same_segments(problem, ranges, arrays.k_marks, kept, arrays.q_marks, rows)


def key_blocks(problem: AttentionProblem, arrays: BackwardInputs, kept: int, rows: int) -> jax.Array:
    """The blocks of keys [start, stop) that some query of each block of `kept` queries sees: int32 [B, blocks, 2]."""
    first = arrays.q_offset[:, None] + jnp.arange(0, arrays.q.shape[1], kept)
    start, stop = problem.mask.key_range(first, first + kept - 1)
    ranges = _blocks(first.shape, start, stop, problem.S, rows)
    if problem.visible_to:
        ranges = both(ranges, blocks_reached(arrays.q_marks[:, -1], kept, problem.S, rows))
    return _same_segments(problem, ranges, arrays.q_marks, kept, arrays.k_marks, rows)


def _blocks(shape: tuple[int, ...], start: Any, stop: Any, length: int, rows: int) -> jax.Array:
    start, stop = (jnp.broadcast_to(jnp.clip(x, 0, length), shape) for x in (start, stop))
    return jnp.stack([start // rows, jnp.maximum(start // rows, -(-stop // rows))], -1)


def _same_segments(
    problem: AttentionProblem,
    ranges: jax.Array,
    kept_marks: jax.Array,
    kept: int,
    streamed_marks: jax.Array,
    rows: int,
) -> jax.Array:
    """Ranges without the blocks at their ends that can hold no segment of the kept block."""
    if not problem.segments:
        return ranges
    return both(ranges, blocks_sharing_ids(kept_marks[:, 1], kept, streamed_marks[:, 1], rows))


class GpuTile(NamedTuple):
    """Where a tile of scores lies, and what decides its values beside q and k."""

    q_dim: int  # the dim of the tile along which queries run
    q_first: Any  # position
    k_first: Any
    rows: int  # in the tile's second dim; the first has ROWS
    q_marks: Any  # of its queries, in shared memory
    k_marks: Any
    slope: Any


def probabilities(problem: AttentionProblem, tile: GpuTile, raw: Any, lse: Any) -> tuple[Any, Any]:
    """p, and p times the derivative of the soft cap, from a tile of q k^T."""
    if problem.soft_cap is None:
        scores = raw * (problem.scale * LOG2_E)
        derivative = None
    else:
        # tanh by exp2, because the hardware's own has an error of 2^-11, times the cap.
        tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(raw * (2.0 * LOG2_E * problem.scale / problem.soft_cap)))
        scores = tanh * (problem.soft_cap * LOG2_E)
        derivative = 1.0 - tanh * tanh
    shape = (ROWS, tile.rows)
    if tile.slope is not None:
        q_pos, k_pos = _spread(tile, 0, 0)
        scores -= tile.slope * LOG2_E * jnp.abs(q_pos - k_pos).astype(jnp.float32)
    p = jnp.exp2(scores - along(lse, shape, tile.q_dim))
    p = _hide(problem, tile, p)
    return p, p if derivative is None else p * derivative


def _hide(problem: AttentionProblem, tile: GpuTile, p: Any) -> Any:
    """p with 0 where the query may not see the key."""
    n_q, n_k = (ROWS, tile.rows) if tile.q_dim == 0 else (tile.rows, ROWS)
    k_last = tile.k_first + n_k - 1

    def masked() -> Any:
        q_pos, k_pos = _spread(tile, 0, 0)
        return jnp.where(problem.mask.visible(q_pos, k_pos) & (k_pos < problem.S), p, 0.0)

    covered = problem.mask.covers(tile.q_first, tile.q_first + n_q - 1, tile.k_first, k_last) & (k_last < problem.S)
    p = lax.cond(covered, lambda: p, masked)
    if problem.segments:
        q_segments, k_segments = _spread(tile, 1, 1)
        p = jnp.where(q_segments == k_segments, p, 0.0)
    if problem.visible_to:
        q_ends, k_pos = _spread(tile, 1 + problem.segments, 0)
        p = jnp.where(k_pos < q_ends, p, 0.0)
    return p


def _spread(tile: GpuTile, q_mark: int, k_mark: int) -> tuple[Any, Any]:
    """A mark of the query and one of the key of each element of a tile.

    From shared memory even where they are mere counts: these would be computed before the loop, and held in registers
    that the sums need.
    """
    return tuple(
        along(load(marks.at[mark], 1 - dim), (ROWS, tile.rows), dim)
        for marks, mark, dim in ((tile.q_marks, q_mark, tile.q_dim), (tile.k_marks, k_mark, 1 - tile.q_dim))
    )


def product(x: Any, y: Any, columns: int) -> Any:
    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(multiply, accumulator(columns))


def accumulator(columns: int) -> Any:
    return plgpu.ACC((ROWS, columns), jnp.float32)


def load(ref: Any, reduced: int) -> Any:
    """A row of numbers in the layout that a tile has once its dim `reduced` is summed away."""
    return load_row(ref, plgpu.Layout.WGMMA.reduce(reduced))


def along(row: Any, shape: tuple[int, ...], dim: int) -> Any:
    return lax.broadcast_in_dim(row, shape, [dim])


def matrix(n: int, rows: int, columns: int, dtype: Any) -> Any:
    """n matrices in shared memory, laid out as wgmma reads them."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((n, rows, columns), dtype, transforms=transforms)
