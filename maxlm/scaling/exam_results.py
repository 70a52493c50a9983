"""What downstream laws are fitted to: of each model FLOPs, the likelihood of right answers, and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import RunConfig, UserError, serialize
from maxlm.config.fields import shown
from maxlm.config.json_file import MAX_BYTES, parse_object, read_bytes, read_object
from maxlm.scaling.measured_runs import positive, table_rows, training_flops

_WROTE = "what python -m maxlm.evaluate --tasks ... --out wrote"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model in one exam."""

    name: str
    flops: float | None
    """Of its training; None: not known, so that it says only what accuracy goes with a likelihood."""
    nll: float
    """Mean negative log-likelihood of the right answers, in nats; of folders for each byte of them."""
    accuracy: float
    """0 to 1."""


class Outcomes(NamedTuple):
    """What was read."""

    found: list[Outcome]
    chance: float | None
    """The share that guessing gets right; None: not known."""


def read_outcomes(places: Sequence[str], exam: str | None) -> Outcomes:
    """
    Args:
        places: tables with nll, accuracy and perhaps flops and run, and folders that maxlm.evaluate wrote.
        exam: which one of the folders; None: the only one.

    Raises:
        UserError: a place is neither, or a number cannot be.
    """
    found, chances = list[Outcome](), set[float]()
    for place in places:
        path = Path(place)
        if path.is_dir():
            outcome, chance = _of_folder(path, exam)
            found.append(outcome)
            chances.add(chance)
        else:
            found += [_of_row(row, where) for where, row in table_rows(path, "exam results")]
    if len(chances) > 1:
        raise UserError(f"the folders have exams with different chance, {sorted(chances)}; take one exam")
    return Outcomes(found, next(iter(chances), None))


def _of_row(row: dict[str, Any], where: str) -> Outcome:
    accuracy = positive(row, "accuracy", where, or_zero=True)
    if accuracy > 1:
        raise UserError(f"{where}: accuracy = {accuracy:g} must be from 0 to 1; divide by 100 what is in per cent")
    return Outcome(
        name=str(row.get("run") or where),
        flops=None if row.get("flops") in (None, "") else positive(row, "flops", where),
        nll=positive(row, "nll", where),
        accuracy=accuracy,
    )


def _of_folder(folder: Path, exam: str | None) -> tuple[Outcome, float]:
    """The outcome, and chance."""
    about = read_object(folder / "results.json", _WROTE)
    try:
        marks = {one["exam"]: one for one in about["results"] if one["measure"] == "acc_per_byte"}
        model, step = str(about["model"]), int(about["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'results.json'}: is not {_WROTE}") from error
    if exam not in marks and (exam is not None or len(marks) != 1):
        asked = "several or no exams of choices" if exam is None else f"no exam {shown(exam)} of choices"
        raise UserError(f"{folder}: has {asked}; name one with --exam {' or '.join(marks) or 'NAME'}")
    name = next(iter(marks)) if exam is None else exam
    file = folder / f"{name.replace('/', '_')}.jsonl"
    try:
        lines = read_bytes(file, MAX_BYTES).splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); evaluate again with --out") from error
    records = [parse_object(line, file) for line in lines]
    try:
        nlls = [-float(one["log_probs_per_byte"][one["answer"]]) for one in records]
        accuracy, chance = float(marks[name]["value"]), float(marks[name]["chance"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{file}: has no log_probs_per_byte of each answer; evaluate again with --out") from error
    outcome = Outcome(
        name=f"{model} at {step}", flops=_flops(Path(model), step), nll=sum(nlls) / len(nlls), accuracy=accuracy
    )
    return outcome, chance


def _flops(run_dir: Path, step: int) -> float | None:
    """Of a run's training up to a step; None: the model is no run."""
    file = run_dir / "config.json"
    if not file.is_file() or "model_type" in read_object(file):  # of a published model
        return None
    config = serialize.load(RunConfig, file)
    return training_flops(config, step * config.train.batch_size * config.train.seq_len)
