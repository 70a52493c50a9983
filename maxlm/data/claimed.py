"""Files that have their old or their new contents whatever happens, and folders that one process at a time writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import reprlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO

LOCK = ".lock"
"""In a folder that is being written."""


def write_json(file: Path, values: Any) -> None:
    """Write JSON into a file that has either its old or its new contents."""
    with replaced(file) as stream:
        stream.write((json.dumps(values, indent=2) + "\n").encode())


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[IO[bytes]]:
    """Bytes that become the file's when the block has ended without an error, and are on the disk then."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


@contextlib.contextmanager
def claimed(out: Path, doing: str) -> Iterator[None]:
    """Let one process at a time write into `out`; the others wait. A killed process leaves no lock.

    `doing`: what the other one does, for who waits: `prepares`.
    """
    with (out / LOCK).open("w") as file:
        if not _taken(file):
            print(f"waiting for another process that {doing} {out}", flush=True)
            while not _taken(file):  # a blocking flock would sleep through a Ctrl-C that came just before it
                time.sleep(0.1)
        yield


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
