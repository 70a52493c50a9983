"""`python -m maxlm.scaling fit|optimal|sweep|downstream`: fit scaling laws, and what follows from them."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from maxlm import surroundings
from maxlm.config import UserError
from maxlm.config.cli import parse, parse_known, parse_run, run_command
from maxlm.config.fields import Filled, Fraction, NotEmpty, PathName, Positive, config
from maxlm.scaling.downstream import Forecasting, Relation, foretell
from maxlm.scaling.drawing import check_picture, draw_downstream, draw_fits
from maxlm.scaling.exam_results import read_outcomes
from maxlm.scaling.fitting import Fits, Fitting, as_json, fit_all, misfit, read_fits, write_fits
from maxlm.scaling.known_laws import KNOWN
from maxlm.scaling.law_tables import of_constants, of_forecasts, of_optima, of_runs, of_sweep
from maxlm.scaling.laws import JointLaw, ParametricLaw
from maxlm.scaling.measured_runs import FlopsRule, Reading, read_runs
from maxlm.scaling.sweep import Sweep, command, plan, run_all, write_configs

_PROG = "python -m maxlm.scaling"
_WIDTH = 160
"""Of tables where nobody looks at a terminal."""
_USAGE = f"""Scaling laws: how loss falls with parameters, tokens and FLOPs, and how a budget is best split.

{_PROG} sweep --config FILE --budgets 1e17 3e17 --widths 256 512 768 [--run] [overrides]
                    configs of runs over budgets and sizes, and the runs themselves
{_PROG} fit RUN... --out FILE.json --picture FILE.png
                    laws from tables (.csv, .jsonl), run folders, and folders of them
{_PROG} optimal --flops 1e21 [--fit FILE.json]
                    parameters and tokens for a budget, by published laws or one's own
{_PROG} downstream TABLE... --hold_out 1
                    from FLOPs to the likelihood of right answers, and on to accuracy

