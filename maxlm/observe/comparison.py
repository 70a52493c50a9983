"""Several runs on one page: a table with a row for each, their curves, and what each answers to the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from maxlm.config import Preference, RunConfig, UserError, serialize
from maxlm.observe.metrics import Row, read_rows
from maxlm.observe.page import cell, section, table, write_page
from maxlm.observe.plots import loss_name
from maxlm.observe.report import loss_chart, task_charts
from maxlm.observe.text import short

_HELD_OUT = 3
"""Held-out figures that are shown of a run."""


class Answered(NamedTuple):
    """What a run says to a question."""

    text: str
    right: bool | None
    """None: nobody has said what is right."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run, and what is known of it beside its own files."""

    name: str
    """Short, unlike the others'."""
    folder: Path
    figures: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the table, and what stands in those of its files in their place."""
    answers: Sequence[Answered] = ()
    """To the questions of the page; none: it was not asked."""
    talks: bool = False
    """Whether `maxlm.chat` can talk to it."""


def table_of(runs: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """The names of columns, and the cells of each run.

    Raises:
        UserError: a folder is no run folder, or a file in it cannot be read.
    """
    rows = [{"run": run.name, **_from_files(run.folder), **run.figures} for run in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return columns, [[row.get(key, "-") for key in columns] for row in rows]


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same for a terminal."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def write_comparison(path: Path, runs: Sequence[Compared], questions: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: of the file.
        runs: in the order of the page.
        questions: what each run that was asked has answered, as it was asked.

    Raises:
        UserError: as `table_of`.
    """
    columns, rows = table_of(runs)
    talks = [run for run in runs if run.talks]
    commands = "\n".join(f"python -m maxlm.chat --run {run.folder}" for run in talks)
    body = [
        "<h1>Runs side by side</h1>",
        f"<p class=sub>{escape(' · '.join(run.name for run in runs))}</p>",
        section("Runs", table(columns, rows)),
        section("Curves", _curves(runs)),
        section("Answers to the same questions", _answers([run for run in runs if run.answers], questions)),
        section("To talk to one", f"<pre>{escape(commands)}</pre>" if commands else ""),
    ]
    write_page(path, "Runs side by side - maxlm", body)


def _from_files(folder: Path) -> dict[str, str]:
    """Of a run folder: columns and what they say."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is no run folder, it has no config.json; name what training or quantize wrote")
    config = serialize.load(RunConfig, folder / "config.json")
    metrics, evals = (read_rows(folder / f"{name}.jsonl") for name in ("metrics", "evals"))
    found = {"learned by": _task(config), "from": config.checkpoint.init_from or "-"}
    if metrics:
        found |= {"steps": f"{metrics[-1]['step']:,}", "tokens": short(metrics[-1]["tokens"])}
    if seconds := [row["step_time_s"] for row in metrics if row.get("step_time_s") is not None]:
        found["minutes"] = f"{statistics.median(seconds) * metrics[-1]['step'] / 60:.1f}"
    if evals:
        found["held-out"] = _held_out(evals[-1])
    return found


def _task(config: RunConfig) -> str:
    """The task, or the loss that a task of preferences has."""
    what = config.task.loss if isinstance(config.task, Preference) else config.task
    return type(what).__name__


def _held_out(row: Row) -> str:
    shown = [(key, value) for key, value in row.items() if key.startswith("eval_") and isinstance(value, int | float)]
    named = [f"{key.removeprefix('eval_').replace('_', ' ')} {cell(value)}" for key, value in shown]
    return ", ".join(named[:_HELD_OUT]) or "-"


def _curves(runs: Sequence[Compared]) -> str:
    charts = []
    for run in runs:
        metrics, evals = (read_rows(run.folder / f"{name}.jsonl") for name in ("metrics", "evals"))
        charts.append(loss_chart(f"{run.name}: {loss_name(evals)}", metrics, evals))
        charts += task_charts(metrics, evals, f"{run.name}: ")
    drawn = "".join(charts)
    return f"<div class=charts>{drawn}</div>" if drawn else ""


def _answers(runs: Sequence[Compared], questions: Sequence[str]) -> str:
    """A row for each question, a column for each run."""
    if not runs or not questions:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("asked", *(run.name for run in runs)))
    rows = ""
    for n, question in enumerate(questions):
        said = (run.answers[n] for run in runs)
        cells = "".join(f"<td{' class=right' if one.right else ''}>{escape(one.text)}</td>" for one in said)
        rows += f"<tr><th>{escape(question)}</th>{cells}</tr>"
    return f"<div class=scroll><table class=side><tr>{head}</tr>{rows}</table></div>"
