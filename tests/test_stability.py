"""What steadies a step: float16's loss scale, the rule of spikes, the gradient's noise; and the run that keeps them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_function, one_device, packed_batch, small_model, small_run
from train_runs import ROOT, free_port, rows
from xla_flags import xla_flags

from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import (
    AdamW,
    BlockConfig,
    CheckpointConfig,
    ConstantSchedule,
    Dtype,
    ExecutionConfig,
    GatedMlp,
    GroupedQuery,
    LossScale,
    NoiseScale,
    ObserveConfig,
    Remat,
    Rope,
    RunConfig,
    ShardingConfig,
    SpikeRule,
    UserError,
)
from maxlm.models import init_parameters
from maxlm.observe.devices import multiplies
from maxlm.shapes.arrays import Array, Constant, Part, Role
from maxlm.sharding import Layout, make_layout
from maxlm.training import make_trainer
from maxlm.training.loop import Recipe, Result, run
from maxlm.training.objective import Batch, BatchArray, Objective, Sums
from maxlm.training.stability import PartNorms, noise_estimates, without_window
from maxlm.training.state import TrainState

B, D, STEPS = 32, 4, 12
RULE = SpikeRule(sigmas=4.0, window=8, min_steps=5, max_in_row=3)
SIGMA = np.array([0.5, 1.0, 2.0, 3.0])


class Rows(Objective):
    """Half the squared distance of w to each row, whose gradient is w - x; a row may weigh 0."""

    def __init__(self) -> None:
        self.declared = {"w": Array("w", (D,), ("embed",), Constant(0.0), Role.OTHER, Part.MLP)}
        self.arrays = {
            "x": BatchArray((B, D), jnp.float32, ("batch", None)),
            "weight": BatchArray((B,), jnp.float32, ("batch",)),
        }

    def init(self, key: jax.Array) -> Any:
        return {"w": jnp.ones(D)}

    def loss(self, params: Any, frozen: Any, batch: Batch, counted: jax.Array) -> Sums:
        each = jnp.square(params["w"] - batch["x"]).sum(1) / 2
        return Sums(jnp.sum(batch["weight"] * each), batch["weight"].sum(), {})


def config(run_dir: Path | str = "runs/none", *, on: bool = True, steps: int = STEPS) -> RunConfig:
    """With the rule of spikes, the noise and float16's scale; `on=False`: with none of them."""
    base = small_run(steps=steps, batch_size=B, log_every=1, micro_batches=4)
    steady = {"spikes": RULE, "noise_scale": NoiseScale(measure=True, decay=0.9)} if on else {}
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **steady),
        execution=ExecutionConfig(
            dtype=Dtype.FLOAT16 if on else Dtype.FLOAT32, loss_scale=LossScale(initial=1024.0, double_every=4)
        ),
        optimizer=AdamW(learning_rate=1e-3, schedule=ConstantSchedule(), weight_decay=0.0),
        checkpoint=CheckpointConfig(every=5),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(run_dir),
    )


