"""What the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from maxlm.observe.text import short
from maxlm.scaling.downstream import Foretold
from maxlm.scaling.fitting import Fits
from maxlm.scaling.laws import Optimum
from maxlm.scaling.measured_runs import MeasuredRuns, SizeOf, size_of
from maxlm.scaling.sweep import PlannedRun

Spread = Mapping[str, tuple[float, float]]


def _table(names: Sequence[str], *, left: int = 1) -> Table:
    """Columns after the first `left` are numbers."""
    table = Table()
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def _range(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.4g} to {found[1]:.4g}"


def _digits(value: float) -> str:
    return short(value) if value >= 1e3 else f"{value:.4g}"


def of_runs(runs: MeasuredRuns) -> Table:
    """A row for each, by budgets and sizes."""
    table = _table(("run", "N", "tokens", "tokens / N", "FLOPs", "6ND", "loss"))
    for run in sorted(runs.runs, key=lambda one: (float(f"{one.flops:.2g}"), one.parameters)):
        ratio = f"{run.tokens / run.parameters:.3g}"
        flops = f"{run.flops:.3g}", f"{run.six_nd:.3g}"
        table.add_row(run.name, short(run.parameters), short(run.tokens), ratio, *flops, f"{run.loss:.4f}")
    return table


def of_constants(fits: Fits) -> Table:
    """A row for each constant of each law."""
    table = _table(("law", "constant", "value", f"{fits.confidence:.0%} interval"), left=2)
    for method, one in fits.fits.items():
        intervals = one.intervals(fits.confidence)
        for number, (key, value) in enumerate(one.law.numbers().items()):
            table.add_row("" if number else method.value, key, f"{value:.4g}", _range(intervals.get(key)))
        table.add_section()
    return table


def of_optima(rows: Sequence[tuple[str, float, Optimum, Spread]], confidence: float) -> Table:
    """How each law would spend each budget."""
    said = any(spread for *_, spread in rows)
    table = _table(("law", "FLOPs", "N", "tokens", "tokens / N", "loss"))
    for name, flops, found, spread in rows:
        cells = [
            short(found.parameters),
            short(found.tokens),
            f"{found.tokens_per_parameter:.3g}",
            "-" if found.loss is None else f"{found.loss:.4g}",
        ]
        if said:
            keys = ("parameters", "tokens", "tokens_per_parameter", "loss")
            cells = [
                f"{cell}\n{_digits(spread[key][0])} to {_digits(spread[key][1])}" if key in spread else cell
                for cell, key in zip(cells, keys, strict=True)
            ]
        table.add_row(name, f"{flops:.3g}", *cells)
    if said:
        table.caption = f"below each figure its {confidence:.0%} interval"
    return table


def of_sweep(runs: Sequence[PlannedRun]) -> Table:
    """A row for each run."""
    names = ("run", "layers", "N", "without tables", "tokens", "tokens / N", "steps", "FLOPs", "6ND", "learning rate")
    table = _table(names)
    for run in runs:
        table.add_row(
            run.name,
            f"{run.config.model.n_layers}",
            short(run.parameters),
            short(size_of(run.config, SizeOf.NON_EMBEDDING)),
            short(run.tokens),
            f"{run.tokens / run.parameters:.3g}",
            f"{run.config.train.steps:,}",
            f"{run.flops:.3g}",
            f"{run.six_nd:.3g}",
            f"{run.config.optimizer.learning_rate:.3g}",
        )
    return table


def of_forecasts(found: Foretold, confidence: float) -> Table:
    """A row for each run that is foretold."""
    interval = f"{confidence:.0%} interval"
    table = _table(("run", "FLOPs", "nll", interval, "came", "accuracy", interval, "came"))
    for one in found.forecasts:
        came = ("-", "-") if one.seen is None else (f"{one.seen.nll:.4g}", f"{one.seen.accuracy:.3f}")
        nll = f"{one.nll:.4g}", _range(one.nll_interval), came[0]
        table.add_row(one.name, f"{one.flops:.3g}", *nll, f"{one.accuracy:.3f}", _range(one.accuracy_interval), came[1])
    return table
