"""Reward models: what people find of completions, and how far that is to be trusted on held-out ones."""

from __future__ import annotations

from maxlm.config import BinaryReward, BradleyTerry, Purpose, Reward, RunConfig
from maxlm.evaluation.judgements import judge_labels, judge_rewards
from maxlm.inference.load import LoadedRun
from maxlm.recipes.of_texts import open_splits, recipe_of_texts
from maxlm.sharding import Layout
from maxlm.training.judging import Rewards
from maxlm.training.loop import Recipe


def recipe(config: RunConfig, task: Reward, layout: Layout) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the data is not there, is damaged, too small, was prepared for another purpose, or has more ids than
            the model.
    """
    match task.loss:
        case BradleyTerry():
            purpose, judge = Purpose.PREFERENCE, judge_rewards
        case BinaryReward():
            purpose, judge = Purpose.BINARY, judge_labels
    make = lambda config, texts: Rewards(config, layout, texts, task)
    return recipe_of_texts(config, layout, open_splits(config, purpose), make, judge)
