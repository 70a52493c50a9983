"""What a run may go on with: every key has its answer, and what the loop does about each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import small_run
from test_fields import PATHS
from test_recipes import STEPS, Distance, Points, Regression
from test_recipes import config as small_config
from train_runs import contents

from maxlm.config import (
    Adafactor,
    Alibi,
    CheckpointConfig,
    ConstantSchedule,
    Dataset,
    Dtype,
    Learned,
    Mlp,
    ObserveConfig,
    ParameterFormat,
    RmsNorm,
    Rope,
    RunConfig,
    StepRange,
    UserError,
    serialize,
)
from maxlm.config.changes import changes, check_allowed
from maxlm.config.cli import parse_run
from maxlm.config.fields import Changes, changes_of
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe, Result, run

NOTHING, TRAINING, IDENTITY = Changes.NOTHING, Changes.TRAINING, Changes.IDENTITY


@pytest.mark.parametrize("cls", PATHS, ids=lambda cls: cls.__name__)
def test_every_key_says_what_another_value_changes(cls: type) -> None:
    for name, answer in changes_of(cls).items():
        assert isinstance(answer, Changes), f"{cls.__name__}.{name}: give @config(..., changes=...) or mark the field"


def change(config: RunConfig, key: str, value: Any) -> RunConfig:
    """The config with another value at a dotted key."""
    name, _, rest = key.partition(".")

    def inner(owner: Any, name: str, rest: str) -> Any:
        if not rest:
            return dataclasses.replace(owner, **{name: value})
        old = getattr(owner, name)
        if isinstance(old, tuple):
            place, _, rest = rest.partition(".")
            entries = list(old)
            entries[int(place)] = inner_of(entries[int(place)], rest)
            return dataclasses.replace(owner, **{name: tuple(entries)})
        return dataclasses.replace(owner, **{name: inner_of(old, rest)})

    def inner_of(owner: Any, key: str) -> Any:
        name, _, rest = key.partition(".")
        return inner(owner, name, rest)

    return inner(config, name, rest)


BLOCK = "model.blocks.0"
CONFIG = small_run()
SAVED = serialize.from_dict(RunConfig, json.loads(json.dumps(serialize.to_dict(CONFIG))))
TABLE: list[tuple[str, Any, Changes]] = [
    ("model.norm.eps", 0.1, IDENTITY),
    ("model.d_model", 64, IDENTITY),
    ("model.n_layers", 4, IDENTITY),
    ("model.embedded_position", Learned(), IDENTITY),
    (f"{BLOCK}.attention.position.theta", 500_000.0, IDENTITY),
    (f"{BLOCK}.attention.position", Alibi(), IDENTITY),
    (f"{BLOCK}.attention.position", None, IDENTITY),
    (f"{BLOCK}.attention.window", 8, IDENTITY),
    (f"{BLOCK}.attention.soft_cap", 30.0, IDENTITY),
    (f"{BLOCK}.mlp", Mlp(d_ff=48), IDENTITY),
    ("model.blocks", CONFIG.model.blocks * 2, IDENTITY),
    ("data.seed", 1, IDENTITY),
    ("data.datasets", (Dataset(path="unused"), Dataset(path="other")), IDENTITY),
    ("data.datasets.0.weight", 2.0, IDENTITY),
    ("data.datasets.0.path", "moved", NOTHING),
    ("data.verify", False, NOTHING),
    ("train.batch_size", 16, IDENTITY),
    ("train.seq_len", 16, IDENTITY),
    ("train.steps", 20, TRAINING),
    ("train.micro_batches", 2, TRAINING),
    ("train.z_loss", 0.1, TRAINING),
    ("train.seed", 1, TRAINING),
    ("train.log_every", 1, NOTHING),
    ("train.eval_batches", 3, NOTHING),
    ("train.profile_steps", StepRange(1, 2), NOTHING),
    ("optimizer", Adafactor(), IDENTITY),
    ("optimizer.moment_dtype", Dtype.BFLOAT16, IDENTITY),
    ("optimizer.parameter_format", ParameterFormat.BFLOAT16, IDENTITY),
    ("optimizer.learning_rate", 1e-4, TRAINING),
    ("optimizer.clip_norm", None, TRAINING),
    ("optimizer.b2", 0.99, TRAINING),
    ("optimizer.schedule", ConstantSchedule(), TRAINING),
    ("optimizer.schedule.warmup_steps", 3, TRAINING),
    ("sharding.fsdp", 2, TRAINING),
    ("execution.dtype", Dtype.BFLOAT16, TRAINING),
    ("execution.scan_layers", False, TRAINING),
    ("checkpoint.every", 5, NOTHING),
    ("checkpoint.init_from", "runs/other", NOTHING),
    ("observe.sample_tokens", 3, NOTHING),
    ("target", "cpu:1", NOTHING),
    ("run_dir", "moved", NOTHING),
]


@pytest.mark.parametrize(("key", "value", "answer"), TABLE, ids=[f"{key}={value!r:.20}" for key, value, _ in TABLE])
def test_a_change_is_found_at_its_key_alone(key: str, value: Any, answer: Changes) -> None:
    assert list(changes(SAVED, CONFIG)) == []
    (found,) = changes(SAVED, change(CONFIG, key, value))
    assert (found.key, found.change) == (key, answer)


def test_both_values_are_told() -> None:
    def told(key: str, value: Any) -> str:
        return str(*changes(CONFIG, change(CONFIG, key, value)))

    assert told("model.norm.eps", 0.1) == "model.norm.eps: 1e-05 -> 0.1"
    assert told("optimizer", Adafactor()) == "optimizer: AdamW -> Adafactor"
    assert told("execution.dtype", Dtype.BFLOAT16) == "execution.dtype: float32 -> bfloat16"
    assert told("model.blocks", CONFIG.model.blocks * 2) == "model.blocks: 1 entry -> 2 entries"
    assert told(f"{BLOCK}.attention.position", None) == f"{BLOCK}.attention.position: Rope -> None"


@pytest.mark.parametrize("key", ["model.norm.eps", "model", "data.datasets.0", "train.seq_len", BLOCK])
def test_keys_and_groups_may_be_allowed(key: str) -> None:
    check_allowed(CONFIG, [key])


@pytest.mark.parametrize(("key", "near"), [("model.norm.epps", "model.norm.eps"), ("", ""), ("norm.eps", "norm.eps")])
def test_what_is_no_key_may_not_be_allowed(key: str, near: str) -> None:
    with pytest.raises(UserError, match=f"--allow_change {key}: must be a key.*{near}"):
        check_allowed(CONFIG, [key])


def test_the_command_line_takes_several() -> None:
    words = ["--config", "tiny", "--allow_change", "data.seed", "--data.seed=3", "--allow_change=model"]
    asked = parse_run(words, prog="", description="")
    assert asked.allow_change == ("data.seed", "model") and asked.config.data.seed == 3
    with pytest.raises(UserError, match="--allow_change"):
        parse_run(["--config", "tiny", "--allow_change"], prog="", description="")


# The loop, with a regression that knows nothing of the model


def go(
    run_dir: Path, changed: dict[str, Any] | None = None, *, stop_at: int | None = None, allow: tuple[str, ...] = ()
) -> Result:
    def recipe(config: RunConfig, layout: Layout) -> Recipe:
        objective = Regression(layout, taught=False)
        feed = Points(objective, layout, stop_at)
        feed.fingerprint = f"points {config.data.seed} {config.data.datasets[0].weight}"
        return Recipe(objective=objective, feed=feed, measures=(Distance(),))

    config = small_config(run_dir)
    for key, value in (changed or {}).items():
        config = change(config, key, value)
    return run(config, recipe, allow_change=allow)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved after step 5, killed before step 9."""
    run_dir = tmp_path_factory.mktemp("changes") / "run"
    with pytest.raises(InterruptedError):
        go(run_dir, stop_at=8)
    return run_dir


