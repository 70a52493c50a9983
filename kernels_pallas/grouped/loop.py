"""Grouped products as a loop over the groups, and within each over blocks of its rows: plain XLA, for every device.

The work is that of the rows there are, rounded up to whole blocks in each group.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped.problem import GroupedBlocks, GroupedProblem
from kernels_pallas.targets import Family, Target


def unsupported(problem: GroupedProblem, target: Target) -> str | None:
    """Why it cannot be done, or None."""
    if 0 in (problem.M, problem.E):
        return f"M {problem.M}, E {problem.E}: without rows or groups there is nothing to loop over"
    return None


def default_blocks(problem: GroupedProblem, target: Target) -> GroupedBlocks:
    """Columns and depth whole. Of rows, where steps are cheap, few beside those of a group, as its last block is waste.

    An accelerator wants large products, and a GPU waits for the host in every step.
    """
    m, F, D = _rows_of_a_block(problem.M, problem.E, on_cpu=target.family is Family.CPU), problem.F, problem.D
    return GroupedBlocks(m=m, f=F, d=D, m_rows=m, f_rows=F, d_rows=D, m_weights=m, f_weights=F, d_weights=D)


def _rows_of_a_block(M: int, E: int, *, on_cpu: bool) -> int:
    share, least, most = (4, 32, 256) if on_cpu else (1, 128, 2048)
    return min(max(1 << max(M // (share * E), 1).bit_length() - 1, least), most)


def on_chip_bytes(problem: GroupedProblem, blocks: GroupedBlocks) -> int:
    """0: left to the compiler."""
    return 0


def forward(
    problem: GroupedProblem,
    blocks: GroupedBlocks,
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    interpret: object = None,
) -> jax.Array:
    """[M, F] in x's dtype."""
    return _rows_by_weights(x, w, sizes, blocks.m, 0, x.dtype)


def row_gradient(
    problem: GroupedProblem,
    blocks: GroupedBlocks,
    dy: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    interpret: object = None,
) -> jax.Array:
    """dx [M, D] in dy's dtype for the cotangent dy [M, F]."""
    return _rows_by_weights(dy, w, sizes, blocks.m_rows, 1, dy.dtype)


def weight_gradient(
    problem: GroupedProblem,
    blocks: GroupedBlocks,
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
    *,
    interpret: object = None,
) -> jax.Array:
    """dw [E, D, F] in problem.weight_dtype."""
    return _outer_sums(x, dy, sizes, blocks.m_weights, problem.weight_dtype)


def rows_by_groups(rows: jax.Array, w: jax.Array, sizes: jax.Array, axis: int) -> jax.Array:
    """As `grouped_matmul` of 8-bit numbers, without a gradient.

    Args:
        rows: [M, D] (axis 0) or [M, F] (axis 1), int8 or 8-bit floats, sorted by group.
        w: [E, D, F], likewise.
        sizes: int32 [E].
        axis: of a matrix, over which is summed.

    Returns:
        [M, F] or [M, D], float32 of floats and int32 of integers; rows after the last group are 0.
    """
    m = _rows_of_a_block(rows.shape[0], w.shape[0], on_cpu=False)
    return _rows_by_weights(rows, w, sizes, m, axis, _wide(rows))


def sums_of_groups(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """For each group the sum of its rows' outer products: x [M, D], dy [M, F] -> [E, D, F], in float32, or as x where
    that is wider."""
    return _outer_sums(x, dy, sizes, _rows_of_a_block(x.shape[0], sizes.shape[0], on_cpu=False), _wide(x))


def _outer_sums(x: jax.Array, dy: jax.Array, sizes: jax.Array, m: int, dtype: jnp.dtype) -> jax.Array:
    def of_group(e: jax.Array) -> jax.Array:
        def add(first: jax.Array, own: jax.Array, total: jax.Array) -> jax.Array:
            read = lambda rows: jnp.where(own, _slice(rows, first, own.shape[0]), jnp.zeros((), rows.dtype))
            return total + _product(read(x), read(dy), 0, 0)

        zeros = jnp.zeros_like(x, _wide(x), (x.shape[1], dy.shape[1]))
        return _over_blocks(e, sizes, x.shape[0], m, add, zeros).astype(dtype)

    return lax.map(of_group, jnp.arange(sizes.shape[0]))


def _rows_by_weights(rows: jax.Array, w: jax.Array, sizes: jax.Array, m: int, axis: int, dtype: jnp.dtype) -> jax.Array:
    """Each row times its group's matrix, summed over axis `axis` of that."""
    M = rows.shape[0]

    def group(e: jax.Array, out: jax.Array) -> jax.Array:
        def write(first: jax.Array, own: jax.Array, out: jax.Array) -> jax.Array:
            product = _product(_slice(rows, first, own.shape[0]), w[e], 1, axis).astype(dtype)
            kept = jnp.where(own, product, _slice(out, first, own.shape[0]))
            return lax.dynamic_update_slice_in_dim(out, kept, first, 0)

        return _over_blocks(e, sizes, M, m, write, out)

    out = jnp.zeros_like(rows, dtype, (M, w.shape[2 - axis]))
    return lax.fori_loop(0, w.shape[0], group, out)


def _over_blocks(
    e: jax.Array,
    sizes: jax.Array,
    M: int,
    m: int,
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    start: jax.Array,
) -> jax.Array:
    """Fold `step(first row, which of the block's rows are to be done [m, 1], value)` over the blocks of group e."""
    m = min(m, M)
    edge = jnp.cumsum(sizes)[e]
    begin, end = edge - sizes[e], edge

    def block(i: jax.Array, value: jax.Array) -> jax.Array:
        wanted = begin + i * m
        # The last rows of all may not fill a block: it begins earlier then, and has rows that are done already.
        first = jnp.minimum(wanted, M - m)
        rows = first + jnp.arange(m)[:, None]
        return step(first, (rows >= wanted) & (rows < end), value)

    return lax.fori_loop(0, (end - begin + m - 1) // m, block, start)


def _slice(rows: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(rows, first, size, 0)


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=_wide(x))


def _wide(x: jax.Array) -> jnp.dtype:
    """What products of such numbers are summed in."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.dtype(jnp.int32)
    return jnp.promote_types(x.dtype, jnp.float32) if x.dtype.itemsize > 1 else jnp.dtype(jnp.float32)
