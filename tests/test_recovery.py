"""A phase that begins early is the phase that was declared for that step, whatever breaks off and wherever."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_phases import BYTE_MODEL, Numbered, Rows, make_run, points, regression, same_state
from train_runs import rows

import maxlm
from maxlm.config import (
    CheckpointConfig,
    ObserveConfig,
    Phase,
    Recovered,
    Rollback,
    Rope,
    RunConfig,
    UserError,
    serialize,
)
from maxlm.config.phases import as_begun
from maxlm.evaluate import main as evaluate
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe, Result, run
from maxlm.training.state import TrainState

WIDER = Phase(start=4, batch_size=16)
LAST = Phase(start=10, batch_size=24, micro_batches=3)
EARLY = dataclasses.replace(LAST, early=Recovered(every=2))
PHASES = WIDER, EARLY
CURVE = {4: 1.0, 6: 1.1, 8: 0.9}
"""Held-out losses after steps; the phase of step 10 begins at 8."""


class Planted:
    """A held-out loss by the number of the step. `seen` gets what is measured, and when."""

    name = "eval"
    every = 0

    def __init__(self, config: RunConfig, curve: Mapping[int, float], seen: list[tuple[int, int]]) -> None:
        self._rows, self._curve, self._seen = config.train.batch_size, curve, seen

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float]:
        assert int(jax.device_get(state.step)) == step
        self._seen.append((step, self._rows))
        return {"eval_loss": self._curve.get(step, 9.0)}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return str(row)


def train(
    config: RunConfig,
    curve: Mapping[int, float] = CURVE,
    read: Callable[[int, Sequence[int]], dict[str, np.ndarray]] = points,
) -> tuple[Result, list[tuple[int, int]]]:
    """How it ended, and the measurements."""
    seen: list[tuple[int, int]] = []

    def make(now: RunConfig, layout: Layout) -> Recipe:
        feed = Numbered(now, layout, read)
        return Recipe(objective=Rows(now, layout), feed=feed, measures=(Planted(now, curve, seen),))

    return run(config, make), seen


def starts(run_dir: Path) -> list[int]:
    """Of the phases, as config.json has them."""
    config = serialize.load(RunConfig, run_dir / "config.json")
    return [phase.start for phase in config.train.phases]


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("early") / "run"
    _, seen = train(regression(run_dir, phases=PHASES))
    # Before the phase of step 4 and then every second step, with batches of before; at the end as the run is then.
    assert seen == [(4, 8), (6, 8), (8, 8), (12, 24)]
    return run_dir


def test_it_is_the_phase_that_begins_there(early: Path, tmp_path: Path) -> None:
    declared = dataclasses.replace(LAST, start=8)
    train(regression(tmp_path / "declared", phases=(WIDER, declared)))
    names = ("step", "tokens", "loss")
    assert [[row[name] for name in names] for row in rows(early)] == [
        [row[name] for name in names] for row in rows(tmp_path / "declared")
    ]
    assert rows(early)[-1]["tokens"] == 4 * 8 + 4 * 16 + 4 * 24


def test_the_config_of_the_run_is_one_to_go_on_with(early: Path) -> None:
    """It began at the first measurement that there could be: nothing refuses that start."""
    at_once = dataclasses.replace(EARLY, start=6, early=Recovered(every=2))
    config = dataclasses.replace(serialize.load(RunConfig, early / "config.json"), run_dir=str(early))
    config.validate(8)
    dataclasses.replace(config, train=dataclasses.replace(config.train, phases=(WIDER, at_once))).validate(8)
    result, seen = train(config)
    assert result.step == 12 and not seen and starts(early) == [4, 8]


def test_without_recovery_it_begins_when_it_was_declared_to(tmp_path: Path) -> None:
    _, seen = train(regression(tmp_path / "run", phases=PHASES), {4: 1.0, 6: 1.1, 8: 1.0001})
    assert seen == [(4, 8), (6, 8), (8, 8), (12, 24)]
    assert rows(tmp_path / "run")[-1]["tokens"] == 4 * 8 + 6 * 16 + 2 * 24


def test_a_loss_may_be_higher_by_the_tolerance(tmp_path: Path) -> None:
    tolerant = dataclasses.replace(EARLY, early=Recovered(every=2, tolerance=0.1))
    _, seen = train(regression(tmp_path / "run", phases=(WIDER, tolerant)))
    assert seen == [(4, 8), (6, 8), (12, 24)]


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(4, id="before what is compared with is measured", marks=pytest.mark.nightly),
        pytest.param(5, id="before a measurement"),
        pytest.param(8, id="between the decision and its checkpoint"),
        pytest.param(11, id="in the phase that began early"),
    ],
)
def test_broken_off_anywhere_it_ends_with_the_same_bits(early: Path, tmp_path: Path, at: int) -> None:
    config = regression(tmp_path / "run", phases=PHASES)

    def stop(step: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        if step == at:
            raise InterruptedError
        return points(step, numbers)

    with pytest.raises(InterruptedError):
        train(config, read=stop)
    train(config)
    assert same_state(early, tmp_path / "run")


def test_what_is_compared_with_is_measured_in_as_many_batches_after_a_change_of_them(tmp_path: Path) -> None:
    config = regression(tmp_path / "run", phases=PHASES, eval_batches=3)
    asked: list[int | None] = []

    class Noted(Planted):
        def __init__(self, config: RunConfig, *more: Any) -> None:
            super().__init__(config, *more)
            asked.append(config.train.eval_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_recovery.Planted", Noted)
        patch.setattr("maxlm.training.loop.Interruption.reached", lambda self, step, last: step == 5)
        assert train(config)[0].interrupted
        patch.undo()
        patch.setattr("test_recovery.Planted", Noted)
        asked.clear()
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=7)))
    assert asked.count(3) == 1, "the one that looks for recovery"


@pytest.mark.parametrize("at", range(4, 12))
@pytest.mark.nightly
def test_stopped_by_a_signal_after_any_step(
    early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = regression(tmp_path / "run", phases=PHASES)
    with monkeypatch.context() as patch:
        patch.setattr("maxlm.training.loop.Interruption.reached", lambda self, step, last: step == at)
        assert train(config)[0].interrupted
    train(config)
    assert same_state(early, tmp_path / "run")


def test_a_phase_that_has_begun_early_stays_so_and_may_not_be_another(early: Path) -> None:
    config = regression(early, phases=PHASES)
    train(config)
    assert starts(early) == [4, 8]
    for other in (dataclasses.replace(EARLY, batch_size=48), dataclasses.replace(EARLY, start=7)):
        with pytest.raises(UserError, match=r"train.phases.1.\w+: .* was trained with \d+, the config says \d+"):
            train(dataclasses.replace(config, train=dataclasses.replace(config.train, phases=(WIDER, other))))


def test_gone_back_to_before_it_began_it_is_decided_anew(tmp_path: Path) -> None:
    """Batches of steps 10 and 11 are a spike; checkpoint 6 is gone back to, where the phase had not begun. What comes
    after is other data, so the loss is another: planted so that the phase waits for its declared step."""
    rule = Rollback(margin=5.0, window=1, patience=2, before=1, skip=1, at_most=2)
    behind = 4 * 8 + 4 * 16
    poison = range(behind + 24, behind + 3 * 24)
    curve = dict(CURVE)
    config = dataclasses.replace(
        regression(tmp_path / "run", steps=15, phases=PHASES, rollback=rule),
        checkpoint=CheckpointConfig(every=6, keep_last=4),
    )

    def read(step: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        batch = points(step, numbers)
        if set(numbers) & set(poison):
            curve[8] = 2.0
            return batch | {"y": batch["y"] + np.float32(1e3)}
        return batch

    _, seen = train(config, curve, read)
    assert rows(tmp_path / "run", "rollbacks")[0]["restored_step"] == 6
    assert seen == [(4, 8), (6, 8), (8, 8), (8, 8), (15, 24)]
    assert starts(tmp_path / "run") == [4, 10]
    assert rows(tmp_path / "run")[-1]["tokens"] == 4 * 8 + 6 * 16 + 5 * 24


@pytest.mark.parametrize(
    ("trained", "step", "expected"),
    [
        ((WIDER, dataclasses.replace(EARLY, start=8)), 8, [4, 8]),
        ((WIDER, dataclasses.replace(EARLY, start=8)), 7, [4, 10]),
        ((WIDER, dataclasses.replace(LAST, start=8)), 8, [4, 10]),
        ((WIDER, dataclasses.replace(EARLY, start=11)), 11, [4, 10]),
        ((WIDER,), 8, [4, 10]),
    ],
    ids=["begun", "to begin", "without early", "later", "not there"],
)
def test_starts_are_taken_from_what_has_begun(trained: tuple[Phase, ...], step: int, expected: list[int]) -> None:
    assert [phase.start for phase in as_begun(PHASES, trained, step)] == expected


@pytest.mark.slow
def test_a_context_grows_when_the_loss_of_short_windows_has_recovered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of text: measured in windows of 16 tokens, with the RoPE of then, as `maxlm.evaluate` does."""
    model = dataclasses.replace(BYTE_MODEL, n_layers=1, max_seq_len=64)
    phases = (
        Phase(start=2, seq_len=32, batch_size=16, rope=Rope(theta=5e5)),
        Phase(start=9, seq_len=64, batch_size=8, early=Recovered(every=2, tolerance=0.5)),
    )
    made = make_run(tmp_path, model=model, seq_len=16, batch_size=32, steps=6, eval_batches=None, phases=phases)
    config = dataclasses.replace(
        made,
        train=dataclasses.replace(made.train, steps=10, log_every=1),
        observe=ObserveConfig(sample_tokens=0),
        checkpoint=CheckpointConfig(every=2, keep_last=9),
        run_dir=str(tmp_path / "grown"),
    )
    result = maxlm.run(config)
    assert result.step == 10 and starts(tmp_path / "grown") == [2, 4]
    assert rows(tmp_path / "grown")[-1]["tokens"] == 10 * 512
    said = capsys.readouterr().out
    found = re.findall(r"held-out loss .*?before.*?: (\d\.\d{4})", said)
    assert "from step 4 on: train.batch_size: 16 -> 8, train.seq_len: 32 -> 64" in said and len(found) == 2, said
    for step, loss in zip((2, 4), found, strict=True):
        evaluate(["--run", str(tmp_path / "grown"), "--step", str(step), "--seq_len", "16", "--whole"])
        assert f"held-out loss {loss}" in capsys.readouterr().out
