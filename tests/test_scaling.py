"""Scaling laws: planted constants come back, closed forms agree with searches, published optima with their papers, and
a sweep is what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_run
from run_folder import make_run
from scipy import optimize

from maxlm.config import (
    ConstantSchedule,
    CosineSchedule,
    ObserveConfig,
    RunConfig,
    Sft,
    UserError,
    WsdSchedule,
    serialize,
)
from maxlm.config.cli import load_config
from maxlm.evaluation.examining import Asking, examine
from maxlm.evaluation.exams import ChoiceExam, ChoiceQuestion
from maxlm.evaluation.results import write_results
from maxlm.evaluation.scoring import Likelihood
from maxlm.scaling import sweep as sweeping
from maxlm.scaling.__main__ import OptimalOptions, main
from maxlm.scaling.downstream import Forecasting, Relation, fit_downstream, foretell
from maxlm.scaling.envelope import envelope, fit_envelope
from maxlm.scaling.exam_results import Outcome, read_outcomes
from maxlm.scaling.fitting import Fitting, Method, fit_all, read_fits, write_fits
from maxlm.scaling.iso_flops import budgets, fit_iso_flops, valley
from maxlm.scaling.known_laws import GOPHER_FLOPS, KNOWN, PF_DAY
from maxlm.scaling.laws import JointLaw, ParametricLaw
from maxlm.scaling.measured_runs import (
    FlopsRule,
    LossSource,
    MeasuredRun,
    MeasuredRuns,
    Reading,
    SizeOf,
    read_runs,
    size_of,
)
from maxlm.scaling.parametric import fit_joint, fit_parametric
from maxlm.scaling.sweep import Sweep, plan, run_all, write_configs
from maxlm.shapes import flops_per_token, parameter_count

ROOT = Path(__file__).parent.parent
CHINCHILLA = KNOWN["chinchilla3"].law
assert isinstance(CHINCHILLA, ParametricLaw)
KAPLAN = JointLaw(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
"""arXiv:2001.08361, table 2."""
BUDGETS = (1e18, 1e19, 1e20, 1e21)


def run(parameters: float, tokens: float, loss: float, curve: Sequence[tuple[float, float]] = ()) -> MeasuredRun:
    return MeasuredRun(
        name=f"{parameters:.3g}",
        parameters=parameters,
        tokens=tokens,
        loss=loss,
        flops=6 * parameters * tokens,
        curve=(*curve, (tokens, loss)),
    )


def planted(
    law: ParametricLaw | JointLaw, noise: float = 0.0, seed: int = 0, flops: Sequence[float] = BUDGETS, sizes: int = 8
) -> list[MeasuredRun]:
    """Runs at budgets, of sizes around the best one, with noise in log-losses."""
    rng = np.random.default_rng(seed)
    found = []
    for budget in flops:
        for n in law.optimum(budget).parameters * np.geomspace(0.2, 5, sizes):
            d = budget / 6 / n
            found.append(run(float(n), d, float(law.loss(n, d) * np.exp(noise * rng.normal()))))
    return found


# Closed forms against searches


@pytest.mark.parametrize("law", [CHINCHILLA, KNOWN["besiroglu"].law, KAPLAN], ids=["chinchilla", "besiroglu", "kaplan"])
@pytest.mark.parametrize("flops", [1e17, 1e24])
def test_the_best_split_is_where_a_search_finds_it(law: ParametricLaw | JointLaw, flops: float) -> None:
    at = lambda log_n: law.loss(math.exp(log_n), flops / 6 / math.exp(log_n))
    found = optimize.minimize_scalar(at, bounds=(math.log(1e3), math.log(1e16)), method="bounded")
    best = law.optimum(flops)
    assert best.parameters == pytest.approx(math.exp(found.x), rel=1e-3)
    assert best.loss == pytest.approx(found.fun, rel=1e-9)
    assert 6 * best.parameters * best.tokens == pytest.approx(flops)


def test_the_exponents_are_not_swapped() -> None:
    """Loss that falls fast with data wants few tokens more: a = beta / (alpha + beta), not alpha / (alpha + beta)."""
    law = ParametricLaw(E=1.7, A=400.0, B=400.0, alpha=0.2, beta=0.5)
    low, high = (law.optimum(flops) for flops in (1e20, 1e22))
    assert math.log10(high.parameters / low.parameters) / 2 == pytest.approx(law.a) == pytest.approx(5 / 7)
    assert math.log10(high.tokens / low.tokens) / 2 == pytest.approx(law.b) == pytest.approx(2 / 7)
    # Equation 4 of arXiv:2203.15556 by hand: alpha A / (beta B) = 0.4.
    assert low.parameters == pytest.approx(0.4 ** (1 / 0.7) * (1e20 / 6) ** (5 / 7))


# What papers say


@pytest.mark.parametrize(
    ("name", "parameters", "within"),
    [
        ("chinchilla1", 67e9, 0.01),
        ("chinchilla2", 63e9, 0.01),
        ("chinchilla3", 40e9, 0.02),  # figure 4
        ("chinchilla3_rounded", 32e9, 0.02),  # which is not 40e9
    ],
)
def test_gophers_budget(name: str, parameters: float, within: float) -> None:
    best = KNOWN[name].law.optimum(GOPHER_FLOPS)
    assert best.parameters == pytest.approx(parameters, rel=within)
    assert 6 * best.parameters * best.tokens == pytest.approx(GOPHER_FLOPS)


@pytest.mark.parametrize(
    ("name", "flops", "parameters", "tokens"),
    [
        # arXiv:2203.15556, table 3.
        *(("chinchilla1", *row) for row in ((1.21e20, 1e9, 20.2e9), (1.27e26, 1e12, 21.2e12))),
        # Table A3.
        *(("chinchilla2", *row) for row in ((1.20e20, 1e9, 20.0e9), (6.88e23, 67e9, 1.7e12), (1.59e26, 1e12, 26.5e12))),
        *(("chinchilla3", *row) for row in ((1.62e20, 1e9, 27.1e9), (1.71e24, 67e9, 4.1e12), (5.65e26, 1e12, 94.1e12))),
        ("llama3", 3.8e25, 402e9, 16.55e12),  # arXiv:2407.21783, section 3.2.1
        ("kaplan", PF_DAY, 1.3e9, PF_DAY / 6 / 1.3e9),  # arXiv:2001.08361, table 6
    ],
)
def test_rows_of_the_papers_tables(name: str, flops: float, parameters: float, tokens: float) -> None:
    best = KNOWN[name].law.optimum(flops)
    assert best.parameters == pytest.approx(parameters, rel=0.09)
    assert best.tokens == pytest.approx(tokens, rel=0.09)


def test_besiroglus_refit_agrees_with_twenty_tokens_a_parameter() -> None:
    """arXiv:2404.10102: unlike equation 10 it is consistent with how Chinchilla was trained, 70e9 on 1.4e12."""
    best = KNOWN["besiroglu"].law.optimum(GOPHER_FLOPS)
    assert 17 < best.tokens_per_parameter < 22 and 67e9 < best.parameters < 77e9


# Fits


def test_a_formula_comes_back_from_its_own_losses() -> None:
    found = fit_parametric(planted(CHINCHILLA))
    for key, value in dataclasses.asdict(CHINCHILLA).items():
        assert getattr(found, key) == pytest.approx(value, rel=2e-3), key
    assert found.optimum(GOPHER_FLOPS).parameters == pytest.approx(40.3e9, rel=0.01)


def test_the_joint_law_comes_back_from_its_own_losses() -> None:
    found = fit_joint(planted(KAPLAN))
    assert found.alpha_N == pytest.approx(0.076, rel=5e-3) and found.alpha_D == pytest.approx(0.103, rel=5e-3)
    assert found.N_c == pytest.approx(6.4e13, rel=0.1) and found.D_c == pytest.approx(1.8e13, rel=0.1)


def test_outliers_move_little() -> None:
    """Three runs of 32 that ended 20 % too high: least squares follows them, the Huber loss does not."""
    runs = planted(CHINCHILLA, noise=1e-3)
    for place in (2, 13, 29):
        runs[place] = dataclasses.replace(runs[place], loss=1.2 * runs[place].loss)
    n, d, loss = (np.array([getattr(one, key) for one in runs]) for key in ("parameters", "tokens", "loss"))
    predict = lambda t: np.log(np.exp(t[0]) * n ** -t[3] + np.exp(t[1]) * d ** -t[4] + np.exp(t[2]))
    squares = optimize.least_squares(lambda t: predict(t) - np.log(loss), (6.0, 6.0, 0.5, 0.34, 0.28)).x
    moved = abs(squares[4] / (squares[3] + squares[4]) - CHINCHILLA.a)
    assert abs(fit_parametric(runs).a - CHINCHILLA.a) < min(0.01, moved / 3)


def test_parabolas_have_the_minima_that_were_planted() -> None:
    """Losses that are parabolas in log N, so that nothing is approximate: N_opt = 0.1 C^0.5, D_opt = C^0.5 / 0.6."""
    runs = []
    for flops in (1e18, 1.1e19, 1e20):
        best = 0.1 * flops**0.5
        for factor in (0.3, 0.7, 1.0, 2.0, 4.0):
            runs.append(run(best * factor, flops / 6 / best / factor, 2.5 + 0.1 * math.log(factor) ** 2))
    found = fit_iso_flops(runs, tolerance=0.05)
    assert found.parameters.exponent == pytest.approx(0.5) and found.parameters.coefficient == pytest.approx(0.1)
    assert found.tokens.exponent == pytest.approx(0.5) and found.tokens.coefficient == pytest.approx(1 / 0.6)
    one = valley(runs[:5])
    assert one.loss == pytest.approx(2.5) and np.polyval(one.curve, math.log(one.parameters)) == pytest.approx(2.5)


def test_runs_are_of_one_budget_within_the_tolerance() -> None:
    runs = [run(1e6 * factor, 1e8, 3.0) for factor in (1.0, 1.09, 1.11, 5.0)]
    assert [len(group) for group in budgets(runs[::-1], 0.1)] == [2, 1, 1]
    assert [len(group) for group in budgets(runs, 0.2)] == [3, 1]


def curves(law: ParametricLaw, sizes: int) -> list[MeasuredRun]:
    """Of runs whose loss is the law's at every moment."""
    found = []
    for n in np.geomspace(1e7, 1e9, sizes):
        tokens = np.geomspace(20, 20_000, 80) * 1e6 * (n / 1e7) ** 0.5
        points = [(float(d), float(law.loss(n, d))) for d in tokens]
        found.append(run(float(n), *points[-1], points[:-1]))
    return found


