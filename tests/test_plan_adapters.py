"""What a plan counts of a run that trains an adapter: the base as it is held, and state for what is trained alone."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from helpers import small_model, small_run
from test_plan_memory import shard_bytes

from maxlm.config import (
    Adapter,
    BaseFormat,
    GatedMlp,
    Lora,
    ModelConfig,
    Remat,
    ShardingConfig,
    Zero,
)
from maxlm.plan.bound import memory_bytes
from maxlm.plan.hlo import Program
from maxlm.plan.machines import Platform, parse_machine
from maxlm.plan.memory import estimate_memory
from maxlm.plan.out_of_memory import largest_arrays
from maxlm.plan.traffic import estimate_traffic
from maxlm.shapes import arrays, flops_per_token
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

LORA = Lora(rank=2, targets=("all-linear",))


def adapted(base: BaseFormat = BaseFormat.FLOAT32, full: tuple[str, ...] = ()) -> ModelConfig:
    model = small_model()
    block = dataclasses.replace(model.blocks[0], mlp=GatedMlp(d_ff=128))
    adapter = Adapter(kind=LORA, base=base, full=full)
    return dataclasses.replace(model, d_model=128, blocks=(block,), adapter=adapter)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("base", list(BaseFormat), ids=str)
def test_the_state_is_that_of_the_real_trainer(base: BaseFormat, axes: dict[str, int]) -> None:
    config = small_run(adapted(base, full=("unembed",)), ShardingConfig(**axes))
    trainer = make_trainer(config, make_layout(config.sharding))
    estimate = estimate_memory(config, 8, Platform.CPU)
    assert estimate.parameters == shard_bytes(trainer.state.parameters)
    assert estimate.optimizer == shard_bytes(trainer.state.optimizer)
    trained = sum(array.size for array in arrays(config.model) if array.trained)
    if axes == {"data": 8}:
        assert estimate.gradients == 4 * trained and estimate.optimizer == 8 * trained


def test_less_is_moved_and_computed_than_where_everything_is_trained() -> None:
    model = adapted()
    plain = dataclasses.replace(model, adapter=None)
    flops = [flops_per_token(one, 32, Remat.NONE) for one in (model, plain)]
    numbers = lambda trained: sum(a.size * a.uses for a in arrays(model) if a.trained is trained)
    assert flops[0].parameters_term == 6 * numbers(True) + 4 * numbers(False)
    assert flops[0].attention_term == flops[1].attention_term
    sizes = ShardingConfig().sizes(1)
    assert memory_bytes(small_run(model), sizes) < 0.8 * memory_bytes(small_run(plain), sizes)


@pytest.mark.parametrize("zero", list(Zero), ids=str)
def test_the_base_has_no_gradients_to_sum(zero: Zero) -> None:
    """What fsdp sends of it are parameters on their way to where they are used."""
    sharding = ShardingConfig(data=1, fsdp=8, zero=zero)
    [found] = estimate_traffic(small_run(adapted(), sharding), parse_machine("cpu:8"))
    sent = 0.0
    for array in arrays(adapted()):
        small = 4 * array.size * 7 / 8
        cut = "embed" in array.dims
        if zero is Zero.PARAMETERS and cut:
            sent += small * (1 if "vocab" in array.dims else 2)
        if array.trained:
            sent += small * (1 if cut and zero is not Zero.OPTIMIZER else 2)
            sent += small if cut and zero is not Zero.PARAMETERS else 0
    assert found.sent == pytest.approx(sent, rel=1e-3)


@pytest.mark.slow
def test_a_compiled_step_takes_what_is_planned_and_unpacks_a_layer_at_a_time() -> None:
    config = small_run(adapted(BaseFormat.NF4))
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, remat=Remat.FULL))
    trainer = make_trainer(config, make_layout(ShardingConfig(), jax.devices()[:1]))
    program = trainer.step.lower(trainer.state, trainer.batch).compile()
    estimate = estimate_memory(config, 1, Platform.CPU)
    state = estimate.parameters + estimate.optimizer + estimate.batch
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(state, rel=0.01)
    stacks = {f"f32[{','.join(map(str, a.shape))}]" for a in arrays(config.model) if a.stacked > 1 and a.inputs}
    found = largest_arrays(Program(program.as_text() or ""), count=10_000)
    assert not stacks & {one.shape for one in found}, "no stack of the base is unpacked as a whole"
