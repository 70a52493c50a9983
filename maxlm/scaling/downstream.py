"""From FLOPs to the negative log-likelihood of right answers, and from that to accuracy (arXiv:2407.21783, section
3.2.1): two curves, so that models of which the FLOPs are not known help with the second."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, assert_never

import numpy as np
from scipy import optimize
from scipy.special import expit

from maxlm.config import UserError
from maxlm.config.fields import Fraction, NotNegative, Positive, Range, Seed, config
from maxlm.scaling.exam_results import Outcome
from maxlm.scaling.fitting import interval
from maxlm.scaling.laws import Floats, Quantity

_FEWEST_RUNS, _FEWEST_MODELS = 3, 4
"""For a line, and for a sigmoid."""


class Relation(enum.Enum):
    """How the likelihood follows from FLOPs."""

    LINEAR = "linear"
    """nll = p + q log C."""
    POWER = "power"
    """log nll = p + q log C."""


@config("--")
class Forecasting:
    """How an exam's outcome is foretold."""

    relation: Relation = Relation.POWER
    """How the likelihood follows from FLOPs."""
    chance: Fraction | None = None
    """Accuracy where the likelihood is low; None: that of guessing, as the folders of maxlm.evaluate say it."""
    ceiling: Fraction = 1.0
    """Accuracy where the likelihood is high."""
    hold_out: NotNegative[int] = 0
    """So many of the runs, those with the most FLOPs, are foretold and not fitted to."""
    at: tuple[Positive[float], ...] = ()
    """FLOPs of runs to foretell."""
    resamples: Annotated[int, Range(ge=2)] = 1000
    """How often the models are drawn with replacement, and fitted again."""
    confidence: Annotated[float, Range(gt=0, lt=1)] = 0.9
    """Share of the resampled forecasts that lies in an interval."""
    seed: Seed = 0
    """Of the draws."""


@dataclass(frozen=True, kw_only=True)
class DownstreamLaw:
    """Both curves."""

    relation: Relation
    offset: float
    slope: float
    """p and q of the relation."""
    middle: float
    """The nll at which accuracy is half-way."""
    steepness: float
    chance: float
    ceiling: float

    def nll(self, flops: Quantity) -> Quantity:
        line = self.offset + self.slope * np.log(flops)
        match self.relation:
            case Relation.LINEAR:
                return line
            case Relation.POWER:
                return np.exp(line)
            case _:
                assert_never(self.relation)

    def accuracy(self, nll: Quantity) -> Quantity:
        """chance + (ceiling - chance) / (1 + exp(steepness (nll - middle)))."""
        return self.chance + (self.ceiling - self.chance) * expit(-self.steepness * (nll - self.middle))


class ExpectedOutcome(NamedTuple):
    """What is expected of a run."""

    name: str
    flops: float
    nll: float
    nll_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]
    seen: Outcome | None
    """What came; None: it is not known yet."""


class Foretold(NamedTuple):
    """The law, and what follows from it."""

    law: DownstreamLaw
    fitted: list[Outcome]
    forecasts: list[ExpectedOutcome]
    resampled: int
    """Resamples that gave a law."""


def fit_downstream(
    found: Sequence[Outcome], how: Forecasting, chance: float, start: DownstreamLaw | None = None
) -> DownstreamLaw:
    """Least squares, each curve by itself.

    Args:
        found: of each model.
        how: which curves.
        chance: the lower end of the sigmoid.
        start: begin with its sigmoid alone.

    Raises:
        UserError: too few models, or accuracy that does not rise with the likelihood.
    """
    runs = [one for one in found if one.flops is not None]
    if len({one.flops for one in runs}) < _FEWEST_RUNS:
        raise UserError(f"{len(runs)} runs have FLOPs, a line needs {_FEWEST_RUNS} of different ones; add runs")
    if len({one.nll for one in found}) < _FEWEST_MODELS:
        raise UserError(f"{len(found)} models, a sigmoid needs {_FEWEST_MODELS}; add models")
    if not chance < how.ceiling:
        raise UserError(f"--chance {chance:g} must be less than --ceiling {how.ceiling:g}")
    log_flops = np.log(np.array([one.flops for one in runs], np.float64))
    nll = np.array([one.nll for one in runs])
    slope, offset = np.polyfit(log_flops, np.log(nll) if how.relation is Relation.POWER else nll, 1)
    every_nll = np.array([one.nll for one in found])
    center, scale = float(every_nll.mean()), float(every_nll.std())
    starts = [(middle, steep) for middle in (-1.0, 1.0) for steep in (0.5, 2.0)]
    if start is not None:
        starts = [((start.middle - center) / scale, start.steepness * scale)]
    accuracies = np.array([one.accuracy for one in found])
    middle, steepness = _sigmoid((every_nll - center) / scale, accuracies, chance, how.ceiling, starts)
    return DownstreamLaw(
        relation=how.relation,
        offset=float(offset),
        slope=float(slope),
        middle=center + scale * middle,
        steepness=steepness / scale,
        chance=chance,
        ceiling=how.ceiling,
    )


