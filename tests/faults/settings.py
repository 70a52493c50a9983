"""A run that goes on with other settings: told, refused, or of no weight; a finished one is never rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train_runs import contents

from faults.case import Case
from faults.runs import finished, is_saved, train, unfinished


class Row(NamedTuple):
    key: str
    value: str
    told: str
    """`old -> new`; of what is refused, the old value; empty: nothing is told."""


ATTENTION = "model.blocks.0.attention"
REFUSED = (
    Row("model.norm.eps", "0.1", "1e-05"),
    Row(f"{ATTENTION}.position.theta", "500", "10000.0"),
    Row(f"{ATTENTION}.window", "8", "None"),
    Row(f"{ATTENTION}.soft_cap", "5", "None"),
    Row(f"{ATTENTION}.position", "None", "Rope"),
    Row("model.blocks.0.mlp.activation", "relu", "silu"),
    Row("model.max_seq_len", "128", "64"),
    Row("model.final_norm", "False", "True"),
    Row("model.d_model", "64", "32"),
    Row("data.seed", "3", "0"),
    Row("data.datasets.0.weight", "2", "1.0"),
    Row("train.batch_size", "4", "8"),
    Row("train.seq_len", "16", "32"),
    Row("optimizer.moment_dtype", "bfloat16", "float32"),
)
TOLD = (
    Row("optimizer.learning_rate", "0.001", "0.003 -> 0.001"),
    Row("optimizer.weight_decay", "0", "0.1 -> 0.0"),
    Row("optimizer.clip_norm", "None", "1.0 -> None"),
    Row("optimizer.schedule.warmup_steps", "3", "2 -> 3"),
    Row("train.z_loss", "0.1", "0.0 -> 0.1"),
    Row("train.seed", "7", "0 -> 7"),
    Row("train.micro_batches", "2", "1 -> 2"),
    Row("execution.dtype", "bfloat16", "float32 -> bfloat16"),
    Row("execution.remat", "full", "none -> full"),
    Row("sharding.zero", "optimizer", "parameters -> optimizer"),
)
FREE = (
    Row("train.log_every", "3", ""),
    Row("train.eval_every", "3", ""),
    Row("checkpoint.keep_last", "5", ""),
    Row("observe.sample_tokens", "8", ""),
    Row("data.verify", "False", ""),
    Row("target", "cpu:1", ""),
)


def refused(row: Row, folder: Path) -> str:
    run_dir = finished(folder)
    before = contents(run_dir)
    ended = train(run_dir, f"--{row.key}={row.value}")
    assert ended.code == 2 and len(ended.errors) == 1, (ended.code, ended.err)
    (line,) = ended.errors
    assert line.startswith(f"{row.key}: ") and f"was trained with {row.told}," in line, line
    assert f"--allow_change {row.key}" in line, line
    assert contents(run_dir) == before, "the run folder has changed"
    return line[:100]


def told(row: Row, folder: Path) -> str:
    run_dir = finished(folder)
    before = contents(run_dir)
    ended = train(run_dir, f"--{row.key}={row.value}")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if "changed after" in line]
    assert len(lines) == bool(row.told), lines
    assert not row.told or lines[0] == f"warning: changed after step 8: {row.key}: {row.told}", lines
    assert contents(run_dir) == before, "the run folder has changed"
    return lines[0] if lines else "nothing told"


def extended(folder: Path) -> str:
    run_dir = finished(folder)
    ended = train(run_dir, "--train.steps=10")
    assert ended.code == 0 and is_saved(run_dir, 10), ended.err
    assert "changed after step 8: train.steps: 8 -> 10" in ended.out
    assert (run_dir / "config.before-step-8.json").exists()
    return "went on to step 10"


def allowed(folder: Path) -> str:
    run_dir = unfinished(folder)
    new = "--model.norm.eps=0.1", "--data.seed=3"
    ended = train(run_dir, *new, "--allow_change", "model.norm.eps", "--allow_change", "data.seed")
    assert ended.code == 0 and is_saved(run_dir), ended.err
    for words in ("model.norm.eps: 1e-05 -> 0.1 (as", "data.seed: 0 -> 3 (as", "was trained with data"):
        assert sum(words in line for line in ended.out.splitlines()) == 1, ended.out
    assert train(run_dir, *new).code == 0, "the same settings are no change any more"
    assert (run_dir / "config.before-step-4.json").exists()
    return "trained, and told"


def cases() -> Iterator[Case]:
    for rows, check, promise in (
        (REFUSED, refused, "exit 2, a line with key and both values; nothing is touched"),
        (TOLD, told, "`old -> new` is told; the finished run is not rewritten"),
        (FREE, told, "not told; the finished run is not rewritten"),
    ):
        for row in rows:
            yield Case(
                name=f"settings: going on with {row.key} = {row.value}",
                expected=promise,
                check=lambda folder, row=row, check=check: check(row, folder),
            )
    yield Case(
        name="settings: more steps for a finished run", expected="trains on; the earlier config is kept", check=extended
    )
    yield Case(name="settings: --allow_change", expected="trains on, told; the same command goes on", check=allowed)
