"""Plans of tasks after pre-training: what is compiled is what the recipe runs, and a reference is counted."""

from __future__ import annotations

import dataclasses
import importlib
import math

import jax
import pytest
from helpers import small_model, small_run

from maxlm.config import (
    Adapter,
    CheckpointConfig,
    ClassHead,
    Classify,
    DistillContext,
    Embed,
    EmbedHead,
    Kto,
    Lora,
    Preference,
    Reward,
    RunConfig,
    ScalarHead,
    Sft,
    ShardingConfig,
    SimPo,
    Task,
)
from maxlm.config.model import Head, LmHead
from maxlm.plan.machines import Platform
from maxlm.plan.memory import estimate_memory
from maxlm.plan.objectives import objective_of
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

LORA = Adapter(kind=Lora(rank=2))


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
    ],
    ids=["dpo", "kto", "simpo", "ahead", "adapter", "named", "full parts", "context", "context under", "sft"],
)
def test_a_reference_is_counted_where_a_step_holds_one(task: Task, adapter: Adapter | None, held: bool) -> None:
    """Against the shards of what the trainer holds."""
    config = config_of(task, adapter=adapter)
    layout = make_layout(config.sharding)
    frozen = make_trainer(config, layout, objective_of(config, layout)).state.frozen
    sizes = [4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(frozen)]
    assert bool(sizes) is held
    found = estimate_memory(config, 8, Platform.CPU)
    before = estimate_memory(dataclasses.replace(config, task=Sft()), 8, Platform.CPU)
    assert found.reference == sum(sizes) and found.peak == before.peak + sum(sizes)
    assert ("reference" in found.at_peak) is held and "reference" not in before.at_peak


@pytest.mark.parametrize(
    ("task", "head"),
    [
        (Sft(), None),
        (DistillContext(), None),
        (Reward(), ScalarHead()),
        (Classify(), ClassHead(n_classes=3)),
        (Embed(), EmbedHead()),
    ],
    ids=["sft", "context", "reward", "classify", "embed"],
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
