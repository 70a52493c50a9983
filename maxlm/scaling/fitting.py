"""Every method on the same runs, how sure each constant is, and the file that keeps all of it."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, assert_never

import numpy as np

from maxlm.config import UserError
from maxlm.config.fields import Filled, NotNegative, Range, Seed, config, shown
from maxlm.config.json_file import read_object
from maxlm.scaling.envelope import fit_envelope
from maxlm.scaling.iso_flops import budgets, fit_iso_flops
from maxlm.scaling.laws import Floats, FrontierLaw, JointLaw, Law, Optimum, ParametricLaw, PowerLaw
from maxlm.scaling.log_fits import lowest_so_far, power_law
from maxlm.scaling.measured_runs import MeasuredRun, MeasuredRuns, as_rows, columns
from maxlm.scaling.parametric import fit_joint, fit_parametric

_LAWS: tuple[type[Law], ...] = (ParametricLaw, JointLaw, FrontierLaw, PowerLaw)
_FEWEST_SHARE = 0.5
"""Of the resamples that must give a law, for there to be an interval."""
_FLATTEST = 5e-3
"""Exponent of a loss that falls."""


class Method(enum.Enum):
    """How a law is found."""

    ENVELOPE = "envelope"
    """Approach 1 of Chinchilla."""
    ISO_FLOPS = "isoflop"
    """Approach 2."""
    PARAMETRIC = "parametric"
    """Approach 3."""
    JOINT = "joint"
    """L(N, D) of Kaplan et al."""
    LOSS_OF_N = "loss_of_n"
    """L(N) = (N_c / N)^alpha, through the runs of which no smaller one has a lower loss."""
    LOSS_OF_D = "loss_of_d"
    """L(D) = (D_c / D)^alpha, likewise of tokens."""
    LOSS_OF_C = "loss_of_c"
    """L(C) = (C_c / C)^alpha, likewise of FLOPs."""


@config("--")
class Fitting:
    """How laws are fitted."""

    methods: Annotated[tuple[Method, ...], Filled(note="name one, such as parametric")] = tuple(Method)
    """Which laws; one that these runs cannot give is told of in a line."""
    tolerance: NotNegative[float] = 0.1
    """Runs are of one budget whose FLOPs lie between the least of them and 1 + tolerance times that."""
    resamples: NotNegative[int] = 200
    """How often the runs are drawn with replacement, and fitted again; 0: there are no intervals."""
    confidence: Annotated[float, Range(gt=0, lt=1)] = 0.9
    """Share of the resampled constants that lies in an interval, as much of the rest below as above."""
    seed: Seed = 0
    """Of the draws."""


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """A law, and the laws of resampled runs."""

    law: Law
    resampled: Sequence[Law] = ()
    """None of them where too few resamples gave one."""

    def intervals(self, confidence: float) -> dict[str, tuple[float, float]]:
        """Of each constant; none without resamples."""
        rows = [law.numbers() for law in self.resampled]
        return {key: interval([row[key] for row in rows], confidence) for key in (rows[0] if rows else ())}

    def optimum(self, flops: float, confidence: float) -> tuple[Optimum, Mapping[str, tuple[float, float]]] | None:
        """At a budget, with intervals; None: the law says nothing of that."""
        if isinstance(self.law, PowerLaw):
            return None
        found = [law.optimum(flops) for law in self.resampled if not isinstance(law, PowerLaw)]
        spread = {
            name: interval([getattr(one, name) for one in found], confidence)
            for name in ("parameters", "tokens", "tokens_per_parameter", "loss")
            if found and getattr(found[0], name) is not None
        }
        return self.law.optimum(flops), spread


def interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Percentiles of resampled values that leave as much below as above."""
    low, high = np.quantile(np.array(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What runs gave."""

    fits: dict[Method, FittedLaw]
    missing: dict[Method, str] = field(default_factory=dict)
    """Why there is no law."""
    confidence: float
    about: dict[str, Any]
    """How they were found, and the runs."""


def fit_all(runs: MeasuredRuns, fitting: Fitting, tell: Callable[[str], None] = lambda line: None) -> Fits:
    """
    Raises:
        UserError: the runs give none of the laws; a line for each.
    """
    fits, missing = dict[Method, FittedLaw](), dict[Method, str]()
    for method in fitting.methods:
        tell(f"fitting {method.value}")
        try:
            fits[method] = _fit(method, runs.runs, fitting)
        except UserError as error:
            missing[method] = str(error)
    if not fits:
        raise UserError("\n".join(f"{method.value}: {reason}" for method, reason in missing.items()))
    about = {
        "flops": runs.flops.value,
        "tolerance": fitting.tolerance,
        "resamples": fitting.resamples,
        "seed": fitting.seed,
        "runs": as_rows(runs.runs),
    }
    return Fits(fits=fits, missing=missing, confidence=fitting.confidence, about=about)


def _fit(method: Method, runs: Sequence[MeasuredRun], fitting: Fitting) -> FittedLaw:
    law = _law(method, runs, fitting.tolerance, None)
    # Budgets are chosen and not drawn: of each as many runs as there are.
    strata = budgets(runs, fitting.tolerance) if method is Method.ISO_FLOPS else [runs]
    rng, found = np.random.default_rng(fitting.seed), list[Law]()
    for _ in range(fitting.resamples):
        drawn = [group[i] for group in strata for i in rng.integers(len(group), size=len(group))]
        try:
            found.append(_law(method, drawn, fitting.tolerance, law))
        except UserError:
            continue
    return FittedLaw(law=law, resampled=found if len(found) >= max(2, _FEWEST_SHARE * fitting.resamples) else ())


def _law(method: Method, runs: Sequence[MeasuredRun], tolerance: float, start: Law | None) -> Law:
    """`start`: the law of all runs, where these are a resample."""
    n, d, loss = columns(runs)
    match method:
        case Method.ENVELOPE:
            return fit_envelope(runs)
        case Method.ISO_FLOPS:
            return fit_iso_flops(runs, tolerance)
        case Method.PARAMETRIC:
            return fit_parametric(runs, start if isinstance(start, ParametricLaw) else None)
        case Method.JOINT:
            return fit_joint(runs, start if isinstance(start, JointLaw) else None)
        case Method.LOSS_OF_N:
            return _falling(n, loss, "parameters")
        case Method.LOSS_OF_D:
            return _falling(d, loss, "tokens")
        case Method.LOSS_OF_C:
            return _falling(np.array([run.flops for run in runs]), loss, "FLOPs")
        case _:
            assert_never(method)


def _falling(x: Floats, loss: Floats, what: str) -> PowerLaw:
    """Through the runs of which none with as little x has a lower loss (arXiv:2001.08361, equations 1.1 to 1.3)."""
    places = lowest_so_far(x, loss)
    if len(places) < 3:
        raise UserError(f"{len(places)} runs have a loss that none with fewer {what} has; a power law needs 3")
    law = power_law(x[places], loss[places])
    if law.exponent > -_FLATTEST:
        raise UserError(f"the loss does not fall with the {what} of these runs; add runs that differ more in them")
    return law


def misfit(law: ParametricLaw | JointLaw, runs: Sequence[MeasuredRun]) -> Floats:
    """log of measured over predicted loss [R]."""
    n, d, loss = columns(runs)
    return np.log(loss / law.loss(n, d))


def as_json(fits: Fits) -> dict[str, Any]:
    """What `read_fits` reads."""
    return {
        "confidence": fits.confidence,
        **fits.about,
        "fits": {
            method.value: {
                "kind": type(one.law).__name__,
                "numbers": one.law.numbers(),
                "intervals": one.intervals(fits.confidence),
                "resampled": _transposed([law.numbers() for law in one.resampled]),
            }
            for method, one in fits.fits.items()
        },
        "missing": {method.value: reason for method, reason in fits.missing.items()},
    }


def _transposed(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [float(f"{row[key]:.6g}") for row in rows] for key in (rows[0] if rows else ())}


def write_fits(fits: Fits, path: Path) -> None:
    """As JSON; intervals are made of the resampled constants."""
    path.write_text(json.dumps(as_json(fits)) + "\n")


def read_fits(path: Path) -> Fits:
    """What `write_fits` wrote.

    Raises:
        UserError: the file is something else.
    """
    values = read_object(path, "a JSON object that python -m maxlm.scaling fit wrote")
    kinds: dict[str, Any] = {kind.__name__: kind for kind in _LAWS}
    try:
        fits = {}
        for name, one in values.pop("fits").items():
            kind, drawn = kinds[one["kind"]], one["resampled"]
            rows = [dict(zip(drawn, row, strict=True)) for row in zip(*drawn.values(), strict=True)]
            laws = [kind.of(numbers) for numbers in [one["numbers"], *rows]]
            fits[Method(name)] = FittedLaw(law=laws[0], resampled=laws[1:])
        missing = {Method(name): str(reason) for name, reason in values.pop("missing").items()}
        confidence = float(values.pop("confidence"))
        if not 0 < confidence < 1 or not all(
            math.isfinite(number) for one in fits.values() for number in one.law.numbers().values()
        ):
            raise ValueError(f"confidence {confidence}, or a constant, cannot be")
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: is not what python -m maxlm.scaling fit wrote ({shown(error)}); fit again") from error
    return Fits(fits=fits, missing=missing, confidence=confidence, about=values)
