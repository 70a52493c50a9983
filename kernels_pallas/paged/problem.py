"""One call of paged attention, as every body receives it: what is known at compile time, and the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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


class TokenTree(NamedTuple):
    """Rows that are nodes of trees of tokens, several of which may stand at one position of their text, as candidates
    of speculative decoding do (arXiv:2401.10774, section 2.1.2). A row sees its text before the tree as the mask says,
    and of the tree the nodes on its own path, whatever the mask says.

    A row of no tree is a tree of one node: its place is its position, `first` too, and `path` is 1.
    """

    places: Any
    """int32 [T]: where the row's own key is, in place of its position."""
    first: Any
    """int32 [T]: the place of the tree's first node, which is that node's position; `places` is less than 32 beyond."""
    path: Any
    """int32 [T]: bit j: the row sees the key at place first + j. The row's own bit is set, and none above it."""


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
    tree: bool = False
    """Rows are nodes of trees."""
    scaled: bool = False
    """Keys and values are int8, with a scale for each key head and position."""

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K

    @property
    def bytes_of_key(self) -> int:
        """What the cache has of one key head at one position: key, value and their scales, if in bfloat16."""
        widths = (self.H,) if self.one_cache else (self.H, self.Hv)
        return sum(width + 2 if self.scaled else width * self.dtype.itemsize for width in widths)

    @property
    def most_keys(self) -> int:
        """Positions between the first and the last key that a row may see, where a table is full."""
        start, stop = self.mask.key_range(self.M * self.C - 1, self.M * self.C - 1)
        return int(stop) - int(start)

    def blocks_of(self, positions: jax.Array, tree: TokenTree | None = None) -> tuple[jax.Array, jax.Array]:
        """Entries [start, stop) of its table that hold all that a query sees: int32, as `positions`."""
        start, stop = self.mask.key_range(positions, positions)
        if tree is not None:
            stop = jnp.where(positions < 0, 0, tree.places + 1)
        first = jnp.asarray(start, jnp.int32) // self.C
        last = -(-jnp.minimum(stop, self.M * self.C) // self.C)
        return jnp.broadcast_to(first, positions.shape), jnp.broadcast_to(last, positions.shape).astype(jnp.int32)

    def seen(self, position: Any, keys: Any, tree: TokenTree | None) -> Any:
        """Whether a query sees the key at each of these places; elementwise. Where the mask divides, it divides only
        positions."""
        if tree is None:
            return self.mask.visible(position, keys)
        node = keys - tree.first
        bit = lax.shift_right_logical(*jnp.broadcast_arrays(tree.path, node.clip(0, 31))) & 1
        before = (node < 0) & self.mask.visible(position, keys)
        return before | ((node >= 0) & (keys <= tree.places) & (bit == 1))


class CacheScales(NamedTuple):
    """What the int8 numbers of a cache are multiplied with: one for all numbers of a key head at a position."""

    k: Any
    """[L, P, K, C]"""
    v: Any
    """[L, P, K, C]"""


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
    tree: TokenTree | None = None
    scales: CacheScales | None = None
