"""A weight and a matrix of low rank beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """W + scale A B; with magnitudes, each output of that as long as its magnitude says. See `config.Lora`."""

    base: Any
    """W: any other weight, of the same shape."""
    a: jax.Array
    """float32 [*inputs, rank]."""
    b: jax.Array
    """float32 [rank, *outputs]."""
    magnitude: jax.Array | None
    """float32 [*outputs]; None: outputs are as long as they are."""
    keys: jax.Array | None
    """A random key [B] for each row, for dropout; None: nothing is dropped."""
    scale: float = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})
    """Chance of each number on its way to `a`, where there are keys."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        found: tuple[int, ...] = self.base.shape
        return found

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self

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
        wide = jnp.float32
        base = self.base.astype(wide) if isinstance(self.base, jax.Array) else self.base.dense(wide)
        return base + self.scale * jnp.tensordot(self.a, self.b, 1)


def lengths(w: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """Of each output's weights, which lie along these axes of w; of zeros it is 1."""
    length = jnp.sqrt(jnp.sum(w * w, axis=inputs))
    return jnp.where(length == 0, 1.0, length)


def dropped(x: jax.Array, keys: jax.Array, chance: float) -> jax.Array:
    """x [B, T, ...] with numbers that are 0 by chance, and others larger: what a row loses depends on its key alone."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - chance, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - chance), 0).astype(x.dtype)
