"""The engine on a thread of its own, for callers on any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from maxlm.inference.engine import Engine, Ticket
from maxlm.inference.engine_stats import EngineStats
from maxlm.inference.request import Delta, Draining, Finish, Request

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_WAIT_S = 0.1
"""How long the thread sleeps at most when there is nothing to do: deadlines and signals are looked at so often."""


@dataclass(eq=False)
class _Asked:
    """A call to be made between two steps."""

    call: Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)


class EngineLoop:
    """Steps an engine as long as there is something to do.

    What is asked of it happens between two steps, in the order of the calls; callers wait for that, which is as long as
    one step at most. If a step fails, every text ends with the error, and nothing new is taken.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._asked: deque[_Asked] = deque()
        self._wake = threading.Condition()
        self._listeners: dict[Ticket, Callable[[Delta], None]] = {}
        self._paused = self._draining = self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> Ticket:
        """Take a request. `on_delta` gets all that its text grows by, on this loop's thread: it must not wait.

        Raises:
            Draining: nothing is taken any more.
            QueueFull, BadRequest: as `Engine.submit`.
        """

        def begin() -> Ticket:
            if self._failure is not None:
                raise Draining(f"the engine failed: {self._failure}")
            if self._draining:
                raise Draining("the server is shutting down; ask another one")
            ticket = self.engine.submit(request)
            self._listeners[ticket] = on_delta
            return ticket

        return self._ask(begin)

    def cancel(self, ticket: Ticket) -> None:
        """End a text; its listener gets a last Delta, unless it had it already. Does not wait."""

        def end() -> None:
            if (delta := self.engine.cancel(ticket)) is not None:
                self._tell(ticket, delta)

        self._put(_Asked(end))

    def pause(self) -> None:
        """Finish the step that runs, and begin no other. Requests are still taken."""

        def halt() -> None:
            self._paused = True

        self._ask(halt)

    def resume(self) -> None:
        """Go on."""

        def go_on() -> None:
            self._paused = False

        self._ask(go_on)

    def update_weights(self, parameters: Any) -> None:
        """As `Engine.update_weights`, between two steps."""

        def update() -> None:
            self._tell_all(self.engine.update_weights(parameters))

        self._ask(update)

    @property
    def stats(self) -> EngineStats:
        """Now, or a step ago."""
        return self.engine.stats

    @property
    def failure(self) -> str | None:
        """What ended the engine."""
        return self._failure

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, and wait for what runs and waits; whether all ended in time. The rest is cancelled."""

        def stop_taking() -> None:
            self._draining = True

        self._ask(stop_taking)
        end = time.monotonic() + timeout_s
        with self._wake:
            done = self._wake.wait_for(lambda: not self._listeners, timeout=max(end - time.monotonic(), 0))
        for ticket in list(self._listeners):
            self.cancel(ticket)
        return done

    def close(self) -> None:
        """End every text, and the thread."""
        for ticket in list(self._listeners):
            self.cancel(ticket)
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    def _ask(self, call: Callable[[], T]) -> T:
        asked = _Asked(call)
        self._put(asked)
        answer: T = asked.answer.result()
        return answer

    def _put(self, asked: _Asked) -> None:
        if self._closed:
            asked.answer.set_exception(Draining("the engine is closed"))
            return
        with self._wake:
            self._asked.append(asked)
            self._wake.notify_all()

    def _work(self) -> None:
        while True:
            self._answer()
            idle = self._paused or self.engine.idle or self._failure is not None
            if idle:
                with self._wake:
                    if self._closed and not self._asked:
                        return
                    self._wake.wait_for(lambda: self._asked or self._closed, timeout=_WAIT_S)
                continue
            try:
                self._tell_all(self.engine.step())
            except Exception as error:  # a device's, in most cases: nothing that runs can go on
                self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
                for ticket in list(self._listeners):
                    self._tell(ticket, Delta(finish=Finish.ERROR, error=self._failure))

    def _answer(self) -> None:
        while self._asked:
            asked = self._asked.popleft()
            try:
                asked.answer.set_result(asked.call())
            except Exception as error:
                asked.answer.set_exception(error)

    def _tell_all(self, deltas: list[tuple[Ticket, Delta]]) -> None:
        for ticket, delta in deltas:
            self._tell(ticket, delta)

    def _tell(self, ticket: Ticket, delta: Delta) -> None:
        listener = self._listeners[ticket]
        if delta.finish is not None:
            with self._wake:
                del self._listeners[ticket]
                self._wake.notify_all()
        try:
            listener(delta)
        except Exception:  # one caller's mistake is not the others'
            _LOG.exception("a listener failed; its request is cancelled")
            self.cancel(ticket)
