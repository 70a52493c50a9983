"""What the train step adds for experts: their losses in the objective, their figures, noise, and biases."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import (
    gradient_function,
    initial_parameters,
    loss_function,
    one_device,
    packed_batch,
    place,
    small_model,
    small_run,
)

from maxlm.config import (
    AdamW,
    Capacity,
    ConstantSchedule,
    Context,
    Experts,
    NoisyTopKRouter,
    ShardingConfig,
    SigmoidRouter,
    TopKRouter,
)
from maxlm.models.moe import RouterStats
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.router_metrics import router_metrics


def moe_model(router, n_experts=4, **moe):
    """Two layers, the second with experts."""
    model = small_model()
    (dense,) = model.blocks
    experts = dataclasses.replace(dense, mlp=Experts(n_experts=n_experts, d_ff=24, router=router, **moe))
    return dataclasses.replace(model, blocks=(dense, experts))


BALANCED = TopKRouter(top_k=2, load_balance=0.3)


# Figures


def test_figures_against_numpy():
    rng = np.random.default_rng(0)
    load, dropped = rng.integers(1, 50, (3, 8)).astype(np.float32), np.array([0, 2, 5], np.float32)
    got = router_metrics((None, RouterStats(load, dropped, np.zeros(3))))
    for layer in range(3):
        p = load[layer].astype(np.float64) / load[layer].sum()
        np.testing.assert_allclose(got["moe_load_entropy"][layer], -(p * np.log(p)).sum() / np.log(8), rtol=1e-6)
        np.testing.assert_allclose(got["moe_dropped_share"][layer], dropped[layer] / load[layer].sum(), rtol=1e-6)
        np.testing.assert_allclose(
            got["moe_max_over_mean_load"][layer], load[layer].max() / load[layer].mean(), rtol=1e-6
        )


def test_figures_at_the_ends_of_their_ranges():
    loads = np.array([[5, 5, 5, 5], [20, 0, 0, 0]], np.float32)
    got = router_metrics((RouterStats(loads, np.zeros(2), np.zeros(2)),))
    np.testing.assert_allclose(got["moe_load_entropy"], [1, 0], atol=1e-6)
    np.testing.assert_allclose(got["moe_max_over_mean_load"], [1, 4])
    alone = router_metrics((RouterStats(np.full((1, 1), 7.0), np.zeros(1), np.zeros(1)),))
    assert (float(alone["moe_load_entropy"][0]), float(alone["moe_max_over_mean_load"][0])) == (1, 1)


def test_figures_are_in_the_order_of_the_layers():
    """Layers 1, 2, 4, 5 have experts; entry 1 of the pattern is layers 1 and 4."""
    entry = lambda *tops: RouterStats(np.array([[top, 10 - top] for top in tops], np.float32), np.zeros(2), np.zeros(2))
    got = router_metrics((None, entry(6, 8), entry(7, 9)))
    np.testing.assert_allclose(np.asarray(got["moe_max_over_mean_load"]) * 5, [6, 7, 8, 9])


def forward(config, layout=None, **batch):
    """The sums of a forward pass with the initial parameters."""
    layout = layout or one_device()
    parameters = initial_parameters(config.model)
    return jax.jit(loss_function(config, layout))(parameters, {**packed_batch(config), **batch})


def test_a_dense_model_has_none():
    sums = forward(small_run())
    assert not router_metrics(sums.router) and "auxiliary_loss" not in sums.means


def test_dropped_choices_are_counted():
    """Room for a quarter of the even share: at least three quarters of all choices find none."""
    figures = router_metrics(forward(small_run(moe_model(BALANCED, dispatch=Capacity(factor=0.25)))).router)
    assert figures["moe_dropped_share"].shape == (1,)
    assert 0.75 <= float(figures["moe_dropped_share"][0]) < 1


# The objective


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_objective_is_the_cross_entropy_and_the_mean_of_the_losses(micro_batches):
    config = small_run(moe_model(BALANCED), micro_batches=micro_batches)
    layout, batch = one_device(), packed_batch(config)
    batch["loss_mask"][::4] = 0  # micro-batches of few counted tokens weigh what the others do, as in a pipeline
    parameters = initial_parameters(config.model)
    loss = loss_function(config, layout)
    sums, _ = jax.jit(gradient_function(config, layout))(parameters, batch)

    def of_router(stats):
        return sum(float(entry.auxiliary.sum()) for entry in stats if entry is not None)

    expected, parts = 0.0, jax.jit(loss)
    for part in range(micro_batches):  # row r is in micro-batch r % parts
        rows = {name: values[part::micro_batches] for name, values in batch.items()}
        one = parts(parameters, rows)
        expected += of_router(one.router) / batch["loss_mask"].size * batch["loss_mask"].sum()
    np.testing.assert_allclose(sums.means["auxiliary_loss"], expected, rtol=1e-5)
    assert expected > 0.29 * batch["loss_mask"].sum()  # the loss is about 0.3 or more
    np.testing.assert_allclose(sums.objective, sums.means["loss"] + sums.means["auxiliary_loss"], rtol=1e-6)


@pytest.mark.nightly
def test_the_losses_have_a_gradient_of_their_size():
    """Without a loss mask nothing is learned; with it, the router's gradient grows with the loss's weight."""
    config = small_run(moe_model(BALANCED))
    layout, batch = one_device(), packed_batch(config)
    parameters = initial_parameters(config.model)

    @functools.cache
    def gradient(weight):
        changed = small_run(moe_model(dataclasses.replace(BALANCED, load_balance=weight)))
        return jax.jit(gradient_function(changed, layout))

    def router_gradient(weight, mask=1.0):
        masked = {**batch, "loss_mask": batch["loss_mask"] * np.float32(mask)}
        _, gradients = gradient(weight)(parameters, masked)
        return np.asarray(gradients["blocks"]["1"]["mlp"]["router"], np.float64) / batch["loss_mask"].sum()

    none, one, three = (router_gradient(weight) for weight in (0.0, 1.0, 3.0))
    np.testing.assert_allclose(three - none, 3 * (one - none), atol=1e-5)
    assert np.abs(one - none).max() > 1e-2
    assert not router_gradient(1.0, mask=0.0).any()


def test_metrics_report_it_and_evaluation_does_not():
    config = small_run(moe_model(BALANCED))
    trainer = make_trainer(config, one_device())
    state, batch = trainer.init(), place(packed_batch(config), trainer)
    total, tokens = trainer.evaluate(state.parameters, batch)
    _, metrics = trainer.step(state, batch)
    np.testing.assert_allclose(float(total) / float(tokens), metrics.figures["loss"], rtol=1e-6)
    assert 0.29 < float(metrics.figures["auxiliary_loss"]) < 1.2  # 0.3 x 1, if even, to 4, if all are on one expert


# Noise


NOISY = moe_model(NoisyTopKRouter(top_k=2))
SEEDS = np.arange(8, dtype=np.uint32) * 7919


def loads(sharding, n_devices, **seeds):
    """How often each expert was chosen."""
    layout = make_layout(sharding, jax.devices()[:n_devices])
    return np.asarray(forward(small_run(NOISY, sharding), layout, **seeds).router[1].load)


@pytest.mark.parametrize(
    "sharding",
    [
        ShardingConfig(data=2, seq=2, expert=2),
        ShardingConfig(data=1, seq=2, expert=2, fsdp=2, context=Context.RING),
    ],
)
@pytest.mark.slow
def test_noise_is_the_same_on_every_mesh(sharding):
    want = loads(ShardingConfig(), 1, seeds=SEEDS)
    assert (want != loads(ShardingConfig(), 1)).any()
    np.testing.assert_array_equal(loads(sharding, 8, seeds=SEEDS), want)


def choices(config, steps):
    """What the routers of each step chose, with a learning rate of almost nothing."""
    config = dataclasses.replace(config, optimizer=AdamW(learning_rate=1e-12, schedule=ConstantSchedule()))
    trainer = make_trainer(config, one_device())
    state, figures = trainer.init(), []
    for _ in range(steps):
        state, metrics = trainer.step(state, place(packed_batch(config), trainer))
        figures.append(float(metrics.figures["moe_load_entropy"][0]))
    return figures


@pytest.mark.slow
def test_noise_is_new_in_every_step_and_the_same_in_every_micro_batch():
    whole = choices(small_run(NOISY), steps=3)
    assert len({round(entropy, 5) for entropy in whole}) == 3
    np.testing.assert_allclose(choices(small_run(NOISY, micro_batches=4), steps=3), whole, atol=1e-6)


# Biases


def test_biases_move_after_a_good_step_and_not_after_a_bad_one():
    config = small_run(moe_model(SigmoidRouter(top_k=2, bias_rate=0.01)))
    trainer = make_trainer(config, one_device())
    batch = packed_batch(config)
    bias = lambda state: np.array(state.parameters["blocks"]["1"]["mlp"]["router_bias"])
    loss = jax.jit(loss_function(config, one_device()))

    state = trainer.init()
    load = np.asarray(loss(state.parameters, batch).router[1].load)
    state, _ = trainer.step(state, place(batch, trainer))
    np.testing.assert_allclose(bias(state), 0.01 * np.sign(load.mean(-1, keepdims=True) - load), atol=1e-7)
    assert bias(state).any()
    before = bias(state)
    bad = {**batch, "loss_mask": np.full_like(batch["loss_mask"], np.nan)}
    state, metrics = trainer.step(state, place(bad, trainer))
    assert int(metrics.figures["skipped_steps"]) == 1
    np.testing.assert_array_equal(bias(state), before)
