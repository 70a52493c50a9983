"""Normalisation."""

from __future__ import annotations

from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm import shapes
from maxlm.config import LayerNorm, Norm, RmsNorm
from maxlm.models.parameters import Initializer


class NormLayer(nnx.Module):
    """A norm over the last dim; the formulas stand with their configs."""

    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, config: Norm, dim: str, size: int, init: Initializer):
        self.config = config
        init.declare(self, shapes.norm(config, dim, size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] in and out, in x's dtype; computed in float32."""
        wide = x.astype(jnp.float32)
        match self.config:
            case RmsNorm(eps=eps, one_plus=one_plus):
                scale = 1 + self.scale[...] if one_plus else self.scale[...]
                y = wide * _inverse_root(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * scale
            case LayerNorm(eps=eps, scale=has_scale, bias=has_bias):
                centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
                y = centred * _inverse_root(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
                y = y * self.scale[...] if has_scale else y
                y = y + self.bias[...] if has_bias else y
            case _:
                assert_never(self.config)
        return y.astype(x.dtype)


@jax.custom_jvp
def _inverse_root(x: jax.Array) -> jax.Array:
    """1 / sqrt(x), correctly rounded twice. XLA's rsqrt is rounded on a CPU as the loop around it happens to be: with a
    gradient in the same program otherwise than without."""
    return jnp.sqrt(1 / x)


@_inverse_root.defjvp
def _inverse_root_jvp(x: tuple[jax.Array], d_x: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """-1/2 x^-1.5, without the square of x, which may overflow."""
    root = _inverse_root(x[0])
    return root, -0.5 * (root / x[0]) * d_x[0]
