"""What the user's environment decides: where things may be kept, and who reads what a command says."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import rich.console

PATIENCE_S = 20.0
"""How long who reads what a command says may look away before the command goes on without. Collectives of other ranks
give up after 30 s on CPUs."""
_AT_ONCE_S = 1.0
"""The same, where a command must not wait."""
_PIECE = 4096
"""PIPE_BUF: what a pipe that takes anything takes as a whole."""
_M_MMAP_THRESHOLD = -3
"""mallopt(3), malloc.h."""
_LARGE = 2**16
"""Bytes of an array that is one."""
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
unread = False
"""Whether something waits in vain for who reads standard output or error. Python would wait for it at its end too."""


def cache_folder(name: str) -> Path | None:
    """Where this user's `name` may be kept between runs: `$XDG_CACHE_HOME/maxlm/NAME`, or below ~/.cache.

    None: there is no home, as in a container that runs under a number without a name.
    """
    places = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    # A relative one would be another folder for each command (the XDG specification says to pass it over).
    return next((Path(place, "maxlm", name) for place in places if os.path.isabs(place)), None)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_back_freed_arrays() -> None:
    """From now on the memory of a large array goes back to the system when it is freed, where the C library can do so
    (glibc). It would keep it for the next one: pieces of all sizes, a third of what a conversion takes at its peak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text`, which a model or a stranger may have written, with what a terminal obeys (control characters, the ends of
    directions of writing) and what `encoding` lacks spelled out."""
    visible = _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def console(*, stderr: bool = False, **options: Any) -> rich.console.Console:
    """Output with colours and moving lines on a terminal, and without a control code anywhere else.

    rich alone would put them into files too, where FORCE_COLOR, TTY_COMPATIBLE or TTY_INTERACTIVE are set, as CI does.
    """
    import rich.console  # imported where something is shown: --help stays instant

    there = (sys.stderr if stderr else sys.stdout).isatty()
    return rich.console.Console(
        stderr=stderr, force_terminal=there, force_interactive=None if there else False, **options
    )


def tell(text: str) -> None:
    """Write to standard error from anywhere, as a signal handler or a thread beside one that hangs, and never wait for
    a reader who has stopped reading: what does not go is lost."""
    data = text.encode(errors="backslashreplace")
    with contextlib.suppress(OSError, ValueError):
        for begin in range(0, len(data), _PIECE):
            if not select.select([], [2], [], _AT_ONCE_S)[1]:
                return
            os.write(2, data[begin : begin + _PIECE])


def patiently(write: Callable[[], Any], limit_s: float) -> bool:
    """Write to standard output or error, and wait so long for a reader; whether it took all, or is gone."""
    global unread

    def attempt() -> None:
        with contextlib.suppress(OSError, ValueError):
            write()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    unread = unread or thread.is_alive()
    return not thread.is_alive()


def flush_at_once() -> bool:
    """Write what is still buffered for standard output and error; whether their readers took it without a wait."""
    return all(map(_flushed_at_once, (sys.stdout, sys.stderr)))


def _flushed_at_once(stream: TextIO) -> bool:
    try:
        return patiently(stream.flush, _AT_ONCE_S)
    except RuntimeError:  # Python 3.12 begins no thread while it ends
        try:
            os.set_blocking(stream.fileno(), False)
            try:
                stream.flush()
            finally:
                os.set_blocking(stream.fileno(), True)
        except (OSError, ValueError):
            return False
        return True
