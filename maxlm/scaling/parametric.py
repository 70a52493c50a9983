"""Approach 3 of Chinchilla, a formula for L(N, D) fitted to all runs; and the joint law of Kaplan et al., likewise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from maxlm.config import UserError
from maxlm.scaling.laws import Floats, JointLaw, ParametricLaw
from maxlm.scaling.log_fits import DELTA, log_sum, robust_fit
from maxlm.scaling.measured_runs import MeasuredRun, columns

_FLATTEST, _STEEPEST = 1e-3, 50.0
"""Exponents. At the first nothing falls any more; the second keeps a search from leaving the range of floats."""

_LARGEST_LOG = 300.0
"""Of constants, which run away where loss is no such law."""
_LEAST_SHARE = math.log(1e-5)
"""Log of what a term must be at least, of the smallest model or the shortest run, to count as seen."""
FormulaLaw = TypeVar("FormulaLaw", ParametricLaw, JointLaw)

_ALPHAS = np.array([0.05, 0.5, 1.0, 1.5, 2.0])
_LOG_FACTORS = np.arange(0, 30, 5.0)
_LOG_ES = np.arange(-1, 1.5, 0.5)
"""The grid of initial values in arXiv:2203.15556, appendix D.3: alpha and beta; log A and log B; log E. Exponents are
searched by their logarithms, so that they stay positive; 0.05 stands for the paper's 0."""


def fit_parametric(runs: Sequence[MeasuredRun], start: ParametricLaw | None = None) -> ParametricLaw:
    """L = E + A / N^alpha + B / D^beta: the least sum of Huber losses of log L (arXiv:2203.15556, equation 3).

    Of the paper's grid of 4,500 initial values the search starts from the best one for each alpha and beta.

    Args:
        runs: final losses count.
        start: begin there alone.

    Raises:
        UserError: too few runs, sizes or lengths, or a loss that does not fall with one of them.
    """
    _enough(runs, constants=5)
    n, d, loss = columns(runs)
    x, y = np.log(n), np.log(d)
    mid_x, mid_y = x.mean(), y.mean()
    x, y, log_loss = x - mid_x, y - mid_y, np.log(loss)  # centred, all constants matter equally much

    def predict(theta: Floats) -> tuple[Floats, Floats]:
        a, b, e = theta[:3]
        alpha, beta = _exponents(theta[3:])
        terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)], 1)
        total, share = log_sum(terms)
        return total, np.column_stack([share, -alpha * share[:, 0] * x, -beta * share[:, 1] * y])

    if start is None:
        starts = _best_of_grid(x, y, log_loss, mid_x, mid_y)
    else:
        a, b, e, s, t = map(math.log, (start.A, start.B, start.E, start.alpha, start.beta))
        starts = [np.array([a - start.alpha * mid_x, b - start.beta * mid_y, e, s, t])]
    found = robust_fit(predict, starts, log_loss)
    a, b, e = map(float, found[:3])
    alpha, beta = map(float, _exponents(found[3:]))
    log_a, log_b = a + alpha * mid_x, b + beta * mid_y
    for name, exponent, largest in (
        ("parameters", alpha, a - alpha * x.min()),
        ("tokens", beta, b - beta * y.min()),
    ):
        if exponent < _FLATTEST or largest < _LEAST_SHARE:
            raise UserError(f"the loss does not fall with the {name} of these runs; add runs that differ more in them")
    if max(abs(log_a), abs(log_b)) > _LARGEST_LOG:
        raise UserError("E + A / N^alpha + B / D^beta does not fit these runs: its constants run away; add runs")
    law = ParametricLaw(E=math.exp(max(e, -_LARGEST_LOG)), A=math.exp(log_a), B=math.exp(log_b), alpha=alpha, beta=beta)
    return _with_optimum(law)


def _best_of_grid(x: Floats, y: Floats, log_loss: Floats, mid_x: float, mid_y: float) -> list[Floats]:
    """For each alpha and beta the best initial value of the grid, in centred constants."""
    found = []
    for alpha, beta in itertools.product(_ALPHAS, _ALPHAS):
        grid = np.array(list(itertools.product(_LOG_FACTORS, _LOG_FACTORS, _LOG_ES)))
        grid[:, 0] -= alpha * mid_x
        grid[:, 1] -= beta * mid_y
        a, b, e = grid.T[..., None]
        residual = np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e) - log_loss
        bent = np.clip(residual / DELTA, -1, 1)
        best = np.argmin(np.sum(bent * (residual / DELTA - bent / 2), 1))
        found.append(np.array([*grid[best], np.log(alpha), np.log(beta)]))
    return found


def fit_joint(runs: Sequence[MeasuredRun], start: JointLaw | None = None) -> JointLaw:
    """L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (arXiv:2001.08361, equation 1.5), by the same loss.

    Args:
        runs: final losses count.
        start: begin there alone.

    Raises:
        UserError: as `fit_parametric`.
    """
    _enough(runs, constants=4)
    n, d, loss = columns(runs)
    x, y = np.log(n), np.log(d)
    mid_x, mid_y = x.mean(), y.mean()
    x, y, log_loss = x - mid_x, y - mid_y, np.log(loss)

    def predict(theta: Floats) -> tuple[Floats, Floats]:
        p, q = theta[:2]
        ratio, power = _exponents(theta[2:])
        terms = np.stack([p - ratio * x, q - y], 1)
        total, share = log_sum(terms)
        return power * total, np.column_stack([power * share, -power * ratio * share[:, 0] * x, power * total])

    if start is None:
        level = float(log_loss.mean())
        # Both terms alike, or one of them small, at four slopes.
        starts = [
            np.array([level / power + p, level / power + q, np.log(ratio), np.log(power)])
            for power in (0.05, 0.1, 0.2, 0.4)
            for ratio in (0.25, 0.5, 1.0, 2.0)
            for p, q in ((-0.7, -0.7), (0.0, -3.0), (-3.0, 0.0))
        ]
    else:
        ratio = start.alpha_N / start.alpha_D
        p, q = ratio * (math.log(start.N_c) - mid_x), math.log(start.D_c) - mid_y
        starts = [np.array([p, q, math.log(ratio), math.log(start.alpha_D)])]
    found = robust_fit(predict, starts, log_loss)
    p, q = map(float, found[:2])
    ratio, power = map(float, _exponents(found[2:]))
    if min(ratio, power) < _FLATTEST or max(abs(p / ratio + mid_x), abs(q + mid_y)) > _LARGEST_LOG:
        raise UserError("the loss does not fall with parameters and tokens as a joint power law; add runs that differ")
    law = JointLaw(N_c=math.exp(p / ratio + mid_x), D_c=math.exp(q + mid_y), alpha_N=ratio * power, alpha_D=power)
    return _with_optimum(law)


def _with_optimum(law: FormulaLaw) -> FormulaLaw:
    if abs(law.log_G) > _LARGEST_LOG:
        raise UserError("the law of these runs has no best split of a budget; add runs that differ more")
    return law


def _exponents(logs: Floats) -> Floats:
    return np.exp(np.minimum(logs, math.log(_STEEPEST)))


def _enough(runs: Sequence[MeasuredRun], *, constants: int) -> None:
    if len(runs) <= constants:
        raise UserError(f"{len(runs)} runs cannot say {constants} constants; use at least {constants + 1}")
    for name, found in (
        ("sizes", {run.parameters for run in runs}),
        ("lengths in tokens", {run.tokens for run in runs}),
    ):
        if len(found) < 3:
            raise UserError(f"the runs have {len(found)} different {name}; a curve over them needs at least 3")
