"""A weight that several adapters change, each for the rows of a batch that are its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByRow:
    """outputs_n * (x W + scale_n x A_n B_n) for a row x of adapter n; of adapter 0, which is none, x W.

    The matrices of all adapters are one pair: what a row's x A has of other adapters' columns becomes 0 before B. So
    nothing is gathered for each row, and n adapters of rank r cost what one of rank n r does.
    """

    base: Any
    """W: any other weight."""
    a: jax.Array
    """[*inputs, R]: the matrices of all adapters side by side."""
    b: jax.Array
    """[R, *outputs]."""
    owner: jax.Array
    """int32 [R]: whose each of the R is."""
    scales: jax.Array
    """float32 [N + 1]."""
    outputs: jax.Array | None
    """float32 [N + 1, *outputs]; None: no adapter has any."""
    adapters: jax.Array | None = None
    """int32 [B]: of each row; None: it is not said yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        found: tuple[int, ...] = self.base.shape
        return found

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """It is no one array."""
        raise ValueError("a weight of several adapters has no one array; multiply by it")

    def mask(self) -> jax.Array:
        """bool [B, 1, R]: what of x A is of its row's adapter."""
        assert self.adapters is not None
        return self.owner == self.adapters[:, None, None]

    def of_row(self, factors: jax.Array, ndim: int) -> jax.Array:
        """Of factors [N + 1, ...] those of each row, [B, ...], for an array of so many dims, whose second is T."""
        assert self.adapters is not None
        found = factors[self.adapters]
        return found.reshape(found.shape[0], *[1] * (ndim - found.ndim), *found.shape[1:])


def of_rows(parameters: Any, adapters: jax.Array) -> Any:
    """The parameters for a batch whose rows are of these adapters, int32 [B]; what a loop over layers takes slices of
    has them for each layer."""

    def one(weight: Any) -> Any:
        if not isinstance(weight, ByRow):
            return weight
        stacked = weight.owner.shape[:-1]
        return dataclasses.replace(weight, adapters=jnp.broadcast_to(adapters, (*stacked, *adapters.shape)))

    return jax.tree.map(one, parameters, is_leaf=lambda node: isinstance(node, ByRow))
