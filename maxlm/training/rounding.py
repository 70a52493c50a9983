"""Parameters that a run holds in fewer bits than a step computes them in."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp

from maxlm.config import ParameterFormat
from maxlm.shapes import is_rounded

_DROPPED = 16
"""Bits of a float32 that bfloat16 has not."""


def stored(how: ParameterFormat, declared: Any, parameters: Any, key: jax.Array | None = None) -> Any:
    """Parameters as a state holds them.

    Args:
        how: what is trained is held.
        declared: the `shapes.Array` of every parameter, in the parameters' tree.
        parameters: what is trained in float32.
        key: decides about each number, with its array and its place in it; the same on every mesh. None: the nearest.
    """
    match how:
        case ParameterFormat.FLOAT32:
            return parameters
        case ParameterFormat.BFLOAT16 if key is not None:
            keys = jax.random.split(key, len(jax.tree.leaves(declared)))
            by_chance = jax.tree.unflatten(jax.tree.structure(declared), list(keys))
            rounded = lambda array, w, key: stochastically_rounded(w, key) if is_rounded(array) else w
            return jax.tree.map(rounded, declared, parameters, by_chance)
        case ParameterFormat.BFLOAT16 | ParameterFormat.BFLOAT16_NEAREST:
            return jax.tree.map(
                lambda array, w: w.astype(jnp.bfloat16) if is_rounded(array) else w, declared, parameters
            )
        case _:
            assert_never(how)


def widened(parameters: Any) -> Any:
    """What a state holds, or a tree like it, in float32."""
    return jax.tree.map(lambda w: w.astype(jnp.float32), parameters)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: of both neighbours of x one, with a chance of 1 - |x - neighbour| / their distance, so that
    the mean is x (Gupta et al. 2015, arXiv:1502.02551, section 3). What bfloat16 has, and what is not finite, stays.

    A number of 16 random bits is added to the bits that are to be dropped; they carry as often as they should.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits >> _DROPPED << _DROPPED, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
