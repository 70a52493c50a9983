"""What the ranks of a run tell each other beside what their devices compute.

Every rank holds one connection to rank 0, with JSON lines on it, and a thread that reads them. So an error on one rank
ends all of them while their main threads wait inside a collective; a rank that was killed is noticed as its connection
closes, and one that is stopped as its signs of life stay away. Waiting for rank 0 has a limit of its own, unlike a
collective, which gives up after half a minute on CPUs.
"""

from __future__ import annotations

import abc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from maxlm.config import LimitsConfig, UserError
from maxlm.processes.wire import BEAT_S, SILENT_S
from maxlm.surroundings import flush_at_once, tell

_GRACE_S = 2.0
"""What a failing collective waits for, lest it hide the cause: the rank that broke it."""
_UNWIND_S = 8.0
"""What is left to a rank that has told its error: a save that waits for ranks which are gone would take minutes."""
_FIRST_WORD_S, _NEXT_WORD_S = 10.0, 30.0
"""When a line says what is being waited for."""


class RankError(UserError):
    """What went wrong on a rank, as every rank says it."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(lines(report))
        self.exit_code = int(report["code"])


class Ranks:
    """This rank's way to the others. Every rank must make the same calls of `say` and `meet`, in the same order.

    A run of one process has a link too; nothing in it waits.
    """

    def __init__(self, rank: int = 0, size: int = 1, limits: LimitsConfig | None = None) -> None:
        self.rank, self.size = rank, size
        self.host = socket.gethostname()
        self.step = 0
        """Steps done, for messages."""
        self._limits = limits or LimitsConfig()
        self._changed = threading.Condition()
        self._calls = 0  # of `say` and `meet`
        self._said: dict[int, Any] = {}
        self._leaving = False
        self._hold = False  # a rank wants to stop: those that come to the end of a step say where they are, and wait
        self._answer: int | None = None  # what is said for the main thread while it does not ask: where it will be
        self._stop_at: int | None = None
        self._asked = False

    # ---- What the main thread calls ----------------------------------------------------------------------------------

    def say(self, what: str, value: Any = None) -> Any:
        """On every rank what rank 0 passes, a value of JSON; the others wait for it.

        Args:
            what: that it does before it says so, for messages: "prepare the data".

        Raises:
            UserError: it takes longer than limits.prepare_s.
        """
        return value

    def meet(self, what: str) -> None:
        """Wait until every rank has come here.

        Raises:
            UserError: it takes longer than limits.prepare_s.
        """

    def begin_loop(self) -> None:
        """Forget what an earlier run of these processes was asked; for every rank, between two calls of `meet`."""

    def stops_after(self, step: int, *, asked: bool, last: int) -> bool:
        """Whether all ranks stop after `step` steps, since one was asked to; for every rank after every step before the
        last. They stop at the same one: the furthest that any has come to."""
        self.step = step
        return asked

    def goes_back(self, step: int) -> None:
        """This rank, like all, goes back from here to an earlier step, and asks `stops_after` no more before it has."""

    def went_back(self, step: int, *, asked: bool) -> bool:
        """Whether all ranks stop now that they are back at `step`, since one was asked to before; for every rank."""
        self.step = step
        return asked

    def report(self, error: BaseException) -> dict[str, Any]:
        """An error as others are told of it."""
        code, reason = _judge(error)
        return {"rank": self.rank, "host": self.host, "step": self.step, "reason": reason, "code": code}

    def tell(self, error: BaseException) -> None:
        """End the other ranks, with the reason, and put this rank's name before it in `error`.

        Raises:
            RankError: for an `error` that is neither a UserError nor a signal.
        """

    def end(self, reason: str, code: int) -> NoReturn:
        """End every rank at once, from any thread."""
        leave(f"step {self.step}: {reason}", code)

    # ---- For ranks that are several ----------------------------------------------------------------------------------

    def _wait(self, ready: Callable[[], bool], what: str, missing: Callable[[], str], limit_s: float, key: str) -> None:
        """Until others have done something, with a line now and then. `key`: of the limit.

        Raises:
            UserError: it takes longer.
        """
        began, word = time.monotonic(), _FIRST_WORD_S
        with self._changed:
            while not ready():
                self._changed.wait(BEAT_S)
                waited = time.monotonic() - began
                if waited > limit_s:
                    raise UserError(f"{missing()} did not {what} within {limit_s:g} s; look there, or raise {key}")
                if waited > word:
                    print(f"rank {self.rank}: waiting for {missing()} to {what} ... {waited:.0f} s", flush=True)
                    word = waited + _NEXT_WORD_S

    def _wait_for(self, what: str, ready: Callable[[], bool], missing: Callable[[], str]) -> None:
        self._wait(ready, what, missing, self._limits.prepare_s, "limits.prepare_s")

    def _end(self, report: dict[str, Any]) -> None:
        """Leave at once, wherever the main thread is."""
        with self._changed:
            if self._leaving:
                return
            self._leaving = True
        leave(lines(report), int(report["code"]))


def leave(text: str, code: int) -> NoReturn:
    """End this process with lines of error on standard error, from any thread."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a status line hides it
    lines = "".join(f"error: {line}\n" for line in text.splitlines())
    tell(show_cursor + lines)
    os._exit(code)


