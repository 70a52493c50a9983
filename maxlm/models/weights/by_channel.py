"""Weights in 8 bits with a scale for each output.

Of what a product sums over, every number has the same scale; so the product is that of the 8-bit numbers, times the
scales (LLM.int8(), arXiv:2208.07339, section 2.1, vector-wise). 1 byte a number in place of 2 or 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

DimNames = tuple[str | None, ...]
"""Of the dims of an array; None is not cut."""


@dataclass(frozen=True)
class ByChannel:
    """values * scales."""

    values: jax.Array
    """8 bits a number, of the weight's shape."""
    scales: jax.Array
    """float32, of the weight's shape but for the dims that a product sums over, which are 1."""

    largest: ClassVar[float]
    """What the largest number of an output becomes."""

    @classmethod
    def of(cls, w: jax.Array, axes: tuple[int, ...]) -> Self:
        """The nearest, for products that sum over these axes of w."""
        scales = jnp.abs(w).max(axes, keepdims=True).astype(jnp.float32) / cls.largest
        return cls(cls.nearest(w / jnp.where(scales == 0, 1, scales)), scales)

    @classmethod
    def nearest(cls, w: jax.Array) -> jax.Array:
        """Of numbers up to `largest`."""
        return jnp.round(w).astype(jnp.int8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Self:
        """Some of the weight, along dims that no product sums over; [...]: all of it."""
        return type(self)(self.values[index], self.scales[index])

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)

    def dims(self, names: DimNames, inputs: tuple[str, ...]) -> Self:
        """The names of the dims of its arrays, for a weight with dims of these names."""
        of_scales: Any = tuple(None if name in inputs else name for name in names)
        of_values: Any = names
        return type(self)(of_values, of_scales)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(ByChannel):
    """Integers from -127 to 127; a number is off by half a scale at most, max |w| / 254. Activations stay as they are.

    1 byte a number also while the product runs, where the compiler reads it so.
    """

    largest = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Activations(ByChannel):
    """The same weight, multiplied by activations in 8 bits too, integers to int32 ("W8A8 dynamic").

    A token's activations get a scale of their own, max |x| / 127, when the product is made, so that what it becomes
    depends on no other. With dx and dw, the largest errors of both (half a scale each), a product of n numbers is off
    by n (max |x| dw + max |w| dx + dx dw) at most.
    """

    largest = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Outliers(ByChannel):
    """The same, but activations beyond `threshold` are multiplied in the compute dtype (LLM.int8(), arXiv:2208.07339,
    section 3).

    There a column is an outlier for all tokens of a batch where one token's number in it is; here each number decides
    for itself, so that what a token becomes depends on no other. The weights of outliers are the 8-bit ones. It costs a
    second product of the whole size, as a compiled program's shapes cannot follow the data.
    """

    largest = 127
    threshold: ClassVar[float] = 6.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8(ByChannel):
    """e4m3 (arXiv:2209.05433): 4 bits of exponent, 3 of fraction, up to 448. A number w is off by |w| / 16 at most, and
    below max |w| / 28,672, where steps are even, by max |w| / 458,752."""

    largest = 448

    @classmethod
    def nearest(cls, w: jax.Array) -> jax.Array:
        """Ties go to the even one."""
        return w.astype(jnp.float8_e4m3fn)
