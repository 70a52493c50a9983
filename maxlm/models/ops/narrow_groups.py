"""Products of experts in 8 bits: rows sorted by group, each times the matrix of its group.

They are XLA products of blocks of rows (`kernels_pallas/grouped/loop.py`) on every chip: the kernels have no 8 bits,
and the compiler for GPUs makes of `ragged_dot` a product of each row with each matrix. Scales are made with each
product, on a mesh by each device for what it has.
"""

from __future__ import annotations

import functools
from typing import assert_never

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.grouped.loop import rows_by_groups, sums_of_groups
from maxlm.config import Float8Products, Int8Products
from maxlm.models.weights.narrow import E4M3, E5M2, float8, whole_numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def narrow_grouped(products: Int8Products | Float8Products, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """As `kernels_pallas.grouped_matmul`, with what it says of rows of no group, and of the result's name.

    Args:
        products: which numbers are multiplied.
        x: [M, D], sorted by group.
        w: [E, D, F].
        sizes: int32 [E], of the groups.

    Returns:
        [M, F] in x's dtype. The gradient of w is in w's dtype.
    """
    return _fwd(products, x, w, sizes)[0]


_Kept = tuple[jax.Array, jax.Array, jax.Array]


def _fwd(
    products: Int8Products | Float8Products, x: jax.Array, w: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, _Kept]:
    x = _only_grouped(x, sizes)  # the others need not be numbers, and would be in the scale
    y = _by_groups(products, x, w, sizes, 1)
    return checkpoint_name(y.astype(x.dtype), "grouped_out"), (x, w, sizes)


def _bwd(products: Int8Products | Float8Products, kept: _Kept, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    g = _only_grouped(g, sizes)
    dx = _by_groups(products, g, w, sizes, 2)
    match products:
        case Int8Products():
            dw = sums_of_groups(x, g, sizes)
        case Float8Products():
            (rows, of_rows), (slope, of_slope) = float8(x, E4M3), float8(g, E5M2)
            dw = sums_of_groups(rows, slope, sizes) * (of_rows * of_slope)
        case _:
            assert_never(products)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


narrow_grouped.defvjp(_fwd, _bwd)


def _only_grouped(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < sizes.sum(), rows, 0)


def _by_groups(
    products: Int8Products | Float8Products, rows: jax.Array, w: jax.Array, sizes: jax.Array, axis: int
) -> jax.Array:
    """float32: each row times its group's matrix, summed over axis 1 of the matrices (forward) or 2 (backward)."""
    match products:
        case Int8Products():
            (left, of_rows), (right, of_outputs) = whole_numbers(rows, (1,)), whole_numbers(w, (axis,))
            y = rows_by_groups(left, right, sizes, axis - 1).astype(jnp.float32)
            group = (jnp.arange(rows.shape[0])[:, None] >= jnp.cumsum(sizes)).sum(-1)
            y *= of_rows * of_outputs.squeeze(axis)[group]  # beyond the last group those of the last
        case Float8Products():
            (left, of_all_rows), (right, of_w) = float8(rows, E4M3 if axis == 1 else E5M2), float8(w, E4M3)
            y = rows_by_groups(left, right, sizes, axis - 1) * (of_all_rows * of_w)
        case _:
            assert_never(products)
    return y
