"""Who is better, from comparisons of two: Elo ratings and win rates; rewards that are to be compared, or combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.evaluation.marking import Estimate
from maxlm.evaluation.marking import mean as mean_of

_Floats = npt.NDArray[np.float64]

_POINTS = 400 / math.log(10)
"""Of Elo's scale for a nat of the odds: ten to one is 400 points."""
_DRAWS = 1e-3
"""Of every pair with all others, so that who never lost has a finite rating."""


class Comparison(NamedTuple):
    """Of two players' answers to one question."""

    first: str
    second: str
    score: float
    """1: the first is better; 0: the second; 1/2: neither."""


def elo(comparisons: Sequence[Comparison], mean: float = 1000.0) -> dict[str, float]:
    """The ratings under which the comparisons are likeliest, where a lead of d points wins with probability
    1 / (1 + 10^(-d/400)) (Elo 1978; Bradley & Terry 1952). Unlike ratings that are updated game by game they do not
    depend on the order. A thousandth of a draw between each two players keeps those finite who never lost.

    Args:
        comparisons: in any order.
        mean: of the ratings.

    Raises:
        UserError: there is none; or a score is none.
    """
    if not comparisons:
        raise UserError("there are no comparisons to rate; give at least one")
    players = sorted({name for one in comparisons for name in (one.first, one.second)})
    place = {name: i for i, name in enumerate(players)}
    wins = np.full((len(players), len(players)), _DRAWS / 2)
    np.fill_diagonal(wins, 0)
    for one in comparisons:
        if not 0 <= one.score <= 1:
            raise UserError(f"score = {one.score} of {one.first} against {one.second} must be in [0, 1]")
        if one.first != one.second:
            wins[place[one.first], place[one.second]] += one.score
            wins[place[one.second], place[one.first]] += 1 - one.score
    nats = _likeliest(wins)
    return {name: mean + _POINTS * float(nats[i]) for name, i in place.items()}


def _likeliest(wins: _Floats) -> _Floats:
    """Bradley-Terry's strengths in nats, of mean 0, by Newton's method; wins[i, j]: how often i won against j."""
    strengths, games = np.zeros(len(wins)), wins + wins.T
    for _ in range(100):
        chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        gradient = (wins - games * chance).sum(1)
        weight = games * chance * (1 - chance)
        # The sum of all is free; this fixes it at 0.
        hessian = np.diag(weight.sum(1)) - weight + 1 / len(wins)
        step = np.linalg.solve(hessian, gradient)
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        strengths = strengths + step
        if np.abs(step).max() < 1e-10:
            break
    centred: _Floats = strengths - strengths.mean()
    return centred


def win_rate(comparisons: Sequence[Comparison], player: str, other: str) -> Estimate | None:
    """How often one player is better than another, a draw as half a win, with its 95 % interval; None: they have not
    met."""
    scores = [one.score for one in comparisons if (one.first, one.second) == (player, other)]
    scores += [1 - one.score for one in comparisons if (one.first, one.second) == (other, player)]
    return mean_of(scores) if scores else None


def by_reward(first: str, second: str, rewards: _Floats, others: _Floats) -> list[Comparison]:
    """Of the rewards of two players' answers to the same questions."""
    return [Comparison(first, second, (float(np.sign(a - b)) + 1) / 2) for a, b in zip(rewards, others, strict=True)]


class RewardScale(NamedTuple):
    """Mean and standard deviation of a reward model's scores on texts that everybody knows.

    A Bradley-Terry loss says nothing of the mean, which InstructGPT brings to 0 on demonstrations (arXiv:2203.02155,
    section 3.5).
    """

    mean: float
    std: float

    @staticmethod
    def of(rewards: npt.ArrayLike) -> RewardScale:
        """
        Raises:
            UserError: there are fewer than two rewards, or all are the same.
        """
        values = np.asarray(rewards, np.float64)
        if values.size < 2 or not values.std():
            raise UserError(f"{values.size} rewards with one value have no scale; give rewards of several texts")
        return RewardScale(float(values.mean()), float(values.std()))

    def normalised(self, rewards: npt.ArrayLike) -> _Floats:
        """With mean 0 and standard deviation 1 on those texts."""
        scaled: _Floats = (np.asarray(rewards, np.float64) - self.mean) / self.std
        return scaled


def gated(helpfulness: npt.ArrayLike, safety: npt.ArrayLike, risky: npt.ArrayLike, threshold: float = 0.15) -> _Floats:
    """One reward of two models, each the sigmoid of its score: that of safety where the prompt may lead to something
    unsafe or the answer is held to be, else that of helpfulness; as a logit, whitened (Llama 2, arXiv:2307.09288,
    section 3.2.3).

    Args:
        helpfulness: [N], scores of the one model.
        safety: [N], scores of the other.
        risky: bool [N], prompts that are marked.
        threshold: safety below it decides.

    Raises:
        UserError: there are fewer than two scores, or all come out the same.
    """
    helpful, safe = (1 / (1 + np.exp(-np.asarray(x, np.float64))) for x in (helpfulness, safety))
    chosen = np.clip(np.where(np.asarray(risky, bool) | (safe < threshold), safe, helpful), 1e-12, 1 - 1e-12)
    logits = np.log(chosen / (1 - chosen))
    return RewardScale.of(logits).normalised(logits)
