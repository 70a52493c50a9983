"""A sweep is what it says, is refused where it cannot be, and goes on where it was."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folder import make_run

from maxlm.config import (
    ConstantSchedule,
    CosineSchedule,
    ObserveConfig,
    Sft,
    UserError,
    WsdSchedule,
    serialize,
)
from maxlm.config.cli import load_config
from maxlm.scaling import sweep as sweeping
from maxlm.scaling.__main__ import main
from maxlm.scaling.measured_runs import (
    Reading,
    SizeOf,
    read_runs,
    size_of,
)
from maxlm.scaling.sweep import Sweep, plan, run_all, write_configs
from maxlm.shapes import flops_per_token, parameter_count


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
