"""What a person sees while a run goes on: rows that scroll, and on a terminal a status line below them."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from statistics import fmean
from types import TracebackType
from typing import Self

import rich.console
import rich.live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maxlm import surroundings
from maxlm.observe.metrics import Row
from maxlm.observe.text import duration, gibibytes, short

_ROW_WIDTH = 80
"""Columns of a row of metrics: what a terminal has, and a narrow window beside an editor."""
_GONE = (OSError, ValueError, SystemExit)
"""The reader is gone, the disk full, the file closed. rich makes a SystemExit of a broken pipe."""
_PENDING = 1000
"""Lines kept for a reader who has stopped reading."""
_WAIT_LINE_S = 30.0
"""Seconds between the lines that say, where there is no status line, that something still goes on."""


class Console:
    """Rows of metrics on standard output; a status line too where that is a terminal, no control codes where it is not.

    A console with `enabled` off (every process but 0) takes the same calls and prints nothing. One whose output goes
    away (`| head`) says so once on standard error and is silent from then on: no run ends for it. Nor does one wait for
    ever for an output that takes no more (Ctrl-S, a pipe that nobody reads): what comes meanwhile is shown once it
    does, as far as it is not too much.
    """

    def __init__(self, *, enabled: bool = True, output: rich.console.Console | None = None) -> None:
        self._output = output or surroundings.console(highlight=False)
        self._enabled = enabled
        self._writer = _Writer()
        self._lost = 0
        self._live: rich.live.Live | None = None
        self._total = 0
        self._latest: Row | None = None
        self._step = self._first_step = 0
        self._stepping_since = 0.0
        self._waiting: tuple[str, float] | None = None
        self._memory_limit: int | None = None
        self._begin = time.monotonic()

    def start(self, total: int, first_step: int, header: Sequence[str], *, memory_limit: int | None = None) -> None:
        """Print the header lines and show the status line of a run that has done `first_step` of `total` steps."""
        self._total, self._memory_limit, self._begin = total, memory_limit, time.monotonic()
        self._step = self._first_step = first_step
        for line in header:
            self.say(line)
        if first_step:
            self.say(f"continuing after step {first_step:,} of {total:,}")
        if self._enabled and self._output.is_terminal and not self._output.is_dumb_terminal:
            live = rich.live.Live(
                get_renderable=self._status,
                console=self._output,
                refresh_per_second=2,
                transient=True,
            )
            self._attempt(live.start)
            self._live = live if self._enabled else None

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While something long goes on, show for how long: in the status line, or in a line now and then."""
        self._waiting = what, time.monotonic()
        done = threading.Event()
        thread = threading.Thread(target=self._say_waiting, args=(what, done), daemon=True)
        if self._live is None:
            self.say(f"{what} ...")
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.is_alive():
                thread.join()
            self._waiting = None

    def _say_waiting(self, what: str, done: threading.Event) -> None:
        begin = time.monotonic()
        while not done.wait(_WAIT_LINE_S):
            self.say(f"{what} ... {duration(time.monotonic() - begin)}")

    def progress(self, step: int) -> None:
        """Move the bar: so many steps are done. The first call begins the estimate of the time left."""
        if not self._stepping_since:
            self._first_step, self._stepping_since = step, time.monotonic()
        self._step = step

    def log(self, row: Row) -> None:
        """Print one row."""
        self._latest, self._step = row, max(self._step, row["step"])
        self.say(self._row(row))
        if self._live is not None:
            self._attempt(self._live.refresh)

    def measured(self, text: str) -> None:
        """Print a measurement; its first line stands out."""
        first, *rest = text.split("\n", 1)
        self.say(first, style="bold")
        for more in rest:
            self.say(more)

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the status line."""
        if not self._enabled:
            return
        if self._lost:
            text = f"... {self._lost:,} lines are missing here, as nobody read on\n{text}"
        # rich takes an output that it did not get by name for UTF-8.
        text = surroundings.printable(text, getattr(self._output.file, "encoding", None) or "utf-8")
        if self._output.is_terminal:
            taken = self._attempt(lambda: self._output.print(Text(text, style=style)))
        else:  # rich would cut long lines to a width that a file does not have
            taken = self._attempt(lambda: print(f"{text}\n", end="", file=self._output.file, flush=True))
        self._lost = 0 if taken else self._lost + 1

    def warning(self, text: str) -> None:
        """Print a line that stands out."""
        self.say(f"warning: {text}", style="bold yellow")

    def stop(self) -> None:
        """Take the status line away."""
        live, self._live = self._live, None
        if live is not None:
            self._attempt(live.stop)

    def _attempt(self, write: Callable[[], None]) -> bool:
        """Write, in the order of the calls, or be silent from now on; false: too much waits to be written."""

        def attempt() -> None:
            try:
                write()
            except _GONE as error:
                self._go_silent(error)

        return self._writer(attempt)

    def _go_silent(self, error: BaseException) -> None:
        was_enabled, self._enabled = self._enabled, False
        self.stop()  # which gives standard error back
        if not was_enabled:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What is still buffered would fail again when Python ends, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._output.file.fileno())
        with contextlib.suppress(OSError, ValueError):
            print(f"warning: no more output here ({error}); the run goes on, see metrics.jsonl", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _row(self, m: Row) -> str:
        """What fits of the figures; metrics.jsonl has them all."""
        width = len(f"{self._total:,}")
        left = None if m["step_time_s"] is None else duration(m["step_time_s"] * (self._total - m["step"]))
        dropped = fmean(m["moe_dropped_share"]) if m.get("moe_dropped_share") else 0
        # In the order in which they are shown, with the order in which they must find room.
        figures = (
            (0, f"{m['step']:>{width},}/{self._total:,}"),
            (0, f"loss {m['loss']:.4f}"),
            (1, m["tokens_per_s"] is not None and f"{short(m['tokens_per_s'])} tokens/s"),
            (4, m["mfu"] is not None and f"MFU {100 * m['mfu']:.3g} %"),
            (3, bool(m.get("skipped_steps")) and f"skipped {m.get('skipped_steps')}"),
            (3, dropped and f"dropped {100 * dropped:.2g} %"),
            (5, f"grad {m['grad_norm']:.3g}"),
            (6, bool(m.get("moe_load_entropy")) and f"entropy {fmean(m['moe_load_entropy']):.3f}"),
            (7, f"lr {m['learning_rate']:.2e}"),
            (8, m.get("z_loss") and f"z-loss {m['z_loss']:.1e}"),
            (2, left is not None and self._live is None and f"{left} left"),
        )
        room, shown = _ROW_WIDTH + 2, set()
        for _, place in sorted((priority, i) for i, (priority, text) in enumerate(figures) if text):
            if (needed := 2 + len(str(figures[place][1]))) <= room:
                room -= needed
                shown.add(place)
        return "  ".join(str(text) for i, (_, text) in enumerate(figures) if i in shown)

    def _status(self) -> Table:
        """Bar and time on the first line, the latest figures on the second."""
        m, now = self._latest, time.monotonic()
        step_time = m["step_time_s"] if m else None
        if step_time is None and self._stepping_since and self._step > self._first_step:
            step_time = (now - self._stepping_since) / (self._step - self._first_step)
        left = None if step_time is None else duration(step_time * (self._total - self._step))
        if self._waiting is not None:
            figures = [f"{self._waiting[0]}, {duration(now - self._waiting[1])}"]
        elif m is None:
            figures = ["starting"]
        else:
            speed = "-" if m["tokens_per_s"] is None else short(m["tokens_per_s"])
            figures = [f"loss {m['loss']:.4f}", f"{speed} tokens/s", f"{short(m['tokens'])} tokens"]
            if m["mfu"] is not None:
                figures.append(f"MFU {100 * m['mfu']:.3g} %")
            if m["memory_bytes"] is not None:
                limit = f" of {gibibytes(self._memory_limit)}" if self._memory_limit else ""
                figures.append(f"memory {gibibytes(m['memory_bytes'])}{limit}")
        first = Table.grid(padding=(0, 2))
        first.add_row(
            Text(f"step {self._step:,}/{self._total:,}", style="bold"),
            ProgressBar(total=self._total, completed=self._step, width=30),
            Text(f"{duration(now - self._begin)} elapsed" + (f", {left} left" if left else "")),
        )
        whole = Table.grid()
        whole.add_row(first)
        whole.add_row(Text(" | ".join(figures), style="cyan"))
        return whole


class _Writer:
    """Makes calls in a daemon thread, in order. Each is waited for, but not for longer than a reader may look away; and
    then none, until all are made."""

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Callable[[], None], Future[None]]] = queue.Queue(_PENDING)
        self._thread: threading.Thread | None = None
        self._behind = False

    def __call__(self, call: Callable[[], None]) -> bool:
        """Whether it is made, or will be."""
        if self._thread is threading.current_thread():
            call()
            return True
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="console", daemon=True)
            self._thread.start()
        made: Future[None] = Future()
        try:
            self._calls.put_nowait((call, made))
        except queue.Full:
            return False
        if not self._behind:
            try:
                made.result(surroundings.PATIENCE_S)
            except TimeoutError:
                self._behind = surroundings.unread = True
        return True

    def _work(self) -> None:
        while True:
            call, made = self._calls.get()
            try:
                call()
            except BaseException as error:
                made.set_exception(error)
            else:
                made.set_result(None)
            if self._behind and self._calls.empty():
                self._behind = surroundings.unread = False
