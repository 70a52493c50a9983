"""What exams gave, for people and for programs: a table, a JSON file, a picture, every answer."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from maxlm.config import UserError
from maxlm.evaluation.examining import Examined, Measured
from maxlm.observe.svg import ShareBar, bars


def print_results(measures: Sequence[Measured]) -> None:
    """A row for each figure."""
    table = Table()
    for name in ("exam", "measure"):
        table.add_column(name)
    for name in ("value", "95 % interval", "chance", "questions"):
        table.add_column(name, justify="right")
    for one in measures:
        chance = "?" if one.chance is None else f"{one.chance:.3f}"
        interval = f"{one.low:.3f} to {one.high:.3f}"
        table.add_row(one.exam, one.measure, f"{one.value:.3f}", interval, chance, f"{one.questions:,}")
    Console().print(table)


def as_json(about: Mapping[str, Any], measures: Sequence[Measured]) -> str:
    """One object on one line: what was measured, and the figures."""
    return json.dumps({**about, "results": [dataclasses.asdict(one) for one in measures]})


def make_folder(folder: Path) -> None:
    """Make a folder for results, and see whether it takes files, before there is anything to lose.

    Raises:
        UserError: it does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from error


def write_results(about: Mapping[str, Any], exams: Mapping[str, Examined], folder: Path) -> None:
    """Write results.json, results.svg and, for each exam, its answers as NAME.jsonl, into a folder that is there."""
    measures = [one for exam in exams.values() for one in exam.measures]
    (folder / "results.json").write_text(as_json(about, measures) + "\n")
    shown = [
        ShareBar(label=f"{one.exam}, {one.measure}", value=one.value, low=one.low, high=one.high, mark=one.chance)
        for one in measures
        if 0 <= one.low <= one.high <= 1
    ]
    (folder / "results.svg").write_text(bars(str(about.get("model", "results")), shown))
    for name, exam in exams.items():
        lines = (json.dumps(record, default=str) for record in exam.records)
        (folder / f"{name.replace('/', '_')}.jsonl").write_text("".join(f"{line}\n" for line in lines))
