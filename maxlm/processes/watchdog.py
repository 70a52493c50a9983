"""The stacks of a step that takes too long, and an end to it where that is wanted."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from maxlm.config import LimitsConfig
from maxlm.processes.joining import ranks
from maxlm.surroundings import tell

_FIRST_STEP_S = 1800.0
"""For steps of which nothing is known yet: an accelerator may still be loading programs."""
_MEASURED, _TIMES_MEDIAN, _LEAST_S = 5, 20, 60.0
"""The default limit, from so many steps on: so many times the median of the latest, and no less than so many
seconds."""
_REMEMBERED = 64
_DEEPEST = 100
"""Calls shown of a thread."""


class Watchdog:
    """Watches the steps of a run from a thread of its own.

    with Watchdog(limits) as watchdog:
        for ...:
            watchdog.step(done)         # between two steps
            with watchdog.off_duty():   # measuring, saving: may take as long as it takes
        watchdog.rest()
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._step = 0
        self._began: float | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._closed.set()

    def step(self, done: int) -> None:
        """So many steps are done, and the next one begins."""
        now = time.monotonic()
        if self._began is not None and done > self._step:
            self._seconds.append(now - self._began)
        self._step, self._began = done, now

    def rest(self) -> None:
        """The last step is done: what follows may take as long as it takes."""
        self._began = None

    @contextlib.contextmanager
    def off_duty(self) -> Iterator[None]:
        """No step is under way inside."""
        entered, self._began = self._began, None
        out = time.monotonic()
        try:
            yield
        finally:
            if entered is not None:
                self._began = entered + time.monotonic() - out

    def limit(self) -> float:
        """Seconds that a step may take."""
        if self._limits.step_s is not None:
            return self._limits.step_s
        if len(self._seconds) < _MEASURED:
            return _FIRST_STEP_S
        return max(_LEAST_S, _TIMES_MEDIAN * statistics.median(self._seconds))

    def _watch(self) -> None:
        told = -1
        while not self._closed.wait(min(1.0, (self._limits.step_s or 4.0) / 4)):
            began, step = self._began, self._step
            if began is None or step == told or time.monotonic() - began <= (limit := self.limit()):
                continue
            told = step
            here = ranks()
            who = f"rank {here.rank}, host {here.host}, " if here.size > 1 else ""
            reason = f"this step has taken more than {limit:g} s (limits.step_s)"
            tell(f"warning: {who}step {step + 1}: {reason}; what each thread is doing:\n{_stacks()}")
            if self._limits.end_stuck_run:
                here.end(f"{reason}; ended, as limits.end_stuck_run asks; the same command continues", 1)


def _stacks() -> str:
    """Of all threads, the innermost call first.

    `faulthandler` would stop the whole process where standard error is not read, and `traceback` reads the sources, on
    a disk that may be what hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        calls = itertools.islice(traceback.walk_stack(frame), _DEEPEST)
        lines += [f'  File "{call.f_code.co_filename}", line {line}, in {call.f_code.co_name}' for call, line in calls]
    return "\n".join(lines) + "\n"
