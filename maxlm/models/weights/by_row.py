"""A weight that several adapters change, each for the rows of a batch that are its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from maxlm.models.weights.around import Around


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByRow(Around):
    """after_n * (outputs_n * ((inputs_n * x) W + scale_n x A_n B_n) + bias) for a row x of adapter n; 0 is none.

    The matrices of all adapters are one pair: what a row's x A has of other adapters' columns becomes 0 before B. So
    nothing is gathered for each row, and n adapters of rank r cost what one of rank n r does. What one adapter lacks
    has no effect: a scale of 0, factors of 1.
    """

    a: jax.Array
    """[*inputs, R]: the matrices of all adapters side by side."""
    b: jax.Array
    """[R, *outputs]."""
    owner: jax.Array
    """int32 [R]: whose each of the R is."""
    scales: jax.Array
    """float32 [N + 1]."""
    inputs: jax.Array | None
    """float32 [N + 1, *inputs]; None: no adapter has any. So are the next two."""
    outputs: jax.Array | None
    """float32 [N + 1, *outputs]."""
    after: jax.Array | None
    """float32 [N + 1, *outputs], for what the bias has been added to."""
    adapters: jax.Array | None = None
    """int32 [B]: of each row; None: it is not said yet."""

    def dense(self, dtype: jnp.dtype) -> NoReturn:
        """There is none."""
        raise NotImplementedError("a weight of several adapters is no one array")

    def mask(self) -> jax.Array:
        """bool [B, 1, R]: what of x A is of its row's adapter."""
        assert self.adapters is not None
        return self.owner == self.adapters[:, None, None]

    def times(self, x: jax.Array, factors: jax.Array | None) -> jax.Array:
        """x [B, T, ...] times its row's of the factors [N + 1, ...], which may have fewer dims."""
        if factors is None:
            return x
        assert self.adapters is not None
        found = factors[self.adapters]
        return (x * found.reshape(found.shape[0], *[1] * (x.ndim - found.ndim), *found.shape[1:])).astype(x.dtype)


def of_rows(parameters: Any, adapters: jax.Array) -> Any:
    """The parameters for a batch whose rows are of these adapters, int32 [B]; what a loop over layers takes slices of
    has them for each layer."""

    def one(weight: Any) -> Any:
        if not isinstance(weight, ByRow):
            return weight
        stacked = weight.owner.shape[:-1]
        return dataclasses.replace(weight, adapters=jnp.broadcast_to(adapters, (*stacked, *adapters.shape)))

    return jax.tree.map(one, parameters, is_leaf=lambda node: isinstance(node, ByRow))
