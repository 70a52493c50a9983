"""Grouped products as XLA's own `ragged_dot`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped.problem import GroupedBlocks, GroupedProblem
from kernels_pallas.targets import Target


def unsupported(problem: GroupedProblem, target: Target) -> str | None:
    """Nothing is."""
    return None


def default_blocks(problem: GroupedProblem, target: Target) -> GroupedBlocks | None:
    """None: the compiler cuts the products."""
    return None


def forward(
    problem: GroupedProblem,
    blocks: GroupedBlocks | None,
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    interpret: object = None,
) -> jax.Array:
    """[M, F] in x's dtype."""
    return _rows_by_weights(x, w, sizes, 1)


def row_gradient(
    problem: GroupedProblem,
    blocks: GroupedBlocks | None,
    dy: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    interpret: object = None,
) -> jax.Array:
    """dx [M, D] in dy's dtype for the cotangent dy [M, F]."""
    return _rows_by_weights(dy, w, sizes, 2)


def weight_gradient(
    problem: GroupedProblem,
    blocks: GroupedBlocks | None,
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
    *,
    interpret: object = None,
) -> jax.Array:
    """dw [E, D, F] in problem.weight_dtype."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
    )
    x, dy = only_grouped(x, sizes), only_grouped(dy, sizes)
    return lax.ragged_dot_general(x, dy, sizes, dims, preferred_element_type=problem.weight_dtype)


def only_grouped(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """The rows with 0 for those of no group."""
    grouped = jnp.arange(rows.shape[0])[:, None] < sizes.sum()
    return jnp.where(grouped, rows, jnp.zeros_like(rows))


def _rows_by_weights(rows: jax.Array, w: jax.Array, sizes: jax.Array, axis: int) -> jax.Array:
    """Each row times its group's matrix, summed over the matrices' axis `axis` (1 or 2)."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (axis,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
    )
    out = lax.ragged_dot_general(rows, w, sizes, dims, preferred_element_type=rows.dtype)
    # What a backend leaves in the rows of no group is its own affair.
    return only_grouped(out, sizes)
