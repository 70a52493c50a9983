"""Training text that has runs of words of an evaluation: reported, dropped or cut.

What is seen in how many documents is known when all of them have been read: a stage finds runs part by part, another
adds them up and writes the report, and then documents are dropped or cut.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.cleaning.decontamination_steps import (
    CutTraining,
    Decontaminate,
    DropTraining,
    KeepTraining,
    OverlapMeasure,
)
from maxlm.data.claimed import replaced, write_json
from maxlm.data.cleaning.evaluation_runs import (
    EvaluationIndex,
    EvaluationItems,
    Item,
    covered,
    indices,
    plain_words,
    read_set,
    stretches,
)
from maxlm.data.cleaning.findings import DocumentStep, Finding, Limit, Page
from maxlm.data.cleaning.hashed_words import FoundWords, folded
from maxlm.data.cleaning.stages import CleaningStage, StepWorkspace

_EXAMPLES = 3
"""Documents that the report names for a run."""


class Decontaminator:
    """See `Decontaminate`."""

    def __init__(self, config: Decontaminate) -> None:
        """
        Raises:
            UserError: a set cannot be read, or the report cannot be written where it should be.
        """
        if Path(config.report).is_dir():
            raise UserError(f"steps[].report = {config.report}: is a folder; name a file in it")
        self._config = config
        self._indices = indices([read_set(one, config.words) for one in config.sets])

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        return (
            CleaningStage("find", before.tasks, functools.partial(self._find, before)),
            CleaningStage("sum", 1, lambda _: self._sum(before)),
        )

    def step(self, before: StepWorkspace, task: int) -> DocumentStep:
        documents = set(json.loads(_found_file(before.folder, task).read_text())["documents"])
        rare = [
            np.ones(index.size, bool)
            if self._config.common is None
            else np.load(_counts_file(before.folder, index), allow_pickle=False) <= self._config.common
            for index in self._indices
        ]
        return _Cleaner(self._config.training, self._indices, rare, documents)

    def _find(self, before: StepWorkspace, task: int) -> None:
        """Write which runs are in which documents of a part."""
        documents = list[str]()
        found = [dict[int, list[int]]() for _ in self._indices]  # run -> how many documents, and the first
        for page in before.pages(task):
            hashes = plain_words(page.text).hashes
            for index, of_index in zip(self._indices, found, strict=True):
                numbers = np.unique(index.find(hashes))
                for number in numbers[numbers >= 0].tolist():
                    if documents[-1:] != [page.id]:
                        documents.append(page.id)
                    of_run = of_index.setdefault(number, [0])
                    of_run[0] += 1
                    if len(of_run) <= _EXAMPLES:
                        of_run.append(len(documents) - 1)  # its place in the list
        write_json(_found_file(before.folder, task), {"documents": documents, "runs": found}, shared=True)

    def _sum(self, before: StepWorkspace) -> None:
        """Write in how many documents each run is, and the report."""
        counts = [np.zeros(index.size, np.int64) for index in self._indices]
        examples = [dict[int, list[str]]() for _ in self._indices]
        for task in range(before.tasks):
            found = json.loads(_found_file(before.folder, task).read_text())
            for of_index, count, named in zip(found["runs"], counts, examples, strict=True):
                for number, (more, *places) in of_index.items():
                    count[int(number)] += more
                    ids = named.setdefault(int(number), [])
                    ids += [found["documents"][place] for place in places[: _EXAMPLES - len(ids)]]
        reports = []
        for index, count, named in zip(self._indices, counts, examples, strict=True):
            with replaced(_counts_file(before.folder, index), shared=True) as stream:
                np.save(stream, count, allow_pickle=False)
            reports += [_report(one, index, count, named, self._config) for one in index.sets]
        order = [one.name for one in self._config.sets]
        values = {
            "measure": self._config.measure.value,
            "least": self._config.least,
            "bytes_of_index": sum(index.nbytes for index in self._indices),
            "sets": sorted(reports, key=lambda one: order.index(one["name"])),
        }
        file = Path(self._config.report)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, values)


def _found_file(folder: Path, task: int) -> Path:
    return folder / f"found-{task:06d}.json"


def _counts_file(folder: Path, index: EvaluationIndex) -> Path:
    return folder / f"counts-{index.length}.npy"


def _report(
    one: EvaluationItems,
    index: EvaluationIndex,
    counts: npt.NDArray[np.int64],
    named: Mapping[int, list[str]],
    config: Decontaminate,
) -> dict[str, Any]:
    """What is to be told of a set. Runs that are in many documents count here: an item may be in many."""
    seen = [row for item in one.items if (row := _row(item, index, counts, named, config)) is not None]
    return {
        "name": one.name,
        "items": len(one.items),
        "too_short": sum(len(item.hashes) < index.length for item in one.items),
        "words_in_a_run": index.length,
        "contaminated": sum(row["contaminated"] for row in seen),
        "overlapping_items": seen,
    }


def _row(
    item: Item,
    index: EvaluationIndex,
    counts: npt.NDArray[np.int64],
    named: Mapping[int, list[str]],
    config: Decontaminate,
) -> dict[str, Any] | None:
    """What is to be told of an item; None: it has nothing in common with training."""
    numbers = index.find(item.hashes)
    found = counts[numbers] > 0
    if not found.any():
        return None
    inside = covered(found, index.length, config.bridge)
    shares = {OverlapMeasure.WORDS: float(inside.mean()), OverlapMeasure.RUNS: float(found.mean())}
    documents = dict.fromkeys(id for number in numbers[found].tolist() for id in named[number])
    return {
        "id": item.id,
        "contaminated": shares[config.measure] >= config.least,
        "share_of_words": round(shares[OverlapMeasure.WORDS], 4),
        "share_of_runs": round(shares[OverlapMeasure.RUNS], 4),
        "longest": max(b - a for a, b in stretches(inside)),  # what tells most of it (ConTAM, arXiv:2411.03923)
        "most_documents": int(counts[numbers[found]].max()),
        "documents": list(documents)[:_EXAMPLES],
    }


class _Cleaner:
    """Drops or cuts the documents of a part."""

    def __init__(
        self,
        training: KeepTraining | DropTraining | CutTraining,
        indices: tuple[EvaluationIndex, ...],
        rare: list[npt.NDArray[np.bool_]],
        documents: set[str],
    ) -> None:
        """
        Args:
            training: what is done.
            indices: of the sets.
            rare: for each index, of each of its runs whether it counts.
            documents: those that have runs at all.
        """
        self._training, self._indices, self._rare, self._documents = training, indices, rare, documents
        self.limits: tuple[Limit, ...]
        match training:
            case KeepTraining():
                self.limits = ()
            case DropTraining(most=most):
                self.limits = (Limit("words of evaluations", most=most, unit="words"),)
            case CutTraining(most_pieces=most):
                self.limits = (Limit("pieces between evaluations", most=most, unit="pieces"),)
            case _:
                assert_never(training)

    def __call__(self, page: Page) -> Finding:
        if isinstance(self._training, KeepTraining):
            return Finding()
        found = plain_words(page.text) if page.id in self._documents else None
        inside = None if found is None else self._inside(found)
        if found is None or inside is None or not inside.any():
            return Finding((0.0 if isinstance(self._training, DropTraining) else 1.0,))
        spans = _characters(page.text, [(found.starts[a], found.ends[b - 1]) for a, b in stretches(inside)])
        seen = page.text[slice(*spans[0])]
        match self._training:
            case DropTraining():
                return Finding((float(inside.sum()),), seen=seen)
            case CutTraining(around=around, least_piece=least):
                pieces = _pieces(page.text, spans, around)
                text = "\n\n".join(piece for piece in pieces if len(piece) >= least)
                return Finding((float(len(pieces)),), seen=seen, text=text, changes={"cut evaluations": len(spans)})

    def _inside(self, found: FoundWords) -> npt.NDArray[np.bool_]:
        """[n]; of the words of a document those that lie in runs that count."""
        inside = np.zeros(len(found.hashes), bool)
        for index, rare in zip(self._indices, self._rare, strict=True):
            numbers = index.find(found.hashes)
            if len(numbers):
                inside |= covered((numbers >= 0) & rare[numbers], index.length)
        return inside


class _Span(NamedTuple):
    """Characters from `start` up to `stop`."""

    start: int
    stop: int


def _characters(text: str, spans: list[tuple[int, int]]) -> list[_Span]:
    """Places of characters in a text, from bytes of `folded(text)`."""
    content = np.frombuffer(folded(text).encode(errors="surrogatepass"), np.uint8)
    before = np.concatenate([[0], np.cumsum((content & 0xC0) != 0x80)])
    return [_Span(int(before[a]), int(before[b])) for a, b in spans]


def _pieces(text: str, spans: list[_Span], around: int) -> list[str]:
    """What is left of a text without the spans and so many characters around each."""
    pieces, at = [], 0
    for start, stop in spans:
        if start - around > at:
            pieces.append(text[at : start - around])
        at = max(at, stop + around)
    return [*pieces, text[at:]] if at < len(text) else pieces
