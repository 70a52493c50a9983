"""`python -m kernels_pallas.bench`: run as a user would, and with kernels that are wrong, refuse, hang or die."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import bench, oracle
from kernels_pallas.measuring import cases
from kernels_pallas.measuring.cases import AttentionCase, Case, GluCase, Goal, GroupedCase, PagedCase
from kernels_pallas.measuring.contest import CaseRow, Effort, Entry, measure
from kernels_pallas.measuring.isolate import Worker, WorkerError
from kernels_pallas.measuring.shapes import attention_cases, glu_cases, quick_cases, tiny
from kernels_pallas.measuring.timing import Call, compare

ROOT = Path(__file__).parent.parent
QUICK = Effort(warmups=1, samples=2, flush_bytes=4096)
ATTENTION, BACKWARD, PACKED, PACKED_BACKWARD = (tiny(case) for case in quick_cases("attention"))
GLU, MLP = (tiny(case) for case in quick_cases("glu"))
GROUPED, GROUPED_BOTH = (tiny(case) for case in quick_cases("grouped"))
PAGED = tiny(quick_cases("paged")[0])
DIRECTIONS = (ATTENTION, PACKED_BACKWARD, GLU, MLP, GROUPED, GROUPED_BOTH, PAGED)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kernels_pallas.bench", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    """Two cases of the four, by name: the table, the file, and the rival that a CPU has not."""
    file = tmp_path / "bench.json"
    done = command(
        *("--quick", "--backend", "xla", "--only", "attention", "--match", "documents 4x4096", "--json", str(file))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean nothing" in done.stdout
    assert "cudnn                       refused: RuntimeError" in done.stdout
    report = json.loads(file.read_text())
    assert report["complete"] is True
    assert "--match" in report["command"]
    assert {"device", "jax", "jaxlib", "python", "nvidia_smi"} <= set(report["machine"])
    assert set(report["method"]) >= {"warmups", "samples", "flush_bytes", "ceilings"}
    assert [case["name"] for case in report["cases"]] == [PACKED.name, PACKED_BACKWARD.name]
    for case in report["cases"]:
        assert set(case) == {field.name for field in dataclasses.fields(CaseRow)}
        assert case["kernel"]["status"] == "ok"
        assert set(case["rivals"]) == {"cudnn", "xla"}
        assert case["rivals"]["cudnn"]["status"] == "refused" and "cuDNN" in case["rivals"]["cudnn"]["reason"]
        timing = case["kernel"]["microseconds"]
        assert timing["first_quartile"] <= timing["median"] <= timing["third_quartile"]
        assert case["ratio"] == pytest.approx(case["rivals"]["xla"]["microseconds"]["median"] / timing["median"])
        assert case["goal"] is None and case["verdict"] is None  # they are set for an H200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--quick --backend xla tries the command on a CPU"),
        (("--quick", "--backend", "xla", "--match", "no such case"), "leaves no case"),
    ],
)
def test_what_makes_no_sense_is_said(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(list(arguments))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", DIRECTIONS, ids=lambda case: case.name)
def test_a_wrong_kernel_is_not_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row only, and by 1/16 of the largest value: what a bug at an edge looks like."""

    def spoiled(function: Any) -> Any:
        def call(*arguments: Any, backend: str, **options: Any) -> jax.Array:
            out = function(*arguments, backend=backend, **options)
            return out.at[-1].add(jnp.max(jnp.abs(out)) / 16) if backend == "xla" else out

        return call

    monkeypatch.setattr(cases, "flash_attention", spoiled(cases.flash_attention))
    monkeypatch.setattr(cases, "fused_glu", spoiled(cases.fused_glu))
    monkeypatch.setattr(cases, "fused_glu_mlp", spoiled(cases.fused_glu_mlp))
    monkeypatch.setattr(cases, "grouped_matmul", spoiled(cases.grouped_matmul))
    monkeypatch.setattr(cases, "paged_attention", spoiled(cases.paged_attention))
    row = measure(case, "xla", QUICK)
    assert row.kernel.status == "wrong" and "is off by" in row.kernel.reason
    assert row.kernel.microseconds is None and row.ratio is None
    assert row.rivals and {rival.status for rival in row.rivals.values()} == {"skipped"}


