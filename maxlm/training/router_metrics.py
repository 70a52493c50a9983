"""How evenly the routers of a step used their experts, in figures that a person can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.models.moe import RouterStats


class RouterMetrics(NamedTuple):
    """One figure for each layer that has experts, float32 [layers], in the order of the layers."""

    load_entropy: jax.Array
    """Entropy of the experts' shares of the choices over log E: 1 when all have the same, 0 when one has all."""
    dropped_share: jax.Array
    """Choices that were not computed, 0..1."""
    max_over_mean_load: jax.Array
    """Choices of the busiest expert over the mean, 1..E."""


def router_metrics(router: Sequence[RouterStats | None]) -> RouterMetrics | None:
    """Figures from sums over the tokens of a step, as `DecoderOutput.router` has them; None without experts."""
    entries = [_figures(stats) for stats in router if stats is not None]
    if not entries:
        return None
    # [L', entries] row by row is the order of the layers.
    return RouterMetrics(*(jnp.stack(figures, 1).reshape(-1) for figures in zip(*entries, strict=True)))


def _figures(stats: RouterStats) -> RouterMetrics:
    choices, E = stats.load.sum(-1), stats.load.shape[-1]
    times_even = stats.load * E / choices[:, None]  # each expert's load over the mean
    # log E - entropy = sum of p log(p E), which is 0 for even shares, whatever E.
    distance = (jax.scipy.special.xlogy(times_even, times_even) / E).sum(-1)
    return RouterMetrics(
        load_entropy=1 - distance / math.log(max(E, 2)),
        dropped_share=stats.dropped / choices,
        max_over_mean_load=times_even.max(-1),
    )
