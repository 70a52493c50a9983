"""Tokenising in several processes, with results in the order of the questions.

The processes are this interpreter started anew on this module alone. `multiprocessing` would import the caller's main
module, and with it jax, in every one of them, and would need a guard in every script.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from maxlm.config import UserError
from maxlm.config.errors import MachineFailure
from maxlm.data.encoders import Tokenised, open_encoder

_LEAST_PATIENCE = 120
"""Seconds for a block of any size."""
_SLOWEST = 10_000
"""Bytes of text in a second, of a slow tokenizer on a crowded machine."""
_STOPPED_PATIENCE = 10
"""Seconds."""
_SERVE = "import sys; from maxlm.data.workers import serve; serve(int(sys.argv[1]), sys.argv[2])"


@dataclass(frozen=True)
class DocumentBlock:
    """Some documents that are tokenised together."""

    first: int
    """Number of the first of them in the whole input."""
    texts: list[bytes]
    """UTF-8."""
    digest: str
    """Of all text up to the end of this block."""
    before: bytes
    """The text before the first of them; of the first of all, its own."""
    places: list[tuple[str, int | None]]
    """File and row of each."""


def tokenise_blocks(
    folder: Path, blocks: Iterable[DocumentBlock], workers: int
) -> Iterator[tuple[DocumentBlock, Tokenised]]:
    """Each block with its tokens, in the order of `blocks`, as the data set that is being made in `folder` wants them.

    One worker means this process. At most three blocks for each worker are in memory at a time.

    Raises:
        UserError: the tokenizer fails on a text.
        MachineFailure: a process died, is stopped, or does not answer.
    """
    if workers == 1:
        encode = open_encoder(folder)
        for block in blocks:
            yield block, encode(block.texts, block.before)
        return
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    waiting: deque[tuple[DocumentBlock, Future[Tokenised]]] = deque()

    def ask(block: DocumentBlock) -> Tokenised:
        worker = idle.get()
        try:
            return worker.ask(block)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(contextlib.closing(_Worker(folder))) for _ in range(workers)]
        for process in processes:
            idle.put(process)
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        for process in processes:  # first of all, so that no thread waits for an answer that does not come
            stack.callback(process.kill)
        for block in blocks:
            waiting.append((block, threads.submit(ask, block)))
            if len(waiting) >= 3 * workers:
                done, answer = waiting.popleft()
                yield done, _answer(done, answer, processes)
        for done, answer in waiting:
            yield done, _answer(done, answer, processes)


def _answer(block: DocumentBlock, answer: Future[Tokenised], workers: Sequence[_Worker]) -> Tokenised:
    """Wait for the oldest block. Seconds in which this process itself is stopped (Ctrl-Z) do not count."""
    size = sum(map(len, block.texts))
    limit, stopped = _LEAST_PATIENCE + size // _SLOWEST, 0
    for _ in range(limit):
        try:
            return answer.result(timeout=1.0)
        except TimeoutError:
            stopped = stopped + 1 if any(worker.stopped() for worker in workers) else 0
            if stopped >= _STOPPED_PATIENCE:
                raise MachineFailure(
                    f"a tokenising process is stopped (SIGSTOP) and has not gone on for {stopped} s; run the same "
                    "command again to continue"
                ) from None
    raise MachineFailure(
        f"a tokenising process has not answered for {limit} s to {size:,} bytes of text, and is given up; run the same "
        "command again to continue, with a smaller prepare.workers if the machine is overloaded"
    )


class _Worker:
    """A process that tokenises, and our end of the pipe to it."""

    def __init__(self, folder: Path) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(folder)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAYON_NUM_THREADS": "1"},
            )

    def ask(self, block: DocumentBlock) -> Tokenised:
        try:
            self._connection.send((block.texts, block.before))
            answer: Tokenised | UserError | str = self._connection.recv()
        except (EOFError, OSError) as error:
            raise MachineFailure(
                f"a tokenising process died (exit code {self._process.wait()}), perhaps for want of memory; run the "
                "same command again to continue, with a smaller prepare.workers if it happens again"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a tokenising process failed: {answer}")
        return answer

    def stopped(self) -> bool:
        """Whether somebody has stopped the process, as far as this system tells."""
        if not hasattr(os, "waitid"):
            return False
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    def kill(self) -> None:
        """End the process, whatever it does; a call of `ask` ends too."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def serve(descriptor: int, folder: str) -> None:
    """What a worker process does: answer texts with `Tokenised` until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    encode = open_encoder(Path(folder))
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            texts, before = connection.recv()
            try:
                connection.send(encode(texts, before))
            except UserError as error:
                connection.send(error)
            except (RuntimeError, ValueError, MemoryError) as error:
                connection.send(f"{type(error).__name__}: {error}")
