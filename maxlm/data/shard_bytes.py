"""Numbers of shard files, read where they are needed.

Files are not mapped into memory: one that is cut while it is read would then end the process by SIGBUS.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.errors import MachineFailure

REMEDY = "restore the file, or delete the folder and prepare it again"
_OPEN_FILES = 256


def read_numbers(owner: Hashable, file: Path, dtype: np.dtype[Any], first: int, count: int) -> npt.NDArray[Any]:
    """`[count]` numbers of a file from number `first` on.

    Args:
        owner: for which the file stays open.
        file: of numbers of the type `dtype`.
        dtype: of the numbers.
        first: the number with which to begin.
        count: how many.

    Raises:
        UserError: the file has become shorter.
        MachineFailure: the disk fails.
    """
    size, begin = count * dtype.itemsize, first * dtype.itemsize
    try:
        content = os.pread(_open(owner, file).number, size, begin)
        left = size if len(content) == size else os.stat(file).st_size
    except OSError as error:
        raise MachineFailure(f"{file}: cannot be read any more ({error.strerror}); run the command again") from error
    if len(content) < size:
        raise UserError(f"{file}: was cut while in use: {left} bytes are left; {REMEDY}")
    return np.frombuffer(content, dtype)


class _OpenFile:
    """A descriptor that is closed with the last reference to it."""

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(_OPEN_FILES)
def _open(owner: Hashable, file: Path) -> _OpenFile:
    """The file, opened for this owner: a folder that is made anew gets files of its own."""
    del owner
    return _OpenFile(file)
