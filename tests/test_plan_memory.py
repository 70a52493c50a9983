"""Memory by arithmetic, against jax's own shards and traces, the ZeRO paper's bytes, and what real compilers said."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from helpers import latent_model, loss_function, one_device, small_model, small_run, with_attention

from benchmarks import plan_memory
from maxlm.config import (
    Adafactor,
    AdamW,
    Capacity,
    DeepNorm,
    Dtype,
    EightBitMoments,
    Ema,
    EngineConfig,
    Experts,
    GatedMlp,
    Lion,
    Muon,
    OutputNorm,
    Parallel,
    PostNorm,
    QkNorm,
    Remat,
    Sandwich,
    Sgd,
    ShardingConfig,
    Swish,
    TopKRouter,
    Zero,
    with_experts,
)
from maxlm.models import Execution
from maxlm.models.kv_cache import empty_cache
from maxlm.plan.machines import Platform
from maxlm.plan.memory import cache_bytes, estimate_memory
from maxlm.plan.tables import optimizer_text
from maxlm.shapes import arrays
from maxlm.sharding import make_layout
from maxlm.training import make_trainer


def experts_model():
    return with_experts(small_model(), Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2)))


def shard_bytes(tree) -> int:
    """Of the first device; counters and Adafactor's empty places, which have one number each, left out."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 1]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(),
        AdamW(moment_dtype=Dtype.BFLOAT16, average=Ema()),
        AdamW(eight_bit=EightBitMoments(block=12, min_size=300)),
        Adafactor(min_factored_dim=8),
        Adafactor(min_factored_dim=40, b1=0.9, moment_dtype=Dtype.BFLOAT16),
        Lion(moment_dtype=Dtype.BFLOAT16),
        Muon(moment_dtype=Dtype.BFLOAT16),
        Sgd(),
        Sgd(momentum=0.0, average=Ema()),
    ],
    ids=lambda one: optimizer_text(one) + "+" * (one.average is not None) + "0" * (getattr(one, "momentum", 1) == 0),
)
@pytest.mark.parametrize(
    ("axes", "zero"),
    [
        ({"data": 8}, Zero.PARAMETERS),
        ({"data": 2, "fsdp": 4}, Zero.OPTIMIZER),
        ({"data": 1, "fsdp": 4, "seq": 2}, Zero.GRADIENTS),
        ({"data": 1, "fsdp": 2, "tensor": 2, "expert": 2}, Zero.PARAMETERS),
        ({"data": 1, "fsdp": 2, "stage": 2, "tensor": 2}, Zero.PARAMETERS),
    ],
    ids=str,
)
def test_the_state_is_that_of_the_real_trainer(axes, zero, optimizer):
    sharding = ShardingConfig(**axes, zero=zero)
    run = small_run(experts_model(), sharding, micro_batches=2 if sharding.stage > 1 else 1)
    config = replace(run, optimizer=optimizer)
    trainer = make_trainer(config, make_layout(sharding))
    estimate = estimate_memory(config, 8, Platform.CPU)
    assert estimate.parameters == shard_bytes(trainer.state.parameters)
    assert estimate.optimizer == shard_bytes(trainer.state.optimizer)
    assert estimate.batch == shard_bytes(trainer.batch)


def saved_by_the_loop(config) -> int:
    """Bytes that the forward loop over the layers stacks up for the backward one, in jax's own trace."""
    layout = one_device()
    trainer, loss = make_trainer(config, layout), loss_function(config, layout)
    jaxpr = jax.make_jaxpr(jax.grad(lambda parameters, batch: loss(parameters, batch).objective))(
        trainer.state.parameters, trainer.batch
    )
    loops = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == config.model.repeats]
    forward = loops[0]
    of_a_turn = forward.params["jaxpr"].jaxpr.outvars  # what is carried leaves the loop in the shape of one turn
    pairs = zip(forward.outvars, of_a_turn, strict=True)
    stacked = [var.aval for var, turn in pairs if var.aval.shape != turn.aval.shape]
    weights = {array.shape for array in arrays(config.model)}
    return sum(
        aval.size * aval.dtype.itemsize
        for aval in stacked
        # Casts of weights and positions are the same in every micro-batch or layer: no activations.
        if aval.shape not in weights and jnp.issubdtype(aval.dtype, jnp.floating)
    )


WIDE = replace(small_model(), d_model=64, n_layers=3, compute_dtype=Dtype.BFLOAT16)
LAYERS = {
    "dense": WIDE,
    "norms of heads": with_attention(WIDE, qk_norm=QkNorm.HEADS),
    "norms of all heads": with_attention(WIDE, qk_norm=QkNorm.WHOLE),
    "latents": latent_model(WIDE),
    "latents of queries too": latent_model(WIDE, query_rank=8),
    "wide mlp": replace(WIDE, blocks=(replace(WIDE.blocks[0], mlp=GatedMlp(d_ff=256)),)),
    "experts": with_experts(WIDE, Experts(n_experts=4, d_ff=48, n_shared_experts=1, router=TopKRouter(top_k=2))),
    "capacity": with_experts(
        WIDE, Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2), dispatch=Capacity(factor=1.0))
    ),
    "clamped experts with biases": with_experts(
        WIDE, Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2, bias=True), bias=True, clamp=1.0, up_offset=1.0)
    ),
    "a learned Swish": replace(
        WIDE, blocks=(replace(WIDE.blocks[0], mlp=GatedMlp(d_ff=96, activation=Swish(), bias=True)),)
    ),
}
RESIDUALS = (PostNorm(), OutputNorm(), DeepNorm(), Sandwich(), Parallel(), Parallel(two_norms=True))
for residual in RESIDUALS:
    of_residual = replace(WIDE, blocks=(replace(WIDE.blocks[0], residual=residual),))
    LAYERS[f"{residual}"] = of_residual
    LAYERS[f"{residual} experts"] = with_experts(of_residual, Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2)))


