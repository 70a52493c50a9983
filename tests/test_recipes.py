"""The loop knows no task: a linear regression with its own feed, measure and frozen teacher runs through it."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_run
from train_runs import rows, scalars

from maxlm.checkpoint.reference import read_reference
from maxlm.checkpoint.state_hash import state_hash
from maxlm.checkpoint.store import Store
from maxlm.config import AdamW, CheckpointConfig, ConstantSchedule, ObserveConfig, RunConfig, UserError
from maxlm.shapes.arrays import Array, Constant, Part, Role
from maxlm.sharding import Layout
from maxlm.training.finite import Diverged
from maxlm.training.loop import Recipe, Result, run
from maxlm.training.objective import Batch, BatchArray, Objective, Sums
from maxlm.training.state import TrainState

B, D, STEPS = 16, 4, 12
TRUE = np.arange(1, D + 1, dtype=np.float32)


class Regression(Objective):
    """Half the squared distance of x @ w + b to y, or to what a frozen regression says of x."""

    def __init__(self, layout: Layout, *, taught: bool) -> None:
        array = lambda name, shape, dims, role: Array(name, shape, dims, Constant(0.0), role, Part.MLP)
        self.declared = {"w": array("w", (D,), ("embed",), Role.PRODUCT), "b": array("b", (), (), Role.OTHER)}
        self.arrays = {
            "x": BatchArray((B, D), jnp.float32, ("batch", None)),
            "y": BatchArray((B,), jnp.float32, ("batch",)),
        }
        if taught:
            shapes = jax.eval_shape(self.init, jax.random.key(0))
            place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding())
            self.frozen = jax.tree.map(place, shapes)

    def init(self, key: jax.Array) -> Any:
        return {"w": jax.random.normal(key, (D,)), "b": jnp.zeros(())}

    def loss(self, params: Any, frozen: Any, batch: Batch, counted: jax.Array) -> Sums:
        predict = lambda w: batch["x"] @ w["w"] + w["b"]
        error = predict(params) - (batch["y"] if frozen is None else predict(frozen))
        return Sums(
            objective=jnp.sum(error**2) / 2,
            weight=jnp.float32(len(error)),
            means={"absolute_error": jnp.sum(jnp.abs(error))},
        )


class Points:
    """Random points of one plane, a function of the step; breaks the run off before one of them."""

    fingerprint = "points"

    def __init__(self, objective: Objective, layout: Layout, stop_at: int | None) -> None:
        self._objective, self._layout, self._stop_at = objective, layout, stop_at
        self.memory: dict[str, Any] = {}

    def next(self, step: int, state: TrainState) -> Batch:
        if step == self._stop_at:
            raise InterruptedError
        x = np.random.default_rng(step).normal(size=(B, D)).astype(np.float32)
        values = {"x": x, "y": x @ TRUE + 1}
        sharding = lambda name: self._layout.sharding(self._layout.activation(*self._objective.arrays[name].dims))
        return {name: jax.device_put(value, sharding(name)) for name, value in values.items()}

    def close(self) -> None:
        pass


class Distance:
    name, every = "distance", 4

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float]:
        return {"distance_l2": float(np.linalg.norm(np.asarray(state.parameters["w"]) - TRUE))}

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        return f"step {step}  distance {row['distance_l2']:.3f}"


def config(run_dir: Path, **changes: Any) -> RunConfig:
    return dataclasses.replace(
        small_run(steps=STEPS, batch_size=B, log_every=1, micro_batches=2),
        optimizer=AdamW(learning_rate=0.3, schedule=ConstantSchedule()),
        checkpoint=CheckpointConfig(every=5),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(run_dir),
        **changes,
    )


def train(run_dir: Path, *, stop_at: int | None = None, teacher: Path | None = None) -> Result:
    def recipe(config: RunConfig, layout: Layout) -> Recipe:
        objective = Regression(layout, taught=teacher is not None)
        return Recipe(
            objective=objective,
            feed=Points(objective, layout, stop_at),
            measures=(Distance(),),
            frozen=None if teacher is None else functools.partial(read_reference, str(teacher)),
            outcome=lambda step, state: (step, Distance()(step, state)["distance_l2"]),
        )

    return run(config(run_dir), recipe)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("regression") / "run"
    assert train(run_dir).step == STEPS
    return run_dir


def copy(run_dir: Path, target: Path) -> Path:
    return Path(shutil.copytree(run_dir, target))


def test_it_learns_and_is_measured(finished: Path) -> None:
    metrics = rows(finished)
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 2
    assert [row["step"] for row in rows(finished, "distances")] == [4, 8, STEPS]
    assert (finished / "report.html").exists()
    assert not (finished / "tokenizer").exists()


def test_the_loss_and_its_micro_batches_are_those_of_numpy(finished: Path, tmp_path: Path) -> None:
    """The first row, from the initial parameters and all points of the batch."""
    start = jax.device_get(Regression.init(None, jax.random.key(0)))  # type: ignore[arg-type]
    x = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32).astype(np.float64)
    error = x @ start["w"] - (x @ TRUE + 1)
    first = rows(finished)[0]
    np.testing.assert_allclose(first["loss"], (error**2).mean() / 2, rtol=1e-5)
    np.testing.assert_allclose(first["absolute_error"], np.abs(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(first["grad_norm"], np.linalg.norm([*(x.T @ error / B), error.mean()]), rtol=1e-5)


def test_an_entry_in_means_is_logged_everywhere(finished: Path) -> None:
    """`absolute_error` is named in `Regression.loss` and nowhere else."""
    metrics = rows(finished)
    assert list(metrics[0])[-1] == "absolute_error"
    shown = {step: value for tag, step, value in scalars(finished / "tensorboard") if tag == "train/absolute_error"}
    assert shown == {row["step"]: pytest.approx(row["absolute_error"]) for row in metrics}
    assert {tag for tag, _, _ in scalars(finished / "tensorboard") if tag.startswith("distance")} == {"distance/l2"}


def untimed(run_dir: Path, name: str) -> list[dict[str, Any]]:
    timed = {"time", "tokens_per_s", "step_time_s", "memory_bytes"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(run_dir, name)]


def test_a_run_that_broke_off_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(InterruptedError):
        train(run_dir, stop_at=8)
    assert train(run_dir).step == STEPS
    assert state_hash(run_dir / "checkpoints", STEPS) == state_hash(finished / "checkpoints", STEPS)
    for name in ("metrics", "distances"):
        assert untimed(run_dir, name) == untimed(finished, name)


def test_the_outcome_is_that_of_the_last_state(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that had nothing left to do, and of one that was asked to stop."""
    last = rows(finished, "distances")[-1]
    assert train(copy(finished, tmp_path / "done")).run == (STEPS, last["distance_l2"])
    monkeypatch.setattr("maxlm.training.loop.Interruption.reached", lambda self, step, last: step == 4)
    stopped = train(tmp_path / "stopped")
    assert stopped.interrupted and stopped.run == (4, rows(finished, "distances")[0]["distance_l2"])


