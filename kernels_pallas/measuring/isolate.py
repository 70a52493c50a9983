"""Calls in a process of their own: a kernel that hangs or poisons the device takes only that process with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class WorkerError(Exception):
    """A call did not return: it raised, died, or took too long. The message is one line."""


class Worker:
    """One process that makes calls in order. It is started when needed, and again after it died or had to be ended.

    Use as a context manager. Functions must be importable by name, arguments and results must pickle.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, function: Callable[..., _Result], *arguments: Any, limit_s: float) -> _Result:
        """function(*arguments), in the worker.

        Raises:
            WorkerError: the call raised, the process died, or limit_s passed (the process is then ended).
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._pipe is not None and self._process is not None
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(limit_s):
                self.stop()
                raise WorkerError(f"no answer within {limit_s:.0f} s")
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            raise WorkerError(f"the process died with exit code {code}") from None
        if not good:
            raise WorkerError(answer)
        return answer

    def stop(self) -> None:
        """Ends the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")  # a forked copy of jax's threads and device state would hang
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, one_line(error)
        pipe.send(answer)


def one_line(error: BaseException) -> str:
    """The type and the message, as much as a report can show."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
