"""Plans for machines that are not there: what real configs hold and send, by the chips' own compilers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from aot import require_compiler

SEVEN_B = ("--config", "configs/llama7b.py", "--model.n_layers", "2", "--sharding.data", "-1")
D, F, V, LAYERS = 4096, 11_008, 32_000, 2


def run_plan(target: str, *arguments: str, **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report, from the compiler and not from a cache."""
    command = [sys.executable, "-m", "maxlm.plan", "--target", target, "--compile", "--json", *arguments]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"MAXLM_PLAN_CACHE": cache} | variables
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode in (0, 3), done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


def plan(target: str, *arguments: str) -> dict[str, Any]:
    code, report = run_plan(target, *arguments)
    assert code == 0 and report["fits"] and all(one["runs_exact"] for one in report["collectives"])
    return report


@pytest.mark.slow
def test_a_gpu_step_that_does_not_fit_names_its_largest_arrays() -> None:
    require_compiler("h200")
    code, report = run_plan(
        "gpu:h200:8", *SEVEN_B, "--sharding.fsdp", "8", "--train.batch_size", "8",
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.01",
    )  # fmt: skip
    assert code == 3 and not report["fits"]
    # The gradient of the table, in float32, before it is scattered.
    largest = report["largest"][0]
    assert largest["size"] == 4 * V * D and largest["source"].startswith("maxlm/")


@pytest.mark.slow
def test_a_gpu_step_sends_what_zero3_says() -> None:
    """7 of 8 parts of each matrix, in bfloat16: gathered forward and backward, and scattered; the embedding in float32,
    gathered once, as the output table is."""
    require_compiler("h200")
    report = plan("gpu:h200:8", *SEVEN_B, "--sharding.fsdp", "8", "--train.batch_size", "8")
    assert report["forbidden"] == []
    layers, table = LAYERS * (4 * D * D + 3 * D * F), V * D
    want = (layers * 2 * 3 + table * (4 + 4) + table * (2 + 2)) * 7 / 8
    assert sum(one["bytes_sent"] for one in report["collectives"]) == pytest.approx(want, rel=1e-3)


@pytest.mark.nightly
def test_a_tpu_step_scatters_all_but_what_is_cut_along_its_last_dim() -> None:
    """The whole of LLaMA 7B on the machine that its config names, where it fits."""
    require_compiler("tpu_v5p")
    report = plan("tpu:v5p:4x4x4", "--config", "configs/llama7b.py")
    large = {
        (one["kind"], one["bytes_each"]) for one in report["collectives"] if "fsdp" in one["axes"]
        if one["bytes_each"] >= 2 * D * D
    }  # fmt: skip
    assert {kind for kind, _ in large} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert ("reduce-scatter", 2 * D * F) in large and ("reduce-scatter", 2 * D * D) in large
    # docs/plan.md: o_proj and down_proj, and the gradients of the two tables.
    assert {size for kind, size in large if kind == "all-reduce"} == {2 * (D * D + D * F), 2 * V * D, 4 * V * D}


@pytest.mark.slow
@pytest.mark.nightly
def test_long_sequences_in_a_ring_fit() -> None:
    require_compiler("tpu_v5p")
    report = plan(
        "tpu:v5p:8x8x8", "--config", "configs/llama3_70b.py", "--model.max_seq_len", "32768",
        "--train.seq_len", "32768", "--train.batch_size", "64", "--sharding.data", "1", "--sharding.fsdp", "64",
        "--sharding.seq", "8", "--sharding.context", "ring",
    )  # fmt: skip
    assert report["memory"]["peak"] < 40 * 2**30
    assert ("collective-permute", "seq") in {(one["kind"], *one["axes"]) for one in report["collectives"]}