def points(step: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    weight = np.where(np.arange(B) % 4 == 3, rng.random(B) < 0.5, True)  # a micro-batch with fewer rows
    return {
        "x": (scale * SIGMA * rng.normal(size=(B, D))).astype(np.float32),
        "weight": weight.astype(np.float32),
    }


@functools.cache
def trainer() -> Any:
    return make_trainer(config(), one_device(), Rows())


def copied(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def bits(state: TrainState) -> list[bytes]:
    return [leaf.tobytes() for leaf in jax.tree.leaves(copied((state.parameters, state.optimizer)))]


def steps(batches: list[dict[str, np.ndarray]]) -> list[tuple[TrainState, dict[str, Any], bool]]:
    """Of each step the state after it, its figures, and whether it changed parameters and optimizer."""
    state, found = trainer().init(), []
    for batch in batches:
        before = bits(state)
        state, output = trainer().step(state, trainer().place(batch))
        found.append((copied(state), copied(output.figures), bits(state) != before))
    return found


def test_a_step_that_asks_for_nothing_has_nothing_of_it() -> None:
    plain = make_trainer(config(on=False), one_device(), Rows())
    assert jax.tree.leaves(plain.state.stability) == []
    figures = jax.eval_shape(plain.step, plain.state, plain.batch)[1].figures
    assert set(figures) == {"loss", "grad_norm", "update_norm", "learning_rate", "skipped_steps"}


# Spikes


def told_by_numpy(figures: list[tuple[float, float]]) -> list[bool]:
    """Which steps the rule accepts, in float64, from each step's loss and gradient norm."""
    kept: list[tuple[float, float]] = []
    accepted, in_row = [], 0
    for one in figures:
        window = np.array(kept[-RULE.window :])
        limits = window.mean(0) + RULE.sigmas * window.std(0, ddof=1) if len(window) >= RULE.min_steps else np.inf
        accepted.append(bool(np.all(np.array(one) <= limits)))
        in_row = 0 if accepted[-1] else in_row + 1
        kept = [*kept, one] if accepted[-1] else kept
        if in_row == RULE.max_in_row:
            kept, in_row = [], 0
    return accepted


SCALES = [9.0, *[1.0] * 5, 20.0, *[1.0] * 8, 0.01, 30.0, 30.0, *[1.0] * 3, *[25.0] * 8, 500.0, 25.0]
"""Spikes: before the rule acts; one; two; and a loss that stays, which the third takes for the new one."""


def test_spikes_are_those_of_the_rule_and_change_nothing_but_counts() -> None:
    found = steps([points(i, scale) for i, scale in enumerate(SCALES)])
    wanted = told_by_numpy([(figures["loss"], figures["grad_norm"]) for _, figures, _ in found])
    assert [changed for _, _, changed in found] == wanted
    skipped = np.cumsum(~np.array(wanted))
    assert skipped[-1] == 1 + 2 + 3 + 1 and wanted[0] and wanted[15]
    for step, (state, figures, _) in enumerate(found):
        assert int(figures["skipped_spikes"]) == int(state.skipped) == int(figures["skipped_steps"]) == skipped[step]
        assert int(state.skipped_in_row) == 0 and int(state.step) == step + 1


def test_a_step_that_is_not_finite_is_no_spike() -> None:
    bad = points(9)
    bad["x"][3, 1] = np.nan
    found = steps([*map(points, range(6)), bad, *map(points, range(6, 9))])
    assert [changed for *_, changed in found] == [True] * 6 + [False] + [True] * 3
    state, figures, _ = found[-1]
    assert int(figures["skipped_spikes"]) == 0 and int(state.skipped) == 1
    assert int(state.stability.spikes.accepted) == 9
    np.testing.assert_array_equal(
        np.sort(state.stability.spikes.losses),
        np.sort([float(figures["loss"]) for i, (_, figures, _) in enumerate(found) if i != 6][-RULE.window :]),
    )


def test_another_phase_begins_without_the_window_of_the_one_before() -> None:
    state = steps([points(i) for i in range(6)])[-1][0].stability
    emptied = without_window(state)
    assert int(state.spikes.accepted) == 6 and int(emptied.spikes.accepted) == int(emptied.spikes.in_row) == 0
    assert emptied._replace(spikes=None) == state._replace(spikes=None)
    assert int(emptied.spikes.skipped) == int(state.spikes.skipped)


# The gradient's noise


@pytest.mark.parametrize("weights", [(4, 4, 4, 4), (3, 5, 0, 8)])
def test_the_estimates_of_the_noise_are_unbiased(weights: tuple[int, ...]) -> None:
    """Gaussian gradients of tokens with a known mean and covariance, many times over."""
    rng, trials, mean = np.random.default_rng(0), 20_000, np.array([0.3, -0.2, 0.1, 0.4])
    of_parts = np.zeros((trials, len(weights), D))
    for i, n in enumerate(weights):
        if n:
            of_parts[:, i] = mean + SIGMA / np.sqrt(n) * rng.normal(size=(trials, D))
    whole = np.einsum("tpd,p->td", of_parts, np.array(weights)) / sum(weights)
    norms = lambda x: jnp.asarray(np.linalg.norm(x, axis=-1), jnp.float32)
    estimate = lambda parts, whole: noise_estimates(
        PartNorms(parts, jnp.array(weights, jnp.float32)), whole, jnp.float32(sum(weights))
    )
    squared, trace = jax.jit(jax.vmap(estimate))(norms(of_parts), norms(whole))
    for found, true in ((squared, (mean**2).sum()), (trace, (SIGMA**2).sum())):
        assert abs(np.mean(found) - true) < 4 * np.std(found) / trials**0.5, (np.mean(found), true)
        assert np.std(found) > 0


def test_the_noise_in_figures_is_that_of_the_rows() -> None:
    """Running averages of the paper's estimates, from the rows of each batch in float64."""
    batches = [points(i) for i in range(8)]
    found, w, sums, weight = steps(batches), np.ones(D), np.zeros(2), 0.0
    for batch, (state, figures, _) in zip(batches, found, strict=True):
        x, counts = np.float64(batch["x"]), batch["weight"] > 0
        gradient = lambda rows: w - x[rows & counts].mean(0)  # noqa: B023
        parts = [np.arange(B) % 4 == i for i in range(4)]
        sizes = np.array([(part & counts).sum() for part in parts])
        small = np.mean([np.square(gradient(part)).sum() for part in parts if (part & counts).any()])
        big, n = np.square(gradient(np.ones(B, bool))).sum(), counts.sum()
        trace = (small - big) / (np.mean(1 / sizes[sizes > 0]) - 1 / n)
        sums, weight = 0.9 * sums + 0.1 * np.array([big - trace / n, trace]), 0.9 * weight + 0.1
        got = [figures["gradient_squared"], figures["noise_trace"]]
        np.testing.assert_allclose(got, sums / weight, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(figures["noise_scale"], got[1] / got[0], rtol=1e-5)
        np.testing.assert_allclose(figures["noise_scale_sequences"], figures["noise_scale"] * B / n, rtol=1e-5)
        w = np.float64(state.parameters["w"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batches": 1}, "compares micro-batches, but train.micro_batches = 1; use at least 2, or False"),
        ({"stage": 2}, "a pipeline (sharding.stage = 2) does not form; use sharding.stage = 1, or False"),
    ],
)
def test_noise_needs_micro_batches(changes: dict[str, int], words: str) -> None:
    made = small_run(
        sharding=ShardingConfig(stage=changes.pop("stage", 1), data=1),
        **{"micro_batches": 2, "noise_scale": NoiseScale(measure=True), **changes},
    )
    with pytest.raises(UserError) as caught:
        made.validate(made.sharding.stage)
    assert str(caught.value).startswith("train.noise_scale.measure = True ") and words in str(caught.value)


# float16


def tiny_run(dtype: Dtype, **scale: Any) -> RunConfig:
    attention = GroupedQuery(n_heads=2, n_kv_heads=1, head_dim=8, position=Rope())
    model = small_model(
        d_model=16, n_layers=1, blocks=(BlockConfig(attention=attention, mlp=GatedMlp(d_ff=32)),), init_std=0.1
    )
    base = small_run(model, batch_size=4, seq_len=16, z_loss=1e-3)
    return dataclasses.replace(
        base,
        execution=ExecutionConfig(dtype=dtype, remat=Remat.NONE, loss_scale=LossScale(**scale)),
        optimizer=AdamW(learning_rate=1e-2, schedule=ConstantSchedule()),
    )


def test_float16_finds_its_scale_and_learns() -> None:
    """From a scale at which gradients overflow; once it has come down, the gradient is that of float32."""
    made = tiny_run(Dtype.FLOAT16, initial=2.0**24, double_every=10)
    steps_of, batch = make_trainer(made, one_device()), packed_batch(made)
    state, scales, losses, good = steps_of.init(), [], [], []
    wide = tiny_run(Dtype.FLOAT32)
    sums, gradients = jax.jit(gradient_function(wide, one_device()))(
        init_parameters(wide.model, jax.random.key(0)), batch
    )
    norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(gradients))) / float(sums.weight)
    for _ in range(40):
        before = bits(state)
        state, output = steps_of.step(state, steps_of.place(batch))
        scales.append(float(output.figures["loss_scale"]))
        good.append(bits(state) != before)
        assert good[-1] == np.isfinite(output.figures["grad_norm"])
        losses.append(float(output.figures["loss"]))
        assert int(state.skipped_in_row) == 0
        if good.count(True) == 1 and good[-1]:
            np.testing.assert_allclose(output.figures["grad_norm"], norm, rtol=5e-3)
    first = good.index(True)
    assert first > 2 and scales[:first] == [2.0 ** (23 - i) for i in range(first)]
    assert int(output.figures["overflows"]) == good.count(False) == int(state.skipped)
    expected, since = 2.0**24, 0
    for scale, ok in zip(scales, good, strict=True):
        since = since + 1 if ok else 0
        expected = expected / 2 if not ok else expected * (2 if since == 10 else 1)
        since %= 10
        assert scale == expected
    assert losses[-1] < 0.5 * losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {jnp.dtype("float32")}

    # At the least scale nothing is left to lower.
    floor = dataclasses.replace(
        state, stability=state.stability._replace(loss_scale=state.stability.loss_scale._replace(scale=jnp.float32(2)))
    )
    bad = {**batch, "loss_mask": batch["loss_mask"] * np.float32(np.nan)}
    in_row = []
    for _ in range(3):
        floor, output = steps_of.step(floor, steps_of.place(bad))
        in_row.append((float(output.figures["loss_scale"]), int(output.skipped_in_row)))
    assert in_row == [(1.0, 0), (1.0, 1), (1.0, 2)]


@pytest.mark.parametrize(
    ("kind", "can"),
    [("cpu", True), ("Tesla T4", True), ("NVIDIA H100 PCIe", True), ("TPU v5e", False), ("TPU v99", False)],
)
def test_which_devices_multiply_float16(kind: str, can: bool) -> None:
    assert multiplies(kind, Dtype.FLOAT16) == can
    assert multiplies(kind, Dtype.FLOAT32)


def test_float16_is_refused_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlm.training.step.multiplies", lambda kind, dtype: False)
    with pytest.raises(UserError, match=r"execution.dtype = float16 needs devices.* cpu does not; use bfloat16"):
        make_trainer(tiny_run(Dtype.FLOAT16), one_device())
    make_trainer(tiny_run(Dtype.FLOAT32), one_device())
    with pytest.raises(UserError, match=r"optimizer.moment_dtype = float16 .* use float32 or bfloat16"):
        AdamW(moment_dtype=Dtype.FLOAT16)
    with pytest.raises(UserError, match=r"train.spikes.min_steps = 9 is more than train.spikes.window = 8 holds"):
        SpikeRule(window=8, min_steps=9)


# A run


class Points:
    """The points of each step, with a spike and a step that is not finite among them."""

    fingerprint = "points"

    def __init__(self, layout: Layout, stop_at: int | None) -> None:
        self._layout, self._stop_at = layout, stop_at
        self.memory: dict[str, Any] = {}

    def next(self, step: int, state: TrainState) -> Batch:
        if step == self._stop_at:
            raise InterruptedError
        values = points(step, {7: np.nan, 10: 100.0}.get(step, 1.0))
        dims = {"x": ("batch", None), "weight": ("batch",)}
        place = lambda name: self._layout.sharding(self._layout.activation(*dims[name]))
        return {name: jax.device_put(value, place(name)) for name, value in values.items()}

    def close(self) -> None:
        pass


def train(made: RunConfig, stop_at: int | None = None) -> Result:
    with contextlib.suppress(InterruptedError):
        return run(made, lambda _, layout: Recipe(objective=Rows(), feed=Points(layout, stop_at)))


def test_a_run_keeps_it_and_may_begin_and_end_with_it(tmp_path: Path) -> None:
    """Killed and gone on, it has the same bits. A checkpoint without it, or with parts nobody asks for, is read."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(whole))
    last = rows(whole)[-1]
    assert (last["skipped_spikes"], last["overflows"], last["skipped_steps"]) == (1, 1, 2)
    assert last["loss_scale"] == 1024 * 2 / 2 * 2, "doubled after 4 steps, halved by the 8th, doubled by the 12th"
    train(config(broken), stop_at=8)
    train(config(broken))
    assert state_hash(broken / "checkpoints", STEPS) == state_hash(whole / "checkpoints", STEPS)
    assert rows(broken)[-1]["noise_scale"] == last["noise_scale"]

    mixed = tmp_path / "mixed"
    train(config(mixed, on=False), stop_at=7)
    assert "loss_scale" not in rows(mixed)[-1]
    train(config(mixed))
    assert rows(mixed)[-1]["loss_scale"] == 1024.0 / 2 * 2, "begun at step 5"
    train(config(mixed, on=False, steps=STEPS + 1))
    assert rows(mixed)[-1]["step"] == STEPS + 1 and "loss_scale" not in rows(mixed)[-1]


# Two processes


def work(index: int, port: str, file: str) -> None:
    """One of the two processes: of each step the state, as this process has it."""
    jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
    layout = make_layout(ShardingConfig(data=4), jax.devices())
    steps_of, state, found = make_trainer(config(), layout, Rows()), None, []
    state = steps_of.init()
    for step in range(14):
        batch = points(step)
        if step == 9:
            batch["x"][-B // 4 :] *= 100  # rows of the second process alone
        if step == 11:
            batch["x"][0, 0] = np.inf  # of the first
        state, output = steps_of.step(state, steps_of.place(batch))
        here = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), (state.parameters, state.stability))
        found.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(here)]))
        counts = (output.figures[name].addressable_data(0) for name in ("skipped_spikes", "overflows"))
        found.append(np.array([float(count) for count in counts]))
    np.savez(file, *found)


@pytest.mark.nightly
def test_both_processes_take_the_same_decision(tmp_path: Path) -> None:
    port, files = free_port(), [tmp_path / f"{index}.npz" for index in range(2)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        processes = []
        for index, file in enumerate(files):
            command = [sys.executable, __file__, str(index), str(port), str(file)]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    one, other = (np.load(file) for file in files)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert one[f"arr_{2 * 13 + 1}"].tolist() == [1.0, 1.0]


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
