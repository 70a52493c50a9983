"""The figures of a run as rows of JSON: `metrics.jsonl`, `evals.jsonl`, `samples.jsonl`, one object a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maxlm.config import UserError
from maxlm.observe.held_out import bits_per_byte, perplexity

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExpertMetrics:
    """How the routers used their experts in a step's batch: one figure for each layer that has experts, in order."""

    auxiliary_loss: float
    """The routers' part of the objective, weights included, summed over the layers; nats a token, not in `loss`."""
    moe_load_entropy: tuple[float, ...]
    """Entropy of the experts' shares of the choices over log E: 1 when all have the same, 0 when one has all."""
    moe_dropped_share: tuple[float, ...]
    """Choices that were not computed as no room was left, 0..1."""
    moe_max_over_mean_load: tuple[float, ...]
    """Choices of the busiest expert over the mean, 1..E."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One row of metrics.jsonl; the keys keep this order. Figures not known are None, null in the file."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Mean cross-entropy of the step's batch, nats a token."""
    tokens: int
    """Tokens trained on since step 0."""
    tokens_per_s: float | None
    """Over all devices, since the row before; pauses and compilation left out. None: nothing was timed yet."""
    step_time_s: float | None
    """Seconds a step, over the same time."""
    mfu: float | None
    """Model FLOPs utilisation, 0..1 (see flops.py); None where the peak of the device is not known."""
    learning_rate: float
    grad_norm: float
    """Global norm of the gradient before clipping."""
    skipped_steps: int = 0
    """Steps since step 0 whose update was skipped, as loss or gradient was not finite."""
    z_loss: float = 0.0
    """The z-loss part of the objective, weight included; not in `loss`."""
    memory_bytes: int | None = None
    """In use on the fullest device of process 0 (on CPU: by the process)."""
    experts: ExpertMetrics | None = None
    """None in a model without experts; its row has no such keys then."""

    def row(self) -> Row:
        row = asdict(self)
        return row | (row.pop("experts") or {})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row of evals.jsonl: the model on held-out text."""

    step: int
    tokens: int
    """Tokens trained on since step 0."""
    eval_loss: float
    """Mean cross-entropy, nats a token."""
    eval_tokens: int
    """Tokens predicted."""
    eval_bytes: int | None = None
    """UTF-8 bytes that these tokens spell; None: not known."""

    def row(self) -> Row:
        """The fields, and what follows from them."""
        length = self.eval_bytes / self.eval_tokens if self.eval_bytes else None
        return {
            "step": self.step,
            "tokens": self.tokens,
            "eval_loss": self.eval_loss,
            "eval_perplexity": perplexity(self.eval_loss),
            "eval_bits_per_byte": None if length is None else bits_per_byte(self.eval_loss, length),
            "eval_tokens": self.eval_tokens,
        }


class RowLog:
    """Appends rows to a file, each flushed to the operating system, so that a killed process loses none.

    Opening it for a run that continues from `resume_step` drops the rows of later steps, which will be written again.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """
        Raises:
            UserError: the file holds something else than rows.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [row for row in read_rows(path) if row["step"] <= resume_step]
            part = path.with_name(path.name + ".part")
            with part.open("w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist. A last line cut short by a kill is left out.

    Raises:
        UserError: any other line is not an object with a step.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what follows the last newline is torn
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(
                f"{path}:{number}: {line[:40]!r} is not a row, must be a JSON object with an integer step; "
                "remove that line"
            )
        rows.append(row)
    return rows


class Throughput:
    """Tokens a second and seconds a step between two readings, less the pauses.

    The caller makes sure that the device has finished the steps it reports (by fetching their loss, say).
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mark: tuple[int, int, float] | None = None
        self._paused = 0.0

    def start(self, step: int, tokens: int) -> None:
        """Begin to measure, with `step` steps done: after compilation, or after the first step."""
        self._mark, self._paused = (step, tokens, self._clock()), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens inside, such as an evaluation. The device should be idle on entering."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def read(self, step: int, tokens: int) -> tuple[float, float] | None:
        """(tokens per second, seconds per step) since the last `start` or `read`; None when there was none."""
        before, paused = self._mark, self._paused
        self.start(step, tokens)
        assert self._mark is not None
        if before is None or step <= before[0]:
            return None
        seconds = max(self._mark[2] - before[2] - paused, 1e-9)
        return (tokens - before[1]) / seconds, seconds / (step - before[0])


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case tuple():
            return [_finite(item) for item in value]
        case _:
            return value