@pytest.fixture
def run_dir(broken_off: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(broken_off, tmp_path / "run"))


def saved(run_dir: Path, name: str = "config.json") -> RunConfig:
    return serialize.load(RunConfig, run_dir / name)


def test_another_training_is_told_and_the_earlier_config_kept(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved(run_dir)
    assert go(run_dir, {"optimizer.learning_rate": 0.1, "train.log_every": 2}).step == STEPS
    out = capsys.readouterr().out
    assert "warning: changed after step 5: optimizer.learning_rate: 0.3 -> 0.1\n" in out
    assert "log_every" not in out
    assert saved(run_dir).optimizer.learning_rate == 0.1
    assert dataclasses.replace(saved(run_dir, "config.before-step-5.json"), run_dir=before.run_dir) == before


def test_what_changes_nothing_is_not_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(run_dir, {"train.log_every": 2, "checkpoint.every": 4, "data.datasets.0.path": "moved"})
    assert "changed" not in capsys.readouterr().out
    assert saved(run_dir).checkpoint.every == 4
    assert not list(run_dir.glob("config.before*"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.norm.eps", 0.1, "was trained with 1e-05, the config says 0.1, which makes another model"),
        ("data.seed", 4, "was trained with 0, the config says 4, which makes another order of the data"),
        ("optimizer", Adafactor(), "was trained with AdamW, the config says Adafactor, which makes another state"),
    ],
)
def test_another_model_state_or_order_is_refused(run_dir: Path, key: str, value: Any, words: str) -> None:
    before = contents(run_dir)
    with pytest.raises(UserError) as caught:
        go(run_dir, {key: value})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{key}: {run_dir}/checkpoints/5 {words}") and f"--allow_change {key}" in message
    assert contents(run_dir) == before


def test_each_refused_key_has_its_line(run_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        go(run_dir, {"model.norm.eps": 0.1, "data.seed": 4, "train.steps": 14}, allow=("model.d_model",))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["model.norm.eps", "data.seed"]


def test_what_is_allowed_goes_on_and_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = {"model.norm.eps": 0.1, "data.seed": 4}
    go(run_dir, new, allow=("model.norm.eps", "data"))
    out = capsys.readouterr().out
    assert "changed after step 5: model.norm.eps: 1e-05 -> 0.1 (as --allow_change says)\n" in out
    assert "changed after step 5: data.seed: 0 -> 4 (as --allow_change says)\n" in out
    assert "was trained with data points 0 1.0..., the config names data points 4 1.0..., as --allow_change says" in out
    assert saved(run_dir).model.norm == RmsNorm(eps=0.1)
    go(run_dir, new)  # the same as the last checkpoint's: nothing to allow
    assert "changed after" not in capsys.readouterr().out


def test_config_json_is_that_of_the_newest_checkpoint(run_dir: Path) -> None:
    """Also while a run with another config has not saved yet."""
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(InterruptedError):
        go(run_dir, {"optimizer.learning_rate": 0.1, "checkpoint.every": 6}, stop_at=6)
    assert saved(run_dir).optimizer.learning_rate == 0.1  # saved after step 6
    shutil.rmtree(run_dir / "checkpoints" / "6")
    (run_dir / "config.json").write_bytes(before)
    with pytest.raises(InterruptedError):
        go(run_dir, {"optimizer.learning_rate": 0.1}, stop_at=6)
    assert (run_dir / "config.json").read_bytes() == before


def test_the_checkpoint_is_what_counts_not_config_json(run_dir: Path) -> None:
    serialize.save(change(saved(run_dir), "model.norm.eps", 0.1), run_dir / "config.json")
    with pytest.raises(UserError, match=r"model\.norm\.eps: "):
        go(run_dir, {"model.norm.eps": 0.1})
    assert go(run_dir).step == STEPS
    assert saved(run_dir).model.norm.eps == 1e-5


def test_a_finished_run_is_never_rewritten(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(run_dir)
    before = contents(run_dir)
    go(run_dir)
    go(run_dir, {"train.log_every": 3, "observe": ObserveConfig(), "checkpoint": CheckpointConfig(every=3)})
    capsys.readouterr()
    result = go(run_dir, {"optimizer.learning_rate": 0.1})
    assert f"changed after step {STEPS}: optimizer.learning_rate: 0.3 -> 0.1" in capsys.readouterr().out
    assert result.step == STEPS and result.files is not None and result.files.report == run_dir / "report.html"
    with pytest.raises(UserError, match=f"{BLOCK}.attention.position.theta: "):
        go(run_dir, {f"{BLOCK}.attention.position": Rope(theta=1.0)})
    go(run_dir, {"model.norm.eps": 0.1}, allow=("model.norm",))
    assert contents(run_dir) == before


@pytest.mark.parametrize("missing", ["report.html", "distances.jsonl"])
def test_what_a_killed_run_left_out_at_its_end_is_made(run_dir: Path, missing: str) -> None:
    go(run_dir)
    rows = (run_dir / "distances.jsonl").read_text()
    if missing == "distances.jsonl":
        (run_dir / missing).write_text(rows[: rows[:-1].rindex("\n") + 1])
    (run_dir / "report.html").unlink()
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    go(run_dir)
    assert (run_dir / "distances.jsonl").read_text() == rows
    assert (run_dir / "report.html").exists() and (run_dir / "metrics.jsonl").read_bytes() == metrics


def test_more_steps_extend_a_finished_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(run_dir)
    assert go(run_dir, {"train.steps": STEPS + 2}).step == STEPS + 2
    assert f"changed after step {STEPS}: train.steps: {STEPS} -> {STEPS + 2}" in capsys.readouterr().out
    assert saved(run_dir, f"config.before-step-{STEPS}.json").train.steps == STEPS
    with pytest.raises(UserError, match=f"train.steps = {STEPS} is less than the {STEPS + 2} steps"):
        go(run_dir)


def test_a_config_that_was_lost_comes_back(run_dir: Path) -> None:
    (run_dir / "config.json").write_text("{")
    with pytest.raises(InterruptedError):
        go(run_dir, stop_at=5)
    assert saved(run_dir).optimizer == small_config(run_dir).optimizer


def test_a_finished_run_without_checkpoints_does_not_begin_anew(run_dir: Path) -> None:
    go(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    before = contents(run_dir)
    with pytest.raises(UserError, match=f"holds the report of a run of {STEPS} steps and none of its checkpoints"):
        go(run_dir)
    assert contents(run_dir) == before
