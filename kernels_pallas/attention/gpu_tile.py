"""One tile of scores of the backward kernels for Hopper: what a warpgroup computes of it between two products.

A tile is [64, rows]: 64 rows of the side that the warpgroup keeps, in the layout of a wgmma result.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.problem import AttentionProblem
from kernels_pallas.compat import load_row

ROWS = 64
"""Rows that a warpgroup keeps: what one wgmma instruction multiplies."""

LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """Where a tile of scores lies, and what decides its values beside q and k."""

    q_dim: int  # the dim of the tile along which queries run
    q_first: Any  # position
    k_first: Any
    rows: int  # in the tile's second dim; the first has ROWS
    q_marks: Any  # of its queries, in shared memory
    k_marks: Any
    slope: Any


def probabilities(problem: AttentionProblem, tile: Tile, raw: Any, lse: Any) -> tuple[Any, Any]:
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
        q_pos, k_pos = _spread(tile, 0)
        scores -= tile.slope * LOG2_E * jnp.abs(q_pos - k_pos).astype(jnp.float32)
    p = jnp.exp2(scores - along(lse, shape, tile.q_dim))
    p = _hide(problem, tile, p)
    return p, p if derivative is None else p * derivative


def _hide(problem: AttentionProblem, tile: Tile, p: Any) -> Any:
    """p with 0 where the query may not see the key."""
    n_q, n_k = (ROWS, tile.rows) if tile.q_dim == 0 else (tile.rows, ROWS)
    k_last = tile.k_first + n_k - 1

    def masked() -> Any:
        q_pos, k_pos = _spread(tile, 0)
        return jnp.where(problem.mask.visible(q_pos, k_pos) & (k_pos < problem.S), p, 0.0)

    covered = problem.mask.covers(tile.q_first, tile.q_first + n_q - 1, tile.k_first, k_last) & (k_last < problem.S)
    p = lax.cond(covered, lambda: p, masked)
    if problem.segments:
        q_segments, k_segments = _spread(tile, 1)
        p = jnp.where(q_segments == k_segments, p, 0.0)
    return p


def _spread(tile: Tile, mark: int) -> tuple[Any, Any]:
    """A mark of the query and of the key of each element of a tile.

    From shared memory even where they are mere counts: these would be computed before the loop, and held in registers
    that the sums need.
    """
    return tuple(
        along(load(marks.at[mark], 1 - dim), (ROWS, tile.rows), dim)
        for marks, dim in ((tile.q_marks, tile.q_dim), (tile.k_marks, 1 - tile.q_dim))
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
