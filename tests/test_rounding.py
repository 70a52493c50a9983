"""Parameters that are held in bfloat16 and rounded by chance."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import one_device, packed_batch, place, small_model, small_run

from maxlm import shapes
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import (
    AdamW,
    Adapter,
    CheckpointConfig,
    ConstantSchedule,
    Ema,
    Lora,
    ParameterFormat,
    RunConfig,
    ShardingConfig,
    UserError,
    Zero,
)
from maxlm.plan.machines import Platform
from maxlm.plan.memory import estimate_memory
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.rounding import stochastically_rounded

FORMATS = ParameterFormat.FLOAT32, ParameterFormat.BFLOAT16, ParameterFormat.BFLOAT16_NEAREST


def held_in(form: ParameterFormat, **changes: Any) -> RunConfig:
    """A run whose updates, of 1e-4, are mostly below half the distance of neighbours."""
    optimizer = AdamW(
        learning_rate=1e-4, schedule=ConstantSchedule(), weight_decay=0.0, average=Ema(), parameter_format=form
    )
    return dataclasses.replace(small_run(**changes), optimizer=optimizer)


def test_the_mean_of_many_roundings_is_the_number() -> None:
    """Each is one of both neighbours, as numpy finds them; the share of the upper one is binomial."""
    rng, n = np.random.default_rng(0), 4096
    x = (rng.normal(size=48) * np.geomspace(1e-30, 1e30, 48)).astype(np.float32)
    rounded = jax.jit(jax.vmap(stochastically_rounded, (None, 0)))(x, jax.random.split(jax.random.key(0), n))
    found = np.asarray(rounded).astype(np.float64)
    toward_zero = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    away = (toward_zero.view(np.uint32) + 0x10000).view(np.float32)
    assert ((found == toward_zero) | (found == away)).all()
    share = (x - toward_zero.astype(np.float64)) / (away.astype(np.float64) - toward_zero)
    deviation = np.sqrt(share * (1 - share) / n)
    assert (np.abs((found == away).mean(0) - share) < 4.5 * deviation + 2.0**-16).all()
    assert 0.2 < share.mean() < 0.8, "numbers between neighbours were tried"


def test_small_updates_add_up() -> None:
    """1000 updates of 1/32 of the distance of neighbours, each rounded: in the mean of 256 numbers all of them are
    there, and to the nearest none."""
    ulp, steps = 2.0**-7, 1000
    update, start = jnp.float32(ulp / 32), jnp.ones(256, jnp.bfloat16)

    def by_chance(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return stochastically_rounded(x.astype(jnp.float32) + update, key), None

    def nearest(x: jax.Array, _: jax.Array) -> tuple[jax.Array, None]:
        return (x.astype(jnp.float32) + update).astype(jnp.bfloat16), None

    keys = jax.random.split(jax.random.key(1), steps)
    moved = np.asarray(jax.lax.scan(by_chance, start, keys)[0], np.float64)
    # A step's variance is at most p (1 - p) ulp^2 with p = 1/32; sums below 1.25 stay in the binade.
    error = ulp * np.sqrt(steps * (1 / 32) * (31 / 32) / 256)
    assert abs(moved.mean() - (1 + steps * ulp / 32)) < 4.5 * error
    assert (np.asarray(jax.lax.scan(nearest, start, keys)[0], np.float64) == 1).all()


def test_what_bfloat16_has_stays() -> None:
    kept = np.array([0, -0.0, 1, -1.5, 3e38, np.inf, -np.inf, np.nan], ml_dtypes.bfloat16)
    for seed in range(3):
        found = stochastically_rounded(jnp.asarray(kept, jnp.float32), jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(found).view(np.uint16)[:-1], kept.view(np.uint16)[:-1])
        assert jnp.isnan(found[-1])


def test_the_same_numbers_go_up_on_every_mesh() -> None:
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    layout = make_layout(ShardingConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    cut = layout.sharding(jax.sharding.PartitionSpec("fsdp", "tensor"))
    rounded = jax.jit(stochastically_rounded)
    here, there = rounded(x, jax.random.key(3)), rounded(jax.device_put(x, cut), jax.random.key(3))
    np.testing.assert_array_equal(here, there)
    assert (np.asarray(here) != np.asarray(rounded(x, jax.random.key(4)))).mean() > 0.2


def test_a_run_goes_on_bit_for_bit_and_holds_what_the_plan_says(tmp_path: Path) -> None:
    config = held_in(ParameterFormat.BFLOAT16)
    trainer = make_trainer(config, one_device())
    batches = [place(packed_batch(config, seed=i), trainer) for i in range(3)]
    state = trainer.init()
    state, _ = trainer.step(state, batches[0])

    for array, w in zip(shapes.arrays(config.model), jax.tree.leaves(state.parameters), strict=True):
        in_few = "scale" not in array.name and array.name != "embed"
        assert w.dtype == (jnp.bfloat16 if in_few else jnp.float32), array.name
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state.optimizer))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)
    estimate = estimate_memory(config, 1, Platform.CPU)
    assert (size(state.parameters), size(state.optimizer)) == (estimate.parameters, estimate.optimizer)

    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.prepare()
        checkpointer.save(1, params=state.parameters, optimizer=state.optimizer, meta={})
        checkpointer.wait()
        saved = jax.device_get(state)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainer.state)
        restored = checkpointer.restore_latest(params=wanted.parameters, optimizer=lambda _: wanted.optimizer)
        assert restored is not None
        again = dataclasses.replace(state, parameters=restored.params, optimizer=restored.optimizer)
    for one in batches[1:]:
        again, _ = trainer.step(again, one)
    state = jax.device_put(saved, jax.tree.map(lambda x: x.sharding, trainer.state))
    for one in batches[1:]:
        state, _ = trainer.step(state, one)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))


@pytest.mark.nightly
def test_as_much_is_learned_by_chance_and_not_to_the_nearest() -> None:
    """40 steps of one batch: within 1 % of float32's gain; to the nearest less than half of it is left."""
    gains = []
    for form in FORMATS:
        config = held_in(form)
        trainer = make_trainer(config, one_device())
        state, batch, losses = trainer.init(), place(packed_batch(config), trainer), list[float]()
        for _ in range(40):
            state, output = trainer.step(state, batch)
            losses.append(float(output.figures["loss"]))
        gains.append(losses[0] - losses[-1])
    assert gains[0] > 0.5
    assert abs(gains[1] - gains[0]) < 0.01 * gains[0]
    assert gains[2] < 0.5 * gains[0]


