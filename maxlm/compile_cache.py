"""What compiling and memory cost beyond the first time: programs kept between processes, memory given back or kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import inspect
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from maxlm import surroundings


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs in the user's cache folder and say where: `$XDG_CACHE_HOME/maxlm/jax`, or below ~/.cache.

    A folder already set (JAX_COMPILATION_CACHE_DIR) is respected. Each program is kept with its SHA-256: one whose
    bytes have changed is dropped and compiled anew, where running it could end the process by a signal. None: the
    folder cannot be written, or this version of jax does not let programs be checked, and nothing is kept.
    """
    already_set = jax.config.values["jax_compilation_cache_dir"]
    folder = Path(already_set) if already_set is not None else surroundings.cache_folder("jax")
    if folder is None or not _is_writable(folder) or not _check_programs():
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if already_set is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _check_programs() -> bool:
    """Make jax check what it reads; False where its cache is not as it is known here (of jax 0.10 to 0.12)."""
    try:
        cache = importlib.import_module("jax._src.compilation_cache")  # private, so it may be gone
        if cache.LRUCache is not _checked_cache():
            cache.LRUCache = _checked_cache()  # type: ignore[attr-defined]
            cache.reset_cache()  # of another folder, or made before
    except (ImportError, AttributeError, TypeError):
        return False
    return True


@functools.cache
def _checked_cache() -> type[Any]:
    """jax's cache of files, with a SHA-256 before each program.

    Raises:
        ImportError, AttributeError, TypeError: it is not what it was.
    """
    LRUCache: Any = importlib.import_module("jax._src.lru_cache").LRUCache
    for name, known in (("get", ["self", "key"]), ("put", ["self", "key", "value"])):
        if list(inspect.signature(getattr(LRUCache, name)).parameters) != known:
            raise TypeError(f"LRUCache.{name} takes other arguments")

    class CheckedCache(LRUCache):
        def get(self, key: str) -> bytes | None:
            """The program, if it is there as it was put."""
            found = super().get(_name(key))
            if found is None or found[:32] == hashlib.sha256(found[32:]).digest():
                return None if found is None else found[32:]
            print(
                f"note: the compiled program {key[:40]}... in {self._path} is damaged; compiled anew", file=sys.stderr
            )
            with contextlib.suppress(OSError):
                Path(self._path, f"{_name(key)}-cache").unlink()
            return None

        def put(self, key: str, value: bytes) -> None:
            """Keep a program: written beside, then renamed, so that other processes never see a part of it."""
            stored = hashlib.sha256(value).digest() + value
            if self.eviction_enabled:  # under a lock
                super().put(_name(key), stored)
                return
            target = Path(self._path, f"{_name(key)}-cache")
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                beside = Path(folder, "program")
                beside.write_bytes(stored)
                beside.replace(target)

    return CheckedCache


def _name(key: str) -> str:
    """Another than jax's own: programs of both may lie in one folder."""
    return f"{key}-sha256"


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
"""mallopt(3), malloc.h."""


def keep_freed_memory() -> None:
    """From now on the C library (glibc) keeps what is freed for the next time, where it would give it back at once.

    On a CPU a step takes one block for all that it computes. The system would make and clear the pages of that block in
    each step: a tenth of the step's time, and a third in a small model. All threads share one heap, because a block in
    those of other threads has 64 MiB at most; so call it before jax starts its threads, which choose theirs once.
    """
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**26)):
            c.mallopt(option, value)


def release_compiler_memory() -> None:
    """Give the memory that the compiler has used and freed back to the system, where the C library can (glibc).

    On a small CPU run that is a quarter of the process, which would otherwise stay at its peak.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
