"""What a product takes as its weight: a plain array, or one that says how to multiply by it.

`ops/dense.py` alone looks inside. A further kind (fewer bits, an adapter beside a frozen weight) is a member of
`Weight`, and a case in `ops.project`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits, symmetric around 0, with a scale for each output: values * scales.

    Of what a product sums over, every number has the same scale; so the product is that of the integers, times the
    scales (LLM.int8(), arXiv:2208.07339, section 2.1, vector-wise). 1 byte a number in place of 2 or 4.
    """

    values: jax.Array
    """int8, of the weight's shape."""
    scales: jax.Array
    """float32, of the weight's shape but for the dims that a product sums over, which are 1."""

    @staticmethod
    def of(w: jax.Array, axes: tuple[int, ...]) -> Int8:
        """The nearest, for products that sum over these axes of w: off by half a scale at most, max |w| / 254."""
        scales = jnp.abs(w).max(axes, keepdims=True).astype(jnp.float32) / 127
        values = jnp.round(w / jnp.where(scales == 0, 1, scales))
        return Int8(values.astype(jnp.int8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Int8:
        """Some of the weight, along dims that no product sums over; [...]: all of it."""
        return Int8(self.values[index], self.scales[index])

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array."""
        return (self.values * self.scales).astype(dtype)


Weight = jax.Array | Int8
