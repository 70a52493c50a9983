"""Rank 0's end: it passes everything on, and finds out who is lost."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from typing import Any

from maxlm.config import LimitsConfig, UserError
from maxlm.processes.ranks import Several
from maxlm.processes.wire import BEAT_S, OWN_PAUSE_S, SILENT_OVER_HOSTS_S, Wire


class Member:
    """A rank as rank 0 knows it."""

    def __init__(self, wire: Wire, hello: dict[str, Any]) -> None:
        self.wire, self.host, self.pid = wire, str(hello["host"]), int(hello["pid"])
        self.step = self.calls = 0
        self.at: int | None = None
        self.last_sign = time.monotonic()
        self.has_left = False

    def __str__(self) -> str:
        return f"host {self.host} (process {self.pid})"


class Hub(Several):
    """Rank 0, which all others are connected to."""

    def __init__(self, listener: socket.socket, size: int, limits: LimitsConfig) -> None:
        """`listener`: bound, and listening."""
        super().__init__(0, size, limits)
        self._listener = listener
        self._members: dict[int, Member] = {}
        self._strangers: dict[socket.socket, Wire] = {}  # that have not said who they are
        self._own_at: int | None = None
        self._started = False
        self._start()

    def wait_for_all(self, seconds: float, place: str) -> None:
        """Until every rank has connected.

        Raises:
            UserError: one does not come.
        """
        self._wait(lambda: not self._missing(), f"come to {place}", self._names_of_missing, seconds, "limits.join_s")
        with self._changed:
            hosts = {self.host, *(member.host for member in self._members.values())}
            if len(hosts) > 1 and self._limits.silent_s is None:
                self._silent_s = SILENT_OVER_HOSTS_S

    def _to_all(self, message: dict[str, Any]) -> None:
        for member in list(self._members.values()):
            member.wire.send(message)

    def start(self, port: int) -> None:
        """Tell the others that all are here, and the port of jax's own service."""
        self._started = True
        self._to_all({"start": {"port": port, "host": self.host, "silent_s": self._silent_s}})

    def say(self, what: str, value: Any = None) -> Any:
        self._calls += 1
        self._to_all({"call": self._calls, "value": value})
        return value

    def begin_loop(self) -> None:
        super().begin_loop()
        with self._changed:
            self._own_at = None
            for member in self._members.values():
                member.at = None

    def meet(self, what: str) -> None:
        self._calls += 1

        def late() -> list[int]:
            return [rank for rank, member in self._members.items() if member.calls < self._calls]

        self._wait_for(what, lambda: not late(), lambda: self._names(late()))
        self._to_all({"call": self._calls, "value": None})

    def _names(self, ranks: list[int]) -> str:
        first, *more = ranks or [0]
        return f"rank {first} (host {self._members[first].host})" + (f" and {len(more)} more" if more else "")

    def _missing(self) -> list[int]:
        return sorted(set(range(1, self.size)) - self._members.keys())

    def _names_of_missing(self) -> str:
        missing = self._missing()
        return f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self.size}"

    def _to_hub(self, message: dict[str, Any]) -> None:
        self._stopping(0, message)

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        ranks: dict[socket.socket, int] = {}
        beat = time.monotonic()
        while True:
            for key, _ in selector.select(BEAT_S):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    with contextlib.suppress(OSError):
                        new, _ = self._listener.accept()
                        self._strangers[new] = Wire(new)
                        selector.register(new, selectors.EVENT_READ)
                    continue
                rank = ranks.get(connection)
                wire = self._strangers[connection] if rank is None else self._members[rank].wire
                messages = wire.receive()
                for message in messages or ():
                    if rank is None:
                        rank = self._welcome(wire, message)
                        if rank is not None:
                            ranks[connection] = rank
                            del self._strangers[connection]
                    else:
                        self._read(rank, message)
                if messages is None:
                    selector.unregister(connection)
                    wire.close()
                    self._strangers.pop(connection, None)
                    if rank is not None:
                        self._closed(rank)
            now = time.monotonic()
            if now - beat > OWN_PAUSE_S:
                for member in self._members.values():
                    member.last_sign = now
            if now - beat >= BEAT_S:
                beat = now
                self._to_all({"beat": self.step})
                self._look_for_the_silent(now)

    def _welcome(self, wire: Wire, message: dict[str, Any]) -> int | None:
        """The rank that a first message names; None for what is no rank of ours."""
        hello = message.get("hello")
        if not isinstance(hello, dict) or not all(isinstance(hello.get(key), int) for key in ("rank", "size", "pid")):
            return None
        rank, size = int(hello["rank"]), int(hello["size"])
        newcomer = Member(wire, hello)
        if self._started:  # it belongs to another run, which must not end this one
            reason = (
                f"another run is under way here: its rank 0 is process {os.getpid()} on host {self.host}; choose "
                "another port in JAX_COORDINATOR_ADDRESS, or stop that run"
            )
            wire.send({"end": {"rank": rank, "host": newcomer.host, "step": 0, "reason": reason, "code": 2}})
            return None
        other = Member(wire, {"host": self.host, "pid": os.getpid()}) if rank == 0 else self._members.get(rank)
        if size != self.size:
            reason = f"rank {rank} on {newcomer} counts {size} processes, rank 0 counts {self.size}"
        elif other is not None:
            reason = f"two processes are rank {rank}: one on {other}, one on {newcomer}"
        else:
            with self._changed:
                self._members[rank] = newcomer
                self._changed.notify_all()
            return rank
        remedy = "give each process its own JAX_PROCESS_ID, and all the same count"
        report = self.report(UserError(f"{reason}; {remedy}"))
        wire.send({"end": report})
        self._end_all(report)
        return None

    def _read(self, rank: int, message: dict[str, Any]) -> None:
        member = self._members[rank]
        member.last_sign = time.monotonic()
        match message:
            case {"beat": int(step)}:
                member.step = step
            case {"call": int(calls)}:
                with self._changed:
                    member.calls = calls
                    self._changed.notify_all()
            case {"end": dict(report)}:
                member.has_left = True
                self._end_all(report)
            case {"bye": _}:
                member.has_left = True
            case {"stop": _} | {"at": _}:
                self._stopping(rank, message)

    def _stopping(self, rank: int, message: dict[str, Any]) -> None:
        """The two turns of stopping: hold everyone, then name the furthest step that anyone has come to."""
        if "stop" in message:
            if not self._hold:
                self._to_all({"hold": True})
                self._held()
            return
        with self._changed:
            if rank == 0:
                self._own_at = message["at"]
            else:
                self._members[rank].at = message["at"]
            steps = [self._own_at, *(member.at for member in self._members.values())]
            known = [step for step in steps if step is not None]
            if len(known) < len(steps) or self._stop_at is not None:
                return
            self._stop_at = max(known)
            self._changed.notify_all()
        self._to_all({"stop_at": self._stop_at})

    def _closed(self, rank: int) -> None:
        member = self._members[rank]
        if not member.has_left:
            self._lost(rank, "ended without a word (killed, or out of memory?)")

    def _look_for_the_silent(self, now: float) -> None:
        for rank, member in list(self._members.items()):
            if not member.has_left and now - member.last_sign > self._silent_s:
                self._lost(rank, f"gave no sign of life for {self._silent_s:g} s (limits.silent_s)")

    def _lost(self, rank: int, reason: str) -> None:
        member = self._members[rank]
        self._end_all({"rank": rank, "host": member.host, "step": member.step, "reason": reason, "code": 1})

    def _end_all(self, report: dict[str, Any]) -> None:
        if not self._leaving:
            self._to_all({"end": report})
            for wire in list(self._strangers.values()):
                wire.send({"end": report})
            self._end(report)
