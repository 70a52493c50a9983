"""Train a linear classifier on texts of known classes, and measure it on texts held out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.sparse

from maxlm.config import UserError
from maxlm.config.cleaning.score_steps import ClassifierTraining, HashedWords, RunEmbeddings
from maxlm.data.cleaning.drawn import drawn
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.cleaning.quality_classifier import Classifier, hashed_features, softmax

REPORT = "classifier_report.json"
_CURVE = 101
_Floats = npt.NDArray[np.float64]
_Matrix = Any  # [rows, features], an array or a sparse matrix


@dataclasses.dataclass(frozen=True)
class ClassReport:
    """How well held-out texts are told to be of a class, or not."""

    name: str
    documents: int
    """Held out, of this class."""
    precision: float
    """Of those said to be of the class, as the most probable one, the share that is; NaN: none is said to be."""
    recall: float
    """Of those of the class, the share that is said to be."""
    auc: float
    """The chance that a text of the class has the higher probability of two, one of them of another class."""
    threshold: float
    """The probability from which on precision and recall have the largest harmonic mean (F1)."""
    f1: float
    """That mean."""
    roc: tuple[tuple[float, float, float], ...]
    """(threshold, share of other texts at or above it, share of texts of the class at or above it) from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class ClassifierReport:
    """What was trained and how good it is."""

    trained: int
    """Documents."""
    held_out: int
    """Documents."""
    accuracy: float
    """Share of held-out documents whose most probable class is theirs."""
    iterations: int
    """Of L-BFGS."""
    loss: float
    """Mean cross-entropy of the trained documents in nats, with the penalty."""
    classes: tuple[ClassReport, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.trained:,} documents trained on, {self.held_out:,} held out; accuracy {self.accuracy:.4f}, "
            f"loss {self.loss:.4f} after {self.iterations} iterations",
            *(
                f"  {one.name:<16} precision {one.precision:.4f}, recall {one.recall:.4f}, AUC {one.auc:.4f}; "
                f"best F1 {one.f1:.4f} from {one.threshold:.4f} on"
                for one in self.classes
            ),
        ]
        return "\n".join(lines)


