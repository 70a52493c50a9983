"""Commands as a user starts them, and what is done to them."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parent.parent.parent


def once(make: Callable[[], T]) -> Callable[[], T]:
    """Made at the first call, while cases in other threads wait."""
    lock, made = threading.RLock(), list[T]()

    @functools.wraps(make)
    def get() -> T:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a command left behind."""

    code: int
    """Negative: ended by that signal."""
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """What its lines of `error: ` say."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def command(
    module: str,
    *words: str,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    timeout: float = 120,
    prefix: Sequence[str] = (),
) -> Ended:
    """`python -m MODULE WORDS` from the root of the clone, or in a folder, until it ends.

    `environment`: variables to set, or (None) to take away. `prefix`: words before, such as ("prlimit", "--fsize=9").

    Raises:
        AssertionError: it does not end in time.
    """
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*prefix, sys.executable, "-m", module, *words],
            cwd=folder or ROOT,
            env=variables(environment),
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"still running after {timeout:.0f} s") from error
    return Ended(
        code=done.returncode,
        out=done.stdout.decode(errors="replace"),
        err=done.stderr.decode(errors="replace"),
        seconds=time.monotonic() - began,
    )


def variables(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with this clone first on Python's path, and changed."""
    found: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **(changes or {})}
    return {name: value for name, value in found.items() if value is not None}


@contextlib.contextmanager
def small_disk(place: Path, n_bytes: int) -> Iterator[Path]:
    """`place`, made, with room for so many bytes: a file system of its own.

    Raises:
        PermissionError: this user may not mount; RLIMIT_FSIZE (`prlimit --fsize=`) limits single files instead.
    """
    if os.geteuid() != 0:
        raise PermissionError("mounting a tmpfs takes root")
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def flip_bit(file: Path, seed: int = 0) -> None:
    """Change one bit somewhere in a file."""
    body = bytearray(file.read_bytes())
    rng = random.Random(seed)
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    file.write_bytes(body)
