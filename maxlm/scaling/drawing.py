"""Fits as a picture: PNG, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.scaling.downstream import Foretold
from maxlm.scaling.envelope import envelope
from maxlm.scaling.fitting import Fits, Method, misfit
from maxlm.scaling.iso_flops import FEWEST_SIZES, budgets, valleys
from maxlm.scaling.laws import JointLaw, ParametricLaw, PowerLaw
from maxlm.scaling.measured_runs import MeasuredRun

_COLOURS = {
    Method.ENVELOPE: "#222222",
    Method.ISO_FLOPS: "#c8501e",
    Method.PARAMETRIC: "#1f4e9c",
    Method.JOINT: "#3b7d4f",
}


def check_picture(path: Path) -> None:
    """Raise what drawing would for this name, before any work is done.

    Raises:
        UserError: it is no .png, its folder is not there, or matplotlib is absent.
    """
    if path.suffix != ".png":
        raise UserError(f"--picture {path} must end in .png, for example --picture {path.with_suffix('.png')}")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.parent}; make it, or name another file")
    _figure((1, 1))


def _figure(size: tuple[float, float]) -> Any:
    try:
        # The object-oriented API alone: pyplot would look for a display and keep figures alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--picture needs matplotlib, which is not installed; {pip_install('maxlm[viz]')}") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    try:
        figure.savefig(part, dpi=90, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def draw_fits(fits: Fits, runs: Sequence[MeasuredRun], path: Path) -> None:
    """Curves with their envelope, parabolas, N and D of the optimum, contours of a formula, what it leaves."""
    figure = _figure((15, 8.5))
    panels = figure.subplots(2, 3)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    colour = _by_size(runs)
    _curves(panels[0, 0], fits, runs, colour)
    _parabolas(panels[0, 1], fits, runs)
    _optima(panels[0, 2], fits, runs, "parameters", exponent="a", label="N_opt, parameters")
    _optima(panels[1, 2], fits, runs, "tokens", exponent="b", label="D_opt, tokens")
    method = next((one for one in (Method.PARAMETRIC, Method.JOINT) if one in fits.fits), None)
    law = None if method is None else fits.fits[method].law
    if isinstance(law, ParametricLaw | JointLaw) and method is not None:
        _contours(panels[1, 0], law, runs, method)
        _residuals(panels[1, 1], law, runs, method, colour)
    else:
        panels[1, 0].set_title("no formula for L(N, D)", loc="left", fontsize=10)
        panels[1, 1].set_axis_off()
    _save(figure, path)


def _by_size(runs: Sequence[MeasuredRun]) -> dict[float, tuple[float, float, float]]:
    """A colour for each size, light to dark."""
    sizes = sorted({run.parameters for run in runs})
    shade = lambda i: 0.82 - 0.75 * i / max(1, len(sizes) - 1)
    return {size: (shade(i) * 0.9, shade(i), 0.45 + 0.5 * shade(i)) for i, size in enumerate(sizes)}


def _title(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _curves(axes: Any, fits: Fits, runs: Sequence[MeasuredRun], colour: dict[float, Any]) -> None:
    labelled = set[float]()
    for run in sorted(runs, key=lambda one: one.parameters):
        tokens, losses = np.array(run.curve).T
        label = None if run.parameters in labelled or len(colour) > 8 else f"N = {run.parameters:.3g}"
        labelled.add(run.parameters)
        style = {"color": colour[run.parameters], "label": label, "linewidth": 1, "markersize": 3}
        axes.plot(tokens * run.flops / run.tokens, losses, "-" if len(run.curve) > 1 else "o", **style)
    if Method.ENVELOPE in fits.fits:
        found = envelope(runs)
        axes.plot(found.flops, found.loss, ".", color="black", markersize=2, label="envelope")
    axes.set_xscale("log")
    _title(axes, "Training curves", "C, FLOPs", "loss, nats a token")
    low, high = min(run.loss for run in runs), max(run.loss for run in runs)
    axes.set_ylim(low - 0.1 * (high - low), high + (high - low))
    _legend(axes)


def _parabolas(axes: Any, fits: Fits, runs: Sequence[MeasuredRun]) -> None:
    tolerance = float(fits.about["tolerance"])
    found, _ = valleys(runs, tolerance)
    groups = [group for group in budgets(runs, tolerance) if len(group) >= FEWEST_SIZES]
    for i, group in enumerate(groups):
        light = 0.75 * (1 - i / len(groups))
        shade = (light, light, 0.8)
        one = next((one for one in found if one.runs[0] in group), None)
        flops = group[0].flops if one is None else one.flops
        n = np.array([run.parameters for run in group])
        axes.plot(n, [run.loss for run in group], "o", color=shade, markersize=4, label=f"{flops:.2g} FLOPs")
        if one is not None:
            line = np.geomspace(n.min(), n.max(), 100)
            axes.plot(line, np.polyval(one.curve, np.log(line)), color=shade, linewidth=1.2)
            axes.plot(one.parameters, one.loss, "*", color="#c8501e", markersize=11)
    axes.set_xscale("log")
    _title(axes, "IsoFLOP parabolas, minima as stars", "N, parameters", "loss, nats a token")
    _legend(axes)


def _optima(axes: Any, fits: Fits, runs: Sequence[MeasuredRun], key: str, *, exponent: str, label: str) -> None:
    """`key`: of an optimum, with that exponent."""
    low, high = min(run.flops for run in runs), max(run.flops for run in runs)
    flops = np.geomspace(low, 30 * high, 60)
    for method, one in fits.fits.items():
        if isinstance(one.law, PowerLaw):
            continue
        power = one.law.numbers()[exponent]
        values = [getattr(one.law.optimum(float(c)), key) for c in flops]
        axes.plot(flops, values, color=_COLOURS[method], linewidth=1.6, label=f"{method.value}: C^{power:.2f}")
        if one.resampled:
            spread = [(one.optimum(float(c), fits.confidence) or (None, {}))[1][key] for c in flops]
            axes.fill_between(flops, *np.array(spread).T, color=_COLOURS[method], alpha=0.1, linewidth=0)
    for valley in valleys(runs, float(fits.about["tolerance"]))[0]:
        axes.plot(valley.flops, getattr(valley, key), "*", color="#c8501e", markersize=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _title(axes, f"{label}: best at each budget", "C, FLOPs", label)
    _legend(axes)


def _contours(axes: Any, law: ParametricLaw | JointLaw, runs: Sequence[MeasuredRun], method: Method) -> None:
    n, d = (np.array([getattr(run, key) for run in runs]) for key in ("parameters", "tokens"))
    c = 6 * n * d
    flops = np.geomspace(c.min() / 2, c.max() * 4, 120)
    sizes = np.geomspace(n.min() / 2, n.max() * 2, 120)
    grid_c, grid_n = np.meshgrid(flops, sizes)
    losses = law.loss(grid_n, grid_c / 6 / grid_n)
    measured = np.array([run.loss for run in runs])
    low = law.optimum(float(flops[-1])).loss or 0.0
    drawn = axes.contour(grid_c, grid_n, losses, levels=np.linspace(low, measured.max() * 1.1, 14), cmap="viridis")
    axes.clabel(drawn, fontsize=7)
    axes.plot(c, n, "o", color="#777777", markersize=3, label="runs")
    best = [law.optimum(float(one)).parameters for one in flops]
    axes.plot(flops, best, color="#1f4e9c", linewidth=2, label="best N")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(sizes[0], sizes[-1])
    _title(axes, f"L(N, D) of {method.value}", "6ND, FLOPs", "N, parameters")
    _legend(axes)


def _residuals(
    axes: Any, law: ParametricLaw | JointLaw, runs: Sequence[MeasuredRun], method: Method, colour: dict[float, Any]
) -> None:
    rest = misfit(law, runs)
    for run, one in zip(runs, rest, strict=True):
        axes.plot(run.tokens, 100 * one, "o", color=colour[run.parameters], markersize=5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    _title(axes, f"Measured over predicted loss, {method.value}; dark: large N", "D, tokens", "log ratio, per cent")


def draw_downstream(found: Foretold, path: Path) -> None:
    """Both curves, what they were fitted to, and what is foretold."""
    figure = _figure((11, 4.6))
    left, right = figure.subplots(1, 2)
    law, runs = found.law, [one for one in found.fitted if one.flops is not None]
    ends = [one.flops for one in runs if one.flops is not None] + [one.flops for one in found.forecasts]
    flops = np.geomspace(min(ends), max(ends), 100)
    nlls = [one.nll for one in found.fitted] + [one.nll for one in found.forecasts]
    spread = max(nlls) - min(nlls)
    line = np.linspace(min(nlls) - 0.1 * spread, max(nlls) + 0.1 * spread, 100)
    left.plot(flops, law.nll(flops), color="#1f4e9c")
    left.plot([one.flops for one in runs], [one.nll for one in runs], "o", color="#777777", label="fitted to")
    right.plot(line, law.accuracy(line), color="#1f4e9c")
    right.plot([one.nll for one in found.fitted], [one.accuracy for one in found.fitted], "o", color="#777777")
    for number, one in enumerate(found.forecasts):
        label = None if number else "foretold, with interval"
        style = {"color": "#c8501e", "capsize": 3, "fmt": "s", "markersize": 5}
        left.errorbar(one.flops, one.nll, yerr=_reach(one.nll, one.nll_interval), label=label, **style)
        right.errorbar(one.nll, one.accuracy, yerr=_reach(one.accuracy, one.accuracy_interval), **style)
        if one.seen is not None:
            left.plot(one.flops, one.seen.nll, "*", color="black", markersize=10, label=None if number else "came")
            right.plot(one.seen.nll, one.seen.accuracy, "*", color="black", markersize=10)
    left.set_xscale("log")
    _title(left, "Likelihood of right answers", "C, FLOPs", "nll of right answers, nats")
    _title(right, "Accuracy", "nll of right answers, nats", "accuracy")
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _reach(value: float, interval: tuple[float, float]) -> list[list[float]]:
    """Of an error bar, below and above."""
    return [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
