"""Vectors of texts: how well held-out passages are found by them, and what else can be read off them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import Embed, Purpose, RunConfig
from maxlm.data.loader import Batches
from maxlm.evaluation.judgements import judge_retrieval, linear_probe
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


def probe(config: RunConfig, layout: Layout, parameters: Any) -> Mapping[str, float]:
    """How much a linear map reads off the vectors of texts with classes: fitted on what the data has to train on, and
    measured on what it holds out.

    Raises:
        UserError: the data is not there, is damaged, too small, or not prepared to classify.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=None))
    splits = open_splits(config, Purpose.CLASSIFY)
    objective = Vectors(config, layout, splits.texts)
    program = jax.jit(lambda parameters, batch: objective.by_text(parameters, None, batch))

    def read(batches: Batches) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        vectors, classes = [], []
        for batch in batches.once():
            put = {
                name: jax.device_put(batch[name], layout.sharding(layout.activation(*array.dims)))
                for name, array in objective.arrays.items()
            }
            found = jax.device_get(program(parameters, put))
            there = found["text_record"] >= 0
            vectors.append(found["vectors"][there])
            classes.append(found["text_value"][there].astype(np.int64))
        return np.concatenate(vectors), np.concatenate(classes)

    assert splits.held_out is not None, "eval_batches is not 0"
    fitted, held_out = read(splits.train), read(splits.held_out)
    return {"linear_probe": linear_probe(*fitted, *held_out), "fitted": len(fitted[1]), "held_out": len(held_out[1])}
