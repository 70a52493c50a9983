"""Supervised fine-tuning: what the assistant wrote in conversations, and what the model answers at the end."""

from __future__ import annotations

from maxlm.config import RunConfig, Sft
from maxlm.inference.load import LoadedRun
from maxlm.recipes.pretrain import batches, recipe_on, refuse_bad_answers
from maxlm.recipes.taught import taught
from maxlm.sharding import Layout
from maxlm.training.assistant_loss import Answers
from maxlm.training.loop import Recipe


def recipe(config: RunConfig, task: Sft, layout: Layout) -> Recipe[LoadedRun]:
    """As of pre-training, but that the loss counts the assistant's tokens alone, and that the sample at the end is an
    answer to `observe.sample_prompt`.

    Raises:
        UserError: as of pre-training; or no data set is of conversations, or one is of answers of which some are bad.
    """
    data = batches(config)
    refuse_bad_answers(config.data)
    return recipe_on(config, layout, Answers(config, task, layout), data, taught(config.data, data.tokenizer))