def train_classifier(
    classes: Mapping[str, Iterable[str]], config: ClassifierTraining, out: Path, models: CleaningModels
) -> ClassifierReport:
    """Train on the texts of each class, and write the folder `out`: `Classifier.open` reads it, and the report is in
    `classifier_report.json`.

    Raises:
        UserError: `out` is there already, there are fewer than two classes, or one has no text to train on or none held
            out.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; name a new folder")
    if len(classes) < 2:
        raise UserError(f"classes = {', '.join(classes)} must be at least two; name another folder")
    texts, labels, held = list[str](), list[int](), list[bool]()
    for label, (name, of_class) in enumerate(classes.items()):
        first = len(texts)
        for text in of_class:
            texts.append(text)
            labels.append(label)
            held.append(drawn(text) < config.held_out)
        if len(set(held[first:])) < 2:
            raise UserError(
                f"{name}: {len(texts) - first} documents, {sum(held[first:])} of them held out, are too few; add "
                "documents, or change held_out: there must be some of both"
            )
    features, fingerprint = config.features, None
    if isinstance(features, RunEmbeddings):
        place, fingerprint = models.exact(features.run)
        features = dataclasses.replace(features, run=place)
    x, y, test = _features(texts, features, models), np.array(labels), np.array(held)
    weights, bias, iterations, loss = fit(x[~test], y[~test], len(classes), config.l2, config.max_iterations)
    probabilities = softmax(x[test] @ weights + bias)
    report = ClassifierReport(
        trained=int((~test).sum()),
        held_out=int(test.sum()),
        accuracy=float((probabilities.argmax(axis=1) == y[test]).mean()),
        iterations=iterations,
        loss=loss,
        classes=tuple(_measure(name, i, probabilities, y[test]) for i, name in enumerate(classes)),
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = weights.astype(np.float32), bias.astype(np.float32)
    Classifier(tuple(classes), features, *arrays, fingerprint).save(partial)
    (partial / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    partial.rename(out)
    return report


def _features(texts: Sequence[str], config: HashedWords | RunEmbeddings, models: CleaningModels) -> _Matrix:
    """[documents, features]."""
    match config:
        case HashedWords():
            rows = [hashed_features(text, config) for text in texts]
            ends = np.cumsum([0, *(len(row.buckets) for row in rows)])
            columns, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
            return scipy.sparse.csr_array((values, columns, ends), shape=(len(texts), 1 << config.bucket_bits))
        case RunEmbeddings():
            embed = models.embedder(config.run)
            starts = range(0, len(texts), config.batch)
            return np.concatenate([embed(texts[i : i + config.batch]) for i in starts]).astype(np.float64)


def fit(
    x: _Matrix, y: npt.NDArray[np.int64], classes: int, l2: float, max_iterations: int
) -> tuple[_Floats, _Floats, int, float]:
    """Weights [features, classes] and bias [classes] of the least loss, iterations, and the loss.

    Features that no row has keep the weight 0, at which the penalty alone holds them.
    """
    used = np.unique(x.indices) if scipy.sparse.issparse(x) else np.arange(x.shape[1])
    seen = x[:, used]
    found = scipy.optimize.minimize(
        loss_and_gradient,
        np.zeros((len(used) + 1) * classes),
        args=(seen, seen.T.tocsr() if scipy.sparse.issparse(seen) else seen.T, y, classes, l2),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 1e-10, "gtol": 1e-7},
    )
    values = found.x.reshape(-1, classes)
    weights = np.zeros((x.shape[1], classes))
    weights[used] = values[:-1]
    return weights, values[-1], int(found.nit), float(found.fun)


def loss_and_gradient(
    values: _Floats, x: Any, transposed: Any, y: npt.NDArray[np.int64], classes: int, l2: float
) -> tuple[float, _Floats]:
    """Mean cross-entropy of softmax(x W + b) in nats, plus l2 / 2 times the sum of W squared; and its slope.

    Args:
        values: [(features + 1) * classes]; W, then b.
        x: [n, features].
        transposed: `x.T`.
        y: [n]; the class of each row.
        classes: their number.
        l2: of the penalty.
    """
    table = values.reshape(-1, classes)
    weights, bias = table[:-1], table[-1]
    logits = x @ weights + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(y))
    loss = -log_probability[rows, y].mean() + l2 / 2 * float((weights**2).sum())
    slope = np.exp(log_probability)
    slope[rows, y] -= 1
    slope /= len(y)
    return float(loss), np.concatenate([transposed @ slope + l2 * weights, [slope.sum(axis=0)]]).ravel()


def _measure(name: str, label: int, probabilities: _Floats, y: npt.NDArray[np.int64]) -> ClassReport:
    own, said, score = y == label, probabilities.argmax(axis=1) == label, probabilities[:, label]
    both = int((own & said).sum())
    levels = np.unique(score)
    above = lambda of: len(of) - np.searchsorted(np.sort(of), levels)
    hits, false = above(score[own]), above(score[~own])
    f1 = 2 * hits / (hits + false + own.sum())
    best = int(f1.argmax())
    grid = np.linspace(0, 1, _CURVE)
    shares = [1 - np.searchsorted(np.sort(of), grid) / len(of) for of in (score[~own], score[own])]
    return ClassReport(
        name=name,
        documents=int(own.sum()),
        precision=both / int(said.sum()) if said.any() else float("nan"),
        recall=both / int(own.sum()),
        auc=_auc(score[own], score[~own]),
        threshold=float(levels[best]),
        f1=float(f1[best]),
        roc=tuple((float(t), float(a), float(b)) for t, a, b in zip(grid, *shares, strict=True)),
    )


def _auc(own: _Floats, other: _Floats) -> float:
    """The chance that a number of the first is larger than one of the second; equal ones count half."""
    other = np.sort(other)
    below = np.searchsorted(other, own, "left") + np.searchsorted(other, own, "right")
    return float(below.mean() / 2 / len(other))
