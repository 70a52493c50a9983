"""Gated linear units as plain XLA products: the body that runs everywhere and that the kernels must equal.

x and every [M, ...] array may have more leading dims than one: they stay as they are, and so does the compiler's
sharding of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.glu.activations import activate, activate_with_slope
from kernels_pallas.glu.problem import GluBlocks, GluProblem
from kernels_pallas.targets import Target


def unsupported(problem: GluProblem, target: Target) -> str | None:
    """Nothing is."""
    return None


def default_blocks(problem: GluProblem, target: Target) -> GluBlocks | None:
    """None: the compiler cuts the products."""
    return None


def forward(
    problem: GluProblem,
    blocks: GluBlocks | None,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    *,
    interpret: object = None,
) -> tuple[jax.Array, ...]:
    """(h,) or, with problem.save == "ag", (h, a, g): [..., F] each, in x's dtype."""
    a, g = _add(project(x, w_gate), b_gate), _add(project(x, w_up), b_up)
    h = gated(problem, a, g)
    return (h, a, g) if problem.save == "ag" else (h,)


def pre_gradients(
    problem: GluProblem,
    blocks: GluBlocks | None,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    dh: jax.Array,
    *,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients (da, dg) for the cotangent dh, with a and g computed again: [..., F] each, in x's dtype."""
    da, dg, _ = _recomputed(problem, x, w_gate, w_up, b_gate, b_up, dh)
    return da, dg


def mlp_pre_gradients(
    problem: GluProblem,
    blocks: GluBlocks | None,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    dy: jax.Array,
    *,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(da, dg, h) for the cotangent dy [..., Dout] of h @ w_down: [..., F] each, in x's dtype."""
    return _recomputed(problem, x, w_gate, w_up, b_gate, b_up, project(dy, w_down, 1))


def project(x: jax.Array, w: jax.Array, over: int = 0) -> jax.Array:
    """Sum x over its last dim with dim `over` of w, in x's dtype: one dot_general, as remat policies look for."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (over,)), ((), ())), preferred_element_type=x.dtype)


def gated(problem: GluProblem, a: jax.Array, g: jax.Array) -> jax.Array:
    """act(a) * g, in float32 or wider and rounded once to the dtype of a."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return (activate(problem.act, a.astype(wide), problem.beta) * g.astype(wide)).astype(a.dtype)


def gated_gradients(problem: GluProblem, a: jax.Array, g: jax.Array, dh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of `gated` for the cotangent dh, each rounded once."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    value, slope = activate_with_slope(problem.act, a.astype(wide), problem.beta)
    dh = dh.astype(wide)
    return (dh * g.astype(wide) * slope).astype(a.dtype), (dh * value).astype(a.dtype)


def _recomputed(
    problem: GluProblem,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    dh: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Without the barrier XLA would see the products of the forward pass in these, and keep those after all.
    x, dh = lax.optimization_barrier((x, dh))
    a, g = _add(project(x, w_gate), b_gate), _add(project(x, w_up), b_up)
    return *gated_gradients(problem, a, g, dh), gated(problem, a, g)


def _add(product: jax.Array, bias: jax.Array | None) -> jax.Array:
    return product if bias is None else product + bias.astype(product.dtype)
