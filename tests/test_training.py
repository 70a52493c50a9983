"""The train step as a whole: it learns, refuses what is not finite, and weighs every token alike."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device, packed_batch, place, small_run

from maxlm.config import Adafactor, AdamW, ConstantSchedule, LinearSchedule, ShardingConfig, UserError
from maxlm.shapes import parameter_count
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.keeper import machine_facts, moved_words
from maxlm.training.objective import NextToken

WARMUP, STEPS = 4, 80


def run_config(optimizer=None, **train):
    optimizer = optimizer or AdamW(learning_rate=1e-2, schedule=LinearSchedule(warmup_steps=WARMUP))
    return dataclasses.replace(small_run(steps=STEPS, **train), optimizer=optimizer)


@functools.cache
def adamw_trainer():
    return make_trainer(run_config(), one_device())


@pytest.fixture(scope="module", params=["adamw", "adafactor"])
def setting(request):
    """A run, its trainer and a batch."""
    if request.param == "adamw":
        config, trainer = run_config(), adamw_trainer()
    else:
        schedule = LinearSchedule(warmup_steps=WARMUP)
        config = run_config(Adafactor(learning_rate=3e-2, schedule=schedule, min_factored_dim=8))
        trainer = make_trainer(config, one_device())
    return config, trainer, packed_batch(config)


@pytest.fixture
def trainer():
    return adamw_trainer()


def copied(state):
    """On the host: the step takes the state's memory."""
    return jax.tree.map(lambda x: np.array(x), state)


def on_device(state, trainer):
    return jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), state, trainer.state)


def assert_same_bits(got, want):
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), jax.tree_util.keystr(path)


def assert_skipped(after, before, metrics, *, skipped, in_row):
    assert_same_bits((after.parameters, after.optimizer), (before.parameters, before.optimizer))
    assert int(after.step) == int(before.step) + 1
    assert (int(after.skipped), int(after.skipped_in_row)) == (skipped, in_row)
    assert (int(metrics.figures["skipped_steps"]), int(metrics.skipped_in_row)) == (skipped, in_row)


def test_one_batch_is_learned_by_heart(setting):
    """Random tokens, far below what their frequencies alone allow. The slope, further down, tells a wrong gradient."""
    config, trainer, batch = setting
    state, batch = trainer.init(), place(batch, trainer)
    losses = []
    for _ in range(60):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.figures["loss"]))
    assert losses[0] > 0.9 * np.log(config.model.vocab_size)
    assert losses[-1] < 0.05, losses[::10]
    assert int(state.step) == 60 and int(metrics.figures["skipped_steps"]) == 0


def test_evaluation_is_the_loss_before_the_update(setting):
    _, trainer, batch = setting
    state, batch = trainer.init(), place(batch, trainer)
    total, tokens = trainer.evaluate(state.parameters, batch)
    _, metrics = trainer.step(state, batch)
    assert float(tokens) == float(metrics.weight) == float(batch["loss_mask"].sum())
    np.testing.assert_allclose(float(total) / float(tokens), metrics.figures["loss"], rtol=1e-6)


def test_same_state_and_batch_give_the_same_bits(setting):
    _, trainer, batch = setting
    start, results = copied(trainer.init()), []
    for _ in range(2):
        results.append(copied(trainer.step(on_device(start, trainer), place(batch, trainer))))
    assert_same_bits(*results)
    changed = [(a != b).any() for a, b in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(start), strict=True)]
    assert sum(changed) > len(changed) / 2


def poison_mask(value):
    def poison(state, batch):
        mask = batch["loss_mask"].copy()
        mask[3, 5] = value
        return state, {**batch, "loss_mask": mask}

    return poison


def poison_parameter(value):
    def poison(state, batch):
        parameters = jax.tree.map(np.copy, state.parameters)
        parameters["blocks"]["0"]["mlp"]["up_proj"][1, 3, 3] = value
        return dataclasses.replace(state, parameters=parameters), batch

    return poison


def poison_gradient_alone(state, batch):
    """Logits of about 1e15, whose loss is finite; but d(loss)/d(norm scale) is 1e25, and its square overflows."""
    parameters = jax.tree.map(np.copy, state.parameters)
    parameters["final_norm"]["scale"][:] = 1e-10
    parameters["unembed"] *= np.float32(1e25)
    return dataclasses.replace(state, parameters=parameters), batch


def poison_objective_alone(state, batch):
    """Logits of about 1e20: their log(Z)^2 overflows, while large embeddings keep every gradient below 1e12."""
    parameters = jax.tree.map(np.copy, state.parameters)
    parameters["embed"] *= np.float32(1e12)
    parameters["final_norm"]["scale"][:] = 1e10
    parameters["unembed"] *= np.float32(1e11)
    return dataclasses.replace(state, parameters=parameters), batch


