"""Vectors of texts, and how well held-out passages are found by them."""

from __future__ import annotations

from maxlm.config import Embed, Purpose, RunConfig
from maxlm.evaluation.judgements import judge_retrieval
from maxlm.inference.load import LoadedRun
from maxlm.recipes.of_texts import open_splits, recipe_of_texts
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe
from maxlm.training.nearness import Vectors


def recipe(config: RunConfig, task: Embed, layout: Layout) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the data is not there, is damaged, too small, was prepared for another purpose, or has more ids than
            the model.
    """
    make = lambda config, texts: Vectors(config, layout, texts)
    return recipe_of_texts(config, layout, open_splits(config, Purpose.EMBED), make, judge_retrieval)
