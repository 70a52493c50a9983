"""What became of the documents: `report.json`, and a page with a funnel, histograms and samples."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import serialize
from maxlm.config.cleaning.cleaning_job import CleaningJob
from maxlm.data.claimed import write_json
from maxlm.data.cleaning.findings import Limit
from maxlm.data.cleaning.report_charts import histogram
from maxlm.data.cleaning.tallies import ELLIPSIS, PassTally, Shown, StepTally
from maxlm.data.input_files import REPORT
from maxlm.observe.page import section, table, tiles, write_page

PAGE = "report.html"
_SAMPLES = ("samples", "changed_samples")
"""Of a tally, what is on the page alone."""
_ABOUT_CHARTS = (
    "<p class=sub>Documents by what each rule found; in red those beyond a limit, which is dashed. A rule "
    "sees what those before it let pass. Values are rounded to two digits.</p>"
)
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")


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
    charts = "".join(map(_charts, report.rows))
    body = [
        f"<h1>{escape(out.name)}</h1>",
        tiles(figures),
        section("Funnel", table(names, rows)),
        section("What was measured, and the limits", charts and _ABOUT_CHARTS + charts),
        section("Some documents that were kept", _samples(last.samples)),
        *(section(f"Dropped by {row.name}", _samples(row.tally.samples)) for row in report.rows),
        *(section(f"Changed by {row.name}", _samples(row.tally.changed_samples)) for row in report.rows),
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
                **{key: value for key, value in vars(row.tally).items() if key not in _SAMPLES},
                "limits": [{"rule": one.rule, **_bounds(one)} for one in row.limits],
                "seconds": round(row.seconds, 3),
            }
            for row in report.rows
        ],
    }


def _bounds(limit: Limit) -> dict[str, float]:
    return {name: bound for name, bound in (("least", limit.least), ("most", limit.most)) if math.isfinite(bound)}


def _charts(row: StepRow) -> str:
    """Histograms of a step's rules, if there is something to show."""
    figures = [
        histogram(limit, values, row.tally.dropped[limit.rule])
        for limit in row.limits
        if (values := row.tally.values.get(limit.rule))
    ]
    return f"<h3>{escape(row.name)}</h3><div class=charts>{''.join(figures)}</div>" if any(figures) else ""


def _samples(samples: Sequence[Shown]) -> str:
    return "".join(
        f"<details><summary><bdi>{escape(one.id)}</bdi> <i>{escape(one.why)}</i></summary>"
        f"<pre dir=auto>{escape(one.text) if one.after is None else _difference(one.text, one.after)}</pre></details>"
        for one in samples
    )


def _difference(before: str, after: str) -> str:
    """As HTML, what was taken out of an excerpt and what was put in, up to the last place where both excerpts agree: of
    what follows there nobody can say whether it changed."""
    cut = ELLIPSIS * (before.endswith(ELLIPSIS) or after.endswith(ELLIPSIS))
    old, new = (_PIECE.findall(text.removesuffix(ELLIPSIS)) for text in (before, after))
    found = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    if cut and any(kind == "equal" for kind, *_ in found):
        while found[-1][0] != "equal":
            found.pop()
    shown = []
    for kind, a, b, c, d in found:
        gone, come = escape("".join(old[a:b])), escape("".join(new[c:d]))
        if kind == "equal":
            shown.append(gone)
        else:
            shown += [f"<del>{gone}</del>" if gone else "", f"<ins>{come}</ins>" if come else ""]
    return "".join(shown) + cut
