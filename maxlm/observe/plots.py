"""The loss curve as a picture, and the smoothing that the report uses too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.observe.metrics import Row
from maxlm.observe.text import short

Points = list[tuple[float, float]]


def points(rows: Sequence[Row], y: str, x: str = "tokens") -> Points:
    """(x, y) of the rows in which both are known."""
    return [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]


def smooth(raw: Points) -> Points:
    """Each point's mean over its neighbours, as many before as after (1.5 % of all, at least 2; fewer at the ends).

    Being symmetric it does not lag behind a falling loss, as an exponential mean does.
    """
    reach = max(2, round(0.015 * len(raw)))
    sums = [0.0, *accumulate(y for _, y in raw)]
    result = []
    for i, (x, _) in enumerate(raw):
        near = min(reach, i, len(raw) - 1 - i)
        result.append((x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return result


def loss_name(evals: Sequence[Row]) -> str:
    """With its unit, where it is a token's cross-entropy: that of pairs, classes and vectors has no perplexity."""
    return "loss" if evals and not any("eval_perplexity" in row for row in evals) else "loss, nats a token"


def loss_curve(metrics: Sequence[Row], evals: Sequence[Row], path: Path) -> Path | None:
    """Write a PNG of the losses and the learning rate over the tokens trained on; None: no loss to draw.

    Raises:
        UserError: matplotlib (the extra `viz`) is absent.
    """
    train = points(metrics, "loss")
    if not train:
        return None
    try:
        # The object-oriented API alone: pyplot would look for a display and keep figures alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise UserError(f"{path.name} needs matplotlib, which is not installed; {pip_install('maxlm[viz]')}") from error
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    loss.plot(*zip(*train, strict=True), color="#9db4d3", linewidth=1, label="training, as logged")
    loss.plot(*zip(*smooth(train), strict=True), color="#1f4e9c", linewidth=2, label="training, smoothed")
    if held_out := points(evals, "eval_loss"):
        loss.plot(*zip(*held_out, strict=True), "o-", color="#c8501e", markersize=5, linewidth=1.2, label="held-out")
    loss.set_ylabel(loss_name(evals))
    loss.legend(frameon=False)
    if rates := points(metrics, "learning_rate"):
        rate.plot(*zip(*rates, strict=True), color="#3b7d4f")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.set_xlabel("tokens")
    rate.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    for axes in (loss, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    part = path.with_suffix(".part")
    try:
        figure.savefig(part, dpi=150, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
