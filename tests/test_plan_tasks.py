"""Plans of tasks after pre-training: what is compiled is what the recipe runs, and what else is held is counted."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import small_model, small_run

from maxlm.config import (
    Adapter,
    BaseFormat,
    CheckpointConfig,
    ClassHead,
    Classify,
    DistillContext,
    Dtype,
    Embed,
    EmbedHead,
    ExactReward,
    ExecutionConfig,
    Grpo,
    Kto,
    Lora,
    Ppo,
    Preference,
    Reward,
    Rollouts,
    RunConfig,
    ScalarHead,
    Sft,
    ShardingConfig,
    SimPo,
    Task,
    WeightFormat,
)
from maxlm.config.cli import load_config
from maxlm.config.model import Head, LmHead
from maxlm.inference.held import held
from maxlm.inference.programs import pool_sizes
from maxlm.models import Execution, init_parameters
from maxlm.models.kv_cache import empty_cache
from maxlm.plan.analysis import CompilerReport, Forecast
from maxlm.plan.machines import Platform, parse_machine
from maxlm.plan.memory import estimate_memory
from maxlm.plan.objectives import objective_of
from maxlm.plan.rollout_time import rollout_time
from maxlm.sharding import decoding_layout, make_layout
from maxlm.training import make_trainer

LORA = Adapter(kind=Lora(rank=2))
EXACT = (ExactReward(),)
GRPO = Grpo(rewards=EXACT, rollouts=Rollouts(prompts=4, samples=2, max_new_tokens=5, slots=3))
PPO = Ppo(rewards=EXACT, rollouts=GRPO.rollouts)


def on_a_device(tree: Any) -> int:
    """Bytes of arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def config_of(task: Task, head: Head | None = None, adapter: Adapter | None = None) -> RunConfig:
    config = small_run(small_model(head=head or LmHead(), adapter=adapter), ShardingConfig(data=2, fsdp=2, tensor=2))
    return dataclasses.replace(config, task=task, checkpoint=CheckpointConfig(init_from="runs/other"))


@pytest.mark.parametrize(
    ("task", "adapter", "held"),
    [
        (Preference(), None, True),
        (Preference(loss=Kto()), None, True),
        (Preference(loss=SimPo()), None, False),
        (Preference(reference_ahead=True), None, False),
        (Preference(), LORA, False),  # the base under it
        (Preference(reference="runs/third"), LORA, True),
        (Preference(), dataclasses.replace(LORA, full=("unembed",)), True),
        (DistillContext(), None, True),
        (DistillContext(), LORA, False),
        (Sft(), None, False),
        (GRPO, None, False),
        (dataclasses.replace(GRPO, kl_weight=0.1), None, True),
        (dataclasses.replace(GRPO, kl_weight=0.1), LORA, False),
        (PPO, None, True),
    ],
    ids=[
        "dpo",
        "kto",
        "simpo",
        "ahead",
        "adapter",
        "named",
        "full parts",
        "context",
        "context under",
        "sft",
        "grpo",
        "grpo held",
        "grpo adapter",
        "ppo",
    ],
)
def test_a_reference_is_counted_where_a_step_holds_one(task: Task, adapter: Adapter | None, held: bool) -> None:
    """Against the shards of what the trainer holds."""
    config = config_of(task, adapter=adapter)
    layout = make_layout(config.sharding)
    frozen = make_trainer(config, layout, objective_of(config, layout)).state.frozen
    size = on_a_device(frozen)
    assert bool(size) is held
    found = estimate_memory(config, 8, Platform.CPU)
    assert found.reference == size and ("reference" in found.at_peak) is held
    if not isinstance(task, Grpo | Ppo):  # which hold more
        before = estimate_memory(dataclasses.replace(config, task=Sft()), 8, Platform.CPU)
        assert found.peak == before.peak + size and "reference" not in before.at_peak


@pytest.mark.parametrize("text_weight", [0.0, 1.0])
def test_the_critic_and_what_is_known_of_tokens_are_counted(text_weight: float) -> None:
    """Against the shards of what the trainer holds."""
    config = config_of(dataclasses.replace(PPO, text_weight=text_weight))
    layout = make_layout(config.sharding)
    trainer = make_trainer(config, layout, objective_of(config, layout))
    found = estimate_memory(config, 8, Platform.CPU)
    counted = found.parameters + found.optimizer + found.critic
    assert abs(on_a_device((trainer.state.parameters, trainer.state.optimizer)) - counted) < 64  # counters
    assert 0 <= on_a_device(trainer.batch) - found.batch <= 4 * config.train.batch_size  # what rows weigh
    alone = estimate_memory(dataclasses.replace(config, task=GRPO), 8, Platform.CPU)
    assert found.gradients > 1.8 * alone.gradients and found.activations >= 2 * alone.activations


