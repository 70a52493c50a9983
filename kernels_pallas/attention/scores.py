"""What shapes the scores of attention, beside queries and keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas import masks
from kernels_pallas.attention.problem import Buckets
from kernels_pallas.masks import Mask


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["max_distance", "bidirectional"]
)
@dataclass(frozen=True)
class DistanceBias:
    """T5's learned bias by distance (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Each head adds table[head, bucket(key position - query position)] to its scores. Distances below half the buckets
    have one each, those up to max_distance share the rest by their logarithm, and longer ones take the last.
    """

    table: jax.Array
    """[N, number of buckets] float32, differentiable."""
    max_distance: int = 128
    bidirectional: bool = False
    """Half of the buckets for keys after the query; otherwise these all count as distance 0."""

    def buckets(self, N: int) -> Buckets:
        """The rule for the buckets, for N heads.

        Raises:
            ValueError: a table of another shape, or buckets that do not fit the rule.
        """
        shape = jnp.shape(self.table)
        if len(shape) != 2 or shape[0] != N:
            raise ValueError(f"relative_bias.table {shape} must be [{N}, buckets]")
        fewest = 4 if self.bidirectional else 2
        if shape[1] < fewest or shape[1] % fewest:
            raise ValueError(f"relative_bias.table {shape} has {shape[1]} buckets; use a multiple of {fewest}")
        if self.max_distance <= shape[1] // fewest:
            raise ValueError(
                f"relative_bias.max_distance = {self.max_distance} must be more than {shape[1] // fewest}, "
                f"the distances that have a bucket each of {shape[1]}"
            )
        return Buckets(n=shape[1], max_distance=self.max_distance, bidirectional=self.bidirectional)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["alibi_slopes", "relative_bias", "sinks"],
    meta_fields=["mask", "scale", "soft_cap"],
)
@dataclass(frozen=True, kw_only=True)
class Scores:
    """All that shapes the scores of a layer, under the names of `flash_attention`'s arguments: `**vars(scores)`.

    A tree whose leaves are arrays with a first dim N: where heads are cut over devices, each leaf is cut with them.
    """

    mask: Mask = masks.causal
    scale: float | None = None
    """None: H ** -0.5."""
    soft_cap: float | None = None
    alibi_slopes: jax.Array | None = None
    """[N]; constants, without a gradient."""
    relative_bias: DistanceBias | None = None
    sinks: jax.Array | None = None
    """[N]."""