POISONS = {
    "mask_inf": poison_mask(np.inf),
    "mask_nan": poison_mask(np.nan),
    "parameter_nan": poison_parameter(np.nan),
    "parameter_inf": poison_parameter(np.inf),
    "gradient_alone": poison_gradient_alone,
    "objective_alone": poison_objective_alone,
}


@pytest.mark.parametrize("name", POISONS)
def test_a_step_that_is_not_finite_changes_nothing(setting, name):
    _, trainer, batch = setting
    state, _ = trainer.step(trainer.init(), place(batch, trainer))  # moments that are not all zero
    before, bad = POISONS[name](copied(state), batch)
    after, metrics = trainer.step(on_device(before, trainer), place(bad, trainer))
    assert np.isfinite([metrics.figures["loss"], metrics.figures["z_loss"], metrics.figures["grad_norm"]]).tolist() == {
        "gradient_alone": [True, True, False],
        "objective_alone": [True, False, True],
    }.get(name, [False, False, False])
    assert_skipped(after, before, metrics, skipped=1, in_row=1)


def test_an_update_that_is_not_finite_changes_nothing(setting, monkeypatch):
    """Objective and gradient are finite, and what the optimizer makes of them is not."""
    config, _, batch = setting
    second_is_nan = lambda updates: jnp.where(updates == 1, jnp.nan, 1e-3)
    monkeypatch.setattr("maxlm.training.step.learning_rate_schedule", lambda *_: second_is_nan)
    trainer = make_trainer(config)
    state, _ = trainer.step(trainer.init(), place(batch, trainer))
    before = copied(state)
    after, metrics = trainer.step(state, place(batch, trainer))
    assert np.isfinite([metrics.figures["loss"], metrics.figures["grad_norm"]]).all()
    assert np.isnan(metrics.figures["update_norm"])
    assert_skipped(after, before, metrics, skipped=1, in_row=1)


def test_the_update_norm_is_that_of_what_was_added(setting):
    _, trainer, batch = setting
    before = copied(trainer.init())
    after, metrics = trainer.step(on_device(before, trainer), place(batch, trainer))
    added = [
        np.asarray(new, np.float64) - np.asarray(old, np.float64)
        for new, old in zip(jax.tree.leaves(after.parameters), jax.tree.leaves(before.parameters), strict=True)
    ]
    norm = np.sqrt(sum((leaf**2).sum() for leaf in added))
    np.testing.assert_allclose(metrics.figures["update_norm"], norm, rtol=1e-4)


def test_skips_are_counted_and_the_learning_rate_waits(setting):
    config, trainer, batch = setting
    good, bad = place(batch, trainer), place(poison_mask(np.nan)(None, batch)[1], trainer)
    state, rates, in_row = trainer.init(), [], []
    updates = 0
    for step, is_good in enumerate([True, False, False, True, False, True]):
        before = copied(state)
        state, metrics = trainer.step(state, good if is_good else bad)
        updates += is_good
        rates.append(float(metrics.figures["learning_rate"]))
        in_row.append(int(state.skipped_in_row))
        assert int(state.step) == step + 1 and int(state.skipped) == step + 1 - updates
        if is_good:
            assert np.isfinite(metrics.figures["loss"])
            assert (np.asarray(state.parameters["unembed"]) != before.parameters["unembed"]).any()
        else:
            assert_skipped(state, before, metrics, skipped=int(before.skipped) + 1, in_row=in_row[-1])
    assert in_row == [0, 1, 2, 0, 1, 0]
    done = np.array([0, 1, 1, 1, 2, 2])  # updates before each step
    np.testing.assert_allclose(rates, config.optimizer.learning_rate * (done + 1) / WARMUP, rtol=1e-6)


def test_a_skipped_batch_leaves_no_trace(setting):
    """Good, bad, good ends with the bits of good, good."""
    _, trainer, batch = setting
    good, bad = place(batch, trainer), place(poison_mask(np.inf)(None, batch)[1], trainer)
    ends = []
    for batches in ([good, bad, good], [good, good]):
        state = trainer.init()
        for one in batches:
            state, _ = trainer.step(state, one)
        ends.append((copied(state.parameters), copied(state.optimizer)))
    assert_same_bits(*ends)


def test_a_batch_without_tokens_divides_by_nothing(trainer):
    batch = packed_batch(run_config())
    empty = place({**batch, "loss_mask": np.zeros_like(batch["loss_mask"])}, trainer)
    state, metrics = trainer.step(trainer.init(), empty)
    assert (
        float(metrics.figures["loss"]) == 0 and float(metrics.figures["grad_norm"]) == 0 and float(metrics.weight) == 0
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(copied(state)))


