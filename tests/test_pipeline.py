"""The pipeline computes what one device computes, in the number of turns that its formula says."""

from __future__ import annotations

import dataclasses
import re

import jax
import pytest
from helpers import (
    initial_parameters,
    loss_function,
    one_device,
    packed_batch,
    place,
    plainly,
    small_model,
    small_run,
    through_cache,
    with_attention,
)
from test_layouts import assert_close, loss_and_gradients

from maxlm.config import ShardingConfig, pipeline_bubble, pipeline_ticks
from maxlm.models import init_parameters
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

# 24 rows divide into 1, 2, 3, 4, 6 and 12 micro-batches on every mesh below.
BATCH = 24
MODEL = small_model(n_layers=8)

LAYOUTS: dict[str, tuple[ShardingConfig, int]] = {
    "stage2": (ShardingConfig(data=4, stage=2), 6),
    "stage4": (ShardingConfig(data=2, stage=4), 4),
    "stage8": (ShardingConfig(data=1, stage=8), 12),
    "one micro-batch": (ShardingConfig(data=2, stage=4), 1),
    "6 micro-batches on 4 stages": (ShardingConfig(data=2, stage=4), 6),
    "3 micro-batches on 4 stages": (ShardingConfig(data=2, stage=4), 3),
    "3 micro-batches on 2 stages": (ShardingConfig(data=4, stage=2), 3),
    "circular 2x2": (ShardingConfig(data=4, stage=2, virtual_stages=2), 6),
    "circular 2x4": (ShardingConfig(data=4, stage=2, virtual_stages=4), 2),
    "circular 4x2": (ShardingConfig(data=2, stage=4, virtual_stages=2), 4),
    "circular 4x2, 6 micro-batches": (ShardingConfig(data=2, stage=4, virtual_stages=2), 6),
    "fsdp": (ShardingConfig(data=1, fsdp=4, stage=2), 3),
    "tensor": (ShardingConfig(data=1, tensor=2, stage=4), 4),
    "tensor, sequence parallel": (ShardingConfig(data=2, tensor=2, stage=2, sequence_parallel=True), 2),
    "seq": (ShardingConfig(data=2, seq=2, stage=2), 2),
    "fsdp x tensor, circular": (ShardingConfig(data=1, fsdp=2, tensor=2, stage=2, virtual_stages=2), 4),
    "stages not rematerialised": (ShardingConfig(data=2, stage=4, remat_stages=False), 4),
}

QUICK = {"stage2", "3 micro-batches on 2 stages", "circular 2x2"}


@pytest.fixture(scope="module")
def reference():
    return loss_and_gradients(small_run(MODEL, z_loss=1e-3, batch_size=BATCH), one_device())


def _copies_on_jax_0_12(name):
    """Its partitioner copies the gradients whole when stages and virtual stages are both two; the numbers are right."""
    return name == "circular 2x2" and jax.__version_info__ >= (0, 12)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in LAYOUTS])
def test_pipeline_equals_one_device(name, reference, capfd):
    sharding, micro_batches = LAYOUTS[name]
    config = small_run(MODEL, sharding, z_loss=1e-3, batch_size=BATCH, micro_batches=micro_batches)
    config.validate(8)
    assert_close(loss_and_gradients(config, make_layout(sharding)), reference, 1e-5)
    warns = "Involuntary full rematerialization" in capfd.readouterr().err
    assert warns == _copies_on_jax_0_12(name)


@pytest.mark.slow
def test_a_pattern_of_blocks_and_unrolled_layers():
    two = (*with_attention(MODEL, window=5).blocks, *MODEL.blocks)
    model = dataclasses.replace(MODEL, blocks=two, scan_layers=False)
    want = loss_and_gradients(small_run(model), one_device())
    sharding = ShardingConfig(data=2, stage=2, tensor=2, virtual_stages=2)
    assert_close(loss_and_gradients(small_run(model, sharding, micro_batches=2), make_layout(sharding)), want, 1e-5)


@pytest.mark.parametrize("stages, virtual, micro_batches", [(4, 1, 4), (4, 1, 6), (2, 2, 6), (4, 2, 8)])
def test_turns_are_those_of_the_formula(stages, virtual, micro_batches):
    """The scan's length, read from the program; the bubble is what is left of it."""
    sharding = ShardingConfig(data=1, stage=stages, virtual_stages=virtual)
    config = small_run(MODEL, sharding, batch_size=BATCH, micro_batches=micro_batches)
    layout = make_layout(sharding, jax.devices()[:stages])
    loss = loss_function(config, layout)
    parameters = jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0)))
    lengths = {int(n) for n in re.findall(r"length=(\d+)", str(jax.make_jaxpr(loss)(parameters, packed_batch(config))))}
    ticks = pipeline_ticks(stages, virtual, micro_batches)
    assert ticks in lengths
    assert pipeline_bubble(stages, virtual, micro_batches) == pytest.approx(1 - virtual * micro_batches / ticks)


def test_bubble_of_gpipe():
    for stages, micro_batches in ((2, 2), (4, 4), (4, 32), (8, 64)):
        expected = (stages - 1) / (stages - 1 + micro_batches)
        assert pipeline_bubble(stages, 1, micro_batches) == pytest.approx(expected)
    assert pipeline_bubble(4, 2, 8) == pytest.approx(3 / (2 * 8 + 3))


def test_parameters_stay_on_their_stage_and_the_batch_is_shared_out():
    """What moves between stages are the items: no stage gathers layers, and none holds the whole batch."""
    sharding = ShardingConfig(data=1, stage=4)
    config = small_run(MODEL, sharding, batch_size=BATCH, micro_batches=4)
    layout = make_layout(sharding, jax.devices()[:4])
    trainer = make_trainer(config, layout)
    state = trainer.init()
    q_proj = state.parameters["blocks"]["0"]["attention"]["q_proj"]
    assert {shard.data.shape[0] for shard in q_proj.addressable_shards} == {2}
    batch = place(packed_batch(config), trainer)
    text = trainer.evaluate.lower(state.parameters, batch).compile().as_text()
    assert "collective-permute" in text and "all-to-all" not in text
    # Token ids and masks [B, T] are gathered, to put rows in the pipeline's order; nothing else is.
    assert set(re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)) <= {f"{BATCH},32"}
    rows = {int(n) for n in re.findall(r"f32\[(?:\d+,)?(\d+),32,32\]", text)}  # [..., rows, T, D]
    assert rows == {BATCH // 4}


def test_decoding_needs_another_mesh():
    sharding = ShardingConfig(data=1, stage=4)
    layout = make_layout(sharding, jax.devices()[:4])
    with pytest.raises(ValueError, match="stage = 1"):
        through_cache(MODEL, initial_parameters(MODEL), plainly(layout), [[1]] * 4)
