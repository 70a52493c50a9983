"""muP: what begins smaller and learns slower in a wider model, and that its logits then move as the narrow one's do."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import initial_parameters, one_device, packed_batch, plainly, run_decoder, small_model, small_run

from maxlm.config import (
    Adafactor,
    AdamW,
    BlockConfig,
    ConstantSchedule,
    Experts,
    GatedMlp,
    GroupedQuery,
    LmHead,
    ModelConfig,
    ScalarHead,
    TopKRouter,
    UserError,
)
from maxlm.models import Tokens, bind, declared, ops
from maxlm.shapes import arrays
from maxlm.training import make_trainer
from maxlm.training.optimizers import make_optimizer

BASE = 32


def wide(m: int, mup: bool, **changes: object) -> ModelConfig:
    """All widths times m but head_dim."""
    block = BlockConfig(attention=GroupedQuery(n_heads=4 * m, n_kv_heads=2 * m, head_dim=8), mlp=GatedMlp(d_ff=48 * m))
    values = {"d_model": BASE * m, "blocks": (block,), "init_std": BASE**-0.5, **changes}
    return small_model(**values, mup_base_width=BASE if mup else None)


def test_rules_of_table_8() -> None:
    """Standard deviation and learning rate of every array at four times the width."""
    experts = Experts(n_experts=4, d_ff=96, router=TopKRouter(top_k=2))
    model = wide(4, True, head=LmHead(bias=True), init_std=0.1)
    block = BlockConfig(attention=model.blocks[0].attention, mlp=experts)
    mixture = small_model(d_model=BASE * 4, blocks=(block,), head=ScalarHead(), init_std=0.1, mup_base_width=BASE)
    to_residual = 0.1 / math.sqrt(4) / math.sqrt(2 * 2)
    rules = {
        "embed": (0.1, 1), "unembed": (0.1, 1), "unembed_bias": (0, 1), "scale": (0, 1), "router": (0.1 / 4, 1 / 4),
        "score": (0.1 / 4, 1 / 4), "o_proj": (to_residual, 1 / 4), "down_proj": (to_residual, 1 / 4),
    }  # fmt: skip
    seen = set()
    for one in (model, mixture):
        parameters = initial_parameters(one)
        for array in arrays(one):
            *path, name = array.name.split("/")
            value = parameters
            for key in (*path, name):
                value = value[key]
            std, rate = rules.get(name, (0.1 / math.sqrt(4), 1 / 4))
            assert abs(float(np.std(value)) - std) <= 4 * std / math.sqrt(2 * array.size), array.name
            assert array.learning_rate == rate, array.name
            seen.add(name)
    assert seen > set(rules)


def test_the_optimizer_takes_each_arrays_rate() -> None:
    """The first step of Adam is the sign of the gradient times the rate, the decay comes on top."""
    model = wide(4, True)
    parameters = initial_parameters(model)
    config = AdamW(weight_decay=0.5, clip_norm=None)
    optimizer = make_optimizer(config, lambda step: 0.01, declared(model), layers=model.repeats)
    gradient = jax.tree.map(lambda x: jnp.where(x < 0, -1.0, 1.0), parameters)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(parameters), parameters)

    def check(array, update, parameter, g):
        want = -0.01 * array.learning_rate * (g + 0.5 * array.role.decays * parameter)
        np.testing.assert_allclose(update, want, rtol=1e-5)

    jax.tree.map(check, declared(model), updates, parameters, gradient)


def test_at_the_base_width_nothing_changes() -> None:
    same = [initial_parameters(wide(1, mup)) for mup in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert {array.learning_rate for array in arrays(wide(1, True))} == {1.0}


def movement(model: ModelConfig) -> tuple[float, float]:
    """RMS of how much hidden states and logits change in three steps of training."""
    run = small_run(model, batch_size=4)
    optimizer = AdamW(learning_rate=0.02, schedule=ConstantSchedule(), weight_decay=0.0, clip_norm=None)
    run = dataclasses.replace(run, optimizer=optimizer)
    batch = packed_batch(run)

    @jax.jit
    def outputs(parameters):
        tokens = Tokens(batch["positions"], batch["segment_ids"])
        hidden = run_decoder(model, parameters, plainly(), batch["inputs"], tokens).hidden
        return hidden, ops.logits(hidden, bind(model, parameters).unembedding)

    trainer = make_trainer(run, one_device())
    state = trainer.init()
    before = jax.device_get(outputs(state.parameters))
    for _ in range(3):
        state, _ = trainer.step(state, trainer.place(batch))
    after = jax.device_get(outputs(state.parameters))
    hidden, logits = (float(np.sqrt(np.mean((a - b) ** 2))) for a, b in zip(after, before, strict=True))
    return hidden, logits


def test_a_wide_models_logits_do_not_move_more() -> None:
    """The check of the paper's appendix D.1. With muP the part of the movement that the initial table gives shrinks
    with the root of the width and the learnt part stays; without it the whole grows. Hidden states move alike."""
    (hidden, logits), (wide_hidden, wide_logits) = movement(wide(2, True)), movement(wide(8, True))
    assert 0.9 < wide_hidden / hidden < 1.1
    assert 0.5 < wide_logits / logits <= 1.05
    assert movement(wide(8, False))[1] / movement(wide(2, False))[1] > 2


def test_what_has_no_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"mup_base_width has no rule for model.head.normalized"):
        wide(2, True, head=LmHead(normalized=True))
    run = dataclasses.replace(small_run(wide(2, True)), optimizer=Adafactor())
    with pytest.raises(UserError, match=r"mup_base_width = 32 has rules for AdamW alone, not for Adafactor"):
        run.validate(1)
