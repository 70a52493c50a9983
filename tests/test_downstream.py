"""Accuracies foretold from smaller runs: both curves come back, intervals hold what came, exams are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_run
from test_scaling import run_folder, table

from maxlm.config import (
    UserError,
)
from maxlm.evaluation.examining import Asking, examine
from maxlm.evaluation.exams import ChoiceExam, ChoiceQuestion
from maxlm.evaluation.results import write_results
from maxlm.evaluation.scoring import Likelihood
from maxlm.scaling.__main__ import main
from maxlm.scaling.downstream import Forecasting, Relation, fit_downstream, foretell
from maxlm.scaling.exam_results import Outcome, read_outcomes
from maxlm.shapes import flops_per_token


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


def test_a_forecast_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exam = "".join(f"{one.flops or ''},{one.nll},{one.accuracy}\n" for one in outcomes(0.01))
    place = table(tmp_path / "b.csv", f"flops,nll,accuracy\n{exam}")
    words = ["--chance", "0.25", "--hold_out", "1", "--at", "1e26", "--resamples", "20"]
    assert main(["downstream", place, *words, "--picture", str(tmp_path / "exam.png")]) == 0
    assert (tmp_path / "exam.png").read_bytes().startswith(b"\x89PNG")
