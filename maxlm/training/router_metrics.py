"""How evenly the routers of a step used their experts, in figures that a person can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maxlm.models.moe import RouterStats


def router_metrics(*routers: Sequence[RouterStats | None]) -> dict[str, jax.Array]:
    """From sums over the tokens of a step, as `DecoderOutput.router` has them: of the pattern of layers, and of those
    that come after them; empty without experts.

    Each is float32 [layers that have experts], in the order of the layers; docs/observe.md says what they mean.
    """
    parts = [[_figures(stats) for stats in router if stats is not None] for router in routers]
    # [L', entries] row by row is the order of the layers.
    in_order = lambda name: [jnp.stack([one[name] for one in part], 1).reshape(-1) for part in parts if part]
    return {name: jnp.concatenate(in_order(name)) for name in (parts[0] or [{}])[0]}


def _figures(stats: RouterStats) -> dict[str, jax.Array]:
    choices, E = stats.load.sum(-1), stats.load.shape[-1]
    times_even = stats.load * E / choices[:, None]  # each expert's load over the mean
    # log E - entropy = sum of p log(p E), which is 0 for even shares, whatever E.
    distance = (jax.scipy.special.xlogy(times_even, times_even) / E).sum(-1)
    return {
        "moe_load_entropy": 1 - distance / math.log(max(E, 2)),
        "moe_dropped_share": stats.dropped / choices,
        "moe_max_over_mean_load": times_even.max(-1),
    }
