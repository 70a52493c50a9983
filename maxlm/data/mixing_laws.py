"""Losses of small runs as functions of the weights of their data sets, and the weights that these functions like best.

RegMix (Liu et al. 2024, arXiv:2407.01492): many small runs on random mixtures, a regression from weights to held-out
loss, and the best of very many mixtures by that regression. The regression here is the mixing law of Ye et al. 2024
(arXiv:2403.16952): L_i(r) = c_i + k_i exp(sum_j t_ij r_j), with r the weights, which sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError

_Floats = npt.NDArray[np.float64]
_STRENGTHS = (0.3, 3.0)
"""Mean of the parameters of a Dirichlet distribution: between these, from corners to the middle."""
_RIDGE = 1e-3
_OFFSETS = 50
_SIMULATED = 100_000
_BEST = 100


def draw_mixtures(shares: Sequence[float], count: int, seed: int) -> _Floats:
    """Weights [count, sets], whose rows sum to 1: Dirichlet, in thousandths.

    Their mean is half-way from the shares to equal ones, so that few runs see much of each set too; RegMix draws around
    the shares themselves. How near they come to it differs from row to row, as there. A set of share 0 has weight 0.
    """
    draw, there = np.random.default_rng(seed), np.asarray(shares, np.float64) > 0
    centre = np.asarray(shares, np.float64)[there] / np.sum(shares) * there.sum() / 2 + 0.5
    found = np.zeros((count, len(there)))
    gammas = draw.standard_gamma(draw.uniform(*_STRENGTHS, (count, 1)) * centre)
    found[:, there] = np.round(gammas / gammas.sum(1, keepdims=True), 3)
    return found / found.sum(1, keepdims=True)


@dataclass(frozen=True)
class MixingLaw:
    """The held-out losses of all data sets, as functions of the weights."""

    offset: _Floats
    """c [sets]: what no weights change."""
    middle: _Floats
    """Weights [sets] at which `level` holds."""
    level: _Floats
    """[sets]: log of what is above the offset there."""
    slope: _Floats
    """t [sets, sets]: of the loss of the row by the weight of the column; the least in a row helps most."""
    left_out: _Floats
    """[runs, sets]: the loss of each run as the law of the others says it."""

    def __call__(self, weights: npt.ArrayLike) -> _Floats:
        """Losses [..., sets] of weights [..., sets]."""
        return self.offset + np.exp(self.level + (np.asarray(weights) - self.middle) @ self.slope.T)


def fit(weights: npt.ArrayLike, losses: npt.ArrayLike) -> MixingLaw:
    """Least squares of log(L - c) with a small ridge, and of all c from 0 to the least loss the one that foretells best
    a run that is left out.

    Args:
        weights: [runs, sets], each row sums to 1.
        losses: [runs, sets], nats a token, held out.

    Raises:
        UserError: there are fewer runs than numbers to fit.
    """
    r, L = np.asarray(weights, np.float64), np.asarray(losses, np.float64)
    runs, sets = r.shape
    if runs < sets + 2:
        raise UserError(f"{runs} runs cannot tell how {sets} weights change a loss; make at least {sets + 2}")
    middle = r.mean(0)
    x = np.concatenate([np.ones((runs, 1)), r - middle], axis=1)
    penalty = _RIDGE * np.diag([0.0] + [1.0] * sets)
    solve = np.linalg.solve(x.T @ x + penalty, x.T)
    leverage = np.sum(x * solve.T, axis=1)
    offset, level, slope, left_out = np.zeros(sets), np.zeros(sets), np.zeros((sets, sets)), np.zeros_like(L)
    for i in range(sets):
        least = np.inf
        for c in L[:, i].min() * np.linspace(0, 1, _OFFSETS, endpoint=False):
            y = np.log(L[:, i] - c)
            found = solve @ y
            without = y - (y - x @ found) / (1 - leverage)  # exact for least squares with a ridge
            foretold = c + np.exp(without)
            if (error := float(np.sum((foretold - L[:, i]) ** 2))) < least:
                least, offset[i], level[i], slope[i], left_out[:, i] = error, c, found[0], found[1:], foretold
    return MixingLaw(offset, middle, level, slope, left_out)


def best_mixture(law: MixingLaw, shares: Sequence[float], targets: Sequence[float], seed: int) -> _Floats:
    """Weights [sets]: the mean of the best hundred of a hundred thousand mixtures, drawn as the runs' were, so that the
    law is asked for nothing far from what it has seen, as RegMix does.

    Args:
        law: of the losses.
        shares: as for `draw_mixtures`.
        targets: weights of the losses of all sets in the one that should be low.
        seed: of the mixtures.
    """
    candidates = draw_mixtures(shares, _SIMULATED, seed)
    order = np.argsort(target_loss(law(candidates), targets), kind="stable")
    best: _Floats = candidates[order[:_BEST]].mean(0)
    return best


def target_loss(losses: npt.ArrayLike, targets: Sequence[float]) -> _Floats:
    """[...] of losses [..., sets]: their mean with the targets as weights."""
    return np.asarray(losses) @ (np.asarray(targets) / np.sum(targets))


def rank_correlation(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Spearman's, of numbers without ties."""
    first, second = (np.argsort(np.argsort(values)) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])