@pytest.mark.nightly
def test_meshes_and_micro_batches_agree() -> None:
    """As far as gradients do, whose last bits differ and take a number over a threshold now and then."""
    found = []
    for sharding, n, parts in (
        (ShardingConfig(), 1, 1),
        (ShardingConfig(data=2, fsdp=2, tensor=2), 8, 1),
        (ShardingConfig(fsdp=4, zero=Zero.OPTIMIZER), 4, 2),
    ):
        config = held_in(ParameterFormat.BFLOAT16, sharding=sharding, micro_batches=parts)
        trainer = make_trainer(config, make_layout(sharding, jax.devices()[:n]))
        state = trainer.init()
        for i in range(2):
            state, _ = trainer.step(state, place(packed_batch(config, seed=i), trainer))
        found.append(jax.device_get(state.parameters))
    for other in found[1:]:
        for one, two in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            off = np.abs(one.astype(np.float64) - two.astype(np.float64))
            assert (off <= 2.0**-7 * np.abs(one.astype(np.float64)) + 2e-4).all()
            assert one.dtype == np.float32 or (off > 0).mean() < 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": small_model(adapter=Adapter(kind=Lora(rank=2)))}, "is for models that are trained as a whole"),
        ({"sharding": ShardingConfig(float32_gradients=True)}, "has no gradients in float32"),
        ({"sharding": ShardingConfig(data=1, stage=2)}, "would add the gradients of a pipeline's micro-batches"),
    ],
)
def test_what_has_too_few_bits_is_refused(changes: Any, words: str) -> None:
    config = dataclasses.replace(held_in(ParameterFormat.BFLOAT16), **changes)
    with pytest.raises(UserError, match=re.escape("optimizer.parameter_format = bfloat16 " + words)):
        config.validate(2)