def _sigmoid(
    x: Floats, accuracy: Floats, chance: float, ceiling: float, starts: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Its middle and steepness."""
    residual = lambda theta: chance + (ceiling - chance) * expit(-theta[1] * (x - theta[0])) - accuracy
    inside = [tuple(np.clip(start, (-19, -49), (19, 49))) for start in starts]
    fits = [optimize.least_squares(residual, start, bounds=((-20, -50), (20, 50))) for start in inside]
    middle, steepness = min(fits, key=lambda one: one.cost).x
    if steepness <= 1e-3:
        raise UserError(
            "accuracy does not rise as the nll of right answers falls; add models that differ more, or questions"
        )
    return float(middle), float(steepness)


def foretell(found: Sequence[Outcome], how: Forecasting, chance: float) -> Foretold:
    """Fit to all but what is held out, and say what is expected of that and at `how.at`.

    An interval is of what will be measured, not of the curve: models are drawn with replacement and fitted again, and
    to each curve a residual of the fit is added, drawn too, larger by (n / (n - 2))^(1/2) as two constants were fitted.

    Raises:
        UserError: as `fit_downstream`, or half of the resamples give no law.
    """
    by_flops = sorted((one for one in found if one.flops is not None), key=lambda one: one.flops or 0.0)
    held_out = by_flops[len(by_flops) - how.hold_out :] if how.hold_out else []
    fitted = [one for one in found if one not in held_out]
    law = fit_downstream(fitted, how, chance)
    rng, laws = np.random.default_rng(how.seed), list[DownstreamLaw]()
    for _ in range(how.resamples):
        try:
            drawn = [fitted[i] for i in rng.integers(len(fitted), size=len(fitted))]
            laws.append(fit_downstream(drawn, how, chance, law))
        except UserError:
            continue
    if len(laws) < max(2, how.resamples / 2):
        raise UserError(
            f"{len(laws)} of {how.resamples} resamples of {len(fitted)} models give a law, too few for an interval; "
            "add models"
        )
    in_logs = how.relation is Relation.POWER
    of_line = _residuals([(one.nll, law.nll(one.flops)) for one in fitted if one.flops is not None], in_logs)
    of_sigmoid = _residuals([(one.accuracy, law.accuracy(one.nll)) for one in fitted], False)
    asked: list[tuple[str, float, Outcome | None]] = [(one.name, one.flops or 0.0, one) for one in held_out]
    asked += [(f"{flops:.3g} FLOPs", flops, None) for flops in how.at]
    forecasts = []
    for name, flops, seen in asked:
        nlls, accuracies = [], []
        for one in laws:
            noise = float(rng.choice(of_line))
            nlls.append(one.nll(flops) * np.exp(noise) if in_logs else one.nll(flops) + noise)
            accuracies.append(float(np.clip(one.accuracy(nlls[-1]) + rng.choice(of_sigmoid), 0, 1)))
        nll = float(law.nll(flops))
        forecasts.append(
            ExpectedOutcome(
                name=name,
                flops=flops,
                nll=nll,
                nll_interval=interval(nlls, how.confidence),
                accuracy=float(law.accuracy(nll)),
                accuracy_interval=interval(accuracies, how.confidence),
                seen=seen,
            )
        )
    return Foretold(law, fitted, forecasts, len(laws))


def _residuals(pairs: Sequence[tuple[float, float]], in_logs: bool) -> Floats:
    """Of measured and fitted values, as wide as those of a new measurement."""
    measured, fitted = np.array(pairs).T
    rest: Floats = np.log(measured / fitted) if in_logs else measured - fitted
    return rest * np.sqrt(len(rest) / max(1, len(rest) - 2))
