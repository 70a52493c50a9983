"""What tests of cleaning share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from maxlm.data.cleaning.findings import Finding, Page, broken
from maxlm.data.cleaning.stages import ComparingStep


class PagesInParts(NamedTuple):
    """Documents cut into parts (`StepWorkspace`)."""

    parts: Sequence[Sequence[Page]]
    folder: Path

    @property
    def tasks(self) -> int:
        return len(self.parts)

    def pages(self, task: int) -> Iterator[Page]:
        yield from self.parts[task]


def in_parts(pages: Sequence[Page], parts: int, folder: Path) -> PagesInParts:
    """The pages in so many parts, of different sizes, some of them empty."""
    chance = random.Random(parts)
    cuts = sorted(chance.randrange(len(pages) + 1) for _ in range(parts - 1))
    bounds = [0, *cuts, len(pages)]
    return PagesInParts([pages[a:b] for a, b in itertools.pairwise(bounds)], folder)


def findings(step: ComparingStep, before: PagesInParts, order: random.Random | None = None) -> dict[str, Finding]:
    """What the step says of each page, by its id. With an `order`, tasks run in one that it draws, some twice."""
    for stage in step.stages(before):
        tasks = list(range(stage.tasks))
        if order is not None:
            tasks += tasks[::2]
            order.shuffle(tasks)
        for task in tasks:
            stage.work(task)
    return {
        page.id: verdict(page)
        for task in range(before.tasks)
        for verdict in (step.step(before, task),)
        for page in before.pages(task)
    }


def outcome(step: ComparingStep, before: PagesInParts, order: random.Random | None = None) -> dict[str, str]:
    """Text of each page that is left, by its id."""
    found = findings(step, before, order)
    limits = step.step(before, 0).limits
    left = {}
    for part in before.parts:
        for page in part:
            finding = found[page.id]
            text = page.text if finding.text is None else finding.text
            if broken(limits, finding) is None and text.strip():
                left[page.id] = text
    return left
