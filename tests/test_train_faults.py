"""What kills, damage, full disks and other meshes do to a run: the same command always reaches the same end."""

from __future__ import annotations

import contextlib
import fcntl
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import STEPS, Bench, Ended, contents, final_hash, flip_byte, inspect, losses, rows

from maxlm.checkpoint.store import Store
from maxlm.data.prepare import prepare
from maxlm.data.shards import read_info

STOPPING = "stopping after this step, and saving; a second signal stops at once, without\n"
"""Told when the first signal comes."""


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.of_session(tmp_path_factory)


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """The same bits in the last state, and every row once."""
    assert final_hash(run_dir) == final_hash(reference)
    assert losses(run_dir) == losses(reference)
    for name in ("evals", "samples"):
        assert rows(run_dir, name) == rows(reference, name)


def interrupt(
    bench: Bench, run_dir: Path, number: signal.Signals, *overrides: str, devices: int = 1
) -> tuple[Ended, int]:
    """Stop a run by a signal in its midst; also the step that it stopped at."""
    with bench.start(run_dir, *overrides, devices=devices) as running:
        running.read_steps(2)
        running.send(number)
        ended = running.end()
    return ended, inspect(run_dir)["latest"]


def parameters(run_dir: Path, step: int) -> dict[str, np.ndarray[Any, Any]]:
    path, store = (run_dir / "checkpoints" / str(step)).absolute(), Store()
    with contextlib.closing(store):
        return store.numpy(path, "params", store.record(path).items["params"])


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_and_the_same_command_goes_on_bit_for_bit(
    number: signal.Signals, bench: Bench, tmp_path: Path
) -> None:
    ended, step = interrupt(bench, tmp_path / "run", number)
    assert (ended.code, ended.err) == (75, STOPPING)
    assert f"stopped by a signal after step {step}; all is saved" in ended.out
    assert 2 <= step < STEPS
    assert losses(tmp_path / "run")[-1][0] == step
    assert inspect(tmp_path / "run", "--verify")["steps"][-1]["status"] == "ok"
    assert not (tmp_path / "run" / "report.html").exists()

    ended = bench.run(tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert f"continuing after step {step} of {STEPS}" in ended.out
    assert_same_end(tmp_path / "run", bench.reference)


@pytest.mark.slow
def test_a_second_signal_kills_at_once_and_harms_nothing(bench: Bench, tmp_path: Path) -> None:
    with bench.start(tmp_path / "run") as running:
        running.read_steps(2)
        running.send(signal.SIGTERM)
        running.wait_until_default(signal.SIGTERM)  # the run waits for its full pipe, and cannot have stopped yet
        running.send(signal.SIGTERM)
        assert running.end().code == -signal.SIGTERM
    assert bench.run(tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", bench.reference)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_data_is_prepared(number: signal.Signals, bench: Bench, tmp_path: Path) -> None:
    info = read_info(bench.data)
    assert info is not None
    recipe = info.prepare
    config = tmp_path / "config.py"
    place = f"path={str(bench.data)!r}"
    text = bench.config.read_text()
    assert place in text
    prepared = f"path={str(tmp_path / 'data')!r}, prepare=c.{recipe!r}".replace("documents=", "documents=c.")
    prepared = prepared.replace("tokenizer=", "tokenizer=c.")
    config.write_text("import maxlm.config as c\n" + text.replace(place, prepared))
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".lock").open("w") as lock:  # the run waits for us in the midst of preparing
        fcntl.flock(lock, fcntl.LOCK_EX)
        with bench.start(tmp_path / "run", "--config", str(config)) as running:
            running.read_until("waiting for another process")
            running.send(number)
            ended = running.end()
    if number is signal.SIGINT:
        assert (ended.code, ended.err) == (130, "error: interrupted\n")
    else:
        assert (ended.code, ended.err) == (75, "stopped before the first step: there is nothing to save\n")
    prepare(recipe, tmp_path / "data")  # goes on
    assert contents(tmp_path / "data") == contents(bench.data)
    assert contents(tmp_path / "run") == {}


@pytest.mark.nightly
def test_ctrl_c_while_compiling(bench: Bench, tmp_path: Path) -> None:
    with bench.start(tmp_path / "run", environment={"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}) as running:
        running.read_until("compiled programs are kept in")
        running.send(signal.SIGINT)
        ended = running.end()
    # Python looks for signals between two calls of the compiler, so the loop may have begun by then.
    assert (ended.code, ended.err) in ((130, "error: interrupted\n"), (75, STOPPING))
    assert bench.run(tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", bench.reference)


# Damage


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(bench: Bench, tmp_path: Path) -> None:
    run_dir = shutil.copytree(bench.reference, tmp_path / "run")
    damaged = flip_byte(run_dir / "checkpoints" / str(STEPS))
    ended = bench.run(run_dir)
    assert ended.code == 0
    (refused,) = [line for line in ended.out.splitlines() if "refused" in line]
    assert refused.startswith(f"warning: {run_dir / 'checkpoints' / str(STEPS)}: checkpoint refused")
    assert damaged.name in refused
    assert f"continuing after step 40 of {STEPS}" in ended.out
    assert (run_dir / "checkpoints" / f"{STEPS}.set-aside").is_dir()
    assert_same_end(run_dir, bench.reference)


def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(bench: Bench, tmp_path: Path) -> None:
    run_dir = shutil.copytree(bench.reference, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    before = contents(run_dir / "checkpoints" / "40")
    limit = 30_000  # bytes a file: less than the optimizer state, more than what else is written before the end
    with bench.start(run_dir) as running:
        running.read_until("compiled the train step")
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        ended = running.end()
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    for part in (str(run_dir / "checkpoints" / str(STEPS)), "File too large", "step 40 is the last finished one"):
        assert part in line
    assert contents(run_dir / "checkpoints" / "40") == before
    assert bench.run(run_dir).code == 0
    assert_same_end(run_dir, bench.reference)


# Other devices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        pytest.param(4, ["--sharding.data=1", "--sharding.fsdp=4"], marks=pytest.mark.nightly),
        (8, ["--sharding.data=1", "--sharding.fsdp=2", "--sharding.tensor=4"]),
    ],
)
def test_another_mesh_restores_the_same_and_goes_on_alike(
    devices: int, mesh: list[str], bench: Bench, tmp_path: Path
) -> None:
    ended, step = interrupt(bench, tmp_path / "run", signal.SIGTERM, "--sharding.fsdp=8", devices=8)
    assert ended.code == 75, ended.err

    # Updates so small that they round to nothing: what is saved again is what was restored.
    still, last = shutil.copytree(tmp_path / "run", tmp_path / "still"), step + 2
    few = f"--train.steps={last}", "--observe.sample_tokens=0"
    assert bench.run(still, *mesh, *few, "--optimizer.learning_rate=1e-30", devices=devices).code == 0
    for (name, saved), again in zip(
        parameters(tmp_path / "run", step).items(), parameters(still, last).values(), strict=True
    ):
        np.testing.assert_array_equal(again, saved, err_msg=name)

    assert bench.run(tmp_path / "run", *mesh, devices=devices).code == 0
    for (at, loss), (at_reference, expected) in zip(losses(tmp_path / "run"), losses(bench.reference), strict=True):
        assert at == at_reference
        assert loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on_as_one(bench: Bench, tmp_path: Path) -> None:
    layout = "--sharding.data=2", "--sharding.fsdp=4"
    with contextlib.ExitStack() as stack:
        first, second = bench.start_two(stack, tmp_path / "two", *layout, "--sharding.slices=2")
        first.read_steps(2)
        second.send(signal.SIGTERM)
        ended = [first.end(), second.end()]
    assert [one.code for one in ended] == [75, 75], ended
    report = inspect(tmp_path / "two", "--verify")
    assert report["steps"][-1]["status"] == "ok"
    assert 2 <= report["latest"] < STEPS
    assert f"after step {report['latest']};" in ended[0].out

    with contextlib.ExitStack() as stack:
        both = bench.start_two(stack, tmp_path / "two", *layout, "--sharding.slices=2")
        ended = [running.end() for running in both]
    assert [one.code for one in ended] == [0, 0], ended
    for (at, loss), (at_one, expected) in zip(losses(tmp_path / "two"), losses(bench.reference), strict=True):
        assert at == at_one
        assert loss == pytest.approx(expected, abs=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in bench.reference.iterdir()}
    assert inspect(tmp_path / "two", "--verify")["steps"][-1]["status"] == "ok"
