"""Every file in configs/ on the machine that it names: by arithmetic; by that machine's own compiler under the mark
`nightly` (`make test-nightly`), but for LLaMA 7B on GPUs, which are quick to compile for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot import require_compiler
from helpers import PRESETS

from maxlm.config import RunConfig
from maxlm.config.cli import load_config
from maxlm.plan.analysis import analyse
from maxlm.plan.machines import GPUS, CpuMachine, GpuMachine, Machine, TpuMachine, parse_machine

ROOT = Path(__file__).parent.parent


def preset(name: str) -> tuple[RunConfig, Machine]:
    config = load_config(f"{ROOT}/configs/{name}.py")
    assert config.target is not None, f"configs/{name}.py names no target"
    return config, parse_machine(config.target)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_fits_the_machine_that_it_names(name: str) -> None:
    config, target = preset(name)
    config.validate(target.devices)
    report = analyse(config, target)
    assert report.fits, f"{report.memory.peak / 2**30:.1f} GiB on {target}"


def test_the_table_of_presets_has_each_once() -> None:
    """docs/configs.md; the first column of what stands under Presets."""
    section = (ROOT / "docs/configs.md").read_text().split("## Presets")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == PRESETS


def test_configs_that_documents_name_are_there() -> None:
    """In commands and tables; `mine` and `x` are those of a reader."""
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        named = set(re.findall(r"configs/(\w+)\.py", document.read_text()))
        assert named <= {*PRESETS, "mine", "x"}, document


def compiled(target: Machine, *arguments: str) -> dict[str, Any]:
    """The plan of a real compile, which must fit and keep the rules that `forbidden` names."""
    match target:
        case TpuMachine():
            require_compiler("tpu_v5p")
        case GpuMachine():
            require_compiler("h200")
        case CpuMachine():
            pass
    command = [sys.executable, "-m", "maxlm.plan", "--target", str(target), "--compile", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["tier"] == "compiled" and report["fits"]
    assert report["peak_bytes"]["compiled"] <= (report["hbm_bytes"] or float("inf"))
    return report


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_compiles_for_the_machine_that_it_names(name: str) -> None:
    _, target = preset(name)
    if isinstance(target, GpuMachine) and target.chip not in GPUS:
        pytest.skip(f"no compiler is told of {target.chip}")
    report = compiled(target, "--config", f"configs/{name}.py")
    assert report["devices"] == target.devices
    if report["mesh"]["expert"] > 1:
        assert ("all-to-all", ["expert"]) in [(one["kind"], one["axes"]) for one in report["collectives"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        pytest.param("tpu:v5e:16x16", (), marks=pytest.mark.nightly),
        ("gpu:h200:8", ("--sharding.fsdp", "8", "--train.micro_batches", "32")),
    ],
)
def test_llama7b_compiles_for_other_machines(target: str, arguments: tuple[str, ...]) -> None:
    compiled(parse_machine(target), "--config", "configs/llama7b.py", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu:8", "gpu:h200:8", *(
    pytest.param(target, marks=pytest.mark.nightly) for target in (
        "tpu:v5p:2x2x1", "tpu:v4:2x2x1", "tpu:v5e:2x2", "tpu:v6e:2x2", "tpu:7x:2x2x1", "gpu:a100:8", "gpu:h100:8",
        "gpu:b200:8",
    )
)])  # fmt: skip
def test_tiny_compiles_for_every_chip(target: str) -> None:
    compiled(parse_machine(target), "--config", "configs/tiny.py", "--sharding.fsdp", "-1")
