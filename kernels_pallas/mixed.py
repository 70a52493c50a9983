"""Products of activations in one format with weights in another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixed_einsum(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(x, w) in x's dtype, where the gradient of w is summed and returned in w's own dtype.

    A weight that comes in bfloat16 thus has its gradient summed over devices in bfloat16, and one that comes in
    float32 in float32, while the products run in x's dtype either way.

    Args:
        subscripts: "x,w->out" in einsum's letters; every letter of x or w alone must be in the output.
        x, w: arrays; w is cast to x's dtype for the product.

    Returns:
        The product in x's dtype, accumulated as wide as the hardware does.
    """
    return jnp.einsum(subscripts, x, w.astype(x.dtype))


def _fwd(subscripts: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not mixed_einsum itself: remat policies look for the product here, and do not look into custom rules.
    return jnp.einsum(subscripts, x, w.astype(x.dtype)), (x, w)


def _bwd(subscripts: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    inputs, out = subscripts.split("->")
    x_dims, w_dims = inputs.split(",")
    dx = jnp.einsum(f"{out},{w_dims}->{x_dims}", g, w.astype(g.dtype))
    dw = jnp.einsum(f"{x_dims},{out}->{w_dims}", x, g, preferred_element_type=w.dtype)
    return dx, dw


mixed_einsum.defvjp(_fwd, _bwd)
