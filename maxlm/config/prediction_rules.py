"""Rules between what is predicted and the rest of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from maxlm.config.data import Dataset
from maxlm.config.model import ModelConfig
from maxlm.config.position import GlmRope, Rope
from maxlm.config.predictions import (
    BlankInfilling,
    CausalLm,
    FillInMiddle,
    GapPositions,
    MaskedLm,
    Prediction,
    PrefixLm,
    SinglePrediction,
    SpanCorruption,
    SuffixInfilling,
    parts,
)
from maxlm.config.task import Pretrain, Task


def predictions(task: Task, datasets: Sequence[Dataset]) -> tuple[Prediction, ...]:
    """What is asked of the texts of each data set."""
    return tuple(dataset.predict or default_prediction(task) for dataset in datasets)


def default_prediction(task: Task) -> Prediction:
    """What is asked of the texts of a data set that does not say it."""
    return task.predict if isinstance(task, Pretrain) else CausalLm()


def broken_prediction_rules(
    task: Task, datasets: Sequence[Dataset], model: ModelConfig, *, seq_len: int, sample_tokens: int
) -> list[str]:
    """A line for each broken rule."""
    failures = []
    for i, dataset in enumerate(datasets):
        if dataset.predict is not None and not isinstance(task, Pretrain):
            failures.append(
                f"data.datasets.{i}.predict = {type(dataset.predict).__name__} is for task = Pretrain; with "
                f"{type(task).__name__} leave it out"
            )
    for key, one in _asked(task, datasets):
        failures += broken_window_rules(key, one, seq_len)
        failures += _of_model(key, one, model)
    if sample_tokens and masked_alone(task, datasets):
        failures.append(
            f"observe.sample_tokens = {sample_tokens}: a model that learns MaskedLm alone cannot write; use 0"
        )
    return failures


def masked_alone(task: Task, datasets: Sequence[Dataset]) -> str | None:
    """Where a run is told to learn `MaskedLm` and nothing else, so that it cannot write: the key; else None."""
    asked = _asked(task, datasets)
    return asked[0][0] if asked and all(isinstance(one, MaskedLm) for _, one in asked) else None


def _asked(task: Task, datasets: Sequence[Dataset]) -> list[tuple[str, SinglePrediction]]:
    """All that is asked of texts, each with its key."""
    asked = list[tuple[str, SinglePrediction]]()
    if any(dataset.predict is None for dataset in datasets):
        asked += parts(default_prediction(task))
    for i, dataset in enumerate(datasets):
        if dataset.predict is not None:
            asked += parts(dataset.predict, f"data.datasets.{i}.predict")
    return asked


def broken_window_rules(key: str, prediction: SinglePrediction, seq_len: int) -> list[str]:
    """A line for each way in which a prediction does not go into a window."""
    match prediction:
        case BlankInfilling() | SpanCorruption():
            return _of_gaps(key, prediction, seq_len)
        case MaskedLm(density=density) if density * seq_len < 1:
            return [
                f"{key}.density = {density:g} leaves no token to find in train.seq_len = {seq_len}; use at least "
                f"{1 / seq_len:.2g}"
            ]
        case CausalLm() | PrefixLm() | SuffixInfilling() | FillInMiddle() | MaskedLm():
            return []
        case _:
            assert_never(prediction)


def _of_gaps(key: str, prediction: BlankInfilling | SpanCorruption, seq_len: int) -> list[str]:
    density, mean_span = prediction.density, prediction.mean_span
    if mean_span > density * seq_len:
        return [
            f"{key}.mean_span = {mean_span:g} must be at most {density * seq_len:.4g}, the tokens that density = "
            f"{density:g} hides of train.seq_len = {seq_len}; use a smaller one, or longer windows"
        ]
    if isinstance(prediction, BlankInfilling):
        return []
    needed = gaps(seq_len + 1, density, mean_span)[1] + 1
    if prediction.n_sentinels >= needed:
        return []
    return [
        f"{key}.n_sentinels = {prediction.n_sentinels} must be at least {needed}, for the gaps of train.seq_len = "
        f"{seq_len} and the end; use {needed}, or a larger mean_span"
    ]


def _of_model(key: str, prediction: SinglePrediction, model: ModelConfig) -> list[str]:
    """What the model is to have or not."""
    name, failures = type(prediction).__name__, []
    if isinstance(prediction, BlankInfilling):
        needed = GlmRope if prediction.positions is GapPositions.TWO else Rope
        if not all(isinstance(block.attention.position, needed) for block in model.layers):
            failures.append(
                f"{key}.positions = {prediction.positions.value} tells gaps apart by what "
                f"model.blocks[].attention.position must know; use {needed.__name__}() there, another of positions, or "
                "SpanCorruption, whose gaps have names"
            )
    if model.mtp is not None and not isinstance(prediction, CausalLm | FillInMiddle):
        failures.append(
            f"{key} = {name} lets tokens see, or leaves out, what model.mtp is to predict; use CausalLm(), "
            "FillInMiddle(), or model.mtp = None"
        )
    if model.virtual_tokens and not isinstance(prediction, CausalLm):
        failures.append(
            f"{key} = {name} leaves no room for the {model.virtual_tokens} virtual tokens of model.adapter; use "
            "CausalLm(), or an adapter without them"
        )
    return failures


def gaps(n: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many of n >= 2 tokens are hidden, and in how many gaps (arXiv:1910.10683, section 3.1.4)."""
    hidden = min(max(round(n * density), 1), n - 1)
    return hidden, min(max(round(hidden / mean_span), 1), n - hidden)
