"""`report.html`: all of a run folder on one page that needs nothing else, neither network nor script."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from maxlm.config import UserError
from maxlm.config.json_file import read_object
from maxlm.observe.guard import reason
from maxlm.observe.metrics import Row, read_rows
from maxlm.observe.plots import loss_name, points, smooth
from maxlm.observe.svg import Line, chart
from maxlm.observe.text import gibibytes, short

T = TypeVar("T")

_SAMPLES_SHOWN = 5
_LEAST_ROWS = 5
"""Of a mean: a single batch says little."""
_EXPERT_CURVES = {
    "moe_load_entropy": "Entropy of the experts' load (1: even), mean over layers",
    "moe_max_over_mean_load": "Load of the busiest expert over the mean, mean over layers",
    "moe_dropped_share": "Share of dropped choices, mean over layers",
    "auxiliary_loss": "Auxiliary loss of the routers, sum over layers",
}
_TASK_CURVES = {
    "reward_margin": "Reward of the better answer less that of the worse",
    "kl_estimate": "Estimate of the KL to the reference, nats a token",
    "reward_accuracy": "Share of pairs that are right, of a batch",
    "accuracy": "Share that is right, of a batch",
}

_PICTURES = {
    "eval_calibration": ("Calibration: share that is right", "predicted"),
    "eval_accuracy_by_margin": ("Share of pairs that are right", "margin, nats"),
    "eval_accuracy_by_rating": ("Share of pairs that are right", "how far their ratings are apart"),
}


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """One checkpoint as the report lists it."""

    step: int
    n_bytes: int
    saved: datetime


def write_report(
    run_dir: Path,
    checkpoints: Sequence[SavedCheckpoint] = (),
    *,
    switched_off: Mapping[str, str] | None = None,
    complete: int | None = None,
) -> Path:
    """Write `run_dir/report.html` from what lies in the folder: config.json, run.json, metrics.jsonl, evals.jsonl,
    samples.jsonl. What is missing is left out; what cannot be read too, and named.

    Args:
        run_dir: the run folder.
        checkpoints: to list.
        switched_off: what the run could not write -> why.
        complete: the step that the run is at with all measurements made, for `report_step`.
    """
    problems = dict(switched_off or {})

    def read(read_one: Callable[[Path], T], name: str, nothing: T) -> T:
        try:
            return read_one(run_dir / name)
        except (OSError, UserError) as error:
            problems.setdefault(str(run_dir / name), reason(error))
            return nothing

    none: list[Row] = []
    metrics, evals, samples = (read(read_rows, f"{name}.jsonl", none) for name in ("metrics", "evals", "samples"))
    empty: dict[str, Any] = {}
    facts, config = (read(_read_object, f"{name}.json", empty) for name in ("run", "config"))
    body = [
        f"<h1>{escape(run_dir.resolve().name)}</h1>",
        f"<p class=sub>{escape(_subtitle(facts, metrics))}</p>",
        _tiles(_summary(facts, metrics, evals)),
        *_curves(metrics, evals),
        _section("Held-out text", _eval_table(evals) + _pictures(evals)),
        _section("Samples", "".join(_sample(row) for row in samples[-_SAMPLES_SHOWN:])),
        _section("Checkpoints", _checkpoint_table(checkpoints)),
        _section("Switched off, or not readable", _pairs(problems.items())),
        _section("Model and machine", _facts_table(facts)),
        _section("Config", _config_tables(config)),
    ]
    page = _PAGE.format(
        title=escape(f"{run_dir.resolve().name} - maxlm run"), style=_STYLE, body="\n".join(body), complete=complete
    )
    path = run_dir / "report.html"
    part = path.with_suffix(".part")
    try:
        part.write_text(page, encoding="utf-8", errors="replace")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def report_step(run_dir: Path) -> int | None:
    """The step at which `write_report` was told that all is complete; None: it was not, or there is no report."""
    try:
        with (run_dir / "report.html").open("rb") as file:
            found = re.search(rb'<meta name="complete" content="(\d+)">', file.read(1000))
    except OSError:
        return None
    return int(found[1]) if found else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists() or path.is_char_device() or path.is_fifo():  # those have no end
        return {}
    try:
        return read_object(path)
    except UserError as error:  # the caller names the file
        raise UserError(str(error).removeprefix(f"{path}: ")) from error


def _subtitle(facts: Mapping[str, Any], metrics: Sequence[Row]) -> str:
    parts = []
    if metrics:
        total = f" of {facts['steps']:,}" if "steps" in facts else ""
        parts.append(f"step {metrics[-1]['step']:,}{total}")
    if facts:
        parts += [
            f"{facts['n_devices']} x {facts['device_kind']}",
            f"started {datetime.fromisoformat(facts['started']):%Y-%m-%d %H:%M %Z}",
        ]
    return " · ".join(parts)


def _summary(facts: Mapping[str, Any], metrics: Sequence[Row], evals: Sequence[Row]) -> list[tuple[str, str]]:
    """(name, figure) of the tiles; throughput figures are medians over all rows."""
    tiles = []
    if facts:
        tiles.append(("parameters", short(facts["parameters"]["total"])))
    if tokens := _known(metrics, "tokens"):
        tiles.append(("tokens trained", short(tokens[-1])))
    if losses := _known(metrics, "loss"):
        last = losses[-max(_LEAST_ROWS, math.ceil(0.03 * len(losses))) :]
        tiles.append((f"training loss, last {len(last)} rows", f"{statistics.fmean(last):.4f}"))
    if evals:
        newest = evals[-1]
        names = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "eval_bits_per_byte": "bits per byte"}
        tiles += [(name, f"{newest[key]:.4g}") for key, name in names.items() if newest.get(key) is not None]
    if speeds := _known(metrics, "tokens_per_s"):
        tiles.append(("tokens per second", short(statistics.median(speeds))))
        tiles.append(("seconds per step", f"{statistics.median(_known(metrics, 'step_time_s')):.3g}"))
    if utilisation := _known(metrics, "mfu"):
        tiles.append(("MFU", f"{100 * statistics.median(utilisation):.3g} %"))
    if memory := _known(metrics, "memory_bytes"):
        tiles.append(("memory, highest row", gibibytes(max(memory))))
    if metrics and metrics[-1].get("skipped_steps"):
        tiles.append(("skipped steps", str(metrics[-1]["skipped_steps"])))
    return tiles


def _known(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(figures: float | list[float | None]) -> float | None:
    """Over layers; None if a layer's figure is not known."""
    layers = figures if isinstance(figures, list) else [figures]
    known = [figure for figure in layers if figure is not None]
    return statistics.fmean(known) if len(known) == len(layers) else None


