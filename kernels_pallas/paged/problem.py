"""One call of paged attention, as every body receives it: what is known at compile time, and the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.problem import Buckets
from kernels_pallas.masks import END, Mask


@dataclass(frozen=True, kw_only=True)
class PagedBlocks:
    """What a body takes at once."""

    keys: int
    """Keys of a tile of scores, in whole blocks of the cache."""
    rows: int = END
    """Rows whose scores exist at a time, at most (XLA)."""
    stages: int = 2
    """Tiles in flight (GPU)."""

    def count(self, block_size: int) -> int:
        """Blocks of the cache in a tile."""
        return max(1, self.keys // block_size)


@dataclass(frozen=True, kw_only=True)
class PagedProblem:
    """Static description of a call. T rows of one query each, N query and K key heads; a cache of L layers of P blocks
    of C positions; S tables of M blocks."""

    T: int
    N: int
    K: int
    H: int
    """Width of queries and keys."""
    Hv: int
    """Width of values and of the output."""
    L: int
    P: int
    C: int
    S: int
    M: int
    dtype: jnp.dtype
    mask: Mask
    """Shows no key after the query."""
    scale: float
    soft_cap: float | None = None
    alibi: bool = False
    buckets: Buckets | None = None
    sinks: bool = False
    one_cache: bool = False
    """Keys and values are one array."""

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K

    @property
    def most_keys(self) -> int:
        """Positions between the first and the last key that a row may see, where a table is full."""
        start, stop = self.mask.key_range(self.M * self.C - 1, self.M * self.C - 1)
        return int(stop) - int(start)

    def blocks_of(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Entries [start, stop) of its table that hold all that a query sees: int32, as `positions`."""
        start, stop = self.mask.key_range(positions, positions)
        first = jnp.asarray(start, jnp.int32) // self.C
        last = -(-jnp.minimum(stop, self.M * self.C) // self.C)
        return jnp.broadcast_to(first, positions.shape), jnp.broadcast_to(last, positions.shape).astype(jnp.int32)


class PagedOperands(NamedTuple):
    """The arrays of a call."""

    q: jax.Array  # [T, N, H]
    k: jax.Array  # [L, P, K, C, H]
    v: jax.Array  # [L, P, K, C, Hv]
    layer: jax.Array  # int32 scalar
    tables: jax.Array  # [S, M] int32
    slots: jax.Array  # [T] int32
    positions: jax.Array  # [T] int32
    alibi_slopes: jax.Array | None  # [N] float32
    bias_table: jax.Array | None  # [N, buckets.n] float32
    sinks: jax.Array | None  # [N] float32
