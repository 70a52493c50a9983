"""Figures of held-out texts: how sure a model was of each and whether rightly, and what is found by vectors.

Each takes arrays [rows, S, ...] by name, as `training.text_objective.TextObjective.by_text` makes them, and gives
numbers, or points [x, y] that a report draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.evaluation.confidence import auroc, calibration_error

TextArrays = Mapping[str, npt.NDArray[Any]]
"""What `TextObjective.by_text` says of many rows."""
_Floats = npt.NDArray[np.float64]

_BUCKETS = 8


def judge_rewards(texts: TextArrays) -> dict[str, Any]:
    """Of a reward model: its scores, how often the better text of a pair has the higher one by how sure it is of that
    (sigmoid of the difference, arXiv:2112.00861, section 3.3) and by how far their ratings are apart."""
    reward, there = _wide(texts["reward"]), texts["text_record"] >= 0
    better, worse = _pairs(texts)
    margin = reward[better] - reward[worse]
    apart = _wide(texts["text_value"][better] - texts["text_value"][worse])
    found: dict[str, Any] = {"reward_mean": float(reward[there].mean()), "reward_std": float(reward[there].std())}
    found |= _of_confidence(_sigmoid(np.abs(margin)), _right(margin))
    ratings = np.unique(apart)
    if 1 < len(ratings) <= _BUCKETS:
        found["accuracy_by_rating"] = [[float(r), float(_right(margin)[apart == r].mean())] for r in ratings]
    return found


def judge_labels(texts: TextArrays) -> dict[str, Any]:
    """Of a reward model that judges single texts."""
    there = texts["text_record"] >= 0
    reward, good = _wide(texts["reward"][there]), texts["text_value"][there] > 0.5
    found = {"reward_mean": float(reward.mean()), "reward_std": float(reward.std())}
    if (area := auroc(reward, good.astype(np.float64))) is not None:
        found["auroc"] = area
    return found | _of_confidence(_sigmoid(np.abs(reward)), _wide((reward > 0) == good))


def judge_ratios(texts: TextArrays) -> dict[str, Any]:
    """Of a policy with a reference: how often the better text of a pair has gained more, by how much more, in nats; and
    how far the policy is from its reference."""
    better, worse = _pairs(texts)
    margin = _wide(texts["log_ratio"][better] - texts["log_ratio"][worse])
    return {"accuracy_by_margin": buckets(np.abs(margin), _right(margin))} | _of_kl(texts)


def judge_labelled_ratios(texts: TextArrays) -> dict[str, Any]:
    """The same of texts with labels: how often a text that has gained is a desired one."""
    there = (texts["text_record"] >= 0) & (texts["text_value"] != 0)
    ratio, desired = _wide(texts["log_ratio"][there]), _wide(texts["text_value"][there] > 0)
    area = auroc(ratio, desired)
    return ({} if area is None else {"auroc": area}) | _of_kl(texts)


def judge_log_probs(texts: TextArrays) -> dict[str, Any]:
    """Of a policy without a reference: how often the better text of a pair is the likelier one a token, by how many
    nats."""
    each = _wide(texts["log_prob"]) / np.maximum(texts["tokens"], 1)
    better, worse = _pairs(texts)
    margin = each[better] - each[worse]
    return {"accuracy_by_margin": buckets(np.abs(margin), _right(margin))}


def judge_classes(texts: TextArrays) -> dict[str, Any]:
    """Of a classifier: whether it is as sure as it is right, and its accuracy over classes of equal weight."""
    there = texts["text_record"] >= 0
    logits, wanted = _wide(texts["logits"][there]), texts["text_value"][there].astype(int)
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = _wide(logits.argmax(-1) == wanted)
    by_class = [float(right[wanted == c].mean()) for c in np.unique(wanted)]
    return {"balanced_accuracy": float(np.mean(by_class))} | _of_confidence(probabilities.max(-1), right)


def judge_retrieval(texts: TextArrays) -> dict[str, Any]:
    """Of vectors: at which place each query finds its own passage among all that are held out, nearest first by
    cosine."""
    there, value = texts["text_record"] >= 0, texts["text_value"]
    row, text = np.nonzero(there & (value > 0))
    of_row = texts["text_record"][row] == texts["text_record"][row, text][:, None]
    own = np.argmax(of_row & (value[row] == 0), axis=1)
    passages = there & (value <= 0)
    numbers = np.cumsum(passages).reshape(passages.shape) - 1
    return retrieval(texts["vectors"][row, text], texts["vectors"][passages], numbers[row, own])


def retrieval(queries: npt.NDArray[Any], passages: npt.NDArray[Any], own: npt.NDArray[np.integer]) -> dict[str, Any]:
    """
    Args:
        queries: [N, D].
        passages: [M, D].
        own: [N], the number of each query's passage.

    Returns:
        `recall_K`, the share of queries whose passage is among the K nearest, and `mrr`, the mean of 1 over its place.
    """
    unit = lambda x: x / np.maximum(np.linalg.norm(np.float64(x), axis=-1, keepdims=True), 1e-12)
    cosines = unit(queries) @ unit(passages).T
    place = 1 + (cosines > cosines[np.arange(len(own)), own][:, None]).sum(1)
    recalls = {f"recall_{k}": float((place <= k).mean()) for k in (1, 5, 10) if k < len(passages)}
    return recalls | {"mrr": float((1 / place).mean()), "passages": len(passages)}


def linear_probe(
    vectors: npt.NDArray[Any],
    classes: npt.NDArray[np.integer],
    held_out: npt.NDArray[Any],
    wanted: npt.NDArray[np.integer],
    ridge: float = 1e-3,
) -> float:
    """How often a linear map from vectors of unit length to classes is right on other texts: one with a bias, fitted by
    least squares to one number for each class, 1 or 0 (ridge regression, whose solution is one and exact).

    Args:
        vectors: [N, D], to fit.
        classes: [N], of each.
        held_out: [M, D].
        wanted: [M].
        ridge: weight of the squares of the map, for each text.
    """

    def inputs(x: npt.NDArray[Any]) -> _Floats:
        unit = _wide(x) / np.maximum(np.linalg.norm(_wide(x), axis=-1, keepdims=True), 1e-12)
        return np.concatenate([unit, np.ones((len(x), 1))], 1)

    x, y = inputs(vectors), np.eye(1 + int(max(classes.max(), wanted.max())))[classes]
    found = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    return float(((inputs(held_out) @ found).argmax(1) == wanted).mean())


def buckets(x: _Floats, right: _Floats, most: int = _BUCKETS) -> list[list[float]]:
    """Points (mean of x, mean of right) of equally many, from the smallest x up."""
    parts = np.array_split(np.argsort(x, kind="stable"), min(most, len(x)))
    return [[float(x[part].mean()), float(right[part].mean())] for part in parts if len(part)]


def _of_confidence(confidence: _Floats, right: _Floats) -> dict[str, Any]:
    if not len(right):
        return {}
    return {"calibration_error": calibration_error(confidence, right), "calibration": buckets(confidence, right)}


def _of_kl(texts: TextArrays) -> dict[str, Any]:
    if "kl" not in texts:
        return {}
    return {"kl": float(_wide(texts["kl"]).sum() / max(_wide(texts["tokens"]).sum(), 1))}


def _pairs(texts: TextArrays) -> tuple[tuple[npt.NDArray[Any], ...], tuple[npt.NDArray[Any], ...]]:
    """Places of the better and of the worse text of each pair."""
    record, value = texts["text_record"], texts["text_value"]
    same = (record[:, :, None] == record[:, None, :]) & (record[:, :, None] >= 0)
    row, better, worse = np.nonzero(same & (value[:, :, None] > value[:, None, :]))
    return (row, better), (row, worse)


def _wide(x: npt.NDArray[Any]) -> _Floats:
    return x.astype(np.float64)


def _right(margin: _Floats) -> _Floats:
    """1 above 0, 1/2 at 0, else 0."""
    right: _Floats = (np.sign(margin) + 1) / 2
    return right


def _sigmoid(x: _Floats) -> _Floats:
    sigmoid: _Floats = 1 / (1 + np.exp(-x))
    return sigmoid
