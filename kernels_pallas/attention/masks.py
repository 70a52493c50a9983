"""Which keys a query may see, as data: one description for the element test and for skipping whole blocks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Causal:
    """Query at position i sees the keys at positions max(0, i - window + 1) .. i; all earlier ones without a window."""

    window: int | None = None

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Boolean, elementwise over broadcast positions."""
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        return seen

    def key_range(self, first_query: jax.Array, last_query: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions [start, stop) that hold every key visible to some query in first_query .. last_query."""
        start = jnp.zeros_like(first_query) if self.window is None else jnp.maximum(0, first_query - self.window + 1)
        return start, last_query + 1

    def query_range(self, first_key: jax.Array, last_key: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions [start, stop) of the queries before `end` that see some key in first_key .. last_key."""
        stop = end if self.window is None else jnp.minimum(end, last_key + self.window)
        return first_key, stop
