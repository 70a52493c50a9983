"""Adapters: what each computes, what is trained, and what stays as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers import initial_parameters, one_device, packed_batch, place, small_model, small_run, whole_logits

from maxlm.config import AdamW, Adapter, AdapterKind, BaseFormat, ConstantSchedule, Lora, ModelConfig
from maxlm.models import abstract_parameters
from maxlm.models.adapters import base_of
from maxlm.shapes import PREFIX, arrays
from maxlm.training import make_trainer


def with_adapter(model: ModelConfig | None = None, kind: Any = Lora(rank=2), **more: Any) -> ModelConfig:
    return dataclasses.replace(model or small_model(), adapter=Adapter(kind=kind, **more))


def outputs(model: ModelConfig, parameters: Any) -> np.ndarray:
    """Logits of some tokens, [2, 9, V]."""
    rows = np.random.default_rng(0).integers(0, model.vocab_size, (2, 9)).tolist()
    return np.stack(whole_logits(model, parameters, rows))


def base_tree(parameters: Any) -> Any:
    return {name: tree for name, tree in parameters.items() if name != PREFIX}


@pytest.mark.parametrize("kind", [Lora(rank=2), Lora(rank=3, dora=True, targets=("all-linear",))], ids=["lora", "dora"])
@pytest.mark.parametrize("base", list(BaseFormat), ids=str)
def test_an_adapter_begins_as_its_base(kind: AdapterKind, base: BaseFormat) -> None:
    model = with_adapter(kind=kind, base=base)
    parameters = initial_parameters(model)
    plain = outputs(base_of(model), base_tree(parameters))
    np.testing.assert_allclose(outputs(model, parameters), plain, atol=2e-5)


@pytest.mark.parametrize("base", [BaseFormat.FLOAT32, BaseFormat.NF4], ids=str)
def test_what_is_declared_is_what_is_built(base: BaseFormat) -> None:
    model = with_adapter(kind=Lora(dora=True), base=base, full=("embed",))
    built = jax.eval_shape(lambda: initial_parameters(model))
    planned = abstract_parameters(model, one_device())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), built) == jax.tree.map(lambda x: (x.shape, x.dtype), planned)
    trained = {array.name for array in arrays(model) if array.trained}
    names = [f"{name}_proj/{part}" for name in "qv" for part in ("a", "b", "magnitude")]
    assert trained == {"embed", *(f"adapter/blocks/0/attention/{name}" for name in names)}


@pytest.mark.parametrize("base", list(BaseFormat), ids=str)
def test_a_step_leaves_the_base_bit_for_bit(base: BaseFormat) -> None:
    config = dataclasses.replace(
        small_run(with_adapter(kind=Lora(rank=2, targets=("all-linear",)), base=base)),
        optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule(), weight_decay=0.1),
    )
    trainer = make_trainer(config, one_device())
    step, state = trainer.start()
    before = jax.tree.map(np.array, state.parameters)
    batch = place(packed_batch(config), trainer)
    losses = []
    for _ in range(3):
        state, output = step(state, batch)
        losses.append(float(output.figures["loss"]))
    assert losses[2] < losses[1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, base_tree(before), base_tree(state.parameters))
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before[PREFIX], state.parameters[PREFIX])
    assert all(jax.tree.leaves(moved))