def _curves(metrics: Sequence[Row], evals: Sequence[Row]) -> list[str]:
    raw = points(metrics, "loss")
    loss = [
        Line(label="training, as logged", style="raw", points=raw),
        Line(label="training, smoothed", style="smooth", points=smooth(raw)),
        Line(label="held-out", style="eval", points=points(evals, "eval_loss"), marks=True),
    ]
    single = {
        "learning_rate": "Learning rate",
        "grad_norm": "Gradient norm before clipping",
        "tokens_per_s": "Tokens per second",
    }
    single = {key: title for key, title in _TASK_CURVES.items() if _known(metrics, key)} | single
    charts = [chart(loss_name(evals).capitalize(), loss, x_label="tokens")]
    for key, title in _EXPERT_CURVES.items():
        if means := [{**row, key: _mean(row[key])} for row in metrics if row.get(key) is not None]:
            charts.append(chart(title, [Line(label="", style="smooth", points=points(means, key))], x_label="tokens"))
    for key, title in single.items():
        charts.append(chart(title, [Line(label="", style="smooth", points=points(metrics, key))], x_label="tokens"))
    return ["<div class=charts>", *charts, "</div>"]


def _eval_table(evals: Sequence[Row]) -> str:
    known = {
        "step": "step", "tokens": "tokens trained", "eval_loss": "loss", "eval_perplexity": "perplexity",
        "eval_bits_per_byte": "bits/byte", "eval_tokens": "tokens measured",
    }  # fmt: skip
    if any("eval_perplexity" in row for row in evals):
        known["eval_loss"] = "loss, nats/token"
    there = dict.fromkeys(key for row in evals for key, value in row.items() if not isinstance(value, list))
    columns = [*(key for key in known if key in there), *(key for key in there if key not in known)]
    names = [known.get(key, key.removeprefix("eval_").replace("_", " ")) for key in columns]
    return _table(names, [[_cell(row.get(key)) for key in columns] for row in evals])


