"""The end of every rank but 0."""

from __future__ import annotations

import os
import selectors
import time
from typing import Any

from maxlm.config import LimitsConfig, UserError
from maxlm.processes.ranks import Several
from maxlm.processes.wire import BEAT_S, OWN_PAUSE_S, SILENT_S, Wire


class Spoke(Several):
    """Any other rank."""

    def __init__(self, wire: Wire, rank: int, size: int, limits: LimitsConfig) -> None:
        super().__init__(rank, size, limits)
        self._wire = wire
        self._hub_host, self._hub_step = "of rank 0", 0
        self._start_from: dict[str, Any] | None = None
        wire.send({"hello": {"rank": rank, "size": size, "host": self.host, "pid": os.getpid()}})
        self._start()

    def wait_for_start(self, seconds: float) -> int:
        """The port of jax's service, which rank 0 says once all have come.

        Raises:
            UserError: it does not.
        """
        # Rank 0 knows who is missing, and says so before this limit.
        limit = seconds + SILENT_S
        there = lambda: self._start_from is not None
        self._wait(there, "say that all are there", lambda: "rank 0", limit, "limits.join_s")
        assert self._start_from is not None
        self._hub_host, self._silent_s = str(self._start_from["host"]), float(self._start_from["silent_s"])
        return int(self._start_from["port"])

    def say(self, what: str, value: Any = None) -> Any:
        self._calls += 1
        call = self._calls
        self._wait_for(what, lambda: call in self._said, lambda: f"rank 0 (host {self._hub_host})")
        return self._said.pop(call)

    def meet(self, what: str) -> None:
        self._wire.send({"call": self._calls + 1})
        self.say(what)

    def _to_hub(self, message: dict[str, Any]) -> None:
        self._wire.send(message)

    def _to_all(self, message: dict[str, Any]) -> None:
        self._wire.send(message)

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wire.socket, selectors.EVENT_READ)
        beat = last_sign = time.monotonic()
        while True:
            messages: list[dict[str, Any]] | None = []
            if selector.select(BEAT_S):
                messages = self._wire.receive()
            now = time.monotonic()
            if messages is None and self._start_from is None:
                self._end(self.report(UserError("rank 0 ended before all ranks had come; its own message says why")))
            if messages is None:
                self._lost("ended without a word (killed, or out of memory?)")
                return
            if messages or now - beat > OWN_PAUSE_S:
                last_sign = now
            for message in messages:
                if "bye" in message:
                    return
                self._read(message)
            if now - beat >= BEAT_S:
                beat = now
                self._wire.send({"beat": self.step})
            if now - last_sign > self._silent_s:
                self._lost(f"gave no sign of life for {self._silent_s:g} s (limits.silent_s)")

    def _read(self, message: dict[str, Any]) -> None:
        match message:
            case {"beat": int(step)}:
                self._hub_step = step
            case {"start": dict(start)}:
                with self._changed:
                    self._start_from = start
                    self._changed.notify_all()
            case {"call": int(call), "value": value}:
                with self._changed:
                    self._said[call] = value
                    self._changed.notify_all()
            case {"hold": _}:
                self._held()
            case {"stop_at": int(step)}:
                with self._changed:
                    self._stop_at = step
                    self._changed.notify_all()
            case {"end": dict(report)}:
                self._end(report)

    def _lost(self, reason: str) -> None:
        self._end({"rank": 0, "host": self._hub_host, "step": self._hub_step, "reason": reason, "code": 1})
