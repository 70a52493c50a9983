"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from maxlm.config.errors import UserError


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir/lock` while the block runs; creates the folder.

    The lock belongs to the open file, so the kernel drops it when the process ends, however it ends. The file stays.

    Raises:
        UserError: another process holds it, or the folder cannot be made or written.
    """
    path = run_dir / "lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"run_dir = {run_dir}: cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run_dir = {run_dir}: run folder in use by {_holder(descriptor)}; wait for that process, stop it, or "
                "choose another run_dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"run_dir = {run_dir}: its file system does not lock files ({error.strerror}); choose another run_dir"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['pid'])} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it took the lock this very moment and has not written yet
        return "another process"
