"""Newton-Schulz's iteration against a singular value decomposition, on one device and on many; what is a matrix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import latent_model, small_model, small_run
from jax.sharding import PartitionSpec as P

from maxlm.config import (
    ConstantSchedule,
    Dtype,
    Ema,
    Experts,
    Muon,
    ShardingConfig,
    SigmoidRouter,
    with_experts,
)
from maxlm.models import declared
from maxlm.shapes import MatrixDims, arrays, matrix_dims
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.muon import orthogonal, orthogonalised

BAND = 0.65, 1.2
"""Where singular values end: five steps do not bring them to 1, but to where the polynomial takes numbers in turn."""


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-3), (jnp.bfloat16, 0.05)])
def test_singular_values_become_about_one_and_vectors_stay(dtype, tolerance):
    """Matrices of three sizes of number, wide and tall, whose smallest singular value is a hundredth of the largest."""
    rng = np.random.default_rng(0)
    for shape in ((3, 12, 20), (3, 20, 12)):
        u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        values = np.geomspace(1, 0.01, 12) * np.array([1e-3, 1, 1e3])[:, None]
        x = u * values[:, None] @ v
        got = np.asarray(orthogonal(jnp.asarray(x, jnp.float32), 5, dtype), np.float64)
        assert got.dtype == np.float64 and got.shape == shape
        found = u.mT @ got @ v.mT
        diagonal = np.diagonal(found, axis1=1, axis2=2)
        assert (BAND[0] < diagonal).all() and (diagonal < BAND[1]).all(), diagonal
        np.testing.assert_allclose(found - diagonal[..., None] * np.eye(12), 0, atol=tolerance)


def test_a_matrix_of_zeros_stays_one():
    assert not np.asarray(orthogonal(jnp.zeros((2, 3, 4)), 5, jnp.bfloat16)).any()


def test_sharded_matrices_become_what_whole_ones_do():
    """Cut by layers, inputs and heads over eight devices; the result lies as the parameter does."""
    layout = make_layout(ShardingConfig(data=1, stage=2, fsdp=2, tensor=2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4, 3)), jnp.float32)
    muon = orthogonalised(Muon(newton_schulz_dtype=Dtype.FLOAT32), MatrixDims((0,), (1,), (2, 3)))
    update = jax.jit(lambda x: muon.update(x, optax.EmptyState())[0])
    sharding = layout.sharding(layout.parameter(("layers", "embed", "heads", "head_dim")))
    assert sharding.spec == P("stage", "fsdp", "tensor", None)
    cut = update(jax.device_put(x, sharding))
    np.testing.assert_allclose(cut, update(x), atol=1e-4)


EXPERTS = Experts(n_experts=4, d_ff=48, n_shared_experts=1, router=SigmoidRouter(top_k=2))


@pytest.mark.parametrize("model", [with_experts(small_model(), EXPERTS), latent_model()], ids=["experts", "latents"])
def test_matrices_are_those_of_hidden_layers(model):
    """By the dims that a product sums over, not by how many there are."""
    found = {array.name.split("/", 2)[-1]: (array, matrix_dims(array)) for array in arrays(model)}
    sizes = lambda name, part: [found[name][0].dims[i] for i in getattr(found[name][1], part)]
    no = {name for name, (_, dims) in found.items() if dims is None}
    assert {name for name in no if "scale" not in name} - {"mlp/router", "mlp/router_bias"} == {"embed", "unembed"}
    assert "attention/o_proj" not in no and "mlp/gate_proj" not in no
    assert (sizes("attention/o_proj", "inputs"), sizes("attention/o_proj", "outputs")) == (
        ["heads", "head_dim"],
        ["embed"],
    )
    if "mlp/router" in no:
        assert sizes("mlp/down_proj", "stack") == ["layers", "experts"]
        assert sizes("mlp/shared_experts/down_proj", "inputs") == ["mlp"]
    else:
        assert sizes("attention/k_proj", "inputs") == ["from_latent"]
        assert sizes("attention/kv_down_proj", "outputs") == ["latent"]


@pytest.mark.nightly
@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2, "expert": 2}, {"stage": 2, "fsdp": 4}], ids=str)
def test_a_step_on_a_mesh_is_that_of_one_device(axes):
    """Of the real trainer, with momentum, the average and AdamW's part; every array lies as its parameter."""
    optimizer = Muon(
        newton_schulz_dtype=Dtype.FLOAT32, learning_rate=1e-2, schedule=ConstantSchedule(), average=Ema(decay=0.5)
    )
    model = with_experts(small_model(n_layers=4), EXPERTS) if "expert" in axes else small_model(n_layers=4)
    ends = []
    for sharding in (ShardingConfig(data=1, **axes), ShardingConfig(data=1)):
        run = small_run(model, sharding, micro_batches=2 if "stage" in axes else 1)
        config = dataclasses.replace(run, optimizer=optimizer)
        devices = jax.devices() if sharding.fsdp > 1 else jax.devices()[:1]
        trainer = make_trainer(config, make_layout(sharding, devices))
        rng, state = np.random.default_rng(0), trainer.init()
        for _ in range(2):
            batch = {
                name: rng.integers(0, 64, array.shape).astype(array.dtype)
                if name in ("inputs", "targets")
                else np.ones(array.shape, array.dtype)
                if name in ("loss_mask", "segment_ids")
                else np.broadcast_to(np.arange(array.shape[1], dtype=array.dtype), array.shape)
                for name, array in trainer.batch.items()
            }
            state, _ = trainer.step(state, trainer.place(batch))
        assert jax.tree.structure(state.parameters) == jax.tree.structure(declared(model))
        ends.append(jax.device_get((state.parameters, state.optimizer)))
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)
