"""Signals: SIGTERM and SIGINT ask a run to stop, with everything saved, at the same step on every rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from maxlm.config.errors import EXIT_INTERRUPTED
from maxlm.processes.joining import ranks
from maxlm.surroundings import tell

_UNWIND_S = 3.0
"""What is left to a run that is stopped before its first step: a compiler cannot be interrupted."""


class Interruption:
    """Turns SIGTERM and SIGINT into a request to stop after the current step; a second one stops at once.

    Before `loop_begins` there is nothing to save: SIGTERM leaves with EXIT_INTERRUPTED, SIGINT is Python's own. Use as
    a context manager, in the main thread; elsewhere (a notebook's worker) it leaves signals alone.
    """

    def __init__(self) -> None:
        self._asked = False
        self._in_loop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._watch(signal.SIGTERM)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def loop_begins(self) -> None:
        """From now on a signal lets the step end, and what was computed be saved."""
        self._in_loop = True
        self._watch(signal.SIGINT)

    def reached(self, step: int, last: int) -> bool:
        """Whether to save and stop after so many steps, of `last`. Every rank must ask after every step but the last;
        all get the same answer."""
        return ranks().stops_after(step, asked=self._asked, last=last)

    def goes_back(self, step: int) -> None:
        """After so many steps every rank goes back to an earlier one, together."""
        ranks().goes_back(step)

    def went_back(self, step: int) -> bool:
        """Whether to stop at `step`, which every rank has gone back to: a stop that was agreed for an undone step does
        not wait until that is done again."""
        return ranks().went_back(step, asked=self._asked)

    def _watch(self, number: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        for watched in self._before:
            signal.signal(watched, signal.SIG_DFL)
        if not self._in_loop:
            tell("stopped before the first step: there is nothing to save\n")
            threading.Thread(target=_leave_soon, daemon=True).start()
            raise SystemExit(EXIT_INTERRUPTED)
        self._asked = True
        tell("stopping after this step, and saving; a second signal stops at once, without\n")


def _leave_soon() -> None:
    time.sleep(_UNWIND_S)
    os._exit(EXIT_INTERRUPTED)
