"""Files that have their old or their new contents whatever happens, and folders that one process at a time writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import reprlib
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO

PARTIAL = ".partial"
"""Ends the names of files that are being written."""
LOCK = ".lock"
"""In a folder that is being written."""


def write_json(file: Path, values: Any, *, shared: bool = False) -> None:
    """Write JSON into a file that has either its old or its new contents; `shared` as in `replaced`."""
    with replaced(file, shared=shared) as stream:
        stream.write((json.dumps(values, indent=2) + "\n").encode())


@contextlib.contextmanager
def replaced(file: Path, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """Bytes that become the file's when the block has ended without an error, and are on the disk then.

    `shared`: other processes may write the same file; until then the bytes are in a hidden one of this process alone.
    """
    partial = file.with_name(f"{file.name}{PARTIAL}")
    if shared:
        partial = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    with partial.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


@contextlib.contextmanager
def claimed(out: Path, doing: str) -> Iterator[int]:
    """Let one process at a time write into `out`; the others wait. A killed process leaves no lock, but to children
    that it gave the file's descriptor, which is what this yields.

    `doing`: what the other one does, for who waits: `prepares`.
    """
    with (out / LOCK).open("w") as file:
        if not _taken(file):
            print(f"waiting for another process that {doing} {out}", flush=True)
            while not _taken(file):  # a blocking flock would sleep through a Ctrl-C that came just before it
                time.sleep(0.1)
        yield file.fileno()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In words, which of the named values are others than before, the first three of them; empty if none is."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    show = reprlib.repr
    changes = ", ".join(f"{key} = {show(there.get(key))} there and {show(here.get(key))} now" for key in keys[:3])
    return changes + (f", and {len(keys) - 3} keys more" if len(keys) > 3 else "")


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
