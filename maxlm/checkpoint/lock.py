"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from maxlm.config.errors import UserError

_SEEN_S = 10.0
"""A network file system may show a new file late."""


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[str]:
    """Hold `run_dir` while the block runs; creates the folder. What it gives stands in `run_dir/lock`: who holds it.

    Both the folder and `run_dir/lock` are locked: the file where no folder can be (some network file systems), and the
    folder because a file may be removed by hand, after which another process would lock a new one. A lock belongs to
    what is open, so the kernel drops it when the process ends, however it ends. The file stays.

    Raises:
        UserError: another process holds it, or the folder cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)
            file = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, file)
        except OSError as error:
            raise UserError(
                f"run_dir = {run_dir}: cannot be written ({error.strerror}); choose a folder that you may write to"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock_folder(folder)
        except BlockingIOError as error:
            raise UserError(
                f"run_dir = {run_dir}: run folder in use by {_holder(file)}; wait for that process, stop it, or choose "
                "another run_dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"run_dir = {run_dir}: its file system does not lock files ({error.strerror}); choose another run_dir"
            ) from error
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, holder.encode(), 0)
        except OSError as error:
            raise UserError(
                f"run_dir = {run_dir}: cannot be written ({error.strerror}); mend that, or choose another run_dir"
            ) from error
        yield holder


def require_seen(run_dir: Path, holder: str) -> None:
    """See that another rank's `lock_run`, which gave `holder`, was in this very folder.

    Raises:
        UserError: this host has another folder there, or none.
    """
    began = time.monotonic()
    while True:
        try:
            seen = (run_dir / "lock").read_text(encoding="utf-8")
        except OSError:
            seen = ""
        if seen == holder:
            return
        if time.monotonic() - began > _SEEN_S:
            raise UserError(
                f"run_dir = {run_dir}: this host does not see the folder that rank 0 has locked; put it on a file "
                "system that all hosts share"
            )
        time.sleep(0.2)


def _lock_folder(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # NFS turns the lock into one for writing, which a folder is not open for
        return


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['pid'])} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it took the lock this very moment and has not written yet
        return "another process"
