"""ZeRO's promise in bytes: what each device holds of parameters, gradients and optimizer state (arXiv:1910.02054)."""

from __future__ import annotations

import math

import jax
import pytest
from helpers import gradient_function, packed_batch, place, small_model, small_run

from maxlm.config import Experts, ShardingConfig, TopKRouter, Zero, with_experts
from maxlm.models import parameter_dims
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

N = 8
PARAMETERS, GRADIENTS, MOMENTS = 4, 4, 8  # bytes for each parameter: float32, float32, and Adam's two float32

# Figure 1 of the paper, where parameters and gradients are 16 bits and K = 12: bytes a parameter on each of N devices.
FIGURE_1 = {
    None: (PARAMETERS, GRADIENTS, MOMENTS),
    Zero.OPTIMIZER: (PARAMETERS, GRADIENTS, MOMENTS / N),
    Zero.GRADIENTS: (PARAMETERS, GRADIENTS / N, MOMENTS / N),
    Zero.PARAMETERS: (PARAMETERS / N, GRADIENTS / N, MOMENTS / N),
}


def on_one_device(leaf: jax.Array) -> int:
    (shard,) = [shard.data for shard in leaf.addressable_shards if shard.device == jax.devices()[0]]
    return shard.nbytes


def held(config):
    """Of each matrix its dims, its size, and the bytes that the first device holds of it, its gradient and moments."""
    layout = make_layout(config.sharding)
    trainer = make_trainer(config, layout)
    state = trainer.init()
    batch = place(packed_batch(config), trainer)
    gradient = jax.jit(gradient_function(config, layout))
    gradients = gradient(state.parameters, batch)[-1]
    adam = next(
        part for part in jax.tree.leaves(state.optimizer, is_leaf=lambda p: hasattr(p, "mu")) if hasattr(part, "mu")
    )
    names = jax.tree.leaves(parameter_dims(config.model), is_leaf=lambda leaf: isinstance(leaf, tuple))
    rows = zip(names, *map(jax.tree.leaves, (state.parameters, gradients, adam.mu, adam.nu)), strict=True)
    matrices = [
        (dims, p.size, on_one_device(p), on_one_device(g), on_one_device(m) + on_one_device(v))
        for dims, p, g, m, v in rows
        if "embed" in dims
    ]
    return matrices, trainer, state, batch


@pytest.mark.parametrize("zero", FIGURE_1)
def test_bytes_are_those_of_figure_1(zero):
    sharding = ShardingConfig(data=N) if zero is None else ShardingConfig(data=1, fsdp=N, zero=zero)
    matrices, *_ = held(small_run(sharding=sharding))
    size = sum(row[1] for row in matrices)
    assert tuple(sum(row[i] for row in matrices) / size for i in (2, 3, 4)) == FIGURE_1[zero]


def experts_model():
    return with_experts(small_model(), Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2)))


@pytest.mark.parametrize(
    ("zero", "axes", "model"),
    [
        pytest.param(Zero.GRADIENTS, {"fsdp": 4, "tensor": 2}, small_model(), id="tensor", marks=pytest.mark.nightly),
        pytest.param(
            Zero.OPTIMIZER, {"fsdp": 2, "stage": 2, "data": 2}, small_model(), id="stage", marks=pytest.mark.nightly
        ),
        pytest.param(
            Zero.PARAMETERS,
            {"fsdp": 2, "tensor": 2, "stage": 2},
            small_model(),
            id="tensor and stage",
            marks=pytest.mark.slow,
        ),
        pytest.param(Zero.PARAMETERS, {"fsdp": 4, "expert": 2}, experts_model(), id="expert", marks=pytest.mark.slow),
        pytest.param(Zero.PARAMETERS, {"fsdp": 2, "seq": 4}, small_model(), id="seq", marks=pytest.mark.slow),
    ],
)
def test_other_axes_divide_what_zero_leaves(zero, axes, model):
    """Of each matrix: by fsdp as ZeRO says, and by tensor, stage and expert if it has heads or d_ff or the vocabulary,
    layers, and experts; data and seq divide nothing."""
    sharding = ShardingConfig(**{"data": 1, **axes}, zero=zero)
    matrices, *_ = held(small_run(model, sharding, micro_batches=2 if sharding.stage > 1 else 1))
    for dims, size, *got in matrices:
        others = 1
        if {"heads", "kv_heads", "mlp", "vocab"} & set(dims):
            others *= sharding.tensor
        others *= sharding.stage if "layers" in dims else 1
        others *= sharding.expert if "experts" in dims else 1
        want = [
            PARAMETERS / (sharding.fsdp if zero is Zero.PARAMETERS else 1),
            GRADIENTS / (sharding.fsdp if zero is not Zero.OPTIMIZER else 1),
            MOMENTS / sharding.fsdp,
        ]
        assert got == [size * each / others for each in want], dims


@pytest.mark.parametrize("zero", [pytest.param(Zero.OPTIMIZER, marks=pytest.mark.slow), Zero.PARAMETERS])
def test_the_compiled_step_takes_those_bytes(zero):
    config = small_run(sharding=ShardingConfig(data=1, fsdp=4, tensor=2, zero=zero))
    matrices, trainer, state, batch = held(config)
    compiled = trainer.step.lower(trainer.state, trainer.batch).compile()
    everything = sum(map(on_one_device, jax.tree.leaves((state, batch))))
    assert compiled.memory_analysis().argument_size_in_bytes == everything
    # All but the matrices is small: the batch, norms and counters.
    of_matrices = sum(row[2] + row[4] for row in matrices)
    assert of_matrices < everything < of_matrices + 3 * 4 * math.prod((5, 8, 32, 2))
