"""Work in stages: a stage is tasks that do not need one another, and begins when the one before it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from maxlm.data.cleaning.findings import DocumentStep, Page


class CleaningStage(NamedTuple):
    """Tasks that may run in any order, on any machine that sees the folder."""

    name: str
    """Of its folder of marks; no other stage of the pipeline has it."""
    tasks: int
    """Known before anything runs, and the same for any number of workers."""
    work: Callable[[int], None]
    """Does a task, by its number: reads what stages before wrote, and writes files of its own (`claimed.replaced`), the
    same ones if it is done again."""


class StepWorkspace(NamedTuple):
    """What a step that compares documents may read and write."""

    tasks: int
    """Parts of the documents; of the same input always the same."""
    folder: Path
    """For what the step itself writes; deleted when the pipeline is done."""
    pages: Callable[[int], Iterator[Page]]
    """The documents of a part, as the steps before have left them, always in the same order."""


@runtime_checkable
class ComparingStep(Protocol):
    """A step whose verdict on a document depends on the others: duplicates, clusters, what is rare."""

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        """What is to be done until `step` can be asked."""

    def step(self, before: StepWorkspace, task: int) -> DocumentStep:
        """What then becomes of the documents of a part: a function of a page's id and text."""