def lines(report: dict[str, Any]) -> str:
    who = f"rank {report['rank']}, host {report['host']}, step {report['step']}"
    return "\n".join(f"{who}: {line}" for line in report["reason"].splitlines())


class Several(Ranks, abc.ABC):
    """One of several ranks."""

    def __init__(self, rank: int, size: int, limits: LimitsConfig) -> None:
        super().__init__(rank, size, limits)
        self._silent_s = limits.silent_s or SILENT_S
        self._failed: int | None = None

    def _start(self) -> None:
        threading.Thread(target=self._serve, name="ranks", daemon=True).start()

    @abc.abstractmethod
    def _serve(self) -> None:
        """Read what comes, say that this rank lives, and notice who does not."""

    @abc.abstractmethod
    def _to_hub(self, message: dict[str, Any]) -> None:
        """To rank 0."""

    @abc.abstractmethod
    def _to_all(self, message: dict[str, Any]) -> None:
        """To every other rank, or to the one that passes it on."""

    def at_exit(self) -> None:
        """The last words of this process. After an error it does not wait for the others, as jax would."""
        if self._failed is not None:
            flush_at_once()
            os._exit(self._failed)
        self._to_all({"bye": True})

    def stops_after(self, step: int, *, asked: bool, last: int) -> bool:
        with self._changed:
            self.step = step
            self._pass_on(asked)
            if not self._hold:
                self._answer = step + 1 if step + 1 >= last else None
                return False
            if self._stop_at is None:
                self._to_hub({"at": step})
        self._wait_for("come to the end of its step", lambda: self._stop_at is not None, lambda: "another rank")
        assert self._stop_at is not None
        return step >= self._stop_at

    def goes_back(self, step: int) -> None:
        with self._changed:
            self.step = self._answer = step
            if self._hold and self._stop_at is None:  # others wait to hear where this rank is
                self._to_hub({"at": step})

    def went_back(self, step: int, *, asked: bool) -> bool:
        with self._changed:
            self.step, self._answer = step, None
            self._pass_on(asked)
        self.meet("go back to a checkpoint")  # from here on all would answer with steps after this one
        return bool(self.say("say whether the run stops", self._hold))

    def _pass_on(self, asked: bool) -> None:
        if asked and not self._asked:
            self._asked = True
            self._to_hub({"stop": True})

    def _leave_anyway(self, report: dict[str, Any]) -> None:
        time.sleep(_UNWIND_S)
        leave(lines(report), int(report["code"]))

    def begin_loop(self) -> None:
        with self._changed:
            self._hold = self._asked = False
            self._stop_at = self._answer = None

    def _held(self) -> None:
        """Some rank wants to stop."""
        with self._changed:
            self._hold = True
            if self._answer is not None:
                self._to_hub({"at": self._answer})

    def end(self, reason: str, code: int) -> NoReturn:
        report = self.report(UserError(reason)) | {"code": code}
        self._to_all({"end": report})
        leave(lines(report), code)

    def tell(self, error: BaseException) -> None:
        report = self.report(error)
        if report["code"] == 1:  # a collective fails because another rank did: let that one speak
            time.sleep(_GRACE_S)
        with self._changed:
            told, self._leaving = self._leaving, True
        if told:
            return
        self._failed = report["code"]
        if isinstance(error, RankError):  # all know
            return
        self._to_all({"end": report})
        threading.Thread(target=self._leave_anyway, args=(report,), daemon=True).start()
        if isinstance(error, UserError):
            error.args = (lines(report),)
        elif isinstance(error, Exception):
            raise RankError(report) from error


def _judge(error: BaseException) -> tuple[int, str]:
    """Exit code and reason."""
    match error:
        case UserError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
        case SystemExit():
            return (error.code if isinstance(error.code, int) else 1), "stopped by a signal before the first step"
        case _:
            return 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
