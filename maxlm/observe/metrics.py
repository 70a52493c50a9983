"""The figures of a run as rows of JSON: `metrics.jsonl`, `evals.jsonl`, `samples.jsonl`, one object a line."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from maxlm.config import UserError

Row = dict[str, Any]


COLUMNS = (
    "step", "time", "loss", "tokens", "tokens_per_s", "step_time_s", "mfu", "learning_rate", "grad_norm",
    "update_norm", "skipped_steps", "skipped_spikes", "loss_scale", "overflows", "z_loss", "max_z_loss", "memory_bytes",
    "noise_scale", "noise_scale_sequences", "gradient_squared", "noise_trace",
    "auxiliary_loss", "moe_load_entropy", "moe_dropped_share", "moe_max_over_mean_load",
)  # fmt: skip
"""The order of keys in a row of metrics.jsonl, as far as it has them; other figures follow. docs/observe.md says what
they mean. Figures not known are None, null in the file."""


class RowLog:
    """Appends rows to a file, each flushed to the operating system, so that a killed process loses none.

    Opening it for a run that continues from `resume_step` drops the rows of later steps, which will be written again.
    A file with other lines than rows is set aside as `NAME.damaged`; its rows go on.
    """

    def __init__(self, path: Path, *, resume_step: int, warn: Callable[[str], None] = lambda text: None) -> None:
        """`warn` gets a line if the file is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():  # a device or a pipe has no end
            rows, problem = _read(path)
            part = path.with_name(path.name + ".part")
            try:
                with part.open("w", encoding="utf-8") as file:
                    file.writelines(_line(row) for row in rows if row["step"] <= resume_step)
                    file.flush()
                    os.fsync(file.fileno())
                if problem is not None:
                    aside = _free(path.with_name(path.name + ".damaged"))
                    os.replace(path, aside)
                    warn(f"{path}:{problem}; kept as {aside}, its other rows go on")
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _free(path: Path) -> Path:
    """`path`, or `path-2`, ... where that exists: what was kept once is not written over."""
    names = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist. A last line cut short by a kill is left out.

    Raises:
        UserError: any other line is not an object with a step.
    """
    rows, problem = _read(path)
    if problem is not None:
        raise UserError(f"{path}:{problem}; remove that line")
    return rows


def readable_rows(path: Path) -> list[Row]:
    """What of a file are rows; none if it cannot be read."""
    try:
        return _read(path)[0]
    except OSError:
        return []


def _read(path: Path) -> tuple[list[Row], str | None]:
    """The rows, and place and words of the first line that is none."""
    if not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return [], None
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what follows the last newline is torn
    rows, problem = [], None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif problem is None:
            problem = f"{number}: {line[:40]!r} is not a row, must be a JSON object with an integer step"
    return rows, problem


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
        case list():
            return [_finite(item) for item in value]
        case _:
            return value