@pytest.mark.parametrize("adapter", [None, dataclasses.replace(LORA, base=BaseFormat.NF4)], ids=["whole", "nf4"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "seq": 2, "stage": 2}], ids=str)
def test_the_engine_that_writes_is_counted(axes: dict[str, int], adapter: Adapter | None) -> None:
    """Against weights and cache as decoding holds them."""
    config = config_of(GRPO, adapter=adapter)
    config = dataclasses.replace(
        config, sharding=ShardingConfig(**axes), execution=ExecutionConfig(dtype=Dtype.BFLOAT16)
    )
    model, engine = config.model, GRPO.rollouts.engine(config.train.seq_len + 1)
    layout = decoding_layout(make_layout(config.sharding), model.d_model)
    how = Execution.of(config, layout).decoding(layout)
    weights = held(init_parameters(model, jax.random.key(0)), model, how, WeightFormat.DTYPE)
    blocks = pool_sizes(model, engine, how, engine.most_tokens(on_cpu=True))
    cache = jax.jit(lambda: empty_cache(model, blocks, engine.block_size, how))()
    found = estimate_memory(config, 8, Platform.CPU)
    assert found.engine == on_a_device((weights, cache))
    assert found.at_peak["engine"] == found.engine


def test_an_engine_is_beside_the_compiled_step() -> None:
    found = Forecast(config_of(GRPO), parse_machine("gpu:h200:8"))
    assert found.limit is not None
    room = found.limit - found.memory.engine
    assert found.with_compiled(CompilerReport(fits=True, peak=room, details={})).fits
    assert not found.with_compiled(CompilerReport(fits=True, peak=room + 1, details={})).fits


def test_a_rollout_of_8b_by_hand() -> None:
    """Llama 3 8B on eight H200 (989.4 TFLOP/s, 450 GB/s of links): 1,024 texts at once, 128 a device."""
    config = load_config(str(Path(__file__).parent.parent / "configs/llama3_8b_grpo.py"))
    assert isinstance(config.task, Grpo)
    target, N = parse_machine("gpu:h200:8"), 8_030_261_248 - 128_256 * 4096
    found = rollout_time(Forecast(config, target))
    assert found is not None and found.at_once == found.texts == 1024
    assert found.limited_by == "gathering"
    read, learn = found.read_seconds, found.learn_seconds
    assert found.write_seconds == pytest.approx(1024 * 2 * N * 7 / 8 / 450e9, rel=0.01)
    attention = 2 * 32 * 4096 * 1536  # 4 D T of a layer and token, of which the mask leaves half
    assert read == pytest.approx(2 * 1024 * 1536 * (2 * N + attention) / 8 / 989.4e12, rel=0.01)
    alone = dataclasses.replace(config, sharding=ShardingConfig(data=8))
    found = rollout_time(Forecast(alone, target))
    assert found is not None and found.limited_by == "memory"
    seen, of_token = 1537 - 512, 2 * 32 * 8 * 128 * 2  # keys and values in 2 bytes
    assert found.token_seconds == pytest.approx((2 * N + 128 * seen * of_token) / 4.8e12, rel=0.01)
    critic = dataclasses.replace(config, task=Ppo(rewards=EXACT, rollouts=config.task.rollouts))
    with_critic = rollout_time(Forecast(critic, target))
    assert with_critic is not None and with_critic.read_seconds == pytest.approx(1.5 * read, rel=0.03)
    assert with_critic.learn_seconds == pytest.approx(2 * learn, rel=0.06)
    assert rollout_time(Forecast(dataclasses.replace(config, task=Sft()), target)) is None


@pytest.mark.parametrize(
    ("task", "head"),
    [
        (Sft(), None),
        (DistillContext(), None),
        (Reward(), ScalarHead()),
        (Classify(), ClassHead(n_classes=3)),
        (Embed(), EmbedHead()),
        (GRPO, None),
        (dataclasses.replace(PPO, text_weight=1.0), None),
    ],
    ids=["sft", "context", "reward", "classify", "embed", "grpo", "ppo"],
)
def test_the_step_of_a_task_is_traced_without_its_data(task: Task, head: Head | None) -> None:
    config = config_of(task, head)
    layout = make_layout(config.sharding)
    trainer = make_trainer(config, layout, objective_of(config, layout))
    _, output = jax.eval_shape(trainer.step, trainer.state, trainer.batch)
    assert output.figures["loss"].shape == ()


@pytest.mark.parametrize("name", ["sft", "context", "dpo", "kto", "reward", "classify", "embed"])
def test_presets_are_planned(name: str) -> None:
    config = importlib.import_module(f"configs.{name}_tiny").get_config()
    found = estimate_memory(config, 1, Platform.CPU)
    assert found.peak > found.parameters > 0 and bool(found.reference) is (name in ("context", "dpo", "kto"))
