"""Policy gradient without a critic: GRPO and its relatives, RLOO, REINFORCE with a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import BatchMean, GroupMean, Grpo, LeaveOneOut, RunConfig
from maxlm.inference.load import LoadedRun
from maxlm.recipes.reinforced import rewarded
from maxlm.recipes.rewards import RewardFunction
from maxlm.recipes.rollouts import Rollout, RowArrays
from maxlm.sharding import Layout
from maxlm.training import policy_losses as losses
from maxlm.training.loop import Recipe
from maxlm.training.policy_objective import GroupPolicy


def recipe(config: RunConfig, task: Grpo, layout: Layout, functions: Mapping[str, RewardFunction]) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the prompts, a reward or the reference is not there, is damaged, or does not fit the model.
    """
    found = rewarded(config, task, layout, functions, held=task.kl_weight > 0)
    objective = GroupPolicy(config, task, layout, **found.held_to)

    def learn(rollout: Rollout, memory: dict[str, Any]) -> tuple[RowArrays, dict[str, float]]:
        texts, mask = rollout.texts, rollout.arrays["loss_mask"]
        groups = texts.rewards.reshape(-1, task.rollouts.samples)
        of_texts = advantages(task, groups, texts.usable.reshape(groups.shape)).ravel()
        weights = losses.token_weights(mask, task.aggregation, task.rollouts.max_new_tokens)
        return {
            "advantages": of_texts[:, None] * mask,
            "token_weights": weights.of_tokens,
            "row_weights": weights.of_rows[:, None],
        }, {}

    return found.recipe(objective, learn, start=found.start, redraws=task.redraws)


def advantages(task: Grpo, rewards: npt.NDArray[np.float64], usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """[P, S] -> [P, S]."""
    match task.advantage:
        case GroupMean(divide_by_std=divide, eps=eps):
            return losses.group_mean(rewards, divide, eps, usable)
        case LeaveOneOut():
            return losses.leave_one_out(rewards, usable)
        case BatchMean():
            return losses.batch_mean(rewards, usable)
        case _:
            assert_never(task.advantage)
