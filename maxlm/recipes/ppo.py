"""Proximal policy optimisation with a critic, a KL term in the reward, and running text beside (PPO-ptx)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxlm.config import Aggregation, ModelConfig, Ppo, Purpose, RunConfig, ScalarHead, UserError
from maxlm.data.loader import open_batches
from maxlm.data.shards import Split, read_info
from maxlm.inference.load import LoadedRun
from maxlm.models.adapters import base_of
from maxlm.recipes.reinforced import RewardedRun, rewarded
from maxlm.recipes.rewards import RewardFunction
from maxlm.recipes.rollouts import Rollout, RowArrays
from maxlm.recipes.starting import open_source
from maxlm.sharding import Layout
from maxlm.training import policy_losses as losses
from maxlm.training.loop import Recipe
from maxlm.training.policy_objective import ActorCritic
from maxlm.training.state import CRITIC, TrainState, init_state, of_model
from maxlm.training.step import Trainer
from maxlm.training.warm_start import Start, WarmStart, warm_start


def recipe(config: RunConfig, task: Ppo, layout: Layout, functions: Mapping[str, RewardFunction]) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the prompts, running text, a reward, the critic or the reference is not there, is damaged, or does
            not fit the model.
    """
    found = rewarded(config, task, layout, functions, held=task.kl.beta > 0)
    critic = _critic(config, task)
    objective = ActorCritic(config, task, layout, critic, **found.held_to)

    def learn(rollout: Rollout, memory: dict[str, Any]) -> tuple[RowArrays, dict[str, float]]:
        texts, arrays, mask = rollout.texts, rollout.arrays, rollout.arrays["loss_mask"]
        beta = memory.setdefault("beta", task.kl.beta)
        kl = np.zeros(mask.shape)
        if "reference_log_probs" in arrays:
            policy, other = jnp.asarray(arrays["old_log_probs"]), jnp.asarray(arrays["reference_log_probs"])
            kl = np.asarray(losses.kl_estimate(policy, other, task.kl_estimator), np.float64)
        rewards = losses.per_token_rewards(texts.rewards, kl, mask, beta)
        ahead = losses.gae(rewards, arrays["old_values"], mask, task.gamma, task.gae_lambda)
        weights = losses.token_weights(mask, Aggregation.TOKEN_MEAN, task.rollouts.max_new_tokens)
        of_text = float((kl * mask).sum() / max((mask.sum(1) > 0).sum(), 1))
        memory["beta"] = losses.next_beta(beta, of_text, task.kl, len(mask))
        return {
            "advantages": losses.whitened(ahead.advantages, mask) if task.whiten else ahead.advantages,
            "returns": ahead.returns,
            "token_weights": weights.of_tokens,
            "row_weights": weights.of_rows[:, None],
        }, {"reference_kl": of_text, "kl_beta": beta}

    return found.recipe(
        objective, learn, start=_start(config, task, layout, found, critic), beside=_running_text(config, task)
    )


def _critic(config: RunConfig, task: Ppo) -> ModelConfig:
    """
    Raises:
        UserError: it gives no number.
    """
    if task.critic is None:
        return dataclasses.replace(base_of(config.model), head=ScalarHead())
    try:
        model = open_source(task.critic).model
    except UserError as error:
        raise UserError(f"task.critic = {task.critic}: {error}") from error
    if not isinstance(model.head, ScalarHead):
        raise UserError(
            f"task.critic = {task.critic}: its model.head is {type(model.head).__name__}; name a run of task = Reward, "
            "whose ScalarHead gives a number"
        )
    return model


def _start(config: RunConfig, task: Ppo, layout: Layout, found: RewardedRun, critic: ModelConfig) -> Start:
    """Of the policy as of any run, with a critic beside it."""
    place, key = (
        (config.checkpoint.init_from, "checkpoint.init_from") if task.critic is None else (task.critic, "task.critic")
    )
    of_policy = found.start
    assert of_policy is not None and place is not None, "RunConfig.validate asks for a start"

    def start(trainer: Trainer, state: TrainState | None, base: Any) -> WarmStart:
        whole = trainer.state.parameters
        if state is not None:  # goes on: of the base under an adapter alone something is read
            critics = state.parameters[CRITIC]
        else:
            one = _view(
                trainer, whole[CRITIC], lambda parameters: parameters[CRITIC], lambda own: init_state(own, None)
            )
            tokenizer = found.taught.fingerprint
            critics = warm_start(place, open_source, critic, layout, one, tokenizer, key=key).state.parameters
        beside = {CRITIC: critics}
        view = _view(trainer, of_model(whole), of_model, lambda own: trainer.begin(own | beside))
        own = None if state is None else dataclasses.replace(state, parameters=of_model(state.parameters))
        begun = of_policy(view, own, base)
        # A state that begins here has the critic already, in the format that parameters are held in.
        both = dataclasses.replace(begun.state, parameters=beside | begun.state.parameters)
        return dataclasses.replace(begun, state=both)

    return start


def _view(trainer: Trainer, shapes: Any, part: Any, begin: Callable[[Any], TrainState]) -> Trainer:
    """The trainer, as it is to who knows a part of the parameters alone."""

    def init() -> TrainState:
        state = trainer.init()
        return dataclasses.replace(state, parameters=part(state.parameters))

    return trainer._replace(init=init, begin=begin, state=dataclasses.replace(trainer.state, parameters=shapes))


def _running_text(config: RunConfig, task: Ppo) -> Any:
    """The arrays of a step's running text.

    Raises:
        UserError: there is none, or there is some that nobody reads.
    """
    of_prompts = lambda path: (info := read_info(Path(path))) is not None and info.purpose is Purpose.PROMPTS
    texts = tuple(one for one in config.data.datasets if not of_prompts(one.path))
    if bool(texts) != bool(task.text_weight):
        there = f"{texts[0].path} is no data set of prompts" if texts else "all data sets are of prompts"
        raise UserError(
            f"task.text_weight = {task.text_weight}, and {there}; use a weight above 0 with running text among "
            "data.datasets, or 0 without"
        )
    if not texts:
        return None
    batches = open_batches(
        dataclasses.replace(config.data, datasets=texts),
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        split=Split.TRAIN,
        virtual=config.model.virtual_tokens,
    )
    return lambda step: {f"text_{name}": x for name, x in batches[step].items()}
