"""What compiling costs beyond its first time: programs kept between processes, and memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import jax


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs in the user's cache folder and say where: `$XDG_CACHE_HOME/maxlm/jax`, or below ~/.cache.

    A folder already set (JAX_COMPILATION_CACHE_DIR) is respected. None: the folder cannot be written, and nothing is
    kept.
    """
    if (already_set := jax.config.values["jax_compilation_cache_dir"]) is not None:
        return Path(already_set)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxlm" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def release_compiler_memory() -> None:
    """Give the memory that the compiler has used and freed back to the system, where the C library can (glibc).

    On a small CPU run that is a quarter of the process, which would otherwise stay at its peak.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
