"""Runs as laws are fitted to them: parameters, tokens, FLOPs and losses, from tables and from run folders."""

from __future__ import annotations

import csv
import enum
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import numpy as np

from maxlm.config import RunConfig, UserError, serialize
from maxlm.config.fields import config, shown
from maxlm.config.json_file import MAX_BYTES, parse_object, read_bytes
from maxlm.observe.metrics import read_rows
from maxlm.observe.plots import points, smooth
from maxlm.scaling.laws import FLOPS_PER_PARAMETER_TOKEN, Floats
from maxlm.shapes import flops_per_token, parameter_count


class SizeOf(enum.Enum):
    """Which parameters N counts."""

    TOTAL = "total"
    """All of them, as Chinchilla counts."""
    NON_EMBEDDING = "non_embedding"
    """Without the tables of input and output, as Kaplan et al. count."""


class FlopsRule(enum.Enum):
    """What C is."""

    COUNTED = "counted"
    """As maxlm counts them, attention included, or as a table's column `flops` says."""
    SIX_ND = "6nd"
    """6ND, with the N that is counted."""


class LossSource(enum.Enum):
    """Which losses of a run folder count."""

    HELD_OUT = "held_out"
    """Of evals.jsonl."""
    TRAINING = "training"
    """Of metrics.jsonl, smoothed."""


@config("--")
class Reading:
    """What is read of runs."""

    parameters: SizeOf = SizeOf.TOTAL
    """Which parameters of a run folder's model N counts. A table's params are taken as they are."""
    flops: FlopsRule | None = None
    """What C is; None: counted where every run says it, else 6ND."""
    loss: LossSource = LossSource.HELD_OUT
    """Which losses of a run folder count."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One training run."""

    name: str
    parameters: float
    tokens: float
    """At its end."""
    loss: float
    """At its end, nats a token."""
    flops: float
    """Of all its training, by the rule that was chosen."""
    curve: tuple[tuple[float, float], ...]
    """Tokens and loss on the way, the end included; tokens rise."""

    @property
    def six_nd(self) -> float:
        return FLOPS_PER_PARAMETER_TOKEN * self.parameters * self.tokens


class MeasuredRuns(NamedTuple):
    """What was read."""

    runs: list[MeasuredRun]
    flops: FlopsRule
    """What their C is."""
    notes: list[str]
    """A line for each run that was left out."""


class _Found(NamedTuple):
    """A run before its C is chosen."""

    name: str
    parameters: float
    curve: list[tuple[float, float]]
    counted: float | None


def columns(runs: Sequence[MeasuredRun]) -> tuple[Floats, Floats, Floats]:
    """Parameters, tokens and final losses [R]."""
    rows = np.array([(run.parameters, run.tokens, run.loss) for run in runs], np.float64)
    return rows[:, 0], rows[:, 1], rows[:, 2]


def read_runs(places: Sequence[str], reading: Reading) -> MeasuredRuns:
    """
    Args:
        places: tables (.csv, .jsonl), run folders, and folders of run folders.
        reading: what counts.

    Raises:
        UserError: a place is none of these, a table lacks a column or has a number that cannot be, or no run is left.
    """
    found, notes = list[_Found](), list[str]()
    for place in places:
        path = Path(place)
        if path.is_dir():
            folders = [path] if (path / "config.json").is_file() else _run_folders(path)
            for folder in folders:
                run = _of_folder(folder, reading)
                if isinstance(run, _Found):
                    found.append(run)
                else:
                    notes.append(run)
        else:
            found += _of_table(path)
    if not found:
        raise UserError(f"{', '.join(places)}: no finished run ({'; '.join(notes) or 'the tables are empty'})")
    rule = reading.flops
    if rule is None:
        rule = FlopsRule.SIX_ND if any(run.counted is None for run in found) else FlopsRule.COUNTED
    return MeasuredRuns([_with_flops(run, rule) for run in found], rule, notes)


def _with_flops(found: _Found, rule: FlopsRule) -> MeasuredRun:
    tokens, loss = found.curve[-1]
    match rule:
        case FlopsRule.COUNTED:
            if found.counted is None:
                raise UserError(f"{found.name}: has no flops, as --flops counted wants; add them, or use --flops 6nd")
            flops = found.counted
        case FlopsRule.SIX_ND:
            flops = FLOPS_PER_PARAMETER_TOKEN * found.parameters * tokens
        case _:
            assert_never(rule)
    return MeasuredRun(
        name=found.name,
        parameters=found.parameters,
        tokens=tokens,
        loss=loss,
        flops=flops,
        curve=tuple(found.curve),
    )


