"""A run goes back from a spike, past the batches around it, and ends as one that never had them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_phases import points, regression, train
from test_recipes import untimed
from train_runs import rows

from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import CheckpointConfig, Phase, Rollback, RunConfig, UserError
from maxlm.training.finite import Diverged

B, STEPS = 8, 15
RULE = Rollback(margin=5.0, window=3, patience=2, before=1, skip=1, at_most=2)
SPIKE = range(8 * B, 11 * B)
"""Windows of the batches of steps 9 to 11. The first two are a spike; the third is computed before that is seen.
Step 8 - 1 is the last to go back to, so it is checkpoint 6; batches 6 to 9 are behind, and RULE.skip more."""

Read = Callable[[int, Sequence[int]], dict[str, np.ndarray]]


def poisoned(value: float = 1e3, windows: range = SPIKE, stop: Callable[[int], bool] = lambda call: False) -> Read:
    """Points, of which some have nonsense for y; breaks off at a call, counted from 1."""
    calls = [0]

    def read(step: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        calls[0] += 1
        if stop(calls[0]):
            raise InterruptedError
        batch = points(step, numbers)
        return batch | {"y": np.where(np.isin(numbers, windows), np.float32(value), batch["y"]).astype(np.float32)}

    return read


def config(run_dir: Path, rule: Rollback | None = RULE, **values: Any) -> RunConfig:
    return regression(run_dir, steps=STEPS, batch_size=B, rollback=rule, **values)


def arrays(run_dir: Path) -> str:
    return state_hash(run_dir / "checkpoints", STEPS, items=("params", "optimizer"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without the five batches from number 6 on."""
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    without = lambda step, numbers: points(step, [n + 5 * B if n >= 6 * B else n for n in numbers])
    train(config(run_dir, None), without)
    return run_dir


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("spiked") / "run"
    assert train(config(run_dir), poisoned()).step == STEPS
    return run_dir


def test_it_ends_as_a_run_that_never_had_those_batches(clean: Path, spiked: Path) -> None:
    assert arrays(spiked) == arrays(clean)
    assert untimed(spiked, "metrics") == untimed(clean, "metrics")
    (event,) = rows(spiked, "rollbacks")
    assert event == {"step": 7, "restored_step": 6, "first_step": 9, "last_step": 10, "skipped_windows": 5 * B}


def test_newer_checkpoints_are_set_aside_and_none_is_lost(spiked: Path) -> None:
    found = {path.name for path in (spiked / "checkpoints").iterdir()}
    assert "9.set-aside" in found and {"12", "15"} <= found


def test_the_hash_tells_that_windows_were_passed_over(clean: Path, spiked: Path) -> None:
    assert state_hash(clean / "checkpoints", STEPS) != state_hash(spiked / "checkpoints", STEPS)


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([11], id="in the spike", marks=pytest.mark.nightly),
        pytest.param([12], id="as it begins again", marks=pytest.mark.nightly),  # 11 calls until the spike is seen
        pytest.param([16], id="after a checkpoint"),
        pytest.param([16, 3], id="and once more", marks=pytest.mark.nightly),
    ],
)
def test_killed_before_during_or_after_it_comes_to_the_same_end(spiked: Path, tmp_path: Path, calls: list[int]) -> None:
    for at in calls:
        with pytest.raises(InterruptedError):
            train(config(tmp_path / "run"), poisoned(stop=lambda call, at=at: call == at))
    train(config(tmp_path / "run"), poisoned())
    assert state_hash(tmp_path / "run" / "checkpoints", STEPS) == state_hash(spiked / "checkpoints", STEPS)
    assert untimed(tmp_path / "run", "metrics") == untimed(spiked, "metrics")
    assert rows(tmp_path / "run", "rollbacks") == rows(spiked, "rollbacks")


@pytest.mark.nightly
def test_killed_between_the_restore_and_the_first_step(
    spiked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("maxlm.training.spikes.Spikes.go_back", killed)
        train(config(tmp_path / "run"), poisoned())
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"6", "9.set-aside"}
    train(config(tmp_path / "run"), poisoned())
    assert state_hash(tmp_path / "run" / "checkpoints", STEPS) == state_hash(spiked / "checkpoints", STEPS)


@pytest.mark.nightly
def test_a_signal_amid_the_spike_changes_nothing(spiked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint of step 7 is newer than 6, and not gone back to: nobody would have it else."""
    stopped = dataclasses.replace(config(tmp_path / "run"), checkpoint=CheckpointConfig(every=3, keep_last=4))
    for at in (7, 9):
        with monkeypatch.context() as patch:
            patch.setattr("maxlm.training.loop.Interruption.reached", lambda self, step, last, at=at: step == at)
            assert train(stopped, poisoned()).interrupted
    train(stopped, poisoned())
    assert arrays(tmp_path / "run") == arrays(spiked)


@pytest.mark.nightly
def test_steps_that_are_not_finite_are_a_spike_too(clean: Path, tmp_path: Path) -> None:
    rule = dataclasses.replace(RULE, patience=3, before=0)
    limited = config(tmp_path / "run", rule, max_skipped_steps=2)
    train(limited, poisoned(np.nan))
    assert arrays(tmp_path / "run") == arrays(clean)


@pytest.mark.nightly
def test_a_spike_that_goes_on_widens_the_hole(tmp_path: Path) -> None:
    """Batches 8 to 13: of them 11 and 12 are read after the first hole, 6 to 10, as steps 7 and 8. No checkpoint is
    older than 6, which is gone back to again, past 2 batches and one more; the next one is number 14."""
    train(config(tmp_path / "run"), poisoned(windows=range(8 * B, 14 * B)))
    (event,) = rows(tmp_path / "run", "rollbacks")
    assert event == {"step": 7, "restored_step": 6, "first_step": 7, "last_step": 8, "skipped_windows": 8 * B}
    assert max(row["loss"] for row in rows(tmp_path / "run")) < 100


def test_too_many_spikes_end_the_run(tmp_path: Path) -> None:
    everything = poisoned(windows=range(8 * B, 1000 * B))
    words = r"steps 7 to 8 had a loss more than 5 above [\d.]+, or not finite; the run has gone back from 2 spikes"
    with pytest.raises(Diverged, match=words):
        train(config(tmp_path / "run"), everything)
    assert [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]


def test_without_a_checkpoint_before_it_that_is_said(tmp_path: Path) -> None:
    rule = dataclasses.replace(RULE, window=1)
    with pytest.raises(UserError, match=r"^steps 3 to 4 had .*no intact checkpoint of step 2 .* there are \[3\]"):
        train(config(tmp_path / "run", rule), poisoned(windows=range(2 * B, 5 * B)))


@pytest.mark.nightly
def test_a_phase_begins_without_a_past(tmp_path: Path) -> None:
    """What a loss usually is changes with the data: no spike, though every later step is high."""
    phases = (Phase(start=7, batch_size=16),)
    high = poisoned(50.0, windows=range(7 * B, 1000 * B))
    assert train(config(tmp_path / "run", phases=phases), high).step == STEPS
    assert not rows(tmp_path / "run", "rollbacks")