def test_the_envelope_is_the_lower_edge_of_all_curves() -> None:
    law = ParametricLaw(E=1.7, A=400.0, B=2000.0, alpha=0.35, beta=0.35)
    runs = curves(law, sizes=40)
    found = envelope(runs)
    for flops in (3e17, 3e18, 3e19):
        place = np.searchsorted(found.flops, flops)
        best = law.optimum(float(found.flops[place]))
        assert found.loss[place] == pytest.approx(best.loss, rel=1e-3)
        assert found.parameters[place] == pytest.approx(best.parameters, rel=0.15)  # sizes are 12 % apart
    fitted = fit_envelope(runs)
    assert fitted.parameters.exponent == pytest.approx(0.5, abs=0.02)
    assert fitted.optimum(1e18).parameters == pytest.approx(law.optimum(1e18).parameters, rel=0.1)


def test_each_loss_alone_is_a_power_law_through_the_best_runs() -> None:
    """L = (10^12 / x)^0.1 on the front, and runs above it."""
    front = [run(10.0**k, 10.0 ** (k + 1), (1e12 / 10.0**k) ** 0.1) for k in range(5, 10)]
    above = [run(10.0**k, 10.0 ** (k + 1), 9.0) for k in range(6, 9)]
    methods = (Method.LOSS_OF_N, Method.LOSS_OF_D, Method.LOSS_OF_C)
    fits = fit_all(MeasuredRuns([*above, *front], FlopsRule.SIX_ND, []), Fitting(methods=methods, resamples=0)).fits
    n, d, c = (fits[method].law.numbers() for method in methods)
    assert n == pytest.approx({"alpha": 0.1, "scale": 1e12})
    assert d == pytest.approx({"alpha": 0.1, "scale": 1e13})
    assert c == pytest.approx({"alpha": 0.05, "scale": 6e25})  # C = 60 N^2


