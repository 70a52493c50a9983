"""A parameter is declared once: shape, names of its dims, and initial value together."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class Initializer:
    """Makes the parameters of one module, each from a random key of its own.

    With `repeats`, every parameter is a stack over that many layers, with a leading "layers" dim; a loop hands each
    layer its slice. The values are the same for a key on every mesh.
    """

    def __init__(self, key: jax.Array, std: float, repeats: int | None = None):
        self._key, self._count = key, 0
        self._std, self._repeats = std, repeats

    def weight(self, shape: Sequence[int], dims: Sequence[str], *, scale: float = 1.0) -> nnx.Param:
        """Float32, normally distributed around 0 with standard deviation std * scale."""
        self._count += 1
        shape, dims = self._stacked(shape, dims)
        key = jax.random.fold_in(self._key, self._count)
        return nnx.Param(self._std * scale * jax.random.normal(key, shape, jnp.float32), dims=dims)

    def zeros(self, shape: Sequence[int], dims: Sequence[str]) -> nnx.Param:
        """A bias."""
        shape, dims = self._stacked(shape, dims)
        return nnx.Param(jnp.zeros(shape, jnp.float32), dims=dims)

    def ones(self, shape: Sequence[int], dims: Sequence[str]) -> nnx.Param:
        """A norm's scale."""
        shape, dims = self._stacked(shape, dims)
        return nnx.Param(jnp.ones(shape, jnp.float32), dims=dims)

    def _stacked(self, shape: Sequence[int], dims: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        if self._repeats is None:
            return tuple(shape), tuple(dims)
        return (self._repeats, *shape), ("layers", *dims)
