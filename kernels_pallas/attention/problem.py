"""One call of attention, as every body receives it: what is known at compile time, and the arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.masks import END, Mask

DTYPES = ("float32", "bfloat16", "float16")
"""Of queries, keys and values."""

MASKED = -1e30
"""Score of a hidden key: finite, so that a row without any visible key gives 0 and not NaN."""


@dataclass(frozen=True, kw_only=True)
class AttentionBlocks:
    """Rows of a tile of scores and its columns, forward and backward; what a body does not use it ignores."""

    q: int
    k: int
    q_backward: int
    k_backward: int
    stages: int = 2
    """Key blocks in flight (GPU)."""
    rows: int = END
    """Rows of the batch whose scores exist at a time, at most (XLA)."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """T5's map from the distance key - query to one of n learned biases (Raffel et al. 2020, arXiv:1910.10683).

    Exact for short distances, logarithmic up to `max_distance`, the last bucket beyond it. With `bidirectional` half of
    the buckets are for keys after the query; without, these all fall into bucket 0.
    """

    n: int
    max_distance: int = 128
    bidirectional: bool = False

    def bucket(self, distance: int) -> int:
        """The bucket of one distance."""
        n = self.n // 2 if self.bidirectional else self.n
        after = n if self.bidirectional and distance > 0 else 0
        apart = abs(distance) if self.bidirectional else max(-distance, 0)
        exact = n // 2
        if apart < exact:
            return after + apart
        logarithmic = math.log(apart / exact) / math.log(self.max_distance / exact) * (n - exact)
        return after + min(exact + int(logarithmic), n - 1)

    def steps(self) -> tuple[tuple[int, int], ...]:
        """The same as steps, for a kernel to compare with: (distance, the bucket from there on), ascending."""
        steps = [(-END, self.bucket(-END))]
        for distance in range(-self.max_distance, self.max_distance + 1):
            if self.bucket(distance) != steps[-1][1]:
                steps.append((distance, self.bucket(distance)))
        return tuple(steps)


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """Static description of a call. Letters as everywhere: B rows, T queries, S keys, N query and K key heads."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    """Width of queries and keys."""
    Hv: int
    """Width of values and of the output."""
    dtype: jnp.dtype
    mask: Mask
    scale: float
    soft_cap: float | None = None
    """cap * tanh(score / cap), before the mask (Gemma 2, arXiv:2408.00118)."""
    segments: bool = False
    visible_to: bool = False
    """Each query says itself where the keys that it sees end; the mask then has no stops (`Mask.opened`)."""
    alibi: bool = False
    buckets: Buckets | None = None
    q_offset: int | None = 0
    """The first query's position where it is known at compile time; None: an array."""
    sinks: bool = False
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K


class Operands(NamedTuple):
    """The arrays of a call."""

    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, Hv]
    q_segments: jax.Array | None  # [B, T] int32
    k_segments: jax.Array | None  # [B, S] int32
    q_offset: jax.Array  # [B] int32: query t has position q_offset + t, key s position s
    alibi_slopes: jax.Array | None  # [N] float32: score -= slope * |query position - key position|
    bias_table: jax.Array | None  # [N, buckets.n] float32: score += table[head, bucket(key position - query position)]
    visible_to: jax.Array | None = None  # [B, T] int32: query t sees no key s >= visible_to[t]


def least_and_most(visible_to: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Of the queries of each block of `size`, the smallest end of what they see and the largest: int32 [B, blocks]."""
    whole = jnp.pad(visible_to, ((0, 0), (0, -visible_to.shape[1] % size)), "edge")
    blocks = whole.reshape(whole.shape[0], -1, size)
    return blocks.min(2), blocks.max(2)


def first_and_last(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., n] boolean: the first index that is true, and one past the last; 0 and 0 where none is."""
    first, from_the_end = jnp.argmax(needed, -1), jnp.argmax(needed[..., ::-1], -1)
    stop = jnp.where(needed.any(-1), needed.shape[-1] - from_the_end, 0)
    return first.astype(jnp.int32), stop.astype(jnp.int32)
