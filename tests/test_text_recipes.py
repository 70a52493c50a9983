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
from helpers import one_device, small_run
from run_folder import make_run
from train_runs import rows

from maxlm import evaluate
from maxlm.checkpoint.state_hash import state_hash
from maxlm.checkpoint.store import Store
from maxlm.config import (
    AdamW,
    Adapter,
    BinaryReward,
    ByteTokenizer,
    CheckpointConfig,
    ClassHead,
    Classify,
    ConstantSchedule,
    Conversations,
    DataConfig,
    Dataset,
    DistillContext,
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
    UserError,
)
from maxlm.data.prepare import ensure_prepared
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
        case Purpose.CONTEXT:
            return [{"prompt": f"{a}?", "completion": a, "context": b} for a, b in pairs]
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


pytestmark = pytest.mark.usefixtures("programs_kept")


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
    assert last["reward_margin"] > 0 and last["kl_estimate"] > first["kl_estimate"] == 0
    [measured] = rows(Path(config.run_dir), "evals")
    assert measured["step"] == 4 and measured["eval_kl"] > 0 and 0 <= measured["eval_reward_accuracy"] <= 1
    report = (Path(config.run_dir) / "report.html").read_text()
    assert "Share of pairs that are right" in report and "Estimate of the KL to the reference" in report
    assert state_hash(taught / "checkpoints", 2) == before
    # Ahead: the same numbers, without the reference beside the state; then from the file, without the reference's run.
    ahead = dataclasses.replace(
        config, task=dataclasses.replace(config.task, reference_ahead=True), run_dir=str(folder / "ahead")
    )
    run(ahead, recipe)
    for one, other in zip(rows(folder / "ahead"), rows(Path(config.run_dir)), strict=True):
        for name in ("loss", "reward_margin", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
    assert all("kl_estimate" not in row for row in rows(folder / "ahead"))  # single tokens of it are not kept
    files = list((folder / "data-preference").glob("reference-*.npy"))
    assert len(files) == 2  # of either split
    for one in (config, ahead):
        goes_on_as_it_went(one)


def test_what_a_reference_said_ahead_is_kept_and_is_of_the_step_that_the_run_began_with(tmp_path: Path) -> None:
    place = make_run(tmp_path).run_dir  # of steps 1 and 2

    def read(place: str, saved: Any) -> Any:
        task = Preference(reference=place, reference_ahead=True)
        frozen = recipe(run_config(tmp_path, task, Purpose.PREFERENCE), one_device()).frozen
        assert frozen is not None
        return frozen(None, saved)

    nothing, began = read(f"{place}/checkpoints/1", None)
    assert nothing is None and began.step == 1
    kept = {file: file.read_bytes() for file in (tmp_path / "data-preference").glob("reference-*.npy")}
    assert len(kept) == 2  # of either split
    assert read(place, began.to_json()) == (None, began)  # though it has been trained further
    with pytest.raises(UserError, match="this run began with"):
        read(place, began.to_json() | {"step": 2})
    for broken in (b"", b"\x80\x04N.", *(whole[:-3] for whole in kept.values())):
        for file in kept:
            file.write_bytes(broken)
        with pytest.raises(UserError, match=r"reference-.*npy: is no array of NumPy .*remove it"):
            read(place, began.to_json())
    for file in kept:
        file.unlink()
    read(place, began.to_json())
    assert kept == {file: file.read_bytes() for file in (tmp_path / "data-preference").glob("reference-*")}


@pytest.mark.nightly
def test_under_an_adapter_is_its_reference(folder: Path, taught: Path) -> None:
    """Nothing is read beside the state; where a part of the base trains as a whole, the base is."""
    for adapter in (Adapter(), Adapter(full=("final_norm/*",))):
        place = folder / f"adapter{len(adapter.full)}"
        config = from_run(run_config(folder, Preference(), Purpose.PREFERENCE, run_dir=str(place)), taught)
        run(dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=adapter)), recipe)
        first, *_, last = rows(place)
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-6) and first["reward_accuracy"] == 0.5
        assert last["reward_margin"] != 0
        assert ("frozen" in Store().record(place / "checkpoints" / "4").meta) == bool(adapter.full)


REST: dict[str, tuple[Task, Purpose, Any, list[str]]] = {
    "context": (DistillContext(), Purpose.CONTEXT, LmHead(), []),
    "kto": (Preference(loss=Kto()), Purpose.KTO, LmHead(), ["kl", "kl_estimate", "reward_desired", "reward_undesired"]),
    "simpo": (Preference(loss=SimPo()), Purpose.PREFERENCE, LmHead(), ["reward_accuracy"]),
    "reward": (Reward(), Purpose.PREFERENCE, ScalarHead(), ["reward_accuracy", "reward_margin"]),
    "binary": (Reward(loss=BinaryReward()), Purpose.BINARY, ScalarHead(), ["reward_accuracy"]),
    "classify": (Classify(), Purpose.CLASSIFY, ClassHead(n_classes=2), ["accuracy", "class_loss"]),
    "embed": (Embed(), Purpose.EMBED, EmbedHead(pooling=Pooling.LAST), ["accuracy", "cosine_scale"]),
}


def runs_and_is_measured(name: str, config: RunConfig) -> dict[str, Any]:
    assert run(config, recipe).step == 4
    row = rows(Path(config.run_dir))[-1]
    assert all(np.isfinite(row[figure]) for figure in ("loss", "grad_norm", *REST[name][3]))
    [measured] = rows(Path(config.run_dir), "evals")
    assert np.isfinite(measured["eval_loss"])
    return measured


def test_a_reward_model_runs_and_is_measured(folder: Path) -> None:
    task, purpose, head, _ = REST["reward"]
    config = run_config(folder, task, purpose, head)
    runs_and_is_measured("reward", config)
    report = (Path(config.run_dir) / "report.html").read_text()
    assert "Share of pairs that are right, of a batch" in report and "nats a token" not in report


@pytest.mark.nightly
@pytest.mark.parametrize("name", REST)
def test_the_other_tasks_start_from_a_run_and_go_on(
    name: str, folder: Path, taught: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, purpose, head, _ = REST[name]
    config = from_run(run_config(folder, task, purpose, head, run_dir=str(folder / name)), taught)
    measured = runs_and_is_measured(name, config)
    goes_on_as_it_went(config)
    evaluate.main(["--run", config.run_dir, "--whole", "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["eval_loss"] == pytest.approx(measured["eval_loss"], rel=1e-5)
    if name == "embed":
        ensure_prepared(run_config(folder, Classify(), Purpose.CLASSIFY).data)
        evaluate.main(["--run", config.run_dir, "--data", str(folder / "data-classify"), "--json"])
        assert 0 <= json.loads(capsys.readouterr().out.splitlines()[-1])["linear_probe"] <= 1
