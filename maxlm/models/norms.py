"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.parameters import Initializer


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, dim: str, eps: float, init: Initializer):
        self.eps = eps
        self.scale = init.ones((size,), (dim,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] in and out, in x's dtype; computed in float32."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)
