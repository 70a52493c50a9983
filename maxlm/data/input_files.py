"""Which files are read, each once, and their bytes: decompressed, as a stream."""

from __future__ import annotations

import bz2
import contextlib
import errno
import fnmatch
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from maxlm.config import Files, UserError
from maxlm.config.errors import MachineFailure, pip_install
from maxlm.config.json_file import kind_of
from maxlm.data.documents import RefusedInput, Unreadable, shown
from maxlm.data.shards import RECORD, TOKENIZER, UNFINISHED

INPUT, CLEANED, REMOVED, REPORT = "input.json", "documents", "removed", "report.json"
"""In a folder that `clean` wrote: what it was made of, what was kept, what was not, what says that all is done."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What reading a damaged compressed file raises."""
_ZSTD_CHUNK = 1 << 12  # of it, zstd makes at most 128 MiB: blocks of 128 KiB from 4 bytes each
_ZSTD_WINDOW = 1 << 31  # `zstd --long=31`
_OF_THIS_FILE = {
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO
}  # fmt: skip


def input_files(documents: Files, unreadable: Unreadable, except_for: Path | None) -> Iterator[Path]:
    """The files of `documents` in their order, each file once, however often and by whatever names it is reached.

    Left out, and told to `unreadable`: files met before, the folder `except_for`, folders that `prepare` wrote; and
    what is no file (a pipe, a socket, a device) or may not be read.

    Raises:
        UserError: a path is missing, or there is no file at all.
    """
    seen: dict[tuple[int, int], Path] = {}
    found = False
    for path in map(Path, documents.paths):
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such file or folder")
        if path.is_dir():
            files = walk(path, documents.pattern, unreadable=unreadable, except_for=except_for)
        else:
            files = iter([path])
        for file in files:
            found = True
            with counted(file, unreadable):
                status = file.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise RefusedInput(f"{kind_of(status.st_mode)}, not a file; write its contents to a file first")
                first = seen.setdefault((status.st_dev, status.st_ino), file)
                if first is not file:
                    unreadable.leave_out(shown(file), f"the same file as {shown(first)}, which is read once")
                elif except_for is not None and except_for.resolve() in file.resolve().parents:
                    unreadable.leave_out(shown(file), "lies in the folder that is being written")
                else:
                    yield file
    if not found:
        raise UserError(
            f"{', '.join(documents.paths)}: holds no file named like {documents.pattern!r}"
            + "".join(f"; {one}" for one in unreadable.examples[:1])
            + "".join(f"; left out: {one}" for one in unreadable.left_out_examples[:1])
        )


def walk(
    folder: Path,
    pattern: str,
    *,
    unreadable: Unreadable,
    except_for: Path | None = None,
    skip: frozenset[str] = frozenset(),
) -> Iterator[Path]:
    """Files below `folder` sorted by path, through links too, without hidden ones and what Python compiled.

    `skip`: names of folders to leave out.
    """
    entered: set[tuple[int, int]] = set()

    def report(error: OSError) -> None:
        with counted(Path(error.filename), unreadable):
            raise error

    def enters(inner: Path) -> bool:
        with counted(inner, unreadable):
            status = inner.stat()
            if (status.st_dev, status.st_ino) in entered:
                unreadable.leave_out(shown(inner), "a link to a folder that is read already")
            elif except_for is not None and except_for.exists() and inner.samefile(except_for):
                unreadable.leave_out(shown(inner), "the folder that is being written")
            elif (inner / TOKENIZER).is_dir() and ((inner / RECORD).exists() or (inner / UNFINISHED).exists()):
                unreadable.leave_out(shown(inner), "prepared data, not documents")
            else:
                entered.add((status.st_dev, status.st_ino))
                return True
        return False

    if not enters(folder):
        return
    for parent, folders, names in os.walk(folder, onerror=report, followlinks=True):
        if (Path(parent) / INPUT).exists() and (Path(parent) / CLEANED).is_dir():
            names, finished = [], (Path(parent) / REPORT).exists()
            folders[:] = [CLEANED] if finished else []
            unreadable.leave_out(
                shown(Path(parent)),
                f"data that was cleaned: of it {CLEANED}/ is read" if finished else "cleaning it has not ended",
            )
        there = sorted(name for name in folders if name not in skip and not name.startswith((".", "__pycache__")))
        folders[:] = [name for name in there if enters(Path(parent, name))]
        for name in sorted(names):
            if fnmatch.fnmatch(name, pattern) and not name.startswith("."):
                yield Path(parent, name)


@contextlib.contextmanager
def counted(file: Path, unreadable: Unreadable) -> Iterator[None]:
    """Count what cannot be read of a file, and go on after it.

    Raises:
        MachineFailure: the disk or the network fails: what was read would depend on the day.
    """
    try:
        yield
    except RefusedInput as refused:
        unreadable.report(shown(file), refused.row, refused.reason)
    except OSError as error:
        if error.errno not in _OF_THIS_FILE:
            raise MachineFailure(
                f"{shown(file)}: cannot be read ({error.strerror}); run the same command again"
            ) from error
        unreadable.report(shown(file), None, f"cannot be read ({error.strerror})")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as its name says.

    Memory beside what the caller keeps: up to 128 MiB and the window that the file was compressed with: 2 GiB at most
    of `zstd --long=31`, 64 MiB of `xz -9`, less of all else.

    Raises:
        OSError: it cannot be opened or read.
        RefusedInput: what is read of it, up to the end of the block, shows that it is damaged.
    """
    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(file.open("rb"))
        match file.suffix.lower():
            case ".gz":
                stream = stack.enter_context(gzip.open(stream))
            case ".bz2":
                stream = stack.enter_context(bz2.open(stream))
            case ".xz":
                stream = stack.enter_context(lzma.open(stream))
            case ".zst":
                stream = stack.enter_context(io.BufferedReader(_ZstdStream(stream)))
        try:
            yield stream
        except DAMAGE as error:
            if (refused := damage(error)) is None:
                raise
            raise refused from error


def damage(error: Exception, row: int | None = None) -> RefusedInput | None:
    """What one of `DAMAGE`, raised at a row, means; None: the disk fails, not the file."""
    if isinstance(error, OSError) and error.errno is not None:
        return None
    return RefusedInput(f"the compressed file is damaged or cut short here ({error}); what follows is not read", row)


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of a file of zstd frames; a file that ends inside a frame raises EOFError."""

    def __init__(self, compressed: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise missing_extra("zstandard", ".zst files") from error
        self._compressed = compressed
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._compressed.read(_ZSTD_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:  # the next frame begins somewhere in this chunk: read on from there
                self._compressed.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def missing_extra(package: str, what: str, extra: str = "hub") -> UserError:
    """What to tell someone who has not installed what a source, or a step of cleaning, needs."""
    return UserError(f"{what} need the package {package}; install it with: {pip_install(f'maxlm[{extra}]')}")