def covered(method: Method, seed: int, resamples: int) -> dict[str, bool]:
    """Whether the exponents that were planted lie in the intervals."""
    runs = MeasuredRuns(planted(CHINCHILLA, noise=3e-3, seed=seed), FlopsRule.SIX_ND, [])
    fitting = Fitting(methods=(method,), resamples=resamples, confidence=0.9, seed=seed)
    intervals = fit_all(runs, fitting).fits[method].intervals(0.9)
    wanted = CHINCHILLA.numbers()
    return {key: low <= wanted[key] <= high for key, (low, high) in intervals.items() if key in wanted}


def test_intervals_hold_what_was_planted() -> None:
    """Of five seeds; the nightly test counts more."""
    assert sum(covered(Method.PARAMETRIC, seed, 25)["a"] for seed in range(5)) >= 3


@pytest.mark.nightly
@pytest.mark.parametrize("method", [Method.PARAMETRIC, Method.ISO_FLOPS])
def test_intervals_hold_what_was_planted_about_as_often_as_they_say(method: Method) -> None:
    """90 % of percentiles, which are somewhat narrow for 32 runs: at least 70 % of 40 seeds, and not always."""
    found = [covered(method, seed, 200) for seed in range(40)]
    for key in found[0]:
        assert 28 <= sum(one[key] for one in found) <= 40, key
    assert not all(all(one.values()) for one in found)