def test_accumulation_weighs_tokens_and_not_micro_batches(trainer):
    """All but one token are in the second half of the batch's micro-batches."""
    config = run_config()
    batch = packed_batch(config)
    batch["loss_mask"][::2] = 0
    batch["loss_mask"][0, 4] = 1  # rows 0, 2, 4, 6 are one micro-batch of two
    accumulating = make_trainer(run_config(micro_batches=2), one_device())
    start = copied(trainer.init())

    def loss_of(mask):
        total, tokens = trainer.evaluate(start.parameters, place({**batch, "loss_mask": mask}, trainer))
        return float(total), float(tokens)

    states, metrics = zip(*(t.step(on_device(start, t), place(batch, t)) for t in (trainer, accumulating)), strict=True)
    np.testing.assert_allclose(*map(jax.tree.leaves, metrics), rtol=1e-5)
    # AdamW's second moment is the square of the gradient, so it would tell a gradient of another scale.
    for one, two in zip(jax.tree.leaves(states[0].optimizer), jax.tree.leaves(states[1].optimizer), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * float(np.abs(one).max()))
    even, odd = batch["loss_mask"].copy(), batch["loss_mask"].copy()
    even[1::2], odd[::2] = 0, 0
    (few, one), (many, others) = loss_of(even), loss_of(odd)
    assert one == 1 and others > 80
    np.testing.assert_allclose(metrics[1].figures["loss"], (few + many) / (one + others), rtol=1e-5)
    assert (
        abs(float(metrics[1].figures["loss"]) - (few / one + many / others) / 2) > 0.01
    )  # what a mean of means would give


def test_token_weights_scale_out(trainer):
    """Weights of 3 everywhere are weights of 1."""
    batch = packed_batch(run_config())
    start = copied(trainer.init())
    runs = [
        trainer.step(on_device(start, trainer), place({**batch, "loss_mask": batch["loss_mask"] * weight}, trainer))[1]
        for weight in (1, 3)
    ]
    np.testing.assert_allclose(runs[0].figures["loss"], runs[1].figures["loss"], rtol=1e-6)
    np.testing.assert_allclose(runs[0].figures["grad_norm"], runs[1].figures["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(3 * runs[0].weight, runs[1].weight)


def test_gradient_is_the_slope_of_the_loss(trainer):
    """The gradient norm that the step reports is the slope of the evaluated loss along the gradient."""
    config = run_config(AdamW(learning_rate=1e-4, schedule=ConstantSchedule(), weight_decay=0.0, clip_norm=None))
    small = make_trainer(config, one_device())
    start, batch = copied(small.init()), packed_batch(config)
    after, metrics = small.step(on_device(start, small), place(batch, small))
    # Adam's first moment after one step is (1 - b1) * gradient.
    gradient = jax.tree.map(lambda m: np.asarray(m, np.float64) / (1 - config.optimizer.b1), first_moment(after))
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.figures["grad_norm"], norm, rtol=1e-5)

    def loss(distance):
        moved = jax.tree.map(lambda p, g: jnp.asarray(p + distance * g / norm, jnp.float32), start.parameters, gradient)
        total, tokens = small.evaluate(moved, place(batch, small))
        return float(total) / float(tokens)

    np.testing.assert_allclose((loss(0.01) - loss(-0.01)) / 0.02, norm, rtol=2e-3)


def first_moment(state):
    """Adam's mu, wherever the chain keeps it."""
    found = [
        leaf for leaf in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu")
    ]
    assert len(found) == 1
    return found[0].mu


def test_a_model_that_is_not_what_was_counted_is_refused():
    config, layout = run_config(), one_device()

    class Wider(NextToken):
        def init(self, key):
            made = super().init(key)
            return {**made, "final_norm": {"scale": jnp.ones(33)}}

    with pytest.raises(UserError, match=r"final_norm/scale is declared as \(32,\) and built as \(33,\)") as caught:
        make_trainer(config, layout, Wider(config, layout))
    total = parameter_count(config.model).total
    assert f"{total:,} parameters are declared and {total + 1:,} were built" in str(caught.value)


def test_going_on_elsewhere_is_said() -> None:
    one, two = (make_layout(ShardingConfig(data=n), jax.devices()[:n]) for n in (1, 2))
    here = machine_facts(one)
    assert moved_words(None, here) is None  # of an earlier version
    assert moved_words(here, here) is None
    said = moved_words(here | {"jax": "0.1"}, machine_facts(two))
    assert said is not None and "devices 1 x cpu -> 2 x cpu, mesh one device -> data 2, jax 0.1 -> " in said
