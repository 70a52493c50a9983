"""Nothing around a run ends it or makes it wait for ever: places that fail, places that never answer."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import rich.console
from test_changes import change
from test_observe import open_log, run_config
from test_observe import train as log_rows
from test_recipes import STEPS, Distance, Points, Regression
from test_recipes import config as small_config

from maxlm.config import RunConfig, StepRange, UserError
from maxlm.observe import guard
from maxlm.observe.console import Console
from maxlm.observe.guard import Guarded
from maxlm.observe.metrics import read_rows
from maxlm.sharding import Layout
from maxlm.training.loop import Measure, Recipe, Result, Unmeasured, run
from maxlm.training.state import TrainState


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE_S", 0.3)


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


def off(told: list[tuple[str, str]]) -> Any:
    return lambda name, reason: told.append((name, reason))


# One place


def test_calls_are_made_in_their_order_and_answered(told: list[tuple[str, str]]) -> None:
    place = Guarded("place", list, off(told))
    assert [place(lambda rows, i=i: rows.append(i) or len(rows)) for i in range(5)] == [1, 2, 3, 4, 5]
    assert place(list) == [0, 1, 2, 3, 4]
    place.close()
    assert told == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (UserError("a line"), "a line"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_fails_is_told_once_and_gets_no_more(
    error: BaseException, reason: str, told: list[tuple[str, str]]
) -> None:
    def fail(place: object) -> None:
        raise error

    seen: list[int] = []
    place = Guarded("place", object, off(told))
    assert place(fail) is None
    assert place(lambda _: seen.append(1)) is None
    place.close(fail)
    assert told == [("place", reason)] and seen == []


def test_a_place_that_cannot_be_opened_is_off(told: list[tuple[str, str]]) -> None:
    def make() -> object:
        raise OSError(21, "Is a directory")

    assert Guarded("place", make, off(told))(lambda _: 1) is None
    assert told == [("place", "Is a directory")]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("wait", [True, False])
def test_what_never_answers_is_waited_for_once(wait: bool, told: list[tuple[str, str]]) -> None:
    release = threading.Event()
    place = Guarded("place", object, off(told), wait=wait)
    began = time.monotonic()
    for _ in range(guard._WAITING + 9):
        place(lambda _: release.wait(20))
    place.close()
    assert time.monotonic() - began < 5
    release.set()
    assert told == [("place", "no answer for 0 s" if wait else f"{guard._WAITING} rows wait for it")]


# W&B


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_wandb_that_fails_or_hangs(
    where: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: threading.Event
) -> None:
    def bad(*_: Any, **__: Any) -> None:
        if how == "raises":
            raise ConnectionError("no network")
        hung.wait(20)

    good = {"log": lambda *a, **k: None, "finish": lambda: None, "define_metric": lambda *a, **k: None}
    client = types.SimpleNamespace(**{**good, where: bad})
    init = bad if where == "init" else lambda **k: client
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    output, began = io.StringIO(), time.monotonic()
    with open_log(tmp_path, config=run_config(wandb_project="p"), output=output) as log:
        log_rows(log, 0, 20)
        finished = log.finish()
    assert time.monotonic() - began < 10
    reason = "ConnectionError: no network" if how == "raises" else "no answer for 0 s"
    line = f"warning: observe.wandb_project = 'p': {reason}; it is switched off, the run goes on without it\n"
    assert output.getvalue().count(line) == output.getvalue().count("switched off") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 10
    assert json.loads((tmp_path / "run.json").read_text())["switched_off"] == {"observe.wandb_project = 'p'": reason}
    assert finished is not None and finished.report is not None and reason in finished.report.read_text()


# Files


def test_damaged_rows_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\nnonsense\n{"step": 4, "loss": 2}\n{"step": 9}\n')
    output = io.StringIO()
    with open_log(tmp_path, resume_step=4, output=output) as log:
        log_rows(log, 4, 6)
        log.finish()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    assert "nonsense" in (tmp_path / "metrics.jsonl.damaged").read_text()
    (line,) = [line for line in output.getvalue().splitlines() if "warning" in line]
    assert line.startswith(f"warning: {tmp_path}/metrics.jsonl:2: 'nonsense' is not a row")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("more\n")
    open_log(tmp_path, resume_step=6, output=output).close()
    assert "nonsense" in (tmp_path / "metrics.jsonl.damaged").read_text()
    assert "more" in (tmp_path / "metrics.jsonl.damaged-2").read_text()


def go(run_dir: Path, *measures: Measure, **changed: Any) -> Result:
    def recipe(config: RunConfig, layout: Layout) -> Recipe:
        objective = Regression(layout, taught=False)
        return Recipe(objective=objective, feed=Points(objective, layout, None), measures=measures or (Distance(),))

    config = small_config(run_dir)
    for key, value in changed.items():
        config = change(config, key.replace("__", "."), value)
    return run(config, recipe)


@pytest.mark.usefixtures("impatient")
def test_a_run_whose_every_file_fails_trains_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    for folder in ("run.json", "evals.jsonl"):
        (run_dir / folder).mkdir(parents=True)
    (run_dir / "tensorboard").write_text("no folder")
    (run_dir / "profile").write_text("no folder")
    os.mkfifo(run_dir / "samples.jsonl")  # nobody reads it: it cannot be opened
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    result = go(run_dir, train__profile_steps=StepRange(2, 4))
    out = capsys.readouterr().out
    assert result.step == STEPS and (run_dir / "checkpoints" / str(STEPS) / "manifest.json").exists()
    names = ("run.json", "evals.jsonl", "samples.jsonl", "metrics.jsonl", "tensorboard", "profile")
    for name in names:
        (line,) = [line for line in out.splitlines() if line.startswith(f"warning: {run_dir / name}: ")]
        assert line.endswith("it is switched off, the run goes on without it")
    assert result.files is not None and result.files.report is not None and result.files.loss_png is None
    page = result.files.report.read_text()
    assert "No space left on device" in page and all(str(run_dir / name) in page for name in names)
    assert [row["step"] for row in read_rows(run_dir / "distances.jsonl")] == [4, 8, STEPS]


def test_a_report_and_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("loss.png", "report.html")
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
    result = go(tmp_path / "run")
    assert result.files is not None and result.files.report is None and result.files.loss_png is None
    out = capsys.readouterr().out
    for name in names:
        assert f"warning: {tmp_path}/run/{name}: Is a directory; it is switched off" in out
    assert not list((tmp_path / "run").glob("*.part"))
    assert "report.html" in (tmp_path / "run" / "run.json").read_text()


# Measurements


class Bad:
    """Fails from a step on."""

    name, every = "bad", 4

    def __init__(self, first: int, last: int, error: Exception) -> None:
        self._steps, self._error = range(first, last), error

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float]:
        if step in self._steps:
            raise self._error
        return {"bad": 1.0}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return "a line"


@pytest.mark.parametrize(("error", "code"), [(UserError("too long"), 2), (ZeroDivisionError("by zero"), 1)])
def test_a_measurement_that_fails_at_the_end_costs_nothing(
    error: Exception, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(
        Unmeasured, match=rf"bad after step {STEPS} failed: .*all {STEPS} steps .* saved, and the same"
    ) as e:
        go(run_dir, Bad(STEPS, STEPS + 1, error), Distance())
    assert e.value.exit_code == code
    assert (run_dir / "checkpoints" / str(STEPS) / "manifest.json").exists() and (run_dir / "report.html").exists()
    assert [row["step"] for row in read_rows(run_dir / "distances.jsonl")] == [4, 8, STEPS]
    assert go(run_dir, Bad(0, 0, error), Distance()).step == STEPS  # and then makes it
    assert [row["step"] for row in read_rows(run_dir / "bads.jsonl")] == [4, 8, STEPS]


def test_a_measurement_that_fails_between_is_told_and_again_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        Unmeasured, match=f"bad after step 8 failed: too long; all {STEPS} steps are trained and saved$"
    ):
        go(tmp_path / "run", Bad(8, 9, UserError("too long")))
    assert "warning: bad after step 8 failed: too long\n" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(tmp_path / "run" / "bads.jsonl")] == [4, STEPS]


# Output


def test_an_output_that_has_ascii_alone_gets_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console = Console(output=rich.console.Console(highlight=False))
    console.say("12·L")
    console.say("after")
    assert raw.getvalue() == b"12\\xb7L\nafter\n"
