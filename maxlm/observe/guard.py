"""What keeps a run going when a place that its figures go to fails, or never answers."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from maxlm.config import UserError

W = TypeVar("W")
T = TypeVar("T")

PATIENCE_S = 30.0
"""How long a place may take for a row, a file or its end."""
_WAITING = 1000
"""Rows that may wait for a place that is not waited for."""


class Guarded(Generic[W]):
    """One place, used in a daemon thread of its own, in the order of the calls.

    The first exception, or the first call that takes too long, switches it off: `off` is told once, and every later
    call does nothing. Nothing is raised here.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], W],
        off: Callable[[str, str], None],
        *,
        wait: bool = True,
        patience_s: float | None = None,
    ) -> None:
        """
        Args:
            name: as `off` gets it, before the reason.
            make: opens the place.
            off: told of the end; from any thread.
            wait: whether calls wait until they are done, so that what was written is there; without it only `close`
                waits, and the run never does.
            patience_s: how long a call that is waited for may take; None: PATIENCE_S.
        """
        self._name, self._off, self._wait = name, off, wait
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._lock = threading.Lock()
        self._ended = False
        self._place: W | None = None
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue(_WAITING)
        threading.Thread(target=self._work, name=f"write {name}", daemon=True).start()

        def open_place() -> None:
            self._place = make()

        self._ask(open_place, wait)

    def __call__(self, use: Callable[[W], T]) -> T | None:
        """What `use` makes of the place; None if it is off, or is not waited for."""
        return self._ask(lambda: use(self._place), self._wait)  # type: ignore[arg-type]

    def close(self, use: Callable[[W], Any] = lambda place: None) -> None:
        """The last call, waited for in any case."""
        self._ask(lambda: use(self._place), True)  # type: ignore[arg-type]
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)

    def _ask(self, call: Callable[[], T], wait: bool) -> T | None:
        if self._ended:
            return None
        answer: Future[T | None] = Future()
        try:
            self._calls.put_nowait((call, answer))
        except queue.Full:
            self._end(f"{_WAITING} rows wait for it")
            return None
        if not wait:
            return None
        try:
            return answer.result(self._patience_s)
        except TimeoutError:
            self._end(f"no answer for {self._patience_s:.0f} s")
            return None

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, answer = item
            result = None
            if not self._ended:
                try:
                    result = call()
                except BaseException as error:  # a client may call sys.exit
                    self._end(reason(error))
            answer.set_result(result)

    def _end(self, why: str) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._off(self._name, why)


def reason(error: BaseException) -> str:
    """Why, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    return words if isinstance(error, UserError) else f"{type(error).__name__}: {words}".removesuffix(": ")