Each has --help. --debug shows tracebacks. docs/scaling.md has the formulas.
Exit code: 0 done, 2 a mistake to mend, 75 a sweep was stopped by a signal (the same command goes on), 1 a failure."""


@config("--")
class FitOptions:
    """What is fitted to what."""

    runs: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name tables or run folders")]]
    """Tables (.csv, .jsonl with params, tokens, loss and perhaps flops, run), run folders, folders of run folders."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    """What is read of runs."""
    fitting: tyro.conf.OmitArgPrefixes[Fitting] = field(default_factory=Fitting)
    """How laws are fitted."""
    at: tuple[Positive[float], ...] = ()
    """FLOPs of which the best split is shown; none: ten times those of the largest run."""
    out: Annotated[PathName | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Where the laws are kept, for --fit of `optimal`."""
    picture: Annotated[PathName | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Where they are drawn."""
    json: bool = False
    """Print one JSON object instead of tables."""


@config("--")
class OptimalOptions:
    """A budget, and who says how it is best spent."""

    flops: Positive[float] | None = None
    """Training FLOPs; or the three that follow."""
    gpu_hours: Positive[float] | None = None
    """Hours, of all devices together."""
    peak_flops: Positive[float] | None = None
    """FLOP/s of a device, as its maker says (H100, dense bfloat16: 989e12)."""
    mfu: Fraction | None = None
    """Share of these that training makes use of, such as 0.4."""
    law: Annotated[tuple[NotEmpty[str], ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Published laws, or methods of --fit; none: all."""
    fit: Annotated[PathName | None, tyro.conf.arg(metavar="FILE.json")] = None
    """One's own laws, as `fit --out` wrote them."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        hours = (self.gpu_hours, self.peak_flops, self.mfu)
        if (self.flops is None) == (None in hours) or (self.flops is not None and hours != (None,) * 3):
            raise UserError(
                "--flops, or --gpu_hours with --peak_flops and --mfu: one of the two says what the budget is, such as "
                "--flops 1e21 or --gpu_hours 1000 --peak_flops 989e12 --mfu 0.4"
            )
        if self.mfu == 0:
            raise UserError("--mfu = 0.0 leaves no FLOPs; use for example 0.4")

    @property
    def budget(self) -> float:
        """In FLOPs."""
        if self.flops is not None:
            return self.flops
        assert self.gpu_hours is not None and self.peak_flops is not None and self.mfu is not None
        return self.gpu_hours * 3600 * self.peak_flops * self.mfu


@config("--")
class SweepOptions:
    """Which runs, and whether to make them."""

    sweep: tyro.conf.OmitArgPrefixes[Sweep]
    """Which runs."""
    run: bool = False
    """Train them too, one after the other; those that are finished are passed over."""


@config("--")
class DownstreamOptions:
    """Exam results, and what is foretold."""

    places: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name tables or folders")]]
    """Tables (.csv, .jsonl with nll, accuracy and perhaps flops, run), and folders that maxlm.evaluate --out wrote."""
    exam: NotEmpty[str] | None = None
    """Which exam of the folders; None: the only one in which the model chooses."""
    forecasting: tyro.conf.OmitArgPrefixes[Forecasting] = field(default_factory=Forecasting)
    """How it is foretold."""
    picture: Annotated[PathName | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Where the curves are drawn."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> int:
    """The command line.

    Raises:
        UserError: a file, an option or what is asked does not fit.
    """
    arguments = [argument for argument in argv if argument != "--debug"]
    match arguments:
        case [] | ["-h" | "--help"]:
            print(_USAGE)
            return 0
        case ["fit", *rest]:
            return _fit(parse(FitOptions, rest, prog=f"{_PROG} fit", description="Fit laws to runs.", flags=True))
        case ["optimal", *rest]:
            description = f"Parameters and tokens for a budget. Published laws: {', '.join(KNOWN)}."
            return _optimal(parse(OptimalOptions, rest, prog=f"{_PROG} optimal", description=description, flags=True))
        case ["sweep", *rest]:
            return _sweep(rest)
        case ["downstream", *rest]:
            description = "From FLOPs to the likelihood of right answers, and on to accuracy."
            prog = f"{_PROG} downstream"
            return _downstream(parse(DownstreamOptions, rest, prog=prog, description=description, flags=True))
        case _:
            raise UserError(f"unknown command {arguments[0]!r}; use fit, optimal, sweep or downstream")


def _fit(options: FitOptions) -> int:
    if options.picture is not None:
        check_picture(Path(options.picture))
    if options.out is not None:
        _check_json("--out", Path(options.out))
    runs = read_runs(options.runs, options.reading)
    for note in runs.notes:
        _tell(note)
    fits = fit_all(runs, options.fitting, lambda line: _tell(line) if sys.stderr.isatty() else None)
    fits.about["parameters"] = options.reading.parameters.value
    if options.out is not None:
        write_fits(fits, Path(options.out))
    if options.picture is not None:
        draw_fits(fits, runs.runs, Path(options.picture))
    if options.json:
        print(json.dumps(as_json(fits)))
        return 0
    _print(of_runs(runs))
    _print(of_constants(fits))
    budgets = options.at or (10 * max(run.flops for run in runs.runs),)
    _print(of_optima(_own_optima(fits, budgets), fits.confidence))
    for method, one in fits.fits.items():
        if isinstance(one.law, ParametricLaw | JointLaw):
            rest = misfit(one.law, runs.runs)
            print(f"{method.value}: predicts losses to {100 * (rest**2).mean() ** 0.5:.2g} % (root mean square)")
        if fits.about["resamples"] and not one.resampled:
            print(f"{method.value}: no intervals, as most resamples of these runs give no law")
    for method, reason in fits.missing.items():
        print(f"{method.value}: not fitted: {reason}")
    if runs.flops is FlopsRule.COUNTED:
        ratios = [run.six_nd / run.flops for run in runs.runs]
        print(
            f"formulas for L(N, D) split a budget as 6ND, which is {min(ratios):.3g} to {max(ratios):.3g} times the "
            "FLOPs that are counted of these runs"
        )
    print(
        f"N: {options.reading.parameters.value} parameters; C: {runs.flops.value}; intervals: "
        f"{options.fitting.resamples} resamples of the runs, seed {options.fitting.seed}"
    )
    return 0


def _own_optima(fits: Fits, budgets: tuple[float, ...]) -> list[Any]:
    """Rows for `of_optima`."""
    rows = []
    for flops in budgets:
        for method, one in fits.fits.items():
            if (found := one.optimum(flops, fits.confidence)) is not None:
                rows.append((method.value, flops, *found))
    return rows


def _optimal(options: OptimalOptions) -> int:
    flops = options.budget
    rows: list[Any] = [(name, flops, known.law.optimum(flops), {}) for name, known in KNOWN.items()]
    sources = {name: f"{known.source}; N: {known.parameters}" for name, known in KNOWN.items()}
    confidence = 0.0
    if options.fit is not None:
        fits = read_fits(Path(options.fit))
        own = _own_optima(fits, (flops,))
        rows, confidence = [*own, *rows], fits.confidence
        sources |= {row[0]: f"{options.fit}; N: {fits.about.get('parameters', 'as fitted')}" for row in own}
    if strange := [name for name in options.law if name not in sources]:
        raise UserError(f"--law {strange[0]}: must be one of {', '.join(sources)}")
    rows = [row for row in rows if not options.law or row[0] in options.law]
    if options.json:
        found = {
            name: {**best._asdict(), "tokens_per_parameter": best.tokens_per_parameter, "intervals": spread}
            for name, _, best, spread in rows
        }
        print(json.dumps({"flops": flops, "optima": found}))
        return 0
    _print(of_optima(rows, confidence))
    for name, *_ in rows:
        print(f"{name}: {sources[name]}")
    return 0


def _sweep(argv: list[str]) -> int:
    description = (
        "Configs of runs over budgets and sizes: OUT/NAME.json and, once trained, OUT/NAME.\n\n--config FILE stands "
        "beside these, and overrides of its keys, such as --train.batch_size=4."
    )
    options, rest = parse_known(SweepOptions, argv, prog=f"{_PROG} sweep", description=description)
    asked = parse_run(rest, prog=f"{_PROG} sweep", description=description)
    runs, notes = plan(asked.config, options.sweep)
    _print(of_sweep(runs))
    for note in notes:
        _tell(note)
    write_configs(runs)
    if options.run:
        return run_all(runs, _tell)
    print("\n".join(" ".join(["python", *command(run)[1:]]) for run in runs))
    return 0


def _downstream(options: DownstreamOptions) -> int:
    if options.picture is not None:
        check_picture(Path(options.picture))
    how = options.forecasting
    found, chance = read_outcomes(options.places, options.exam)
    chance = how.chance if how.chance is not None else chance
    if chance is None:
        raise UserError("--chance is missing, and tables do not say it; give what guessing gets right, such as 0.25")
    foretold = foretell(found, how, chance)
    law = foretold.law
    if options.picture is not None:
        draw_downstream(foretold, Path(options.picture))
    if options.json:
        law_json = {**asdict(law), "relation": law.relation.value}
        rows = [{**one._asdict(), "seen": None if one.seen is None else asdict(one.seen)} for one in foretold.forecasts]
        print(json.dumps({"law": law_json, "forecasts": rows, "resampled": foretold.resampled}))
        return 0
    left = "log nll" if law.relation is Relation.POWER else "nll"
    n_runs = sum(one.flops is not None for one in foretold.fitted)
    print(f"{left} = {law.offset:.4g} {law.slope:+.4g} log C, of {n_runs} runs")
    print(
        f"accuracy = {law.chance:g} + {law.ceiling - law.chance:g} / (1 + exp({law.steepness:.4g} (nll - "
        f"{law.middle:.4g}))), of {len(foretold.fitted)} models"
    )
    if foretold.forecasts:
        _print(of_forecasts(foretold, how.confidence))
        print(f"intervals: of a new measurement, from {foretold.resampled} resamples of the models, seed {how.seed}")
    return 0


def _check_json(option: str, path: Path) -> None:
    if path.suffix != ".json":
        raise UserError(f"{option} {path} must end in .json, for example {option} {path.with_suffix('.json')}")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it, or name another file")


def _print(table: Table) -> None:
    surroundings.console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