def _pictures(evals: Sequence[Row]) -> str:
    """Of the newest measurement: its lists of points."""
    drawn = []
    for key, value in (evals[-1] if evals else {}).items():
        if isinstance(value, list) and value:
            title, x_label = _PICTURES.get(key, (key.removeprefix("eval_").replace("_", " "), ""))
            line = Line(label="", style="eval", points=[(x, y) for x, y in value], marks=True)
            drawn.append(chart(title, [line], x_label=x_label))
    return "".join(["<div class=charts>", *drawn, "</div>"]) if drawn else ""


def _checkpoint_table(checkpoints: Sequence[SavedCheckpoint]) -> str:
    rows = [[f"{c.step:,}", gibibytes(c.n_bytes), f"{c.saved:%Y-%m-%d %H:%M:%S}"] for c in checkpoints]
    return _table(["step", "size", "saved"], rows)


def _sample(row: Row) -> str:
    text = f"<b>{escape(str(row.get('prompt', '')))}</b>{escape(str(row.get('text', '')))}"
    return f"<p class=sub>after step {row['step']:,}</p><pre>{text}</pre>"


def _facts_table(facts: Mapping[str, Any]) -> str:
    return _pairs(
        (key, value)
        for key, value in _leaves(facts)
        if key not in ("started", "steps") and not key.startswith("switched_off")
    )


def _config_tables(config: Mapping[str, Any]) -> str:
    """One table for each part of the config, which folds away."""
    loose = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
    parts = [_pairs(_leaves(loose))] if loose else []
    for key, value in config.items():
        if key not in loose:
            parts.append(f"<details><summary>{escape(key)}</summary>{_pairs(_leaves(value, key))}</details>")
    return "".join(parts)


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of nested objects and lists."""
    items: Iterable[tuple[Any, Any]]
    match value:
        case dict() if value:
            items = value.items()
        case list() if any(isinstance(item, dict | list) for item in value):
            items = enumerate(value)
        case _:
            yield prefix, value
            return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.5g}"
        case _:
            return json.dumps(value)


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_cell(value))}</td></tr>" for key, value in pairs)
    return f"<table class=pairs>{rows}</table>" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{first}</tr>{rest}</table></div>"


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f"<div><span>{escape(name)}</span><b>{escape(figure)}</b></div>" for name, figure in tiles)
    return f"<div class=tiles>{inner}</div>" if tiles else ""


def _section(title: str, inner: str) -> str:
    return f"<h2>{escape(title)}</h2>{inner}" if inner else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="complete" content="{complete}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --text: #1d1f21; --soft: #63686e; --line: #dfe1e3; --tile: #fff;
  --raw: #a9bedb; --smooth: #1f4e9c; --eval: #c8501e; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --text: #e6e6e4; --soft: #9aa0a6; --line: #34383c;
  --tile: #1f2225; --raw: #41597a; --smooth: #7fb0f5; --eval: #f2915f; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 34px 0 10px; }
.sub { color: var(--soft); margin: 2px 0 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
.tiles div { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tiles span { display: block; color: var(--soft); font-size: 13px; } .tiles b { font-size: 20px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.key { font-weight: 400; font-size: 13px; margin-left: 10px; color: var(--soft);
  display: inline-block; } .key:empty { display: none; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }
.key.raw::before { background: var(--raw); } .key.smooth::before { background: var(--smooth); }
.key.eval::before { background: var(--eval); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.8; }
polyline.raw { stroke: var(--raw); stroke-width: 1; } polyline.smooth { stroke: var(--smooth); }
polyline.eval { stroke: var(--eval); } circle.eval { fill: var(--eval); } circle.smooth { fill: var(--smooth); }
circle.raw { fill: var(--raw); }
pre { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } .pairs td { overflow-wrap: anywhere; }
.pairs th { font-family: ui-monospace, monospace; font-size: 13px; }
summary { cursor: pointer; padding: 5px 0; } details table { margin: 0 0 10px 16px; }
"""
