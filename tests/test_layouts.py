"""The same numbers on every mesh: loss and gradients of each layout against one device."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import (
    gradient_function,
    initial_parameters,
    latent_model,
    one_device,
    packed_batch,
    place,
    small_model,
    small_run,
    with_attention,
)

from maxlm.config import (
    Adafactor,
    AdamW,
    ConstantSchedule,
    Context,
    DeepNorm,
    Dtype,
    DynamicNtkScaling,
    LayerNorm,
    Learned,
    LmHead,
    OutputNorm,
    QkNorm,
    Remat,
    RmsNorm,
    Rope,
    ShardingConfig,
    UserError,
    YarnScaling,
    Zero,
)
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

LAYOUTS = {
    "data8": ShardingConfig(data=8),
    "fsdp8": ShardingConfig(data=1, fsdp=8),
    "tensor2_data4": ShardingConfig(data=4, tensor=2),
    "seq8": ShardingConfig(data=1, seq=8),
    "data4_fsdp2": ShardingConfig(data=4, fsdp=2),
    "data4_seq2": ShardingConfig(data=4, seq=2),
    "fsdp4_seq2": ShardingConfig(data=1, fsdp=4, seq=2),
    "seq4_tensor2": ShardingConfig(data=1, seq=4, tensor=2),
    "fsdp4_tensor2": ShardingConfig(data=1, fsdp=4, tensor=2),
    "fsdp4_tensor2_sp": ShardingConfig(data=1, fsdp=4, tensor=2, sequence_parallel=True),
    "data2_fsdp2_seq2": ShardingConfig(data=2, fsdp=2, seq=2),
    "fsdp2_seq2_tensor2": ShardingConfig(data=1, fsdp=2, seq=2, tensor=2),
    "fsdp2_seq2_tensor2_sp": ShardingConfig(data=1, fsdp=2, seq=2, tensor=2, sequence_parallel=True),
    "zero1": ShardingConfig(data=1, fsdp=8, zero=Zero.OPTIMIZER),
    "zero2": ShardingConfig(data=1, fsdp=8, zero=Zero.GRADIENTS),
    "zero2_tensor2": ShardingConfig(data=1, fsdp=4, tensor=2, zero=Zero.GRADIENTS),
}


def loss_and_gradients(config, layout):
    parameters = initial_parameters(config.model, seed=1)
    gradient = jax.jit(gradient_function(config, layout))
    batch = jax.device_put(packed_batch(config), layout.sharding(layout.activation("batch", "seq")))
    sums, gradients = gradient(parameters, batch)
    count = float(batch["loss_mask"].sum())
    return jax.device_get(jax.tree.map(lambda x: x / count, (sums, gradients)))


def assert_close(got, want, atol):
    for (path, g), (_, w) in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want), strict=True
    ):
        np.testing.assert_allclose(g, w, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def reference():
    return loss_and_gradients(small_run(z_loss=1e-3), one_device())


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_device(name, reference, capfd):
    config = small_run(sharding=LAYOUTS[name], z_loss=1e-3)
    got = loss_and_gradients(config, make_layout(config.sharding))
    assert_close(got, reference, 1e-5)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(got[1])) > 1e-2, "gradients too small to compare"
    # The partitioner prints this when it copies a whole array to every device to change its layout.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_tensor_alone_equals_one_device(reference):
    """On two devices, as there are two key heads."""
    config = small_run(sharding=ShardingConfig(data=1, tensor=2), z_loss=1e-3)
    assert_close(loss_and_gradients(config, make_layout(config.sharding, jax.devices()[:2])), reference, 1e-5)


@pytest.mark.parametrize("remat", list(Remat))
def test_remat_changes_nothing(remat, reference):
    config = small_run(small_model(remat=remat), z_loss=1e-3)
    assert_close(loss_and_gradients(config, one_device()), reference, 1e-5)


def test_unrolled_equals_scan(reference):
    config = small_run(small_model(scan_layers=False), z_loss=1e-3)
    assert_close(loss_and_gradients(config, one_device()), reference, 1e-5)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulation_equals_one_batch(micro_batches, reference):
    config = small_run(micro_batches=micro_batches, z_loss=1e-3)
    assert_close(loss_and_gradients(config, one_device()), reference, 1e-5)


def test_accumulation_on_a_mesh(reference):
    config = small_run(sharding=ShardingConfig(data=2, fsdp=2, tensor=2), micro_batches=2, z_loss=1e-3)
    assert_close(loss_and_gradients(config, make_layout(config.sharding)), reference, 1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_cross_devices_in_the_asked_format(wide):
    """Read from the program before the backend's own passes: the CPU's turn every bfloat16 sum into float32."""
    sharding = ShardingConfig(data=8, float32_gradients=wide)
    config = small_run(small_model(compute_dtype=Dtype.BFLOAT16), sharding=sharding)
    layout = make_layout(sharding)
    parameters = initial_parameters(config.model)
    jaxpr = str(jax.make_jaxpr(gradient_function(config, layout))(parameters, packed_batch(config)))
    # d(down_proj) = contraction of two bfloat16 arrays over rows and tokens, which is what devices sum.
    products = [line for line in jaxpr.splitlines() if "dot_general" in line and "[48,32]" in line]
    assert products and all(("f32[48,32]" in line) == wide for line in products)


@pytest.mark.parametrize("optimizer", [AdamW(schedule=ConstantSchedule()), Adafactor(min_factored_dim=8)])
@pytest.mark.parametrize("zero", list(Zero))
def test_state_is_sharded_as_zero_says(zero, optimizer):
    sharding = ShardingConfig(data=1, fsdp=8, zero=zero)
    config = dataclasses.replace(small_run(sharding=sharding), optimizer=optimizer)
    trainer = make_trainer(config, make_layout(sharding))
    share = lambda leaf: leaf.addressable_shards[0].data.size / leaf.size
    matrix_shares = lambda tree: {share(leaf) for leaf in jax.tree.leaves(tree) if leaf.size >= 64 * 32}

    def check(state):
        assert matrix_shares(state.parameters) == {1 / 8 if zero is Zero.PARAMETERS else 1}
        # Adafactor has no moment as large as a matrix, only its rows and columns.
        assert matrix_shares(state.optimizer) == ({1 / 8} if isinstance(optimizer, AdamW) else set())

    state = trainer.init()
    check(state)
    check(trainer.step(state, place(packed_batch(config), trainer))[0])


def test_initial_parameters_do_not_depend_on_the_mesh():
    values = []
    for sharding in (ShardingConfig(data=8), ShardingConfig(data=1, fsdp=4, tensor=2)):
        config = small_run(sharding=sharding)
        values.append(jax.device_get(make_trainer(config, make_layout(sharding)).init().parameters))
    jax.tree.map(np.testing.assert_array_equal, *values)


def test_pure_data_parallelism_gathers_nothing():
    config = small_run(sharding=ShardingConfig(data=8))
    trainer = make_trainer(config, make_layout(config.sharding))
    text = trainer.step.lower(trainer.state, trainer.batch).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def test_window_and_biases_on_a_mesh():
    model = with_attention(
        small_model(tie_embeddings=True), window=7, qkv_bias=True, out_bias=True, qk_norm=QkNorm.HEADS
    )
    want = loss_and_gradients(small_run(model), one_device())
    sharding = ShardingConfig(data=1, fsdp=2, seq=2, tensor=2)
    assert_close(loss_and_gradients(small_run(model, sharding), make_layout(sharding)), want, 1e-5)


CHOICES = {
    "gpt-oss": with_attention(
        small_model(),
        sinks=True,
        scale=0.5,
        position=Rope(theta=100.0, dims=4, interleaved=True, scaling=YarnScaling(factor=4.0, original_max_len=16)),
    ),
    "whole norms, stretched by length": with_attention(
        small_model(norm=LayerNorm()),
        qk_norm=QkNorm.WHOLE,
        log_length=4,
        position=Rope(theta=100.0, scaling=DynamicNtkScaling(factor=3.0, original_max_len=5)),
    ),
    "latents": latent_model(query_rank=8),
    "offset": with_attention(small_model(embedded_position=Learned(offset=2)), position=None, sinks=True),
}


@pytest.mark.parametrize(
    ("name", "context"),
    [
        pytest.param(name, one, marks=[] if name == "latents" or one is Context.RING else pytest.mark.nightly)
        for name in CHOICES
        for one in Context
    ],
)
def test_choices_of_attention_on_a_mesh(name, context):
    sharding = ShardingConfig(data=1, fsdp=2, seq=2, tensor=2, context=context)
    want = loss_and_gradients(small_run(CHOICES[name]), one_device())
    assert_close(loss_and_gradients(small_run(CHOICES[name], sharding), make_layout(sharding)), want, 1e-5)


def with_residual(model, residual):
    return dataclasses.replace(
        model, blocks=tuple(dataclasses.replace(block, residual=residual) for block in model.blocks)
    )


NORMS_AND_HEADS = {
    "gemma": with_residual(
        small_model(
            norm=RmsNorm(one_plus=True),
            embedding_scale=32**0.5,
            head=LmHead(tied=True, bias=True, scale=0.5, soft_cap=3.0),
        ),
        OutputNorm(),
    ),
    "deep": with_residual(
        small_model(norm=LayerNorm(scale=False), embedding_norm=True, head=LmHead(normalized=True, bias=True)),
        DeepNorm(),
    ),
}


@pytest.mark.parametrize("name", NORMS_AND_HEADS)
@pytest.mark.parametrize(
    "sharding",
    [
        ShardingConfig(data=1, fsdp=2, seq=2, tensor=2, sequence_parallel=True),
        ShardingConfig(data=2, tensor=2, stage=2),
    ],
    ids=["cut", "pipeline"],
)
def test_norms_residuals_and_heads_on_a_mesh(name, sharding):
    """In a pipeline too, whose first and last stage they are not part of."""
    model, micro_batches = NORMS_AND_HEADS[name], 2
    want = loss_and_gradients(small_run(model, z_loss=1e-3), one_device())
    config = small_run(model, sharding, z_loss=1e-3, micro_batches=micro_batches)
    got = loss_and_gradients(config, make_layout(sharding))
    assert_close(got, want, 1e-5)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(got[1])) > 1e-2, "gradients too small to compare"
    assert float(abs(got[1]["unembed_bias"]).max()) > 1e-3


def test_impossible_meshes_are_all_reported():
    config = small_run(sharding=ShardingConfig(data=1, fsdp=1, tensor=8), batch_size=3)
    with pytest.raises(UserError) as caught:
        config.validate(8)
    lines = str(caught.value).splitlines()
    assert any("sharding.tensor = 8 does not divide model.blocks.0.attention.n_heads = 4" in line for line in lines)
    assert any("sharding.tensor may be one of [1, 2, 4]" in line for line in lines)
    assert any("n_kv_heads = 2" in line for line in lines)


@pytest.mark.parametrize(("asked", "extra"), [("cuda", "gpu"), ("tpu", "tpu"), ("nonsense", None)])
def test_hardware_that_is_not_there_is_said_in_a_line(asked: str, extra: str | None) -> None:
    if importlib.util.find_spec("libtpu") or importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("jax is installed for more than the CPU")
    code = "from maxlm.sharding import all_devices\nall_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": asked}, capture_output=True, text=True
    )
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"maxlm.config.errors.UserError: JAX_PLATFORMS = {asked}: jax {jax.__version__} finds no")
    assert line.endswith("unset JAX_PLATFORMS, or use one that jax is installed for: cpu")
    assert (f"pip install 'maxlm[{extra}]'" in line) == (extra is not None)