def test_a_kernel_that_gives_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cases.fused_glu
    monkeypatch.setattr(cases, "fused_glu", lambda *a, **k: real(*a, **k).at[0, 0].set(jnp.nan))
    assert measure(GLU, "xla", QUICK).kernel.status == "wrong"


def test_a_body_that_refuses_is_told_from_one_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = measure(GLU, "gpu", QUICK).kernel  # not on a CPU
    assert refused.status == "refused" and "gpu" in refused.reason

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(cases, "fused_glu", broken)
    failed = measure(GLU, "xla", QUICK).kernel
    assert failed.status == "failed" and "ILLEGAL_ADDRESS" in failed.reason


def test_a_rival_that_is_wrong_is_reported_and_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_glu_concatenated", lambda x, both: 0 * jnp.split(x @ both, 2, axis=1)[0])
    row = measure(GLU, "xla", QUICK)
    assert row.rivals["xla concatenated"].status == "wrong"
    assert row.fastest_rival == "xla" and row.kernel.status == "ok"


@pytest.mark.parametrize("case", (BACKWARD, PACKED, *DIRECTIONS), ids=lambda case: case.name)
def test_the_reference_is_the_oracle(case: Case) -> None:
    """The float32 reference on the device against float64 formulas, so that both cannot be wrong alike."""
    arrays = case.arrays()
    found = case.reference(arrays)
    inputs = [np.asarray(array, np.float64) for array in arrays]
    match case:
        case AttentionCase():
            wanted = oracle_attention(case, inputs)
        case GluCase():
            wanted = oracle_glu(case, inputs)
        case GroupedCase():
            wanted = oracle_grouped(case, arrays)
        case PagedCase():
            wanted = {"out": oracle.paged_attention(*inputs[:3], int(arrays[3]), *map(np.asarray, arrays[4:]))}
        case _:
            assert_never(case)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def oracle_grouped(case: GroupedCase, arrays: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
    x, w, sizes, dy = arrays
    assert int(sizes.sum()) == case.M
    found = oracle.grouped_matmul(x, w, sizes, dy)
    return dict(zip(("y", "dx", "dw"), found, strict=True)) if case.direction != "forward" else {"y": found.out}


def oracle_attention(case: AttentionCase, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    q, k, v, ids, d_out = arrays
    found = oracle.attention(q, k, v, d_out, mask="causal", segment_ids=ids)
    return {name: getattr(found, name) for name in (("out",) if case.direction == "forward" else ("dq", "dk", "dv"))}


def oracle_glu(case: GluCase, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    if case.op == "fused_glu":
        return {"h": oracle.glu(*arrays).h}
    *inputs, down, dy = arrays
    found = oracle.glu(*inputs, dy @ down.T)
    gradients = {name: getattr(found, name) for name in ("dx", "dw_gate", "dw_up")}
    return {"y": found.h @ down, **gradients, "dw_down": found.h.T @ dy}


def test_every_timed_call_is_made() -> None:
    """Neither moved out of the loop nor dropped: the function counts its own calls, which any optimiser may remove."""
    made = []

    def count(x: np.ndarray) -> np.ndarray:
        made.append(1)
        return np.asarray(x)

    def function(x: jax.Array) -> jax.Array:
        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    [timing] = compare({"one": Call(function, (jnp.ones((2, 2)),))}, warmups=1, samples=3, flush_bytes=4096).values()
    assert not isinstance(timing, Exception)
    assert len(made) >= 2 + 4 * timing.calls  # twice one call, to find how many make a sample; more where one was void


def test_more_work_takes_longer() -> None:
    """The figures mean time: 16 products of 512 x 512 against one, so far apart that no noise bridges it."""
    x = jax.random.normal(jax.random.key(0), (512, 512))

    def products(n: int) -> Call:
        return Call(lambda x: jax.lax.fori_loop(0, n, lambda _, y: x @ y, x), (x,))

    found = compare({"one": products(1), "many": products(16)}, warmups=1, samples=5, flush_bytes=4096)
    assert found["many"].median > 2 * found["one"].median


def test_one_that_raises_does_not_stop_the_others() -> None:
    x = jnp.ones((4, 4))
    found = compare(
        {"bad": Call(lambda x: x @ x[:3], (x,)), "good": Call(lambda x: x @ x, (x,))},
        warmups=0,
        samples=2,
        flush_bytes=4096,
    )
    assert isinstance(found["bad"], TypeError) and found["good"].calls >= 1


def die() -> None:
    os._exit(7)


def hang() -> None:
    time.sleep(60)


def test_a_worker_outlives_its_calls() -> None:
    with Worker() as worker:
        assert worker.call(math.hypot, 3, 4, limit_s=30) == 5
        with pytest.raises(WorkerError, match="ValueError: math domain error"):
            worker.call(math.sqrt, -1, limit_s=30)
        with pytest.raises(WorkerError, match="died with exit code 7"):
            worker.call(die, limit_s=30)
        with pytest.raises(WorkerError, match="no answer within 1 s"):
            worker.call(hang, limit_s=1)
        assert worker.call(math.hypot, 3, 4, limit_s=30) == 5


class Scripted:
    """A worker whose answers are known beforehand."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.stopped = list(answers), 0

    def call(self, *_: Any, **__: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self.stopped += 1


def test_a_lost_case_loses_no_other() -> None:
    good = CaseRow(name=GLU.name, op="fused_glu", backend="gpu", kernel=Entry(status="ok"), rivals={})
    worker = Scripted(WorkerError("no answer within 120 s"), WorkerError("poisoned"), good)
    rows = list(bench.run([ATTENTION, GLU], "gpu", QUICK, worker, budget_s=60, case_s=120))
    assert [row.kernel.status for row in rows] == ["failed", "ok"]
    assert rows[0].name == ATTENTION.name and "no answer" in rows[0].kernel.reason
    assert worker.stopped == 1  # the device did not answer afterwards, so the process is renewed


def test_what_time_did_not_allow_is_named() -> None:
    [row] = bench.run([ATTENTION], "gpu", QUICK, Scripted(), budget_s=-1, case_s=120)
    assert row.name == ATTENTION.name and row.kernel.status == "skipped" and "--budget" in row.kernel.reason


def test_cases_are_told_apart_and_cover_what_is_promised() -> None:
    everything = [*attention_cases(), *glu_cases()]
    names = [case.name for case in everything]
    assert len(set(names)) == len(names)
    assert {case.T for case in attention_cases()} == {1024, 2048, 4096, 8192, 16384}
    assert {(case.H, case.Hv) for case in attention_cases()} == {(64, 64), (128, 128), (256, 256), (192, 128)}
    assert all(sum(case.documents) == case.T for case in attention_cases() if case.documents)
    assert {(4096, 11008), (4096, 14336), (2048, 5632), (8192, 28672)} <= {(case.D, case.F) for case in glu_cases()}


def test_flops() -> None:
    case = AttentionCase(direction="forward", B=2, T=8, N=4, K=2, H=16, Hv=32)
    assert case.flops == 2 * 4 * (8 * 9 // 2) * 2 * (16 + 32)
    packed = dataclasses.replace(case, direction="backward", documents=(5, 3))
    assert packed.flops == 2 * 4 * (15 + 6) * 2 * (3 * 16 + 2 * 32)
    glu = GluCase(op="fused_glu", direction="forward", M=3, D=5, F=7)
    assert glu.flops == 2 * 2 * 3 * 5 * 7
    assert dataclasses.replace(glu, op="fused_glu_mlp", direction="forward and backward").flops == 9 * 2 * 3 * 5 * 7


def test_the_file_is_json_even_where_a_figure_is_none(tmp_path: Path) -> None:
    bench.write(tmp_path / "a.json", {"errors": {"h": math.nan}, "list": [math.inf, 1.5, "text", None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"errors": {"h": None}, "list": [None, 1.5, "text", None]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_verdicts() -> None:
    goal = Goal(0.85, 0.95, 1.0, ("cudnn",))
    assert [goal.verdict(r) for r in (0.84, 0.85, 0.95, 1.0)] == ["below", "ship", "aim", "stretch"]
    assert dataclasses.replace(goal, stretch=None).verdict(2.0) == "aim"


@pytest.mark.slow
def test_the_examples_of_the_docs_run() -> None:
    """All of them in order, as a reader would type them."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert len(examples) > 5
    names: dict[str, Any] = {}
    exec("\n".join(examples), names)
    assert names["out"].shape == (2, 256, 8, 64) and names["y"].shape == (2, 256, 128)
    assert names["routed"].shape == (512, 384)
