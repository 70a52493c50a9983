"""The rules of `RunConfig.validate` for the mesh: they refuse what cannot run, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
from helpers import gradient_function, small_model, small_run, with_attention
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from maxlm.config import (
    MESH_AXES,
    AdamW,
    Backend,
    Capacity,
    ConstantSchedule,
    Context,
    Dropless,
    ExecutionConfig,
    ExpertChoiceRouter,
    Experts,
    KernelConfig,
    NoisyTopKRouter,
    ObserveConfig,
    RunConfig,
    ShardingConfig,
    SigmoidRouter,
    TopKRouter,
    UserError,
    llama,
    with_experts,
)
from maxlm.config.layout_rules import broken_layout_rules
from maxlm.config.model import padded_vocabulary
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

EXPERTS = Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2))


def complaints(config: RunConfig, n_devices: int) -> list[str]:
    """The lines that validate has to say; none if it accepts."""
    try:
        config.validate(n_devices)
    except UserError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("model", "sharding", "train", "words"),
    [
        # rows: 2 data x 2 expert x 2 micro-batches = 8; a pipeline: 2 x lcm(4, 6) = 24
        ({"mlp": EXPERTS}, {"data": 2, "expert": 2}, {"batch_size": 12, "micro_batches": 2}, "use 8 or 16"),
        (
            {"n_layers": 4},
            {"data": 2, "stage": 4},
            {"batch_size": 30, "micro_batches": 6},
            "train.batch_size = 30 is not a multiple of 24 (sharding.data 2 x least common multiple of sharding.stage "
            "4 and train.micro_batches 6: 12); use 24 or 48",
        ),
        (
            {"n_layers": 6},
            {"data": 1, "stage": 2, "virtual_stages": 2},
            {},
            "model.n_layers = 6 has model.blocks 6 times, which is not a multiple of 4 (sharding.stage 2 x "
            "sharding.virtual_stages 2); use 4 or 8",
        ),
        ({}, {"virtual_stages": 2}, {}, "sharding.virtual_stages = 2 needs a pipeline, but sharding.stage = 1; use 1"),
        (
            {},
            {"data": 2, "expert": 2},
            {},
            "sharding.expert = 2 finds no experts in this model, and would be one more data axis; use "
            "sharding.expert = 1 and sharding.data = 4",
        ),
        (
            {"mlp": dataclasses.replace(EXPERTS, n_experts=6)},
            {"data": 2, "expert": 4},
            {},
            "sharding.expert = 4 does not divide model.blocks.0.mlp.n_experts = 6; sharding.expert may be one of [1, "
            "2]",
        ),
        (
            {"mlp": EXPERTS},
            {"data": 1, "tensor": 5},
            {},
            "sharding.tensor = 5 does not divide model.blocks.0.mlp.d_ff = 48; sharding.tensor may be one of [1]",
        ),
        (
            {},
            {"data": 1, "seq": 4, "context": Context.RING},
            {"seq_len": 36},
            "train.seq_len = 36 is not a multiple of 8 (pieces for sharding.context = ring: 2 x sharding.seq 4); "
            "use 32 or 40",
        ),
        (
            {"kernels": KernelConfig(attention=Backend.CUDNN)},
            {"data": 1, "seq": 4, "context": Context.RING},
            {},
            "execution.kernels.attention = cudnn gives no logsumexp",
        ),
        (
            {},
            {"data": 1, "seq": 4, "tensor": 2, "context": Context.ULYSSES},
            {},
            "sharding.seq = 4 must divide the 2 query heads that a device of the tensor axis has of "
            "model.blocks.0.attention, and divide or be a multiple of its 1 key heads, as sharding.context = ulysses; "
            "sharding.seq may be one of [1, 2]",
        ),
        (
            {"mlp": dataclasses.replace(EXPERTS, dispatch=Capacity())},
            {"data": 1, "seq": 2},
            {},
            "model.blocks.0.mlp.dispatch.group_size = None makes groups of 32 tokens, which do not divide the 16 that "
            "a device has of a sequence (train.seq_len 32, sharding.seq 2); use 16",
        ),
        (
            {"mlp": dataclasses.replace(EXPERTS, dispatch=Capacity(group_size=16))},
            {"data": 1, "seq": 2, "context": Context.RING},
            {},
            "group_size = 16 makes groups of 16 tokens, which do not divide the 8 that a device has in one piece of a "
            "sequence (train.seq_len 32, sharding.seq 2); use 8",
        ),
    ],
)
def test_a_broken_rule_names_key_value_rule_and_what_works(model, sharding, train, words) -> None:
    values = {**model}
    base = small_model(**{key: value for key, value in values.items() if key != "mlp"})
    config = small_run(
        with_experts(base, values["mlp"]) if "mlp" in values else base, ShardingConfig(**sharding), **train
    )
    n_devices = math.prod(max(1, size) for axis, size in sharding.items() if axis in MESH_AXES)
    found = complaints(config, n_devices)
    assert any(words in line for line in found), found


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dataclasses.replace(EXPERTS, router=TopKRouter(top_k=5)), "top_k = 5 is more than n_experts = 4"),
        (lambda: dataclasses.replace(EXPERTS, router=ExpertChoiceRouter()), "ExpertChoiceRouter needs dispatch=Capac"),
        (lambda: dataclasses.replace(EXPERTS, n_shared_experts=-1), "n_shared_experts = -1 must be at least 0"),
        (lambda: dataclasses.replace(EXPERTS, router_z_loss=-0.1), "router_z_loss = -0.1 must be at least 0"),
        (lambda: dataclasses.replace(EXPERTS, router=TopKRouter(top_k=1)), "normalize = True with top_k = 1"),
        (lambda: dataclasses.replace(EXPERTS, router=SigmoidRouter(top_k=1)), "normalize = True with top_k = 1"),
        (lambda: NoisyTopKRouter(top_k=1), "router.top_k = 1 must be at least 2; the softmax of one score is 1"),
        (
            lambda: dataclasses.replace(EXPERTS, n_experts=1, router=TopKRouter(top_k=1, normalize=False)),
            "n_experts = 1: the one score of a TopKRouter is always 1",
        ),
        (lambda: dataclasses.replace(EXPERTS, routed_scaling=0.0), "routed_scaling = 0.0 must be positive"),
        (lambda: TopKRouter(top_k=0), "router.top_k = 0 must be positive"),
        (lambda: TopKRouter(top_k=1, load_balance=-1.0), "router.load_balance = -1.0 must be at least 0"),
        (lambda: NoisyTopKRouter(top_k=2, load_loss=-1.0), "router.load_loss = -1.0 must be at least 0"),
        (lambda: SigmoidRouter(top_k=1, bias_rate=-1.0), "router.bias_rate = -1.0 must be at least 0"),
        (lambda: Dropless(buffer=0.5), "dispatch.buffer = 0.5 must be at least 1; None leaves room for the worst case"),
        (lambda: Capacity(factor=0.0), "dispatch.factor = 0.0 must be positive"),
        (lambda: Capacity(group_size=0), "dispatch.group_size = 0 must be positive"),
    ],
)
def test_experts_that_cannot_be(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make()


def test_a_model_that_cannot_decode_must_not_sample() -> None:
    experts = Experts(n_experts=4, d_ff=48, router=ExpertChoiceRouter(), dispatch=Capacity(factor=2.0))
    config = small_run(with_experts(small_model(), experts))
    assert complaints(config, 1) == [
        "observe.sample_tokens = 64 needs a model that can decode, but with model.blocks[].mlp.router = "
        "ExpertChoiceRouter it looks at later tokens; use 0"
    ]
    assert not complaints(dataclasses.replace(config, observe=ObserveConfig(sample_tokens=0)), 1)


def can_run(config: RunConfig) -> bool:
    """Whether every array of a step can be cut as the layout says, and the program can be written down."""
    layout = make_layout(config.sharding, jax.devices()[: math.prod(axis_sizes(config.sharding).values())])
    train, model = config.train, config.model
    try:
        trainer = make_trainer(config, layout)
        for leaf in jax.tree.leaves((trainer.state.parameters, trainer.state.optimizer, trainer.batch)):
            leaf.sharding.shard_shape(leaf.shape)
        rows = train.batch_size // train.micro_batches
        between = "stage_batch" if layout.mesh.shape["stage"] > 1 else "batch"
        residual = layout.sharding(layout.activation(between, "residual_seq", "embed"))
        residual.shard_shape((rows, train.seq_len, model.d_model))
        loss = gradient_function(config, layout)
        jax.eval_shape(loss, trainer.state.parameters, trainer.batch)
    except Exception:
        return False
    return True


def axis_sizes(sharding: ShardingConfig) -> dict[str, int]:
    return {axis: getattr(sharding, axis) for axis in MESH_AXES}


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Up to 8 devices, and sizes of which about half fit them."""
    axes = dict.fromkeys(MESH_AXES, 1)
    for axis in draw(st.lists(st.sampled_from(MESH_AXES), min_size=1, max_size=3)):
        axes[axis] *= draw(st.sampled_from([2, 2, 3]))
    assume(math.prod(axes.values()) <= 8)
    some = lambda *sizes: draw(st.sampled_from(sizes))
    kv_heads = some(1, 2, 2, 4)
    heads = kv_heads * some(1, 2, 2)
    model = small_model(vocab_size=some(48, 64, 72), d_model=some(24, 32, 48), n_layers=some(2, 4, 6))
    model = with_attention(model, n_heads=heads, n_kv_heads=kv_heads)
    context = draw(st.sampled_from(Context))
    if axes["expert"] > 1 or draw(st.booleans()):
        group = Dropless() if context is Context.RING else draw(st.sampled_from([Dropless(), Capacity(group_size=8)]))
        experts = Experts(n_experts=some(4, 6), d_ff=some(24, 36), router=TopKRouter(top_k=2), dispatch=group)
        model = with_experts(model, experts)
    sharding = ShardingConfig(
        **axes,
        context=context,
        sequence_parallel=draw(st.booleans()),
        virtual_stages=some(1, 2) if axes["stage"] > 1 else 1,
    )
    config = small_run(
        model, sharding, batch_size=some(8, 12, 16, 24), seq_len=some(16, 24, 32, 48), micro_batches=some(1, 1, 2, 3)
    )
    return dataclasses.replace(config, optimizer=AdamW(schedule=ConstantSchedule()))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(config=runs())
