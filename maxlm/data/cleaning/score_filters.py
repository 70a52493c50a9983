"""Steps that judge documents by a classifier or a language model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config.cleaning.score_steps import (
    BitsPerByteFilter,
    DomainTagger,
    LeastScore,
    ParetoDraw,
    QualityFilter,
    RunEmbeddings,
)
from maxlm.data.claimed import replaced, write_json
from maxlm.data.cleaning.drawn import drawn
from maxlm.data.cleaning.findings import DocumentStep, Finding, Limit, Page, Tag, measured
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.cleaning.quality_classifier import Classifier
from maxlm.data.cleaning.stages import CleaningStage, ComparingStep, StepWorkspace

_Floats = npt.NDArray[np.float64]


class QualityVerdict:
    """Which scores stay."""

    def __init__(self, selection: LeastScore | ParetoDraw, good: int) -> None:
        """`good`: the place of the class that is wanted."""
        self._selection, self._good = selection, good
        match selection:
            case LeastScore(least=least):
                self.limits = (Limit("quality", least=least, unit="probability"),)
            case ParetoDraw():
                self.limits = (Limit("quality and a drawn number", least=1.0, unit="sum"),)
            case _:
                assert_never(selection)

    def __call__(self, page: Page, probabilities: _Floats) -> Finding:
        score = float(probabilities[self._good])
        chance = pareto(page.id, self._selection) if isinstance(self._selection, ParetoDraw) else 0.0
        return Finding(measured(self.limits, [score + chance]), tags={"quality": round(score, 6)})


def pareto(id: str, draw: ParetoDraw) -> float:
    """A number of the Pareto distribution that begins at 0, as numpy's (Lomax): U^(-1/alpha) - 1, U in (0, 1]."""
    return (1 - drawn(id, draw.seed)) ** (-1 / draw.alpha) - 1


class DomainVerdict:
    """What a document's domain is."""

    limits: tuple[Limit, ...] = ()

    def __init__(self, classes: tuple[str, ...], least: float) -> None:
        self._classes, self._least = classes, least

    def __call__(self, page: Page, probabilities: _Floats) -> Finding:
        best = int(probabilities.argmax())
        return Finding(tags={"domain": self._classes[best] if probabilities[best] >= self._least else "other"})


class BitsVerdict:
    """How well a model may foretell a document."""

    def __init__(self, config: BitsPerByteFilter) -> None:
        self.limits = (Limit("bits per byte", config.least, math.inf if config.most is None else config.most, "bits"),)

    def __call__(self, page: Page, bits: _Floats) -> Finding:
        value = float(bits[0])
        tags: Mapping[str, Tag] = {"bits_per_byte": round(value, 6) if math.isfinite(value) else None}
        return Finding(measured(self.limits, [value]), tags=tags)


ScoreVerdict = QualityVerdict | DomainVerdict | BitsVerdict


class JudgedText:
    """A step with a verdict on the scores of each page."""

    def __init__(self, scores: Callable[[Page], _Floats], verdict: ScoreVerdict) -> None:
        self._scores, self._verdict = scores, verdict
        self.limits = verdict.limits

    def __call__(self, page: Page) -> Finding:
        return self._verdict(page, self._scores(page))


class InBatches:
    """A step whose scores come from a large model, which wants many documents at once: they are made in a stage of its
    own, part by part."""

    def __init__(self, score: Callable[[Sequence[str]], _Floats], batch: int, verdict: ScoreVerdict) -> None:
        """`score`: [n, scores] of n texts."""
        self._score, self._batch, self._verdict = score, batch, verdict

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        return (CleaningStage("scores", before.tasks, lambda task: self._write(before, task)),)

    def step(self, before: StepWorkspace, task: int) -> DocumentStep:
        ids, scores = _files(before.folder, task)
        rows = np.load(scores, allow_pickle=False)
        known = dict(zip(json.loads(ids.read_text()), rows, strict=True))
        return JudgedText(lambda page: known[page.id], self._verdict)

    def _write(self, before: StepWorkspace, task: int) -> None:
        ids, rows = list[str](), list[_Floats]()
        documents = before.pages(task)
        while pages := list(islice(documents, self._batch)):
            ids += [page.id for page in pages]
            rows.append(self._score([page.text for page in pages]))
        of_ids, of_scores = _files(before.folder, task)
        write_json(of_ids, ids, shared=True)
        with replaced(of_scores, shared=True) as stream:
            np.save(stream, np.concatenate(rows) if rows else np.empty((0, 1)), allow_pickle=False)


def _files(folder: Path, task: int) -> tuple[Path, Path]:
    return folder / f"ids-{task:06d}.json", folder / f"scores-{task:06d}.npy"


def quality_filter(config: QualityFilter, models: CleaningModels) -> DocumentStep | ComparingStep:
    """
    Raises:
        UserError: the classifier cannot be read, or has no such class.
    """
    classifier = Classifier.open(Path(config.model))
    verdict = QualityVerdict(config.selection, classifier.index(config.good, Path(config.model)))
    return _by_classifier(classifier, verdict, models)


def domain_tagger(config: DomainTagger, models: CleaningModels) -> DocumentStep | ComparingStep:
    """
    Raises:
        UserError: the classifier cannot be read.
    """
    classifier = Classifier.open(Path(config.model))
    return _by_classifier(classifier, DomainVerdict(classifier.classes, config.least), models)


def bits_per_byte_filter(config: BitsPerByteFilter, models: CleaningModels) -> ComparingStep:
    """
    Raises:
        UserError: the run cannot be read.
    """
    scorer = models.scorer(config.run)
    return InBatches(lambda texts: scorer(texts)[:, None], config.batch, BitsVerdict(config))


def _by_classifier(
    classifier: Classifier, verdict: ScoreVerdict, models: CleaningModels
) -> DocumentStep | ComparingStep:
    if isinstance(classifier.features, RunEmbeddings):
        embedder = models.embedder(classifier.features.run, classifier.fingerprint)
        return InBatches(classifier.of_texts(embedder), classifier.features.batch, verdict)
    return JudgedText(lambda page: classifier.of_text(page.text), verdict)
