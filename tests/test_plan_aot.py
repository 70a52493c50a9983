"""Plans for machines that are not there: what real configs hold and send, by the chips' own compilers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot import require_compiler

SEVEN_B = ("--config", "configs/llama7b.py", "--model.n_layers", "2", "--sharding.data", "-1")
D, F, V, LAYERS = 4096, 11_008, 32_000, 2


def plan(target: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "maxlm.plan", "--target", target, "--compile", "--json", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["fits"] and all(one["runs_exact"] for one in report["collectives"])
    return report


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


@pytest.mark.slow
def test_a_tpu_step_scatters_all_but_what_is_cut_along_its_last_dim() -> None:
    require_compiler("tpu_v5p")
    report = plan("tpu:v5p:4x4x4", *SEVEN_B, "--sharding.fsdp", "32", "--train.batch_size", "64")
    large = {
        (one["kind"], one["bytes_each"]) for one in report["collectives"] if "fsdp" in one["axes"]
        if one["bytes_each"] >= 2 * D * D
    }  # fmt: skip
    assert {kind for kind, _ in large} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert ("reduce-scatter", 2 * D * F) in large and ("reduce-scatter", 2 * D * D) in large
    # docs/plan.md: o_proj and down_proj, and the gradients of the two tables.
    assert {size for kind, size in large if kind == "all-reduce"} == {2 * (D * D + D * F), 2 * V * D, 4 * V * D}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "arguments", "peak_gib"),
    [
        ("tpu:v5p:4x4x8", ("--config", "configs/mixtral8x7b.py"), 40),
        (
            "tpu:v5p:8x8x8",
            (
                "--config", "configs/llama3_70b.py", "--model.max_seq_len", "32768", "--train.seq_len", "32768",
                "--train.batch_size", "64", "--sharding.data", "1", "--sharding.fsdp", "64", "--sharding.seq", "8",
                "--sharding.context", "ring",
            ),
            40,
        ),
    ],
    ids=["mixtral8x7b", "llama3_70b ring 32k"],
)  # fmt: skip
def test_large_runs_fit(target: str, arguments: tuple[str, ...], peak_gib: int) -> None:
    require_compiler("tpu_v5p")
    report = plan(target, *arguments)
    assert report["memory"]["peak"] < peak_gib * 2**30
    kinds = {(one["kind"], *one["axes"]) for one in report["collectives"]}
    assert ("all-to-all", "expert") in kinds or ("collective-permute", "seq") in kinds