# States that are not finite


class WithUnused(Regression):
    """One parameter more, of which one value is NaN, and which no loss sees."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, taught=False)
        self.declared |= {"unused": Array("unused", (3,), (None,), Constant(0.0), Role.OTHER, Part.MLP)}

    def init(self, key: jax.Array) -> Any:
        return super().init(key) | {"unused": jnp.array([0.0, jnp.nan, 0.0])}


def train_unused(run_dir: Path) -> Result:
    def recipe(config: RunConfig, layout: Layout) -> Recipe:
        objective = WithUnused(layout)
        return Recipe(objective=objective, feed=Points(objective, layout, None))

    return run(config(run_dir), recipe)


def test_a_state_with_nan_is_neither_saved_nor_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    bad = r"parameters/unused \(1 of 3 values\)"
    with pytest.raises(Diverged, match=f"step 5: the state is not finite and was not saved: {bad}"):
        train_unused(run_dir)
    assert not (run_dir / "checkpoints").exists() or not list((run_dir / "checkpoints").iterdir())

    with monkeypatch.context() as patch:  # as if another program had written it
        patch.setattr("maxlm.training.keeper.not_finite", lambda tree: None)
        train_unused(run_dir)
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    with pytest.raises(UserError, match=f"checkpoints/{STEPS}: not finite: {bad}.*{STEPS}.set-aside"):
        train_unused(run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before


# Frozen


@pytest.fixture(scope="module")
def taught(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student that learned its parameters."""
    folder = tmp_path_factory.mktemp("taught")
    teacher = copy(finished, folder / "teacher")
    train(folder / "student", teacher=teacher)
    return teacher, folder / "student"


def parameters(run_dir: Path, step: int = STEPS) -> Any:
    path, store = (run_dir / "checkpoints" / str(step)).absolute(), Store()
    return store.numpy(path, "params", ["w", "b"])


def record(run_dir: Path, step: int = STEPS) -> Any:
    return Store().record((run_dir / "checkpoints" / str(step)).absolute())


def test_the_teacher_is_read_and_saved_as_a_reference(finished: Path, taught: tuple[Path, Path]) -> None:
    teacher, student = taught
    first = rows(student)[0]["loss"]
    assert rows(student)[-1]["loss"] < first / 2
    assert first != rows(finished)[0]["loss"]
    found = record(student)
    folder = teacher / "checkpoints"
    fingerprint = state_hash(folder, STEPS, items=("params",))
    assert found.meta["frozen"] == {"folder": str(folder), "step": STEPS, "fingerprint": fingerprint}
    assert set(found.items) == {"params", "optimizer"}
    assert not [name for name in found.items["optimizer"] if "frozen" in name]
    np.testing.assert_array_equal(parameters(teacher)["w"], parameters(finished)["w"])


def test_a_student_goes_on_with_the_same_bits(taught: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = taught
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", stop_at=8, teacher=teacher)
    train(tmp_path / "run", teacher=teacher)
    assert state_hash(tmp_path / "run" / "checkpoints", STEPS) == state_hash(student / "checkpoints", STEPS)


def test_a_teacher_that_moved_may_be_named_anew(taught: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = taught
    moved, again = copy(teacher, tmp_path / "moved"), copy(student, tmp_path / "student")
    assert train(again, teacher=moved).step == STEPS
    with pytest.raises(UserError, match=r"nowhere/checkpoints: has no finished checkpoint of step 12.*moved to"):
        train(again, teacher=tmp_path / "nowhere")


def test_another_teacher_is_refused(taught: tuple[Path, Path], tmp_path: Path) -> None:
    _, student = taught
    again = copy(student, tmp_path / "student")
    with pytest.raises(UserError, match=r"student/checkpoints/12: its parameters have fingerprint .*this run began"):
        train(again, teacher=student)


def test_a_checkpoint_of_the_teacher_is_read_by_its_step(taught: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, _ = taught
    train(tmp_path / "run", teacher=teacher / "checkpoints" / "10")
    assert record(tmp_path / "run").meta["frozen"]["step"] == 10
