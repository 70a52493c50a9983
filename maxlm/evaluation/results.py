"""What exams gave, for people and for programs: a table, a JSON file, a picture, every answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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


def write_results(about: Mapping[str, Any], exams: Mapping[str, Examined], folder: Path) -> None:
    """Write results.json, results.svg and, for each exam, its answers as NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
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