def test_validate_accepts_exactly_what_can_run(config: RunConfig) -> None:
    found = complaints(config, math.prod(axis_sizes(config.sharding).values()))
    assert (not found) == can_run(config), found or "accepted"


def test_the_check_above_can_tell() -> None:
    """It finds a run that works and one that does not, each on 8 devices."""
    for sharding, works in (
        (ShardingConfig(data=2, fsdp=2, tensor=2), True),
        (ShardingConfig(data=1, tensor=8), False),
    ):
        assert can_run(small_run(small_model(), sharding)) == works == (not complaints(small_run(sharding=sharding), 8))
    assert np.prod(list(axis_sizes(ShardingConfig(data=1, tensor=8)).values())) == 8


def test_a_vocabulary_may_be_padded() -> None:
    model = llama(vocab_size=50_257, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_seq_len=64)
    sharding, sizes = ShardingConfig(data=1, tensor=4), {"batch_size": 8, "seq_len": 64, "micro_batches": 1}
    (line,) = broken_layout_rules(model, sharding, ExecutionConfig(), n_devices=4, **sizes)
    assert "sharding.tensor = 4 does not divide model.vocab_size = 50257" in line
    assert "use model.vocab_size = 50304, whose last rows no id uses" in line
    assert padded_vocabulary(50_304) == 50_304
    assert padded_vocabulary(50_257, 3) == 50_304 == 131 * 384
