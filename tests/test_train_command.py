"""`python -m maxlm.train` as a user runs it: what it leaves behind, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from train_runs import ROOT, STEPS, Bench, Ended, contents, inspect, losses, rows

from maxlm import evaluate
from maxlm.checkpoint.lock import lock_run
from maxlm.config import RmsNorm, RunConfig, serialize
from maxlm.config.cli import parse_run, run_command
from maxlm.train import command, main
from maxlm.training.loop import Result

Here = Callable[..., Ended]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.of_session(tmp_path_factory)


@pytest.fixture
def finished(bench: Bench, tmp_path: Path) -> Path:
    """A copy of a run that is done."""
    return shutil.copytree(bench.reference, tmp_path / "run")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench: Bench) -> Here:
    """The command in this process, which has 8 devices and has loaded jax: quicker than a process of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(bench.folder / "cache"))

    def run(run_dir: Path, *overrides: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["train", *bench.arguments(run_dir, *overrides)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(command)
        code = stop.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


def complaint(ended: Ended, code: int = 2) -> str:
    """The one line that the user reads."""
    assert ended.code == code, ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0]


# What a run leaves


def test_a_run_leaves_rows_evaluations_checkpoints_and_a_report(bench: Bench) -> None:
    run_dir = bench.reference
    metrics = rows(run_dir)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    wanted = {"step", "loss", "tokens", "tokens_per_s", "step_time_s", "mfu", "learning_rate", "grad_norm"}
    for row in metrics:
        assert wanted <= row.keys()
        assert row["tokens"] == row["step"] * 8 * 32
        assert row["tokens_per_s"] > 0
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(8 * 32)
        assert row["mfu"] is None
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1
    assert [row["step"] for row in rows(run_dir, "evals")] == [25, 50, STEPS]
    assert [row["step"] for row in rows(run_dir, "samples")] == [STEPS]
    assert "<html" in (run_dir / "report.html").read_text()
    assert (run_dir / "loss.png").stat().st_size > 0
    assert [(s["step"], s["status"]) for s in inspect(run_dir, "--verify")["steps"]] == [(40, "ok"), (STEPS, "ok")]
    config = serialize.load(RunConfig, run_dir / "config.json")
    argv = bench.arguments(run_dir)
    assert config == parse_run(argv, prog="", description="").config


def test_evaluate_says_what_the_run_said(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--run", str(bench.reference), "--json"])
    found, said = json.loads(capsys.readouterr().out), rows(bench.reference, "evals")[-1]
    assert (found["step"], found["tokens"]) == (said["step"], said["eval_tokens"])
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert found[key] == pytest.approx(said[f"eval_{key}"], rel=1e-5)
    for batch_size in ("1", "4", "16"):  # the same windows, 2 batches of 8
        evaluate.main(["--run", str(bench.reference), "--json", "--batch_size", batch_size])
        again = json.loads(capsys.readouterr().out)
        assert again["tokens"] == found["tokens"] and again["loss"] == pytest.approx(found["loss"], rel=1e-5)
    evaluate.main(["--run", str(bench.reference), "--json", "--whole"])
    assert json.loads(capsys.readouterr().out)["tokens"] > found["tokens"]


def test_evaluate_takes_the_model_from_the_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever became of config.json."""
    config = serialize.load(RunConfig, finished / "config.json")
    model = dataclasses.replace(config.model, norm=RmsNorm(eps=10.0))
    serialize.save(dataclasses.replace(config, model=model), finished / "config.json")
    evaluate.main(["--run", str(finished), "--json"])
    found, said = json.loads(capsys.readouterr().out), rows(finished, "evals")[-1]
    assert found["loss"] == pytest.approx(said["eval_loss"], rel=1e-5)


def test_the_same_command_on_a_finished_run_does_nothing_again(finished: Path, here: Here) -> None:
    before = contents(finished)
    ended = here(finished)
    assert (ended.code, ended.err) == (0, "")
    assert f"all {STEPS} steps are done" in ended.out
    assert "compiled the" not in ended.out
    assert contents(finished) == before


def test_a_larger_number_of_steps_goes_on(finished: Path, here: Here) -> None:
    before = losses(finished)
    quick = "--train.eval_batches=0", "--observe.sample_tokens=0"
    assert here(finished, f"--train.steps={STEPS + 3}", *quick).code == 0
    after = losses(finished)
    assert after[:STEPS] == before
    assert [step for step, _ in after] == list(range(1, STEPS + 4))
    assert inspect(finished)["latest"] == STEPS + 3


def test_a_smaller_number_of_steps_is_a_mistake(finished: Path, here: Here) -> None:
    before = contents(finished)
    line = complaint(here(finished, f"--train.steps={STEPS - 1}"))
    for part in (f"train.steps = {STEPS - 1}", f"at least {STEPS}", str(finished)):
        assert part in line
    assert contents(finished) == before


@pytest.mark.parametrize("in_thread", [False, True])
def test_main_in_process_returns_a_result(
    in_thread: bool, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(bench.folder / "cache"))
    config = parse_run(bench.arguments(tmp_path / "run"), prog="", description="").config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8, log_every=3, eval_every=0))
    results: list[Result] = []
    if in_thread:
        thread = threading.Thread(target=lambda: results.append(main(config)))
        thread.start()
        thread.join()
    else:
        results.append(main(config))
    (result,) = results
    assert (result.step, result.interrupted) == (8, False)
    assert result.files is not None and result.files.report.exists()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 3, 6, 8]
    assert result.loss == losses(tmp_path / "run")[-1][1]
    assert [row["step"] for row in rows(tmp_path / "run", "evals")] == [8]
    assert len(jax.devices()) == 8  # what this test ran on


def test_help_does_not_load_jax() -> None:
    program = (
        "import sys\nfrom maxlm.train import command\n"
        "try: command(['--help'])\n"
        "except SystemExit as stop: print(stop.code, *({'jax', 'numpy', 'flax', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--train.steps" in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


# Mistakes in the config: nothing is touched


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--train.stps=5"], ["--train.stps", "--train.steps"]),
        (["--sharding.data=3", "--train.batch_size=24"], ["data=3", "3 devices", "there are 8"]),
        (["--sharding.tensor=8", "--model.vocab_size=312", "--model.blocks.0.attention.n_heads=8"],
         ["sharding.tensor = 8", "n_kv_heads = 4", "[1, 2, 4]"]),
        (["--train.batch_size=12"], ["train.batch_size = 12", "multiple of 8", "use 8 or 16"]),
        (["--train.seq_len=65"], ["train.seq_len = 65", "model.max_seq_len = 64"]),
        (["--train.profile_steps=58:61"], ["train.profile_steps = 58:61", "train.steps = 60"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_config_is_one_line(
    overrides: list[str], parts: list[str], here: Here, tmp_path: Path
) -> None:
    line = complaint(here(tmp_path / "run", *overrides))
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_several_mistakes_are_all_reported(here: Here, tmp_path: Path) -> None:
    ended = here(tmp_path / "run", "--train.micro_batches=3", "--train.seq_len=65", "--sharding.tensor=3")
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for rule in (
        "tensor=3 needs a multiple of 3 devices, there are 8",
        "train.batch_size = 8 is not a multiple of 3",
        "train.seq_len = 65 is longer than model.max_seq_len = 64",
        "sharding.tensor = 3 does not divide model.vocab_size = 320; sharding.tensor may be one of [1, 2, 4, 8]",
        "sharding.tensor = 3 does not divide model.blocks.0.mlp.d_ff = 64; sharding.tensor may be one of [1, 2, 4, 8]",
    ):
        assert sum(rule in line for line in lines) == 1, ended.err
    assert len(lines) == 7


def test_debug_shows_the_traceback(here: Here, tmp_path: Path) -> None:
    ended = here(tmp_path / "run", "--train.seq_len=65", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert "train.seq_len = 65" in ended.err


# Data that does not fit


def test_a_tokenizer_larger_than_the_model(here: Here, tmp_path: Path) -> None:
    line = complaint(here(tmp_path / "run", "--model.vocab_size=256"))
    for part in ("model.vocab_size = 256", "258"):
        assert part in line
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "--observe.sample_tokens=60",
            "'s 5 tokens and observe.sample_tokens = 60 make 65, more than model",
        ),
        ("--observe.sample_prompt=\udcff", "observe.sample_prompt = '\\udcff' cannot be tokenised"),
    ],
)
def test_what_the_end_could_not_do_is_refused_at_the_beginning(
    override: str, words: str, here: Here, tmp_path: Path
) -> None:
    assert words in complaint(here(tmp_path / "run", override))
    assert contents(tmp_path / "run") == {}


def test_data_that_is_not_there(here: Here, tmp_path: Path) -> None:
    line = complaint(here(tmp_path / "run", f"--data.datasets.0.path={tmp_path / 'none'}"))
    for part in (str(tmp_path / "none"), "python -m maxlm.data prepare"):
        assert part in line


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_shard(damage: str, bench: Bench, here: Here, finished: Path, tmp_path: Path) -> None:
    data = shutil.copytree(bench.data, tmp_path / "data")
    shard = data / "train-00000.tokens"
    body = bytearray(shard.read_bytes())
    match damage:
        case "missing":
            shard.unlink()
        case "truncated":
            shard.write_bytes(body[:-2])
        case "changed":
            body[len(body) // 2] ^= 1
            shard.write_bytes(body)
    before = contents(finished)
    line = complaint(here(finished, f"--data.datasets.0.path={data}"))
    reason = {"missing": "No such file", "truncated": f"{len(body) - 2} bytes", "changed": "has changed"}[damage]
    for part in (str(shard), reason):
        assert part in line
    assert contents(finished) == before


# Run folders that do not fit


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--train.seq_len=16"], ["data", "train.seq_len", "another run_dir"]),
        (["--data.seed=7"], ["data", "data.seed", "another run_dir"]),
        (["--model.blocks.0.attention.position.theta=500"], ["position.theta", "10000.0", "500.0", "another run_dir"]),
        (["--model.d_model=64", "--allow_change=model.d_model"],
         ["params leaf", "[2, 32", "[2, 64", "another run_dir"]),
        (["--model.n_layers=4", "--allow_change", "model"], ["params leaf", "[2, ", "[4, ", "another run_dir"]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run(overrides: list[str], parts: list[str], here: Here, finished: Path) -> None:
    before = contents(finished)
    line = complaint(here(finished, *overrides))
    for part in (str(finished / "checkpoints" / str(STEPS)), *parts):
        assert part in line
    assert contents(finished) == before


def test_all_checkpoints_damaged(here: Here, finished: Path) -> None:
    for step in (40, STEPS):
        manifest = finished / "checkpoints" / str(step) / "manifest.json"
        manifest.write_text(manifest.read_text()[:-20])
    before = contents(finished)
    line = complaint(here(finished))
    for part in (str(finished / "checkpoints"), f"[40, {STEPS}]", "all damaged", "another run_dir"):
        assert part in line
    assert contents(finished) == before


def test_a_run_folder_that_cannot_be_made(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = complaint(here(tmp_path / "file" / "run"))
    for part in (str(tmp_path / "file" / "run"), "cannot be written"):
        assert part in line
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_run_folder_in_use(here: Here, finished: Path) -> None:
    before = contents(finished)
    with lock_run(finished):
        line = complaint(here(finished))
    for part in (str(finished), "in use by process", "another run_dir"):
        assert part in line
    assert contents(finished) == before


def test_a_loss_that_diverges(here: Here, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = here(
        run_dir, "--optimizer.learning_rate=1e30", "--train.max_skipped_steps=3", "--checkpoint.every=1",
        "--optimizer.schedule.warmup_steps=0",
    )  # fmt: skip
    line = complaint(ended, code=1)
    report = str(run_dir / "diverged.json")
    for part in ("not finite for 3 steps in a row", "first not finite: ", report, "optimizer.learning_rate"):
        assert part in line
    assert '"skipped_in_row": 3' in (run_dir / "diverged.json").read_text()
    kept = inspect(run_dir, "--verify")["steps"]
    assert kept
    assert {step["status"] for step in kept} == {"ok"}
