"""One run through a part of the documents: each goes through steps, until one drops it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from maxlm.config.cleaning.cleaning_job import KeptOfRemoved
from maxlm.data.claimed import replaced
from maxlm.data.cleaning.findings import DocumentStep, Page, broken
from maxlm.data.cleaning.parts import write_line
from maxlm.data.cleaning.tallies import PassTally, StepTally, verdict


class NamedStep(NamedTuple):
    """A step and the name of its folder in `removed/`, such as `03-GopherQuality`."""

    name: str
    step: DocumentStep


class PassResult(NamedTuple):
    """Of a part."""

    tally: PassTally
    seconds: list[float]
    """Of processor time, of each step."""


def run_pass(pages: Iterable[Page], steps: Sequence[NamedStep], kept: IO[bytes], removed: Removed) -> PassResult:
    """Take the pages through the steps; what is left is written to `kept`, line by line."""
    tally = PassTally([StepTally() for _ in steps])
    seconds = [0.0] * len(steps)
    for page in pages:
        if not page.text.strip():
            tally.blank += 1
            continue
        size = len(page.text.encode(errors="replace"))
        for number, ((name, step), of_step) in enumerate(zip(steps, tally.steps, strict=True)):
            began = time.process_time()
            finding = step(page)
            seconds[number] += time.process_time() - began
            limits = step.limits
            if broken(limits, finding) is not None or (finding.text is not None and not finding.text.strip()):
                of_step.note(page, size, limits, finding, None)
                removed.write(name, page, verdict(limits, finding).record())
                break
            left = size if finding.text is None else len(finding.text.encode(errors="replace"))
            of_step.note(page, size, limits, finding, left)
            if finding.text is not None:
                removed.write(name, page, {"changes": dict(finding.changes)})
                page, size = page._replace(text=finding.text), left
            if finding.tags:
                page = page._replace(tags={**page.tags, **finding.tags})
        else:
            tally.keep(page, size)
            kept.write(write_line(page))
    return PassResult(tally, seconds)


class Removed(contextlib.ExitStack):
    """Files of what steps of a pass dropped or changed in one part, there when the block has ended without an error."""

    def __init__(self, folder: Path, part: int, what: KeptOfRemoved) -> None:
        super().__init__()
        self._folder, self._part, self._what = folder, part, what
        self._files: dict[str, IO[bytes]] = {}

    def write(self, name: str, page: Page, why: dict[str, Any]) -> None:
        """A document that the step of that name was given, and what it said."""
        if (file := self._files.get(name)) is None:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            file = self._files[name] = self.enter_context(
                replaced(self._folder / name / f"{self._part:05}.jsonl", shared=True)
            )
        record: dict[str, Any] = {"id": page.id, "step": name, **why}
        if self._what is KeptOfRemoved.TEXTS:
            record["text"] = page.text
        file.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