@pytest.mark.parametrize("remat", [remat for remat in Remat if remat is not Remat.OFFLOAD])
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_backward_pass_finds_saved(name, remat):
    config = small_run(replace(LAYERS[name], remat=remat))
    want = saved_by_the_loop(config)
    got = estimate_memory(config, 1, Platform.CPU).activations
    assert got == pytest.approx(want, rel=0.1 if remat is Remat.NONE else 0.02)


def test_full_keeps_a_blocks_input_alone():
    config = small_run(replace(small_model(), remat=Remat.FULL))
    B, T, D, L = 8, 32, 32, 2
    assert estimate_memory(config, 1, Platform.CPU).activations == 4 * B * T * D * L


def test_offloaded_arrays_are_elsewhere():
    memory = {
        remat: estimate_memory(small_run(replace(small_model(), remat=remat)), 1, Platform.GPU).activations
        for remat in Remat
    }
    assert memory[Remat.OFFLOAD] == memory[Remat.FULL] < memory[Remat.NAMES] < memory[Remat.DOTS] < memory[Remat.NONE]


def test_micro_batches_keep_less_and_a_sum_more():
    whole = estimate_memory(small_run(), 1, Platform.GPU)
    parts = estimate_memory(small_run(micro_batches=4), 1, Platform.GPU)
    assert parts.activations * 4 == whole.activations
    assert parts.accumulated == whole.gradients == whole.parameters
    assert parts.gradients == 2 * whole.gradients


def test_a_pipeline_keeps_its_turns_inputs():
    """GPipe (arXiv:1811.06965, section 2.3): O(N + L / K x N / M) instead of O(N x L) for N rows in M micro-batches."""
    model = replace(small_model(), n_layers=8, remat=Remat.FULL)
    stages, parts, rows, x = 4, 8, 8, 32 * 32 * 4
    sharding = ShardingConfig(data=1, stage=stages)
    run = small_run(model, sharding, micro_batches=parts)
    turns = parts + stages - 1
    kept = estimate_memory(run, stages, Platform.GPU).activations
    assert kept == rows // parts * x * (turns + model.n_layers // stages)
    every = replace(run, sharding=replace(sharding, remat_stages=False))
    assert estimate_memory(every, stages, Platform.GPU).activations == rows // parts * x * turns * 2


@pytest.mark.parametrize("platform", Platform)
def test_adam_in_mixed_precision_takes_16_to_20_bytes_a_parameter(platform):
    """16 (arXiv:1910.02054, section 3.1) to 20 (with float32 gradients). Ours: 4 + 8 + 4, and copies for products."""
    run = small_run(LAYERS["wide mlp"])
    memory = estimate_memory(run, 1, platform)
    held = memory.parameters + memory.optimizer + memory.gradients + memory.copies
    assert 16 <= held / (memory.parameters / 4) <= 20


def test_parts_make_the_peak():
    memory = estimate_memory(small_run(), 8, Platform.TPU)
    assert sum(memory.at_peak.values()) == memory.peak
    assert set(memory.at_peak) > {"parameters", "optimizer", "batch", "activations", "gradients"}


@pytest.mark.parametrize("model", [small_model(), latent_model()], ids=["heads", "latents"])
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "seq": 2}], ids=str)
def test_cache_is_that_of_the_decoder(axes, model):
    config = small_run(model, sharding=ShardingConfig(**axes))
    how, train, model = Execution.of(config, make_layout(config.sharding)), config.train, config.model
    C, texts = EngineConfig().block_size, train.batch_size // how.layout.batch_shards
    empty = jax.jit(lambda: empty_cache(model, {0: texts * -(-model.max_seq_len // C) + 1}, C, how))
    compiled, shapes = empty.lower().compile(), jax.eval_shape(empty)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(compiled.output_shardings), strict=True)
    want = sum(math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf, sharding in pairs)
    assert cache_bytes(config, 8) == want


def test_needs_no_jax():
    code = "import sys, maxlm.plan.memory; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


REPORT = json.loads(plan_memory.RESULTS.read_text())


def test_the_document_is_what_was_measured():
    assert plan_memory.DOCUMENT.read_text() == plan_memory.markdown(REPORT)


def test_the_recorded_predictions_are_todays():
    for row in REPORT["rows"]:
        assert plan_memory.predicted(row["config"], row["target"], row["overrides"]) == row["predicted"], row


def test_predictions_come_near_the_compilers():
    errors = [abs(row["predicted"] / row["compiled"] - 1) for row in REPORT["rows"]]
    assert len(errors) >= 12
    assert max(errors) <= 0.15