@pytest.fixture(scope="module")
def noisy() -> MeasuredRuns:
    return MeasuredRuns(planted(CHINCHILLA, noise=2e-3, sizes=5), FlopsRule.SIX_ND, [])


def test_a_fit_is_kept_whole(noisy: MeasuredRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = fit_all(noisy, Fitting(methods=(Method.ISO_FLOPS, Method.PARAMETRIC, Method.LOSS_OF_C), resamples=20))
    write_fits(fits, tmp_path / "fit.json")
    again = read_fits(tmp_path / "fit.json")
    for method, one in fits.fits.items():
        assert again.fits[method].law.numbers() == pytest.approx(one.law.numbers())
        for key, ends in one.intervals(0.9).items():
            assert again.fits[method].intervals(0.9)[key] == pytest.approx(ends, rel=1e-4)
    assert main(["optimal", "--flops", "1e22", "--fit", str(tmp_path / "fit.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["optima"]
    assert set(found) == {"isoflop", "parametric", *KNOWN}
    low, high = found["parametric"]["intervals"]["parameters"]
    assert low < found["parametric"]["parameters"] < high


def test_intervals_depend_on_the_seed_alone(noisy: MeasuredRuns) -> None:
    ends = [
        fit_all(noisy, Fitting(methods=(Method.ISO_FLOPS,), resamples=20, seed=seed)).fits[Method.ISO_FLOPS]
        for seed in (1, 1, 2)
    ]
    assert ends[0].intervals(0.9) == ends[1].intervals(0.9) != ends[2].intervals(0.9)


# Reading


def table(path: Path, rows: str) -> str:
    path.write_text(rows)
    return str(path)


def test_rows_of_one_run_are_its_curve(tmp_path: Path) -> None:
    place = table(tmp_path / "a.csv", "run,params,tokens,loss\nx,1e6,200,3\nx,1e6,100,4\ny,2e6,100,3.5\n")
    x, y = read_runs([place], Reading()).runs
    assert x.curve == ((100.0, 4.0), (200.0, 3.0)) and (x.tokens, x.loss, x.flops) == (200, 3, 6 * 1e6 * 200)
    assert y.name == "y" and y.curve == ((100.0, 3.5),)
    rows = [
        {"params": 10, "tokens": 20, "loss": 2.5, "flops": 7},
        {"params": 10, "tokens": 30, "loss": 2.4, "flops": 9},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_runs([str(tmp_path / "b.jsonl")], Reading())
    assert found.flops is FlopsRule.COUNTED and [one.flops for one in found.runs] == [7, 9]
    by_rule = read_runs([str(tmp_path / "b.jsonl")], Reading(flops=FlopsRule.SIX_ND))
    assert [one.flops for one in by_rule.runs] == [1200, 1800]
    both = read_runs([place, str(tmp_path / "b.jsonl")], Reading())
    assert both.flops is FlopsRule.SIX_ND, "not every run says its own"


def run_folder(folder: Path, config: RunConfig, steps: int) -> None:
    """As far as training has come."""
    folder.mkdir(parents=True)
    serialize.save(config, folder / "config.json")
    per_step = config.train.batch_size * config.train.seq_len
    rows = [{"step": step, "tokens": step * per_step, "loss": 6.0 - 0.1 * step} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    held = [{"step": row["step"], "tokens": row["tokens"], "eval_loss": row["loss"] + 0.5} for row in rows[4::5]]
    (folder / "evals.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held))


def test_run_folders_are_read_as_they_were_trained(tmp_path: Path) -> None:
    config = small_run()
    run_folder(tmp_path / "whole", config, steps=10)
    run_folder(tmp_path / "half", config, steps=6)
    found = read_runs([str(tmp_path)], Reading())
    (one,) = found.runs
    count = parameter_count(config.model)
    assert (one.name, one.parameters, one.tokens) == ("whole", count.total, 10 * 8 * 32)
    assert one.loss == pytest.approx(5.5) and [loss for _, loss in one.curve] == pytest.approx([6.0, 5.5])
    assert found.flops is FlopsRule.COUNTED
    assert one.flops == 2560 * flops_per_token(config.model, 32, config.execution.remat).total
    assert one.six_nd == 6 * count.total * 2560
    assert len(found.notes) == 1 and "half: is at step 6 of 10" in found.notes[0]
    other = Reading(parameters=SizeOf.NON_EMBEDDING, loss=LossSource.TRAINING)
    (one,) = read_runs([str(tmp_path / "whole")], other).runs
    assert one.parameters == count.total - count.embedding - count.unembedding
    assert len(one.curve) == 10 and one.loss == pytest.approx(5.0)


GOOD = "params,tokens,loss\n" + "".join(f"{n},{d},{3 - 0.1 * i}\n" for i, (n, d) in enumerate([(1e6, 1e8), (2e6, 5e7)]))


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ("params,tokens,loss\n1e6,1e8,0\n", (), r"line 2: loss = '0' must be a positive number"),
        ("params,tokens,loss\n1e6,1e8,nan\n", (), r"line 2: loss = 'nan' must be a positive number"),
        ("params,tokens,loss\n1e6,1e8,-1\n", (), "must be a positive number"),
        ("params,tokens,loss\n1e6,x,3\n", (), r"tokens = 'x' must be a positive number; mend or leave out"),
        ("params,loss\n1e6,3\n", (), r"line 2: has no tokens; its columns are 'params, loss'"),
        ("params,tokens,loss\n1e6,1e8\n", (), "line 2: has not as many values as the first line has names"),
        ("params,tokens,loss\n", (), "no finished run"),
        ("run,params,tokens,loss\na,1,2,3\na,2,3,3\n", (), "run 'a' has another params elsewhere"),
        (GOOD, ("--flops", "counted"), "has no flops, as --flops counted wants"),
        (GOOD, ("--methods", "parametric"), "parametric: 2 runs cannot say 5 constants; use at least 6"),
        (GOOD, ("--methods", "joint"), "joint: 2 runs cannot say 4 constants; use at least 5"),
        (GOOD, ("--methods", "loss_of_c"), "a power law needs 3"),
        (GOOD, ("--methods", "isoflop"), "0 of 1 budgets have a minimum, a power law needs 2 .6e.14 FLOPs: 2 sizes"),
        (GOOD, ("--methods", "envelope"), "envelope: 1 size is on the envelope, 4 are needed"),
        (GOOD, ("--out", "fit.txt"), r"--out fit.txt must end in .json"),
        (GOOD, ("--picture", "no/where.png"), "--picture no/where.png: there is no folder no"),
        (GOOD, ("--confidence", "1"), r"--confidence = 1.0 must be in \(0, 1\)"),
    ],
)
def test_runs_that_cannot_be_fitted_are_one_line(
    rows: str, options: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        main(["fit", table(tmp_path / "a.csv", rows), *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("losses", "complaint"),
    [
        ((3.0, 3.5, 3.0), "is a parabola that opens downwards and has no minimum"),
        ((3.0, 2.9, 2.85), r"has its minimum at .*, outside of 1e\+07 to 1e\+09; add runs that are larger"),
        ((2.85, 2.9, 3.0), "add runs that are smaller"),
    ],
)
def test_a_budget_without_a_minimum_says_why(losses: Sequence[float], complaint: str) -> None:
    runs = [run(n, 1e17 / n, loss) for n, loss in zip((1e7, 1e8, 1e9), losses, strict=True)]
    with pytest.raises(UserError, match=complaint):
        valley(runs)
    with pytest.raises(UserError, match=f"0 of 1 budgets have a minimum, a power law needs 2 .6e.17 .*{complaint}"):
        fit_iso_flops(runs, tolerance=0.1)


def test_one_budget_is_too_few() -> None:
    with pytest.raises(UserError, match=r"1 of 1 budgets have a minimum, a power law needs 2$"):
        fit_iso_flops(planted(CHINCHILLA, flops=(1e20,)), tolerance=0.1)


def test_a_loss_that_does_not_fall_is_said() -> None:
    rng = np.random.default_rng(0)
    loss = lambda n, d: 2 + 0.1 * math.log10(n) + 100 * d**-0.3 + 1e-3 * rng.random()
    rising = [run(n, d, loss(n, d)) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)]
    with pytest.raises(UserError, match="the loss does not fall with the parameters of these runs"):
        fit_parametric(rising)


def test_what_cannot_be_fitted_does_not_keep_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = planted(CHINCHILLA, flops=(1e20,))
    rows = "".join(f"{one.parameters},{one.tokens},{one.loss}\n" for one in runs)
    place = table(tmp_path / "a.csv", f"params,tokens,loss\n{rows}")
    assert main(["fit", place, "--methods", "isoflop", "parametric", "--resamples", "0"]) == 0
    said = capsys.readouterr().out
    assert "isoflop: not fitted: 1 of 1 budgets have a minimum" in said and "alpha" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.pop("fits"),
        lambda one: one["fits"].update(parametric={}),
        lambda one: one["fits"]["loss_of_c"].update(kind="eval"),
        lambda one: one.update(confidence=2),
    ],
)
def test_another_file_is_no_fit(noisy: MeasuredRuns, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    write_fits(fit_all(noisy, Fitting(methods=(Method.LOSS_OF_C,), resamples=0)), tmp_path / "fit.json")
    values = json.loads((tmp_path / "fit.json").read_text())
    change(values)
    (tmp_path / "fit.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"fit.json: is not what python -m maxlm.scaling fit wrote"):
        read_fits(tmp_path / "fit.json")


# Budgets


def test_a_budget_in_hours() -> None:
    assert OptimalOptions(gpu_hours=100.0, peak_flops=1e15, mfu=0.4).budget == 100 * 3600 * 1e15 * 0.4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "--flops, or --gpu_hours with --peak_flops and --mfu"),
        (("--flops", "1e20", "--mfu", "0.4"), "--flops, or --gpu_hours"),
        (("--gpu_hours", "8", "--peak_flops", "1e15"), "--flops, or --gpu_hours"),
        (("--flops", "1e20", "--law", "moore"), "--law moore: must be one of chinchilla1, chinchilla2"),
    ],
)
def test_a_budget_that_is_none_is_one_line(options: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        main(["optimal", *options])


def test_laws_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimal", "--flops", "5.76e23", "--law", "chinchilla3", "kaplan"]) == 0
    said = capsys.readouterr().out
    assert "40.3B" in said and "804B" in said and "besiroglu" not in said and "arXiv:2404.10102" in said


# Sweeps


def sweep(out: Path | str = "runs/sweep", **changes: Any) -> Sweep:
    return Sweep(**{"budgets": (4e11, 1e12), "widths": (64, 96, 256), "out": str(out), **changes})


def test_a_sweep_is_what_it_says(tmp_path: Path) -> None:
    base = load_config("llama_5m")
    runs, notes = plan(base, sweep(tmp_path))
    assert [one.name for one in runs] == [f"{c}_{size}" for c in ("4e11", "1e12") for size in ("d64_l1", "d96_l2")] + [
        "1e12_d256_l4"
    ]
    assert len(notes) == 1 and notes[0].startswith("4e11_d256_l4: would have 7 steps, must have 10 to")
    write_configs(runs)
    for one in runs:
        config = load_config(f"{one.config.run_dir}.json")
        assert config == one.config
        config.validate(1)
        assert one.parameters == parameter_count(config.model).total == size_of(config, SizeOf.TOTAL)
        per_token = flops_per_token(config.model, 256, config.execution.remat).total
        assert abs(one.tokens * per_token - one.budget) <= per_token * 8 * 256 / 2, "the nearest number of steps"
        assert one.flops == one.tokens * per_token
        assert config.optimizer.learning_rate == pytest.approx(2e-3 * (256 / config.model.d_model) ** 0.5)
        schedule = config.optimizer.schedule
        assert isinstance(schedule, CosineSchedule) and schedule.warmup_steps == round(config.train.steps / 10)
        assert config.model.d_model == 32 * config.model.blocks[0].attention.n_heads
    widest = runs[-1].config.model
    assert widest == base.model, "the base width with the base's own aspect"


def test_schedules_keep_their_shares_and_muP_its_rate() -> None:
    base = load_config("llama_5m")
    optimizer = dataclasses.replace(base.optimizer, schedule=WsdSchedule(warmup_steps=20, decay_steps=40))
    model = dataclasses.replace(base.model, mup_base_width=256)
    found, _ = plan(dataclasses.replace(base, optimizer=optimizer, model=model), sweep(widths=(64,), budgets=(1e12,)))
    (config,) = (one.config for one in found)
    steps = config.train.steps
    assert config.optimizer.schedule == WsdSchedule(warmup_steps=round(steps / 10), decay_steps=round(steps / 5))
    assert config.optimizer.learning_rate == base.optimizer.learning_rate
    constant = dataclasses.replace(base, optimizer=dataclasses.replace(optimizer, schedule=ConstantSchedule()))
    (note,) = plan(constant, sweep(widths=(64,)))[1]
    assert "ConstantSchedule does not come down" in note


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"widths": (80,)}, "--widths 80 is no whole number of heads: .* use a multiple of 32"),
        ({"budgets": (1e3,)}, "would have 0 steps"),
        ({"budgets": ()}, r"--budgets = \(\) must not be empty; give FLOPs"),
        ({"widths": (0,)}, "--widths.0 = 0 must be positive"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        plan(load_config("llama_5m"), sweep(**changes))


def test_only_pretraining_is_swept() -> None:
    with pytest.raises(UserError, match="use a config whose task is Pretrain"):
        plan(dataclasses.replace(load_config("llama_5m"), task=Sft()), sweep())


def test_finished_runs_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains is a program that finishes its run, and fails the second one the first time."""
    runs, _ = plan(load_config("llama_5m"), sweep(tmp_path, budgets=(1e12,)))
    write_configs(runs)
    program = (
        "import json, pathlib, sys\n"
        "folder, steps, fails = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "folder.mkdir(exist_ok=True)\n"
        "if fails and not (folder / 'once').exists():\n"
        "    (folder / 'once').touch(); sys.exit(int(fails))\n"
        "for name in ('metrics', 'evals'):\n"
        "    (folder / f'{name}.jsonl').write_text(json.dumps({'step': steps}) + '\\n')\n"
    )
    codes = {runs[1].name: "2", runs[2].name: "75"}
    words = lambda one: (one.config.run_dir, str(one.config.train.steps), codes.get(one.name, ""))
    monkeypatch.setattr(sweeping, "command", lambda one: [sys.executable, "-c", program, *words(one)])
    said: list[str] = []
    with pytest.raises(UserError, match=f"{runs[1].name}: training ended with exit code 2"):
        run_all(runs, said.append)
    assert run_all(runs, said.append) == 75
    assert run_all(runs, said.append) == 0
    assert said == [
        f"1 of 3: {runs[0].name}",
        f"2 of 3: {runs[1].name}",
        f"1 of 3: {runs[0].name} is finished",
        f"2 of 3: {runs[1].name}",
        f"3 of 3: {runs[2].name}",
        f"1 of 3: {runs[0].name} is finished",
        f"2 of 3: {runs[1].name} is finished",
        f"3 of 3: {runs[2].name}",
    ]


@pytest.mark.nightly
def test_a_sweep_trains_and_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = dataclasses.replace(make_run(tmp_path, batch_size=8, eval_batches=1), observe=ObserveConfig())
    serialize.save(base, tmp_path / "base.json")
    words = ["sweep", "--config", str(tmp_path / "base.json"), "--widths", "16", "32", "--out", f"{tmp_path}/s"]
    words += ["--budgets", "4e8", "8e8", "--fewest_steps", "3", "--run"]
    assert main(words) == 0
    assert "is finished" not in capfd.readouterr().err
    assert main(words) == 0
    assert capfd.readouterr().err.count("is finished") == 4
    found = read_runs([f"{tmp_path}/s"], Reading())
    assert len(found.runs) == 4 and not found.notes
    for one in found.runs:
        config = load_config(tmp_path / "s" / f"{one.name}.json")
        assert one.parameters == parameter_count(config.model).total
        assert one.tokens == config.train.steps * 8 * 32 and 1 < one.loss < 10


# Downstream


def outcomes(noise: float = 0.0, seed: int = 0) -> list[Outcome]:
    """nll = 3 (C / 10^18)^-0.05; accuracy = 0.25 + 0.75 / (1 + exp(4 (nll - 2.2))); the last two without FLOPs."""
    rng = np.random.default_rng(seed)
    found = []
    for i, flops in enumerate(np.geomspace(1e18, 1e25, 12)):
        nll = 3 * (flops / 1e18) ** -0.05 * math.exp(noise * rng.normal())
        accuracy = 0.25 + 0.75 / (1 + math.exp(4 * (nll - 2.2))) + noise * rng.normal()
        known = None if i in (8, 10) else float(flops)
        found.append(Outcome(name=str(i), flops=known, nll=nll, accuracy=float(np.clip(accuracy, 0, 1))))
    return found


def test_both_curves_come_back() -> None:
    law = fit_downstream(outcomes(), Forecasting(), chance=0.25)
    assert law.slope == pytest.approx(-0.05) and law.nll(1e18) == pytest.approx(3)
    assert law.middle == pytest.approx(2.2) and law.steepness == pytest.approx(4)
    assert law.accuracy(2.2) == pytest.approx(0.625)
    line = fit_downstream(
        [dataclasses.replace(one, nll=5 - 0.1 * math.log(one.flops or 1e20)) for one in outcomes()],
        Forecasting(relation=Relation.LINEAR),
        chance=0.25,
    )
    assert line.slope == pytest.approx(-0.1) and line.nll(1e20) == pytest.approx(5 - 0.1 * math.log(1e20))


def test_a_larger_run_is_foretold() -> None:
    """Of eight seeds, the interval of 90 % holds what came nearly always, and is no wider than the noise wants."""
    held = 0
    for seed in range(8):
        found = outcomes(noise=0.01, seed=seed)
        foretold = foretell(found, Forecasting(hold_out=1, resamples=50, seed=seed), chance=0.25)
        (one,) = foretold.forecasts
        assert one.seen is found[-1] and len(foretold.fitted) == 11
        low, high = one.accuracy_interval
        held += low <= one.seen.accuracy <= high and one.nll_interval[0] <= one.seen.nll <= one.nll_interval[1]
        assert high - low < 0.15
    assert held >= 5


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ("flops,nll,accuracy\n1e18,2,0.3\n1e19,1.5,0.4\n", (), "--chance is missing"),
        ("flops,nll,accuracy\n1e18,2,0.3\n1e19,1.5,0.4\n", ("--chance", "0.2"), "2 runs have FLOPs, a line needs 3"),
        ("flops,nll,accuracy\n1e18,2,30\n", ("--chance", "0.2"), "accuracy = 30 must be from 0 to 1; divide by 100"),
        ("flops,nll\n1e18,2\n", ("--chance", "0.2"), "has no accuracy"),
        (
            "flops,nll,accuracy\n" + "".join(f"1e{18 + i},{3 - 0.2 * i},{0.6 - 0.1 * i}\n" for i in range(5)),
            ("--chance", "0.1"),
            "accuracy does not rise as the nll of right answers falls",
        ),
    ],
)
def test_results_that_foretell_nothing_are_one_line(
    rows: str, options: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        main(["downstream", table(tmp_path / "a.csv", rows), *options])
    assert "\n" not in str(caught.value)


class Knows:
    """An examinee that gives each choice the log-probability -(its length) * its place."""

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return [1], list(continuation.encode())

    def scores(self, pairs: Sequence[Any]) -> list[Likelihood]:
        return [Likelihood(np.full(len(ids), -float(i % 2 + 1)), True) for i, (_, ids) in enumerate(pairs)]


def test_folders_of_evaluate_are_read(tmp_path: Path) -> None:
    """The right answer is the first in one question, the second in the other: nll a byte 1 and 2."""
    config = small_run()
    run_folder(tmp_path / "run", config, steps=10)
    questions = tuple(ChoiceQuestion(prompt="?", choices=(" yes", " maybe"), answer=answer) for answer in (0, 1))
    done = examine(Knows(), ChoiceExam(name="two", questions=questions), Asking())  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    write_results({"model": str(tmp_path / "run"), "step": 10}, {"two": done}, tmp_path / "out")
    found = read_outcomes([str(tmp_path / "out")], None)
    (one,) = found.found
    assert one.nll == pytest.approx(1.5) and one.accuracy == 0.5 and found.chance == 0.5
    assert one.flops == 2560 * flops_per_token(config.model, 32, config.execution.remat).total
    with pytest.raises(UserError, match="has no exam 'three' of choices; name one with --exam two"):
        read_outcomes([str(tmp_path / "out")], "three")


# The command


def test_an_unknown_command_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown command 'guess'; use fit, optimal, sweep or downstream"):
        main(["guess"])


def test_pictures_are_drawn(noisy: MeasuredRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{one.parameters},{one.tokens},{one.loss}\n" for one in noisy.runs)
    place = table(tmp_path / "a.csv", f"params,tokens,loss\n{rows}")
    words = ["--methods", "isoflop", "parametric", "--resamples", "10", "--picture", str(tmp_path / "fit.png")]
    assert main(["fit", place, *words]) == 0
    said = capsys.readouterr().out
    assert "parametric: predicts losses to 0." in said and "N: total parameters; C: 6nd" in said
    exam = "".join(f"{one.flops or ''},{one.nll},{one.accuracy}\n" for one in outcomes(0.01))
    place = table(tmp_path / "b.csv", f"flops,nll,accuracy\n{exam}")
    words = ["--chance", "0.25", "--hold_out", "1", "--at", "1e26", "--resamples", "20"]
    assert main(["downstream", place, *words, "--picture", str(tmp_path / "exam.png")]) == 0
    for name in ("fit.png", "exam.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
