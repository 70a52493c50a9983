"""Approach 2 of Chinchilla: at each budget a parabola in log N, and power laws through their minima."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.config import UserError
from maxlm.scaling.laws import Floats, FrontierLaw
from maxlm.scaling.log_fits import power_law
from maxlm.scaling.measured_runs import MeasuredRun, columns

FEWEST_SIZES = 3


@dataclass(frozen=True, kw_only=True)
class Valley:
    """The runs of a budget, and the least loss between them."""

    flops: float
    """Geometric mean of the runs'."""
    runs: tuple[MeasuredRun, ...]
    curve: tuple[float, float, float]
    """Loss as a polynomial of log N, the highest power first."""
    parameters: float
    tokens: float
    loss: float
    """Of the minimum."""


def budgets(runs: Sequence[MeasuredRun], tolerance: float) -> list[list[MeasuredRun]]:
    """The runs by FLOPs, in groups that reach from the least of each to (1 + tolerance) times that."""
    groups: list[list[MeasuredRun]] = []
    for run in sorted(runs, key=lambda one: one.flops):
        if groups and run.flops <= groups[-1][0].flops * (1 + tolerance):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def valley(runs: Sequence[MeasuredRun]) -> Valley:
    """Of runs of one budget (arXiv:2203.15556, section 3.2): parabolas in log N and in log D.

    Raises:
        UserError: too few sizes, a parabola that opens downwards, or a minimum outside of the sizes that were run.
    """
    flops = math.exp(sum(math.log(run.flops) for run in runs) / len(runs))
    n, d, loss = columns(runs)
    if (sizes := len(set(n))) < FEWEST_SIZES:
        raise UserError(f"{flops:.3g} FLOPs: {sizes} sizes, and a parabola needs {FEWEST_SIZES}; add runs of others")
    curve, log_n = _lowest(np.log(n), loss, f"{flops:.3g} FLOPs: loss over sizes")
    _, log_d = _lowest(np.log(d), loss, f"{flops:.3g} FLOPs: loss over tokens")
    return Valley(
        flops=flops,
        runs=tuple(runs),
        curve=(float(curve[0]), float(curve[1]), float(curve[2])),
        parameters=math.exp(log_n),
        tokens=math.exp(log_d),
        loss=float(np.polyval(curve, log_n)),
    )


def _lowest(x: Floats, loss: Floats, what: str) -> tuple[Floats, float]:
    """A parabola, and where its minimum is."""
    middle = float(x.mean())  # log N is far from 0
    p, q, r = np.polyfit(x - middle, loss, 2)
    if p <= 0:
        raise UserError(f"{what} is a parabola that opens downwards and has no minimum; add runs, or better tuned ones")
    lowest = middle - float(q / (2 * p))
    if not x.min() <= lowest <= x.max():
        where = "smaller" if lowest < x.min() else "larger"
        raise UserError(
            f"{what} has its minimum at {math.exp(lowest):.3g}, outside of {math.exp(x.min()):.3g} to "
            f"{math.exp(x.max()):.3g}; add runs that are {where}"
        )
    return np.array([p, q - 2 * p * middle, r - q * middle + p * middle**2]), lowest


def valleys(runs: Sequence[MeasuredRun], tolerance: float) -> tuple[list[Valley], list[str]]:
    """Those of all budgets, and of a budget without one a line that says why."""
    found, without = [], []
    for group in budgets(runs, tolerance):
        try:
            found.append(valley(group))
        except UserError as error:
            without.append(str(error))
    return found, without


def fit_iso_flops(runs: Sequence[MeasuredRun], tolerance: float) -> FrontierLaw:
    """Power laws through the minima; budgets without one are left out.

    Raises:
        UserError: fewer than two budgets have a minimum.
    """
    found, without = valleys(runs, tolerance)
    if len(found) < 2:
        reasons = f" ({'; '.join(without)})" if without else ""
        raise UserError(
            f"{len(found)} of {len(found) + len(without)} budgets have a minimum, a power law needs 2{reasons}"
        )
    flops = np.array([one.flops for one in found])
    return FrontierLaw(
        parameters=power_law(flops, np.array([one.parameters for one in found])),
        tokens=power_law(flops, np.array([one.tokens for one in found])),
    )
