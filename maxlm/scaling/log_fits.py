"""Fits in logarithms: straight lines by least squares, and curves by a Huber loss from many starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
from scipy import optimize

from maxlm.config import UserError
from maxlm.scaling.laws import Floats, PowerLaw

DELTA = 1e-3
"""Of the Huber loss of log-losses (arXiv:2203.15556, equation 3)."""

_SEARCH = {"maxiter": 1000, "gtol": 1e-4}
"""Slopes are in units of delta: where the search ends, they are a ten-thousandth of what one run contributes."""

Predict = Callable[[Floats], tuple[Floats, Floats]]
"""Constants [K] -> log-losses [R] and their derivatives [R, K]."""


def power_law(x: Floats, y: Floats) -> PowerLaw:
    """Least squares of log y on log x, both [R].

    Raises:
        UserError: x has one value alone.
    """
    if np.ptp(x) == 0:
        raise UserError("a power law needs two points or more at different places")
    slope, offset = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(coefficient=float(np.exp(offset)), exponent=float(slope))


def lowest_so_far(x: Floats, loss: Floats) -> npt.NDArray[np.int64]:
    """Places of the runs of which none with as little x has a lower loss, by x."""
    order = np.lexsort((loss, x)).astype(np.int64)
    before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
    return order[loss[order] < before]


def log_sum(terms: Floats) -> tuple[Floats, Floats]:
    """Of terms [R, K]: log of the sum of their exponentials [R], and the share of each in that [R, K]."""
    top = terms.max(1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(1, keepdims=True)
    return (top + np.log(total))[:, 0], shares / total


def robust_fit(predict: Predict, starts: Iterable[Floats], log_loss: Floats) -> Floats:
    """Constants with the least sum of Huber losses of log-losses, by BFGS from every start.

    A sum in units of delta^2: with a mean of such small numbers the search stops before it has arrived, which is what
    went wrong in arXiv:2203.15556 (arXiv:2404.10102, section 4). There it was L-BFGS, whose memory is for many
    constants; of five BFGS remembers all.
    """

    def objective(theta: Floats) -> tuple[float, Floats]:
        values, slopes = predict(theta)
        residual = (values - log_loss) / DELTA
        bent = np.clip(residual, -1, 1)
        return float(np.sum(bent * (residual - bent / 2))), bent @ slopes / DELTA

    with np.errstate(all="ignore"):  # steps of a search that lead nowhere
        found = [optimize.minimize(objective, start, jac=True, method="BFGS", options=_SEARCH) for start in starts]
    best: Floats = min(found, key=lambda one: one.fun if np.isfinite(one.fun) else np.inf).x
    return best
