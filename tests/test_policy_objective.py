"""Learning from rewards: against formulas in float64 of the model, and one result however a batch is cut."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device, small_model
from helpers import small_run as plain_run

from maxlm.config import (
    Grpo,
    KlEstimator,
    ModelConfig,
    Ppo,
    Reinforced,
    Rollouts,
    RunConfig,
    ScalarHead,
    ShardingConfig,
)
from maxlm.config.rewards import FunctionReward
from maxlm.sharding import Layout, make_layout
from maxlm.training.policy_objective import ActorCritic, GroupPolicy, PolicyGradient
from maxlm.training.state import CRITIC, of_model
from maxlm.training.step import gradient_function, make_trainer

B, T = 8, 16
REWARDS = (FunctionReward(name="any"),)


def run_of(
    task: Reinforced, *, micro_batches: int = 1, sharding: ShardingConfig | None = None, **model: Any
) -> RunConfig:
    config = plain_run(model=small_model(**model), batch_size=B, seq_len=T)
    train = dataclasses.replace(config.train, micro_batches=micro_batches)
    return dataclasses.replace(config, task=task, train=train, sharding=sharding or config.sharding)


def objective_of(config: RunConfig, layout: Layout) -> PolicyGradient:
    match config.task:
        case Grpo() as task:
            reference = config.model if task.kl_weight else None
            return GroupPolicy(config, task, layout, reference=reference)
        case Ppo() as task:
            critic = dataclasses.replace(config.model, head=ScalarHead())
            return ActorCritic(config, task, layout, critic)
        case _:
            raise AssertionError


def batch_of(objective: PolicyGradient, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of several lengths, of which some tokens in the middle were not drawn."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name, array in objective.arrays.items():
        found[name] = rng.normal(size=array.shape).astype(array.dtype)
    for prefix in ("", "text_") if "text_inputs" in found else ("",):
        found[f"{prefix}inputs"] = rng.integers(0, 64, (B, T)).astype(np.int32)
        found[f"{prefix}targets"] = rng.integers(0, 64, (B, T)).astype(np.int32)
        found[f"{prefix}positions"] = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        found[f"{prefix}segment_ids"] = np.ones((B, T), np.int32)
        found[f"{prefix}loss_mask"] = np.ones((B, T), np.float32)
    lengths = rng.integers(4, T, B)
    mask = (np.arange(T) >= 3) & (np.arange(T) < lengths[:, None]) & (np.arange(T) != 6)
    found["loss_mask"] = mask.astype(np.float32)
    found["token_weights"] = mask.astype(np.float32)
    found["row_weights"] = mask.sum(1, keepdims=True).astype(np.float32)
    found["old_log_probs"] = -4 + 0.2 * found["old_log_probs"]
    return found


GRPO = Grpo(
    rewards=REWARDS, clip_low=0.2, clip_high=0.3, kl_weight=0.1, kl_estimator=KlEstimator.K3, entropy_weight=0.01
)
PPO = Ppo(rewards=REWARDS, entropy_weight=0.02, text_weight=0.5)
TASKS = pytest.mark.parametrize("task", [GRPO, PPO], ids=["grpo", "ppo"])


def parameters_of(config: RunConfig, objective: PolicyGradient) -> Any:
    params = objective.init(jax.random.key(3))
    if CRITIC in params:
        params[CRITIC]["score"] = 0.3 * jax.random.normal(jax.random.key(5), params[CRITIC]["score"].shape)
    return params


def logits_of(model: ModelConfig, params: Any, batch: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    from maxlm.models import Execution, Tokens, bind, ops

    how = Execution.of(run_of(GRPO), one_device())
    decoder = bind(model, params)
    tokens = Tokens(jnp.asarray(batch[f"{prefix}positions"]), jnp.asarray(batch[f"{prefix}segment_ids"]))
    hidden = decoder(decoder.embeddings(jnp.asarray(batch[f"{prefix}inputs"]), tokens, how), tokens, how).hidden
    if isinstance(model.head, ScalarHead):
        return np.asarray(decoder.scalars(hidden), np.float64)
    return np.asarray(ops.logits(hidden, decoder.unembedding), np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@TASKS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_is_that_of_the_papers(task: Reinforced, temperature: float) -> None:
    task = dataclasses.replace(task, rollouts=Rollouts(temperature=temperature))
    config = run_of(task)
    objective = objective_of(config, one_device())
    params, batch = parameters_of(config, objective), batch_of(objective)
    frozen = params if objective.frozen is not None else None
    sums = objective.loss(params, frozen, batch, objective.counted(params, frozen, batch))

    log_p = log_softmax(logits_of(config.model, of_model(params), batch) / temperature)
    own = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    mask, advantage = batch["loss_mask"], batch["advantages"]
    ratio = np.exp(own - batch["old_log_probs"])
    low, high = (task.clip_low, task.clip_high) if isinstance(task, Grpo) else (task.clip, task.clip)
    loss = -np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
    loss = loss - task.entropy_weight * entropy
    if isinstance(task, Grpo):
        x = own - batch["reference_log_probs"]
        loss = loss + task.kl_weight * (np.exp(-x) - 1 + x)
    else:
        values = logits_of(dataclasses.replace(config.model, head=ScalarHead()), params[CRITIC], batch)
        old, returns = batch["old_values"], batch["returns"]
        held = old + np.clip(values - old, -task.value_clip, task.value_clip)
        loss = loss + task.value_weight * 0.5 * np.maximum((values - returns) ** 2, (held - returns) ** 2)
    expected = (loss * mask).sum() / mask.sum()
    if isinstance(task, Ppo):
        text = log_softmax(logits_of(config.model, of_model(params), batch, "text_"))
        nll = -np.take_along_axis(text, batch["text_targets"][..., None], -1)[..., 0]
        expected += task.text_weight * nll.mean()
    assert float(sums.objective / sums.weight) == pytest.approx(expected, rel=2e-5)
    assert float(sums.means["entropy"] / sums.weight) == pytest.approx((entropy * mask).sum() / mask.sum(), rel=1e-5)
    assert float(sums.largest["largest_ratio"]) == pytest.approx((ratio * mask).max(), rel=1e-4)


@TASKS
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_first_ratio_is_exactly_one(task: Reinforced, micro_batches: int) -> None:
    """`scores` and `loss` are two programs; on a CPU they say the same to the bit."""
    config = run_of(
        dataclasses.replace(task, text_weight=0.0) if isinstance(task, Ppo) else task, micro_batches=micro_batches
    )
    layout = one_device()
    objective = objective_of(config, layout)
    params, batch = parameters_of(config, objective), batch_of(objective)
    frozen = params if objective.frozen is not None else None
    scores = jax.jit(objective.scores)(
        params, frozen, {name: batch[name] for name in ("inputs", "targets", "positions", "segment_ids", "loss_mask")}
    )
    batch |= {name: np.asarray(x) for name, x in scores.items() if name in batch}
    sums, _ = jax.jit(gradient_function(config, layout, objective))(params, frozen, batch)
    assert float(sums.largest["largest_ratio"]) == 1.0
    assert float(sums.means["moved_kl"]) == 0.0
    assert float(sums.means["ratio"]) == float(sums.weight)


@TASKS
@pytest.mark.parametrize(
    "cut",
    [
        {"micro_batches": 4},
        {"sharding": ShardingConfig(data=2, fsdp=2, tensor=2)},
        {"sharding": ShardingConfig(fsdp=2, seq=2, data=2)},
        {"sharding": ShardingConfig(stage=2, data=4), "micro_batches": 2},
    ],
    ids=["micro", "mesh", "ring", "stages"],
)
def test_one_result_however_it_is_cut(task: Reinforced, cut: dict[str, Any]) -> None:
    def of(**how: Any) -> Any:
        config = run_of(task, **how)
        layout = make_layout(config.sharding) if "sharding" in how else one_device()
        objective = objective_of(config, layout)
        params, batch = parameters_of(config, objective), batch_of(objective)
        frozen = params if objective.frozen is not None else None
        trainer = make_trainer(config, layout, objective)
        placed = trainer.place(batch)
        sums, gradients = jax.jit(gradient_function(config, layout, objective))(params, frozen, placed)
        scores = jax.jit(objective.scores)(params, frozen, placed)
        return jax.device_get((sums._replace(router=()), gradients, scores))

    def close(one: np.ndarray, other: np.ndarray) -> None:
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(one).max())

    jax.tree.map(close, of(), of(**cut))


def test_without_clipping_it_is_the_policy_gradient() -> None:
    """The gradient of -A log p at the old policy, whatever the clip (Williams 1992)."""
    config = run_of(Ppo(rewards=REWARDS, clip=0.2, value_weight=1e-9))
    layout = one_device()
    objective = objective_of(config, layout)
    params, batch = parameters_of(config, objective), batch_of(objective)
    batch["old_log_probs"] = np.asarray(objective.scores(params, None, batch)["old_log_probs"])
    _, gradients = gradient_function(config, layout, objective)(params, None, batch)

    def reinforce(policy: Any) -> jax.Array:
        scores = objective.scores(policy | {CRITIC: params[CRITIC]}, None, batch)
        return -(batch["advantages"] * batch["loss_mask"] * scores["old_log_probs"]).sum()

    expected = jax.grad(reinforce)(of_model(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), of_model(gradients), expected)


def test_batch_that_moved_too_far_changes_nothing() -> None:
    config = run_of(Ppo(rewards=REWARDS, largest_kl=0.05))
    objective = objective_of(config, one_device())
    trainer = make_trainer(config, one_device(), objective)
    batch = batch_of(objective)
    moved = {}
    for shift in (0.04, 0.06):
        state = trainer.init()
        before = jax.device_get(state.parameters)
        scores = objective.scores(state.parameters, None, batch)
        given = trainer.place(batch | {"old_log_probs": np.asarray(scores["old_log_probs"]) + np.float32(shift)})
        state, output = trainer.step(state, given)
        assert float(output.figures["moved_kl"]) == pytest.approx(shift, rel=1e-3)
        moved[shift] = not jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(state.parameters)))
        assert int(state.skipped) == (not moved[shift])
        assert int(output.skipped_in_row) == 0, "a run does not stop because of it"
    assert moved == {0.04: True, 0.06: False}
