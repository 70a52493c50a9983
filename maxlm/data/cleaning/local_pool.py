"""Stages on this machine: processes that are handed one task after the other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from maxlm.config import UserError
from maxlm.config.errors import MachineFailure
from maxlm.data.cleaning.cleaning_work import CleaningWork

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Sums in another order would be other numbers, and the cores have other work."""
OK = "ok"
"""A worker's answer, if it did the task."""


def worker_command(out: Path) -> list[str]:
    """What does tasks of the job in `out`: `STAGE TASK` on a line of its standard input, an answer on its output."""
    return [sys.executable, "-m", "maxlm.data", "clean", "work", str(out)]


def worker_environment() -> dict[str, str]:
    """Of a worker: it finds maxlm where this process has found it."""
    return {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run_locally(work: CleaningWork, workers: int, show: Callable[[str, int, int], None], lock: int) -> None:
    """Do all tasks of all stages that are not done.

    Args:
        work: of the job.
        workers: processes.
        show: told of a stage's name, its tasks that are done, and all of them.
        lock: descriptor of the folder's lock, which a worker that outlives this process holds until its task ends.

    Raises:
        UserError: of a task.
        MachineFailure: a process died.
    """
    with contextlib.ExitStack() as stack:
        idle: SimpleQueue[_CleaningWorker] = SimpleQueue()
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        for _ in range(workers):  # killed first of all, so that no thread waits for an answer that does not come
            idle.put(stack.enter_context(contextlib.closing(_CleaningWorker(work.out, lock))))

        def ask(stage: int, task: int) -> None:
            worker = idle.get()
            try:
                worker.do(stage, task)
            finally:
                idle.put(worker)

        for number, stage in enumerate(work.stages):
            done = len(there := work.done(stage))
            show(stage.name, done, stage.tasks)
            waiting = {threads.submit(ask, number, task) for task in range(stage.tasks) if task not in there}
            for _ in _as_they_end(waiting):
                done += 1
                show(stage.name, done, stage.tasks)


def _as_they_end(waiting: set[Future[None]]) -> Iterator[None]:
    while waiting:
        ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for one in ended:
            one.result()
            yield


class _CleaningWorker:
    """A process that does tasks, and our end of the pipes to it. It begins when it is first asked."""

    def __init__(self, out: Path, lock: int) -> None:
        self._out, self._lock = out, lock
        self._process: subprocess.Popen[str] | None = None

    def do(self, stage: int, task: int) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                worker_command(self._out),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[self._lock],
                start_new_session=True,  # Ctrl-C is for the parent, whose end closes the pipe
                env=worker_environment(),
            )
        answer = ""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(f"{stage} {task}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        if not answer:
            code = self._process.wait()
            raise MachineFailure(
                f"a cleaning process died (exit code {code}), perhaps for want of memory; run the same command again "
                "to go on, with fewer --workers if it happens again"
            )
        if answer != OK:
            raise UserError(json.loads(answer))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve_tasks(work: CleaningWork, asked: Iterable[str], answers: IO[str]) -> None:
    """What a worker does: tasks as they are asked for, until there are no more."""
    for line in asked:
        stage, task = map(int, line.split())
        try:
            work.do(stage, task)
        except UserError as error:
            answer = json.dumps(str(error))
        except OSError as error:
            answer = json.dumps(
                f"{error.filename or work.out}: {error.strerror}; make room, then run the same command again"
            )
        else:
            answer = OK
        answers.write(answer + "\n")
        answers.flush()