# Run folders


def _run_folders(path: Path) -> list[Path]:
    folders = sorted(file.parent for file in path.glob("*/config.json"))
    if not folders:
        raise UserError(f"{path}: neither a run folder nor a folder of them; name one that has config.json")
    return folders


def training_flops(config: RunConfig, tokens: float) -> float:
    """Of training the model on so many tokens, forward and backward, as MFU counts (`maxlm.shapes`)."""
    return flops_per_token(config.model, config.train.seq_len, config.execution.remat).total * tokens


def size_of(config: RunConfig, which: SizeOf) -> int:
    """N of a model."""
    count = parameter_count(config.model)
    return count.total - (0 if which is SizeOf.TOTAL else count.embedding + count.unembedding)


def steps_done(folder: Path) -> int:
    """Of the training in a run folder, as far as metrics.jsonl says; 0 without one."""
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def _of_folder(folder: Path, reading: Reading) -> _Found | str:
    """The run, or why it is left out."""
    config = serialize.load(RunConfig, folder / "config.json")
    done = steps_done(folder)
    if done < config.train.steps:
        return f"{folder}: is at step {done:,} of {config.train.steps:,}, where the learning rate is not down; left out"
    match reading.loss:
        case LossSource.HELD_OUT:
            curve = points(read_rows(folder / "evals.jsonl"), "eval_loss")
            remedy = "train with a validation split, or use --loss training"
        case LossSource.TRAINING:
            curve = smooth(points(read_rows(folder / "metrics.jsonl"), "loss"))
            remedy = "train again"
        case _:
            assert_never(reading.loss)
    if not curve:
        raise UserError(f"{folder}: has no {reading.loss.value} loss; {remedy}")
    return _Found(
        name=folder.name,
        parameters=float(size_of(config, reading.parameters)),
        curve=_rising(curve),
        counted=training_flops(config, curve[-1][0]),
    )


def _rising(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """By tokens, and of the same number of them the last."""
    return sorted({float(tokens): float(loss) for tokens, loss in curve}.items())


# Tables


def _of_table(path: Path) -> list[_Found]:
    """Rows with the same `run` are one curve."""
    rows: list[tuple[str, str, dict[str, float]]] = []
    for where, row in table_rows(path, "runs"):
        values = {key: positive(row, key, where) for key in ("params", "tokens", "loss")}
        if row.get("flops") not in (None, ""):
            values["flops"] = positive(row, "flops", where)
        rows.append((str(row.get("run") or where), where, values))
    found = []
    for name, group in itertools.groupby(sorted(rows, key=lambda one: one[0]), lambda one: one[0]):
        members = sorted(group, key=lambda one: one[2]["tokens"])
        last = members[-1][2]
        if strange := [where for _, where, values in members if values["params"] != last["params"]]:
            raise UserError(
                f"{strange[0]}: run {shown(name)} has another params elsewhere; give runs names of their own"
            )
        curve = _rising([(values["tokens"], values["loss"]) for _, _, values in members])
        found.append(_Found(name, last["params"], curve, last.get("flops")))
    return found


def table_rows(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a table: `file, line N`, and its values by column.

    Raises:
        UserError: the file cannot be read, is neither .csv nor .jsonl, or a line is no row.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"{path}: must be a table of {what}, .csv or .jsonl, or a folder")
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a table of {what}") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield f"{path}, line {number}", parse_object(line, Path(f"{path}, line {number}"), "a JSON object")
        return
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace"), newline=""), skipinitialspace=True)
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: has not as many values as the first line has names; mend the line")
        yield where, dict(row)


def positive(row: dict[str, Any], key: str, where: str, *, or_zero: bool = False) -> float:
    """A number of a row.

    Raises:
        UserError: it is missing, no number, not finite, or not above 0.
    """
    value = row.get(key)
    if value is None:
        raise UserError(f"{where}: has no {key}; its columns are {shown(', '.join(map(str, row)))}")
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and (number > 0 or (or_zero and number == 0))):
        words = "a number of at least 0" if or_zero else "a positive number"
        raise UserError(f"{where}: {key} = {shown(value)} must be {words}; mend or leave out the line")
    return number


def as_rows(runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    """What of the runs is kept beside a fit."""
    return [
        {"run": run.name, "params": run.parameters, "tokens": run.tokens, "loss": run.loss, "flops": run.flops}
        for run in runs
    ]
