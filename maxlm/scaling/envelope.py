"""Approach 1 of Chinchilla: of all training curves, the size that has the lowest loss at each number of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maxlm.config import UserError
from maxlm.scaling.laws import Floats, FrontierLaw
from maxlm.scaling.log_fits import power_law
from maxlm.scaling.measured_runs import MeasuredRun

_POINTS = 1500
"""Numbers of FLOPs that are looked at, evenly in their logarithm (arXiv:2203.15556, section 3.1)."""
_FEWEST_SIZES = 4


class Envelope(NamedTuple):
    """The lowest loss at each number of FLOPs at which two sizes or more have one; all are [P]."""

    flops: Floats
    loss: Floats
    parameters: Floats
    tokens: Floats


def envelope(runs: Sequence[MeasuredRun]) -> Envelope:
    """Between the points of a curve loss is linear in log C; beyond its ends it is not known.

    Raises:
        UserError: there is no number of FLOPs at which two sizes have a loss.
    """
    curves = [np.array(run.curve).T for run in runs]
    flops = [tokens * run.flops / run.tokens for run, (tokens, _) in zip(runs, curves, strict=True)]
    low, high = min(one[0] for one in flops), max(one[-1] for one in flops)
    grid = np.geomspace(low, high, _POINTS)
    losses = np.array(
        [
            np.interp(np.log(grid), np.log(x), curve[1], left=np.inf, right=np.inf)
            for x, curve in zip(flops, curves, strict=True)
        ]
    )
    sizes = np.array([run.parameters for run in runs])
    known = np.array([np.isfinite(losses[sizes == size]).any(0) for size in np.unique(sizes)])
    compared = known.sum(0) >= 2
    if not compared.any():
        raise UserError("at no number of FLOPs two sizes have a loss; give the runs' curves, or sizes that overlap")
    best = losses.argmin(0)[compared]
    tokens = grid[compared] * np.array([run.tokens / run.flops for run in runs])[best]
    return Envelope(grid[compared], losses.min(0)[compared], sizes[best], tokens)


def fit_envelope(runs: Sequence[MeasuredRun]) -> FrontierLaw:
    """Power laws through the envelope, but for its ends: the smallest and the largest size on it have rivals on one
    side alone, and win where others would.

    Raises:
        UserError: fewer than four sizes are on the envelope, or as `envelope`.
    """
    found = envelope(runs)
    sizes = np.unique(found.parameters)
    if len(sizes) < _FEWEST_SIZES:
        found_sizes = "1 size is" if len(sizes) == 1 else f"{len(sizes)} sizes are"
        raise UserError(
            f"{found_sizes} on the envelope, {_FEWEST_SIZES} are needed, as its two ends do not count; add sizes, or "
            "longer runs"
        )
    inner = (found.parameters > sizes[0]) & (found.parameters < sizes[-1])
    return FrontierLaw(
        parameters=power_law(found.flops[inner], found.parameters[inner]),
        tokens=power_law(found.flops[inner], found.tokens[inner]),
    )
