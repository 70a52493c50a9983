"""A weight and a matrix of low rank beside it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.weights.around import Around, plain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Around):
    """W + scale A B; with magnitudes, each output of that as long as its magnitude says. See `config.Lora`."""

    a: jax.Array
    """float32 [*inputs, rank]."""
    b: jax.Array
    """float32 [rank, *outputs]."""
    magnitude: jax.Array | None
    """float32 [*outputs]; None: outputs are as long as they are."""
    keys: jax.Array | None
    """A random key [B] for each row, in training; None: nothing is drawn."""
    scale: float = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})
    """Chance of each number on its way to `a`, where there are keys."""
    nested: bool = field(metadata={"static": True})
    """Where there are keys, each row has some first ones of the ranks alone. See `config.DyLora`."""

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array, computed in float32."""
        whole = self._sum()
        if self.magnitude is not None:
            whole *= self.magnitude / lengths(whole, tuple(range(self.a.ndim - 1)))
        return whole.astype(dtype)

    def factors(self) -> jax.Array | None:
        """What each output of W + scale A B is multiplied by, [*outputs]; None: nothing."""
        if self.magnitude is None:
            return None
        return self.magnitude / jax.lax.stop_gradient(lengths(self._sum(), tuple(range(self.a.ndim - 1))))

    def _sum(self) -> jax.Array:
        return plain(self.base) + self.scale * jnp.tensordot(self.a, self.b, 1)


def lengths(w: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """Of each output's weights, which lie along these axes of w; of zeros it is 1."""
    length = jnp.sqrt(jnp.sum(w * w, axis=inputs))
    return jnp.where(length == 0, 1.0, length)


def with_keys(weights: Any, keys: jax.Array | None) -> Any:
    """A tree of weights in which each `LowRank` that draws numbers has keys of its own, made of those of the rows."""
    if keys is None:
        return weights
    is_low_rank = lambda node: isinstance(node, LowRank)
    numbers = itertools.count()

    def one(leaf: Any) -> Any:
        if not (isinstance(leaf, LowRank) and (leaf.dropout or leaf.nested)):
            return leaf
        number = next(numbers)
        return dataclasses.replace(leaf, keys=jax.vmap(lambda key: jax.random.fold_in(key, number))(keys))

    return jax.tree.map(one, weights, is_leaf=is_low_rank)
