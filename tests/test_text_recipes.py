"""Runs of the tasks about whole texts: from records to figures, a reference that stays, and going on after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import small_run
from train_runs import rows

from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import (
    AdamW,
    BinaryReward,
    ByteTokenizer,
    CheckpointConfig,
    ClassHead,
    Classify,
    ConstantSchedule,
    Conversations,
    DataConfig,
    Dataset,
    Dpo,
    Embed,
    EmbedHead,
    Kto,
    LmHead,
    ObserveConfig,
    Pooling,
    Preference,
    PrepareConfig,
    Purpose,
    Reward,
    RunConfig,
    ScalarHead,
    Sft,
    SimPo,
    Task,
)
from maxlm.recipes import recipe
from maxlm.training import loop
from maxlm.training.loop import run

ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "kite", "lion"]


def lines_of(purpose: Purpose) -> list[dict[str, Any]]:
    """Records of which each answer is short enough for a row of 48 bytes to hold two."""
    pairs = [(a, b) for a in ANIMALS for b in ANIMALS if a != b]
    match purpose:
        case Purpose.PREFERENCE:
            return [{"prompt": f"{a}?", "chosen": f"{a}", "rejected": b} for a, b in pairs]
        case Purpose.KTO | Purpose.BINARY:
            return [{"prompt": f"{a}?", "completion": c, "label": c == a} for a, b in pairs for c in (a, b)]
        case Purpose.CLASSIFY:
            return [{"text": f"{a} {b}", "label": int(a < b)} for a, b in pairs]
        case Purpose.EMBED:
            return [{"query": f"{a} {b}", "positive": f"{b} {a}"} for a, b in pairs]
        case _:
            return [{"prompt": f"{a}?", "completion": a} for a in ANIMALS]


def run_config(folder: Path, task: Task, purpose: Purpose, head: Any = LmHead(), **changes: Any) -> RunConfig:
    file = folder / f"{purpose.value}.jsonl"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines_of(purpose)))
    documents = Conversations(paths=(str(file),), purpose=purpose, template="raw")
    data = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.15, workers=1)
    base = small_run(batch_size=8, seq_len=48, steps=4, log_every=1)
    values = {
        "model": dataclasses.replace(base.model, vocab_size=384, n_layers=1, head=head),
        "data": DataConfig(datasets=(Dataset(path=str(folder / f"data-{purpose.value}"), prepare=data),)),
        "optimizer": AdamW(learning_rate=1e-3, schedule=ConstantSchedule()),
        "checkpoint": CheckpointConfig(every=2, keep_last=9),
        "observe": ObserveConfig(sample_tokens=0),
        "task": task,
        "run_dir": str(folder / type(task).__name__.lower()),
    }
    return dataclasses.replace(base, **values | changes)


@pytest.fixture(scope="module", autouse=True)
def on_one_device() -> Iterator[None]:
    """test_text_objectives.py compares eight with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "all_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def taught(folder: Path) -> Path:
    """A run that others start from."""
    config = run_config(
        folder, Sft(), Purpose.SFT, train=small_run(batch_size=8, seq_len=48, steps=2, eval_batches=0).train
    )
    run(config, recipe)
    return Path(config.run_dir)


def from_run(config: RunConfig, place: Path) -> RunConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, init_from=str(place)))


def newest(run_dir: Path | str) -> str:
    checkpoints = Path(run_dir) / "checkpoints"
    return state_hash(checkpoints, max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()))


def goes_on_as_it_went(config: RunConfig) -> None:
    """From what a run leaves that is killed after step 2, to the same bits."""
    run_dir, whole = Path(config.run_dir), newest(config.run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "4")
    (run_dir / "report.html").unlink()
    run(config, recipe)
    assert newest(run_dir) == whole


@pytest.mark.nightly
def test_dpo_begins_at_its_reference_and_goes_on_to_the_same_state(folder: Path, taught: Path) -> None:
    config = from_run(run_config(folder, Preference(loss=Dpo(beta=0.1)), Purpose.PREFERENCE), taught)
    before = state_hash(taught / "checkpoints", 2)
    assert run(config, recipe).step == 4
    first, *_, last = rows(Path(config.run_dir))
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6) and first["reward_accuracy"] == 0.5
    assert last["reward_margin"] > 0
    [measured] = rows(Path(config.run_dir), "evals")
    assert measured["step"] == 4 and measured["eval_kl"] > 0 and 0 <= measured["eval_reward_accuracy"] <= 1
    assert "Share of pairs that are right" in (Path(config.run_dir) / "report.html").read_text()
    assert state_hash(taught / "checkpoints", 2) == before
    # Ahead: the same numbers, without the reference beside the state; then from the file, without the reference's run.
    ahead = dataclasses.replace(
        config, task=dataclasses.replace(config.task, reference_ahead=True), run_dir=str(folder / "ahead")
    )
    run(ahead, recipe)
    for one, other in zip(rows(folder / "ahead"), rows(Path(config.run_dir)), strict=True):
        for name in ("loss", "reward_margin", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
    files = list((folder / "data-preference").glob("reference-*.npy"))
    assert len(files) == 2  # of either split
    goes_on_as_it_went(config)


REST: dict[str, tuple[Task, Purpose, Any, list[str]]] = {
    "kto": (Preference(loss=Kto()), Purpose.KTO, LmHead(), ["kl", "reward_desired", "reward_undesired"]),
    "simpo": (Preference(loss=SimPo()), Purpose.PREFERENCE, LmHead(), ["reward_accuracy"]),
    "reward": (Reward(), Purpose.PREFERENCE, ScalarHead(), ["reward_accuracy", "reward_margin"]),
    "binary": (Reward(loss=BinaryReward()), Purpose.BINARY, ScalarHead(), ["reward_accuracy"]),
    "classify": (Classify(), Purpose.CLASSIFY, ClassHead(n_classes=2), ["accuracy", "class_loss"]),
    "embed": (Embed(), Purpose.EMBED, EmbedHead(pooling=Pooling.LAST), ["accuracy", "cosine_scale"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name != "reward" else ()) for name in REST]
)
def test_the_other_tasks_run_and_are_measured(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    task, purpose, head, figures = REST[name]
    config = run_config(folder, task, purpose, head, run_dir=str(folder / name))
    if name != "reward":
        config = from_run(config, request.getfixturevalue("taught"))
    assert run(config, recipe).step == 4
    row = rows(folder / name)[-1]
    assert all(np.isfinite(row[figure]) for figure in ("loss", "grad_norm", *figures))
    [measured] = rows(folder / name, "evals")
    assert np.isfinite(measured["eval_loss"])
    goes_on_as_it_went(config)
