"""What a config learns, for a step that is compiled without its data."""

from __future__ import annotations

from typing import Any, assert_never

from maxlm.config import (
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
    Pretrain,
    Reward,
    RunConfig,
    Sft,
    SimPo,
    TrainMedusa,
)
from maxlm.config.task_rules import reference_beside
from maxlm.models.adapters import base_of
from maxlm.plan.work import critic_of
from maxlm.sharding import Layout
from maxlm.training.assistant_loss import Answers
from maxlm.training.context_objective import UntoldTexts
from maxlm.training.judging import Classes, Rewards
from maxlm.training.later_tokens import LaterTokens
from maxlm.training.nearness import Vectors
from maxlm.training.objective import NextToken, Objective
from maxlm.training.policy_objective import ActorCritic, GroupPolicy
from maxlm.training.preference_objective import LabelledTexts, PairedTexts

_TEXTS = 2
"""In a row: one record of two. How many there are only the data can tell; it hardly changes a step."""


def objective_of(config: RunConfig, layout: Layout) -> Objective:
    """As the recipe of `config.task` makes it; a reference and a critic are taken to be of the model's own kind."""
    match config.task:
        case Pretrain():
            return NextToken(config, layout)
        case Sft() as task:
            return Answers(config, task, layout)
        case TrainMedusa() as task:
            return LaterTokens(config, task, layout)
        case DistillContext() as task:
            return UntoldTexts(config, layout, _TEXTS, **_reference(config, task))
        case Preference() as task:
            return _of_preferences(config, task, layout)
        case Reward() as task:
            return Rewards(config, layout, _TEXTS, task)
        case Classify() as task:
            return Classes(config, layout, _TEXTS, task)
        case Embed():
            return Vectors(config, layout, _TEXTS)
        case Grpo() as task:
            return GroupPolicy(config, task, layout, **_reference(config, task))
        case Ppo() as task:
            return ActorCritic(config, task, layout, critic_of(config.model), **_reference(config, task))
        case _:
            assert_never(config.task)


def _reference(config: RunConfig, task: Preference | DistillContext | Grpo | Ppo) -> dict[str, Any]:
    return {"reference": base_of(config.model)} if reference_beside(task, config.model) else {"under": True}


def _of_preferences(config: RunConfig, task: Preference, layout: Layout) -> Objective:
    reference = {"ahead": True} if task.reference_ahead else _reference(config, task)
    match task.loss:
        case Orpo() | SimPo() as loss:
            return PairedTexts(config, layout, _TEXTS, loss)
        case Dpo() | Ipo() as loss:
            return PairedTexts(config, layout, _TEXTS, loss, **reference)
        case Kto() as loss:
            return LabelledTexts(config, layout, _TEXTS, loss, **reference)
        case _:
            assert_never(task.loss)
