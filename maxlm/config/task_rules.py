"""Rules between a task and the rest of a run."""

from __future__ import annotations

import math
from typing import assert_never

from maxlm.config.model import ClassHead, EmbedHead, Head, LmHead, ModelConfig, ScalarHead
from maxlm.config.policy import GroupMean, LeaveOneOut
from maxlm.config.reinforcement import Reinforced
from maxlm.config.task import (
    Classify,
    DistillContext,
    Dpo,
    Embed,
    Grpo,
    Ipo,
    Kto,
    Orpo,
    Ppo,
    Preference,
    Reward,
    SimPo,
    Task,
)

_HEADS: dict[type[Task], type[Head]] = {Reward: ScalarHead, Classify: ClassHead, Embed: EmbedHead}
"""What tasks train that do not learn by logits over the vocabulary."""


def broken_task_rules(
    task: Task,
    model: ModelConfig,
    *,
    init_from: str | None,
    sample_tokens: int,
    batch_size: int,
    rhythm: dict[str, int],
) -> list[str]:
    """A line for each broken rule.

    Args:
        task: what is learned.
        model: by what.
        init_from: `checkpoint.init_from`.
        sample_tokens: of `observe`.
        batch_size: of `train`.
        rhythm: keys that say at which steps a run is saved, and their values.
    """
    name, head, failures = type(task).__name__, type(model.head).__name__, []
    wanted = _HEADS.get(type(task), LmHead).__name__
    if head != wanted:
        lack = f"gives no logits, which task = {name} learns" if wanted == "LmHead" else f"is not what {name} trains"
        failures.append(f"model.head = {head} {lack}; use {wanted}")
    if isinstance(task, Reward | Classify) and isinstance(model.head, ScalarHead | ClassHead):
        if task.lm_weight and model.head.lm is None:
            failures.append(
                f"task.lm_weight = {task.lm_weight} weighs a loss of logits, and model.head.lm is None; use an LmHead "
                "there, or 0"
            )
        if not task.lm_weight and model.head.lm is not None:
            failures.append(
                "model.head.lm makes logits that task.lm_weight = 0 never looks at; use None, or a weight above 0"
            )
    if isinstance(task, Preference):
        failures += _of_reference(task, init_from)
    if isinstance(task, Reinforced):
        failures += _of_rollouts(task, init_from, batch_size, rhythm)
    if isinstance(task, DistillContext) and task.reference is None and init_from is None:
        failures.append(
            "task = DistillContext learns what another model says that is told a context, and task.reference and "
            "checkpoint.init_from are None; name a model that answers, in checkpoint.init_from"
        )
    if sample_tokens and not isinstance(model.head, LmHead):
        failures.append(
            f"observe.sample_tokens = {sample_tokens} needs a model that writes, model.head = {head} does not; use 0"
        )
    return failures


def _of_reference(task: Preference, init_from: str | None) -> list[str]:
    """What the policy is held to."""
    loss = type(task.loss).__name__
    match task.loss:
        case Orpo() | SimPo():
            said = "reference" if task.reference is not None else "reference_ahead" if task.reference_ahead else None
            value = task.reference if said == "reference" else True
            return [f"task.{said} = {value}: task.loss = {loss} has no reference; leave it out"] if said else []
        case Dpo() | Ipo() | Kto():
            if task.reference is not None or init_from is not None:
                return []
            return [
                f"task.loss = {loss} holds the model to a reference, and task.reference and checkpoint.init_from are "
                "None; name a run that was trained on the chosen answers, in checkpoint.init_from"
            ]
        case _:
            assert_never(task.loss)


def _of_rollouts(task: Reinforced, init_from: str | None, batch_size: int, rhythm: dict[str, int]) -> list[str]:
    """How what is written is cut into steps, and what the policy begins as."""
    rollouts, failures = task.rollouts, []
    if rollouts.completions % batch_size:
        failures.append(
            f"train.batch_size = {batch_size} must divide the {rollouts.completions} completions of a rollout "
            f"(task.rollouts.prompts = {rollouts.prompts} times samples = {rollouts.samples}); use for example "
            f"{math.gcd(rollouts.completions, batch_size)}"
        )
    elif steps := [key for key, value in rhythm.items() if value % rollouts.steps(batch_size)]:
        n = rollouts.steps(batch_size)
        failures += [
            f"{key} = {rhythm[key]} must be a multiple of {n}, the steps of a rollout (prompts * samples * epochs / "
            f"train.batch_size), as a run is saved between rollouts alone; use for example {-(-rhythm[key] // n) * n}"
            for key in steps
        ]
    if isinstance(task, Grpo) and isinstance(task.advantage, GroupMean | LeaveOneOut) and rollouts.samples < 2:
        failures.append(
            f"task.rollouts.samples = {rollouts.samples} leaves {type(task.advantage).__name__} nothing to compare a "
            "completion with; use at least 2, or BatchMean"
        )
    if init_from is None:
        failures.append(
            f"task = {type(task).__name__} trains a model that can answer already: checkpoint.init_from is None; name "
            "its run, or hf:DIR"
        )
    return failures


def under_adapter(task: Preference | DistillContext | Reinforced, model: ModelConfig) -> bool:
    """Whether the reference is the base under the adapter: what trains as a whole is not as it was in the base."""
    return task.reference is None and model.adapter is not None and not model.adapter.full


def asks_reference(task: Task) -> bool:
    """Whether a step puts its batch through a reference, too."""
    if isinstance(task, DistillContext):
        return True
    if not isinstance(task, Preference):
        return False
    match task.loss:
        case Orpo() | SimPo():
            return False
        case Dpo() | Ipo() | Kto():
            return not task.reference_ahead
        case _:
            assert_never(task.loss)


def rollout_asks_reference(task: Grpo | Ppo) -> bool:
    """Whether the texts of a rollout go through a reference, too."""
    match task:
        case Grpo():
            return task.kl_weight > 0
        case Ppo():
            return task.kl.beta > 0
        case _:
            assert_never(task)


def reference_beside(task: Task, model: ModelConfig) -> bool:
    """Whether the parameters of a reference are held, beside those that are trained."""
    match task:
        case Grpo() | Ppo():
            held = rollout_asks_reference(task)
        case Preference() | DistillContext():
            held = asks_reference(task)
        case _:
            return False
    return held and not under_adapter(task, model)
