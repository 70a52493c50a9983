"""`python -m kernels_pallas.tune`: run as a user would, and the table that it writes read by the dispatch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels_pallas import decision, tune
from kernels_pallas.attention.problem import AttentionBlocks
from kernels_pallas.glu.problem import GluBlocks
from kernels_pallas.measuring.contest import CaseRow, Effort, Entry
from kernels_pallas.measuring.timing import Timing
from kernels_pallas.targets import named

ROOT = Path(__file__).parent.parent
OPS = ("flash_attention", "fused_glu", "fused_glu_mlp")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kernels_pallas.tune", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    """The XLA body's blocks at tiny sizes, into a table beside another row, which stays."""
    file = tmp_path / "cpu.json"
    other = {"op": "fused_glu", "backend": "gpu", "match": {}, "blocks": {}, "provenance": "compiled"}
    first, *rest = tune.shape_classes("flash_attention")
    known = [{**row(shape, 1.0), "backend": "xla"} for shape in rest]
    file.write_text(json.dumps({"chip": "cpu", "auto": {"kept": []}, "rows": [other, *known]}))
    done = command("--op", "flash_attention", "--missing", "--table", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(file.read_text())
    assert table["chip"] == "cpu" and table["auto"] == {"kept": []}
    assert all(old in table["rows"] for old in (other, *known)) and len(table["rows"]) == len(known) + 2
    [found] = [new for new in table["rows"] if new not in (other, *known)]
    assert found["op"] == "flash_attention" and found["backend"] == "xla" and found["match"] == first.match
    assert found["provenance"] == "measured"
    assert set(found["blocks"]) == {field.name for field in dataclasses.fields(AttentionBlocks)}
    assert found["microseconds"] > 0 and found["rival_microseconds"] > 0
    assert found["rivals"] == ["xla", "xla"] and "--missing" in found["command"]
    assert found["date"] and found["jax"]


def test_a_dry_run_needs_no_chip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    [shape] = tune.shape_classes("fused_glu")[1:2]
    monkeypatch.setattr(tune, "shape_classes", lambda op: [shape])
    tune.main(["--dry-run", "--chip", "h200", "--op", "fused_glu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"fused_glu {shape.match}"
    assert any("and the chip has 232448" in line for line in lines)
    assert any("refused" not in line and " bytes  m=" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run", "--chip", "h300"), "target = 'h300' is unknown; use cpu, "),
        (("--dry-run", "--chip", "a100"), "a100"),
        (("--chip", "h200"), "--chip is for --dry-run"),
        ((), "give --table FILE"),
    ],
)
def test_what_makes_no_sense_is_said(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(list(arguments))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backward", [False, True])
def test_candidates_vary_one_pass_only_and_fit(backward: bool) -> None:
    shape, target = tune.shape_classes("fused_glu_mlp")[1], named("h200")
    start = GluBlocks(m=128, f=128, d=64, m_backward=128, f_backward=64, d_backward=64)
    found = tune.candidates(shape, target, backward=backward, start=start)
    varying = {
        field.name
        for field in dataclasses.fields(GluBlocks)
        if len({getattr(candidate.blocks, field.name) for candidate in found}) > 1
    }
    assert varying and {name.endswith("_backward") for name in varying} == {backward}
    assert len({candidate.blocks for candidate in found}) == len(found)
    for candidate in found:
        assert (candidate.on_chip_bytes > 232_448) == ("and the chip has" in (candidate.refused or ""))


@pytest.mark.parametrize("op", OPS)
def test_a_row_is_found_for_the_problems_that_it_was_measured_on(
    op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through `plan`, whatever the order in which classes are measured: each class finds its own row."""
    target = named("h200")
    table: dict[str, Any] = {"chip": "h200", "auto": {}, "rows": []}
    # The GPU kernels take head_dim 256 with newer versions of jax only.
    classes = [shape for shape in tune.shape_classes(op) if shape.match.get("H") != 256]
    for i, shape in enumerate(reversed(classes)):
        table = tune.updated(table, row(shape, i))
    (tmp_path / "h200.json").write_text(json.dumps(table))
    monkeypatch.setattr(decision, "TUNING", tmp_path)
    decision.load_table.cache_clear()
    try:
        for shape in classes:
            found = decision.lookup(op, tune._plan(shape, target).problem, target, "gpu")
            assert found is not None and found["match"] == shape.match
    finally:
        decision.load_table.cache_clear()


def row(shape: tune.ShapeClass, microseconds: float) -> dict[str, Any]:
    return {
        "op": shape.op,
        "backend": "gpu",
        "match": shape.match,
        "blocks": {},
        "provenance": "measured",
        "microseconds": microseconds,
        "rival_microseconds": 1.0,
    }


def test_a_new_row_replaces_its_predecessor_alone() -> None:
    one, two = tune.shape_classes("fused_glu")[:2]
    table = tune.updated(tune.updated({"chip": "x", "auto": {}, "rows": []}, row(one, 5)), row(two, 6))
    table = tune.updated(table, row(one, 7))
    assert {r["microseconds"] for r in table["rows"]} == {6, 7}


def result(case: Any, microseconds: float, rival: float | None) -> CaseRow:
    def entry(us: float) -> Entry:
        return Entry(status="ok", errors={}, microseconds=Timing(us, us, us, 1), tflops=1.0)

    found = CaseRow(name=case.name, op=case.op, backend="gpu", kernel=entry(microseconds), rivals={})
    if rival is not None:
        found.rivals, found.fastest_rival = {"cudnn": entry(rival)}, "cudnn"
    return found


def test_the_fastest_right_blocks_win_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward by themselves; what is wrong, or refuses a rival, never becomes a row."""
    shape, target = tune.shape_classes("fused_glu")[1], named("h200")
    sizes = {"m": (128,), "f": (64, 128), "d": (64,), "stages": (3, 4)}
    monkeypatch.setitem(tune._CHOICES["fused_glu"], target.family, sizes)
    fastest = {"m": 128, "f": 64, "d": 64, "stages": 3}

    def attempt(worker: Any, case: Any, target: Any, effort: Any, blocks: GluBlocks, *, alone: bool = False) -> CaseRow:
        suffix = "" if case.direction == "forward" else "_backward"
        mine = {name: getattr(blocks, name + suffix) for name in fastest}
        if mine == {**fastest, "stages": 4}:  # the fastest of all, and wrong
            return dataclasses.replace(
                result(case, 1.0, None), kernel=Entry(status="wrong", reason="h is off by 0.5 (at most 0.01)")
            )
        return result(case, 10.0 if mine == fastest else 20.0, None if alone else 12.0)

    monkeypatch.setattr(tune, "attempt", attempt)
    found, told = tune.tune(shape, target, None, Effort())  # type: ignore[arg-type]
    assert found is not None, told
    assert found["blocks"] == {**fastest, **{f"{name}_backward": size for name, size in fastest.items()}}
    assert (found["microseconds"], found["rival_microseconds"]) == (10.0, 12.0)
    assert decision.is_faster(found)

    def no_rival(*arguments: Any, alone: bool = False) -> CaseRow:
        return attempt(*arguments, alone=True)

    monkeypatch.setattr(tune, "attempt", no_rival)
    found, told = tune.tune(shape, target, None, Effort())  # type: ignore[arg-type]
    assert found is None and "no time beside a rival" in told
