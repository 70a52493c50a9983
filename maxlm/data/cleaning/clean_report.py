"""What became of the documents: `report.json`, and a page with a funnel, histograms and samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import serialize
from maxlm.config.cleaning.cleaning_job import CleaningJob
from maxlm.data.claimed import write_json
from maxlm.data.cleaning.findings import Limit
from maxlm.data.cleaning.tallies import PassTally, Shown, StepTally
from maxlm.data.input_files import REPORT
from maxlm.observe.page import section, table, tiles, write_page

PAGE = "report.html"
_BINS, _WIDTH, _HEIGHT = 40, 420, 120


class StepRow(NamedTuple):
    """A step in the funnel."""

    name: str
    tally: StepTally
    limits: tuple[Limit, ...]
    seconds: float


class CleaningReport(NamedTuple):
    """Of a finished job."""

    job: CleaningJob
    rows: list[StepRow]
    first: PassTally
    """It read the input."""
    last: PassTally
    """What it kept is what there is."""

    @property
    def read(self) -> tuple[int, int]:
        """Documents and bytes that went in."""
        first = self.first.steps[0] if self.first.steps else None
        seen, size = (self.first.kept, self.first.kept_bytes) if first is None else (first.seen, first.seen_bytes)
        return seen + self.first.blank, size


def funnel(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Of `report.json`: names and rows of a table, what each step was given and what it let pass."""
    names = ["step", "documents", "dropped", "changed", "MB after", "s", "most by rule"]
    rows = []
    for step in record["steps"]:
        dropped, seen = sum(step["dropped"].values()), step["seen"]
        left = step["seen_bytes"] - step["dropped_bytes"] - step["removed_bytes"]
        why = Counter(step["dropped"] or step["changes"]).most_common(1)
        rows.append(
            [
                *(step["name"], f"{seen:,}", f"{dropped:,} ({dropped / max(1, seen):.1%})", f"{step['changed']:,}"),
                *(f"{left / 1e6:,.2f}", f"{step['seconds']:,.1f}"),
                ", ".join(f"{rule}: {count:,}" for rule, count in why),
            ]
        )
    return names, rows


def write_report(report: CleaningReport, out: Path) -> None:
    """Write the page, then `report.json`, which says that all is done."""
    record, last = _record(report), report.last
    documents, size = report.read
    figures = [
        ("documents read", f"{documents:,}"),
        ("documents kept", f"{last.kept:,} ({last.kept / max(1, documents):.1%})"),
        ("bytes read", f"{size:,}"),
        ("bytes kept", f"{last.kept_bytes:,} ({last.kept_bytes / max(1, size):.1%})"),
        ("tokens kept, at 4 bytes each", f"{last.kept_bytes // 4:,}"),
        ("blank", f"{report.first.blank:,}"),
        ("could not be read", f"{report.first.unreadable:,}"),
    ]
    names, rows = funnel(record)
    histograms = [
        _histogram(f"{row.name}: {limit.rule}", row.tally.values[limit.rule], limit)
        for row in report.rows
        for limit in row.limits
        if row.tally.values.get(limit.rule)
    ]
    body = [
        f"<h1>{escape(out.name)}</h1>",
        tiles(figures),
        section("Funnel", table(names, rows)),
        section("What was measured, and the limits", _charts(histograms)),
        section("Some documents that were kept", _samples(last.samples)),
        *(section(f"Dropped by {row.name}", _samples(row.tally.samples)) for row in report.rows),
        section("Not read", table(["file and reason"], [[line] for line in report.first.examples])),
    ]
    write_page(out / PAGE, f"{out.name}: cleaning", body)
    write_json(out / REPORT, record)


def _record(report: CleaningReport) -> dict[str, Any]:
    documents, size = report.read
    return {
        "job": serialize.to_dict(report.job),
        "read": {"documents": documents, "bytes": size},
        "kept": {"documents": report.last.kept, "bytes": report.last.kept_bytes},
        "blank": report.first.blank,
        "unreadable": {"count": report.first.unreadable, "examples": report.first.examples},
        "steps": [
            {
                "name": row.name,
                **{key: value for key, value in vars(row.tally).items() if key != "samples"},
                "limits": [{"rule": one.rule, **_bounds(one)} for one in row.limits],
                "seconds": round(row.seconds, 3),
            }
            for row in report.rows
        ],
    }


def _bounds(limit: Limit) -> dict[str, float]:
    return {name: bound for name, bound in (("least", limit.least), ("most", limit.most)) if math.isfinite(bound)}


def _charts(figures: Sequence[str]) -> str:
    return f"<div class=charts>{''.join(figures)}</div>" if figures else ""


def _samples(samples: Sequence[Shown]) -> str:
    return "".join(
        f"<details><summary>{escape(one.id)} <i>{escape(one.why)}</i></summary><pre>{escape(one.text)}</pre></details>"
        for one in samples
    )


def _histogram(title: str, values: Counter[str], limit: Limit) -> str:
    """Bars of how many documents have which value, with the limits as lines; logarithmic where values are far apart."""
    found = sorted((float(value), count) for value, count in values.items() if math.isfinite(float(value)))
    bounds = list(_bounds(limit).values())
    if not found:
        return ""
    low, high = min([found[0][0], *bounds]), max([found[-1][0], *bounds])
    positive = [value for value, _ in found if value > 0]
    logarithmic = low >= 0 and high > 100 and bool(positive)
    smallest = min([*positive, *(bound for bound in bounds if bound > 0)], default=1.0)
    at = (lambda value: math.log(max(value, smallest))) if logarithmic else (lambda value: value)
    begin, span = at(low), (at(high) - at(low)) or 1.0
    bins = [0] * _BINS
    for value, count in found:
        bins[min(_BINS - 1, int((at(value) - begin) / span * _BINS))] += count
    top, width = max(bins), _WIDTH / _BINS
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{_HEIGHT * (1 - n / top):.1f}" width="{width - 1:.1f}" '
        f'height="{_HEIGHT * n / top:.1f}" fill="var(--raw)"/>'
        for i, n in enumerate(bins)
        if n
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}" stroke="var(--eval)" stroke-width="2"/>'
        for x in ((at(bound) - begin) / span * _WIDTH for bound in bounds)
    )
    ends = (
        f'<text x="0" y="{_HEIGHT + 14}">{low:.3g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{high:.3g}{" (log)" * logarithmic}</text>'
    )
    told = ", ".join(f"{name} {bound:g}" for name, bound in _bounds(limit).items())
    return (
        f"<figure><figcaption>{escape(title)} <span class='key eval'>{escape(told)}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 18}" role="img">{bars}{lines}{ends}</svg></figure>'
    )
