"""`report.html`: all of a run folder on one page that needs nothing else, neither network nor script."""

from __future__ import annotations

import math
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
from maxlm.observe.page import cell, pairs, section, table, tiles, write_page
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
        tiles(_summary(facts, metrics, evals)),
        *_curves(metrics, evals),
        section("Held-out text", _eval_table(evals) + _pictures(evals)),
        section("Samples", "".join(_sample(row) for row in samples[-_SAMPLES_SHOWN:])),
        section("Checkpoints", _checkpoint_table(checkpoints)),
        section("Switched off, or not readable", pairs(problems.items())),
        section("Model and machine", _facts_table(facts)),
        section("Config", _config_tables(config)),
    ]
    path = run_dir / "report.html"
    write_page(path, f"{run_dir.resolve().name} - maxlm run", body, complete=complete)
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
    found = []
    if facts:
        found.append(("parameters", short(facts["parameters"]["total"])))
    if tokens := _known(metrics, "tokens"):
        found.append(("tokens trained", short(tokens[-1])))
    if losses := _known(metrics, "loss"):
        last = losses[-max(_LEAST_ROWS, math.ceil(0.03 * len(losses))) :]
        found.append((f"training loss, last {len(last)} rows", f"{statistics.fmean(last):.4f}"))
    if evals:
        newest = evals[-1]
        names = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "eval_bits_per_byte": "bits per byte"}
        found += [(name, f"{newest[key]:.4g}") for key, name in names.items() if newest.get(key) is not None]
    if speeds := _known(metrics, "tokens_per_s"):
        found.append(("tokens per second", short(statistics.median(speeds))))
        found.append(("seconds per step", f"{statistics.median(_known(metrics, 'step_time_s')):.3g}"))
    if utilisation := _known(metrics, "mfu"):
        found.append(("MFU", f"{100 * statistics.median(utilisation):.3g} %"))
    if memory := _known(metrics, "memory_bytes"):
        found.append(("memory, highest row", gibibytes(max(memory))))
    if metrics and metrics[-1].get("skipped_steps"):
        found.append(("skipped steps", str(metrics[-1]["skipped_steps"])))
    return found


def _known(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(figures: float | list[float | None]) -> float | None:
    """Over layers; None if a layer's figure is not known."""
    layers = figures if isinstance(figures, list) else [figures]
    known = [figure for figure in layers if figure is not None]
    return statistics.fmean(known) if len(known) == len(layers) else None


def loss_chart(title: str, metrics: Sequence[Row], evals: Sequence[Row]) -> str:
    """The losses over the tokens trained on, as HTML."""
    raw = points(metrics, "loss")
    loss = [
        Line(label="training, as logged", style="raw", points=raw),
        Line(label="training, smoothed", style="smooth", points=smooth(raw)),
        Line(label="held-out", style="eval", points=points(evals, "eval_loss"), marks=True),
    ]
    return chart(title, loss, x_label="tokens")


def task_charts(metrics: Sequence[Row], evals: Sequence[Row], of: str = "") -> list[str]:
    """What else the task looks at, as HTML; `of` stands before each title."""
    reward = [
        Line(label="drawn", style="smooth", points=points(evals, "eval_reward"), marks=True),
        Line(label="the likeliest", style="eval", points=points(evals, "eval_reward_greedy"), marks=True),
    ]
    charts = [chart(f"{of}Reward of answers to held-out prompts", reward, x_label="tokens")]
    for key, title in _TASK_CURVES.items():
        charts.append(
            chart(of + title, [Line(label="", style="smooth", points=points(metrics, key))], x_label="tokens")
        )
    return charts


def _curves(metrics: Sequence[Row], evals: Sequence[Row]) -> list[str]:
    single = {
        "learning_rate": "Learning rate",
        "grad_norm": "Gradient norm before clipping",
        "loss_scale": "Loss scale of float16",
        "noise_scale": "Gradient-noise scale, tokens",
        "tokens_per_s": "Tokens per second",
    }
    charts = [loss_chart(loss_name(evals).capitalize(), metrics, evals), *task_charts(metrics, evals)]
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
    return table(names, [[cell(row.get(key)) for key in columns] for row in evals])


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
    return table(["step", "size", "saved"], rows)


def _sample(row: Row) -> str:
    text = f"<b>{escape(str(row.get('prompt', '')))}</b>{escape(str(row.get('text', '')))}"
    return f"<p class=sub>after step {row['step']:,}</p><pre>{text}</pre>"


def _facts_table(facts: Mapping[str, Any]) -> str:
    return pairs(
        (key, value)
        for key, value in _leaves(facts)
        if key not in ("started", "steps") and not key.startswith("switched_off")
    )


def _config_tables(config: Mapping[str, Any]) -> str:
    """One table for each part of the config, which folds away."""
    loose = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
    parts = [pairs(_leaves(loose))] if loose else []
    for key, value in config.items():
        if key not in loose:
            parts.append(f"<details><summary>{escape(key)}</summary>{pairs(_leaves(value, key))}</details>")
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
