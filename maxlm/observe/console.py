"""What a person sees while a run goes on: rows that scroll, and on a terminal a status line below them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from types import TracebackType
from typing import Self

import rich.console
import rich.live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maxlm.observe.metrics import Row
from maxlm.observe.text import duration, gibibytes, short


class Console:
    """Rows of metrics on standard output; a status line too where that is a terminal, no control codes where it is not.

    A console with `enabled` off (every process but 0) takes the same calls and prints nothing.
    """

    def __init__(self, *, enabled: bool = True, output: rich.console.Console | None = None) -> None:
        self._output = output or rich.console.Console(highlight=False)
        self._enabled = enabled
        self._live: rich.live.Live | None = None
        self._total = 0
        self._latest: Row | None = None
        self._memory_limit: int | None = None
        self._begin = time.monotonic()

    def start(self, total: int, first_step: int, header: Sequence[str], *, memory_limit: int | None = None) -> None:
        """Print the header lines and show the status line of a run that has done `first_step` of `total` steps."""
        self._total, self._memory_limit, self._begin = total, memory_limit, time.monotonic()
        for line in header:
            self.say(line)
        if first_step:
            self.say(f"continuing after step {first_step:,} of {total:,}")
        if self._enabled and self._output.is_terminal and not self._output.is_dumb_terminal:
            self._live = rich.live.Live(
                get_renderable=lambda: self._status(first_step),
                console=self._output,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()

    def log(self, row: Row) -> None:
        """Print one row."""
        self._latest = row
        self.say(self._row(row))
        if self._live is not None:
            self._live.refresh()

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
        text = _printable(text, self._output.encoding)
        if self._output.is_terminal:
            self._output.print(Text(text, style=style))
        else:  # rich would cut long lines to a width that a file does not have
            print(text, file=self._output.file, flush=True)

    def warning(self, text: str) -> None:
        """Print a line that stands out."""
        self.say(f"warning: {text}", style="bold yellow")

    def stop(self) -> None:
        """Take the status line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _row(self, m: Row) -> str:
        width = len(f"{self._total:,}")
        parts = [f"step {m['step']:>{width},}/{self._total:,}", f"loss {m['loss']:.4f}"]
        if m["tokens_per_s"] is not None and m["step_time_s"] is not None:
            parts += [f"{short(m['tokens_per_s'])} tokens/s", f"{m['step_time_s']:.3g} s/step"]
        if m["mfu"] is not None:
            parts.append(f"MFU {100 * m['mfu']:.3g} %")
        parts += [f"lr {m['learning_rate']:.2e}", f"grad norm {m['grad_norm']:.3f}"]
        if m.get("z_loss"):
            parts.append(f"z-loss {m['z_loss']:.2e}")
        if m.get("moe_load_entropy"):
            parts.append(f"load entropy {fmean(m['moe_load_entropy']):.3f}")
            if dropped := fmean(m["moe_dropped_share"]):
                parts.append(f"dropped {100 * dropped:.2g} %")
        if m.get("skipped_steps"):
            parts.append(f"skipped {m['skipped_steps']}")
        if (left := self._time_left(m)) is not None and self._live is None:
            parts.append(f"{left} left")
        return "  ".join(parts)

    def _time_left(self, m: Row) -> str | None:
        return None if m["step_time_s"] is None else duration(m["step_time_s"] * (self._total - m["step"]))

    def _status(self, first_step: int) -> Table:
        """Bar and time on the first line, the latest figures on the second."""
        m = self._latest
        step = m["step"] if m else first_step
        elapsed = duration(time.monotonic() - self._begin)
        left = self._time_left(m) if m else None
        if m is None:
            figures = ["compiling and running the first step"]
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
            Text(f"step {step:,}/{self._total:,}", style="bold"),
            ProgressBar(total=self._total, completed=step, width=30),
            Text(f"{elapsed} elapsed" + (f", {left} left" if left else "")),
        )
        whole = Table.grid()
        whole.add_row(first)
        whole.add_row(Text(" | ".join(figures), style="cyan"))
        return whole


def _printable(text: str, encoding: str) -> str:
    """`text`, which a model may have written, with control characters and what `encoding` lacks spelled out."""
    visible = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return visible.encode(encoding, "backslashreplace").decode(encoding)
