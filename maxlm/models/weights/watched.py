"""A plain weight that tells what it was multiplied with, for methods that choose a quantised one by that.

What it tells comes back as a gradient: the gradient of `SeenInputs` is not that of any loss, but what the activations
were. So it goes through jit, loops and meshes as gradients do, and the model's code knows nothing of it:

    y, pull = jax.vjp(lambda seen: block(with_watched_weights(seen)), zeros)
    (seen,) = pull(jnp.ones_like(y))

Nothing of the true backward pass is needed for it, and the compiler leaves that out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from maxlm.models.weights.by_channel import DimNames


class SeenInputs(NamedTuple):
    """What a product summed over, of all tokens; float32, all inputs of the weight as one dim I."""

    gram: jax.Array
    """[I, I]: the sum of x x^T."""
    size: jax.Array
    """[I]: the sum of |x|."""
    largest: jax.Array
    """[I]: the largest |x|."""

    @staticmethod
    def none(inputs: int) -> SeenInputs:
        """Before any token."""
        return SeenInputs(jnp.zeros((inputs, inputs)), jnp.zeros(inputs), jnp.zeros(inputs))

    def add(self, other: SeenInputs) -> SeenInputs:
        """Of the tokens of both."""
        return SeenInputs(self.gram + other.gram, self.size + other.size, jnp.maximum(self.largest, other.largest))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Watched:
    """A weight, and where to put what it sees."""

    values: jax.Array
    """float32."""
    seen: SeenInputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array; who multiplies by it, is not seen."""
        return self.values.astype(dtype)

    def dims(self, names: DimNames, inputs: tuple[str, ...]) -> Self:
        """As of `ByChannel`; what is seen is whole on every device."""
        of_values: Any = names
        whole: Any = (None,)
        of_seen: Any = SeenInputs(whole * 2, whole, whole)
        return type(self)(of_values, of_seen)


@jax.custom_vjp
def watch(x: jax.Array, seen: SeenInputs) -> jax.Array:
    """x [B, T, ...] as it is."""
    return x


def _watch_fwd(x: jax.Array, seen: SeenInputs) -> tuple[jax.Array, jax.Array]:
    return x, x


def _watch_bwd(x: jax.Array, d: jax.Array) -> tuple[jax.Array, SeenInputs]:
    rows = x.astype(jnp.float32).reshape(x.shape[0] * x.shape[1], -1)
    size = jnp.abs(rows)
    gram = jnp.einsum("ni,nj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST)
    return d, SeenInputs(gram, size.sum(0), size.max(0))


watch.defvjp(_watch_fwd, _watch_bwd)
