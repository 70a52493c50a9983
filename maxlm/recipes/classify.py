"""Classifiers of texts."""

from __future__ import annotations

from maxlm.config import ClassHead, Classify, Purpose, RunConfig, UserError
from maxlm.evaluation.judgements import judge_classes
from maxlm.inference.load import LoadedRun
from maxlm.recipes.of_texts import open_splits, recipe_of_texts
from maxlm.sharding import Layout
from maxlm.training.judging import Classes
from maxlm.training.loop import Recipe


def recipe(config: RunConfig, task: Classify, layout: Layout) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the data is not there, is damaged, too small, was prepared for another purpose, or has more ids or
            classes than the model.
    """
    splits, head = open_splits(config, Purpose.CLASSIFY), config.model.head
    assert isinstance(head, ClassHead), "RunConfig.validate asks for one"
    classes = 1 + int(max(split.largest_value for split in splits if split is not None))
    if classes > head.n_classes:
        raise UserError(
            f"model.head.n_classes = {head.n_classes} is less than the {classes} classes of "
            f"{config.data.datasets[0].path}; use {classes}"
        )
    make = lambda config, texts: Classes(config, layout, texts, task)
    return recipe_of_texts(config, layout, splits, make, judge_classes)
