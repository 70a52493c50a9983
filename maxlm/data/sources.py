"""Documents, one after the other and always in the same order, with the place where each one stands."""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, assert_never

from maxlm.config import Documents, Files, HuggingFaceDataset, StandardLibrary, UserError
from maxlm.config.errors import pip_install

_EXAMPLES = 5
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it stands: a file, and the line or row in it (from 1) where a file holds many."""

    text: str
    file: str
    row: int | None = None

    @property
    def kind(self) -> str:
        """The ending of the file's name, as `.py`; the name itself where it has none."""
        return Path(self.file).suffix or Path(self.file).name


@dataclass
class Unreadable:
    """What could not be read: how much, and the first few places."""

    strict: bool = False
    """Stop at the first."""
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def report(self, file: str, row: int | None, reason: str) -> None:
        """Count a document that is not usable.

        Raises:
            UserError: `strict` is set.
        """
        place = file if row is None else f"{file}:{row}"
        if self.strict:
            raise UserError(f"{place}: {reason}; mend it, or leave strict off to pass over such documents")
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{place}: {reason}")

    def summary(self) -> str:
        """A line with the count, then the first few places."""
        return "\n".join([f"{self.count:,} documents could not be read and were passed over:", *self.examples])


def iterate_documents(documents: Documents, unreadable: Unreadable) -> Iterator[Document]:
    """Every document that can be read, in an order that depends on names and contents alone.

    Bad UTF-8, malformed JSON, a missing key and a value that is not text are told to `unreadable`.

    Raises:
        UserError: a path is missing or cannot be read, nothing is found at all, or an extra is not installed.
    """
    match documents:
        case StandardLibrary():
            for file in _walk(Path(sysconfig.get_path("stdlib")), "*.py", skip=_NOT_LIBRARY):
                yield from _text_file(file, unreadable)
        case Files():
            for file in _files(documents):
                if file.name.endswith(_JSON_LINES):
                    yield from _json_lines(file, documents.text_key, unreadable)
                elif file.suffix == ".parquet":
                    yield from _parquet(file, documents.text_key, unreadable)
                else:
                    yield from _text_file(file, unreadable)
        case HuggingFaceDataset():
            yield from _hugging_face(documents, unreadable)
        case _:
            assert_never(documents)


def first_bytes(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Whole documents until they have `limit` bytes of text or more."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode())
        if size >= limit:
            return


def describe_documents(documents: Documents) -> str:
    """The documents in a few words, for messages."""
    match documents:
        case StandardLibrary():
            return "the standard library"
        case Files(paths=paths):
            return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        case HuggingFaceDataset(name=name, split=split):
            return f"{name}[{split}]"
        case _:
            assert_never(documents)


def _files(documents: Files) -> Iterator[Path]:
    found = False
    for path in map(Path, documents.paths):
        if path.is_dir():
            for file in _walk(path, documents.pattern, skip=set()):
                found = True
                yield file
        elif path.exists():
            found = True
            yield path
        else:
            raise UserError(f"{path}: no such file or folder")
    if not found:
        raise UserError(f"{', '.join(documents.paths)}: holds no file named like {documents.pattern!r}")


def _walk(folder: Path, pattern: str, skip: set[str]) -> Iterator[Path]:
    """Files below `folder` sorted by path, without hidden ones and what Python compiled."""

    def refuse(error: OSError) -> None:
        raise _not_readable(Path(error.filename), error) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            if fnmatch.fnmatch(name, pattern) and not name.startswith("."):
                yield Path(parent, name)


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise _not_readable(file, error) from error


def _not_readable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read ({error.strerror})")


def _text_file(file: Path, unreadable: Unreadable) -> Iterator[Document]:
    try:
        with _open(file) as stream:
            content = stream.read()
    except OSError as error:
        raise _not_readable(file, error) from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        unreadable.report(str(file), line, f"not UTF-8 (byte 0x{content[error.start]:02x})")
    else:
        yield Document(text, str(file))


def _json_lines(file: Path, key: str, unreadable: Unreadable) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        stream: Iterable[bytes] = (compressed := stack.enter_context(_open(file)))
        if file.suffix == ".gz":
            stream = stack.enter_context(gzip.open(compressed))
        elif file.suffix == ".zst":
            stream = stack.enter_context(io.BufferedReader(_ZstdStream(compressed)))
        row = 0
        try:
            for row, line in enumerate(stream, start=1):
                if line.strip():
                    yield from _json_line(line, str(file), row, key, unreadable)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            unreadable.report(str(file), row + 1, f"the compressed file is damaged or cut short here ({error})")
        except OSError as error:
            raise _not_readable(file, error) from error


def _json_line(line: bytes, file: str, row: int, key: str, unreadable: Unreadable) -> Iterator[Document]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        unreadable.report(file, row, "not UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        unreadable.report(file, row, f"not JSON ({error})")
    else:
        if not isinstance(record, dict):
            unreadable.report(file, row, f"holds {_kind(record)}, not an object")
        elif key not in record:
            unreadable.report(file, row, f"has no key {key!r}, only {sorted(record)[:8]}")
        else:
            yield from _value(record[key], file, row, key, unreadable)


def _value(value: object, file: str, row: int, key: str, unreadable: Unreadable) -> Iterator[Document]:
    """The document that is the value of a record's text key."""
    if not isinstance(value, str):
        unreadable.report(file, row, f"{key!r} holds {_kind(value)}, not text")
        return
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        unreadable.report(file, row, f"{key!r} holds half of a surrogate pair, which is not Unicode text")
    else:
        yield Document(value, file, row)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of a file of zstd frames; a file that ends inside a frame raises EOFError."""

    def __init__(self, compressed: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise _missing_extra("zstandard", ".zst files") from error
        self._compressed = compressed
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._compressed.read(1 << 17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:  # the next frame begins somewhere in this chunk: read on from there
                self._compressed.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parquet(file: Path, key: str, unreadable: Unreadable) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing_extra("pyarrow", ".parquet files") from error
    with _open(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            if key not in table.schema_arrow.names:
                raise UserError(f"{file}: has no column {key!r}, only {table.schema_arrow.names}; set text_key")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[key]):
                for cell in batch.column(0):
                    row += 1
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError:
                        unreadable.report(str(file), row, "not UTF-8")
                    else:
                        yield from _value(value, str(file), row, key, unreadable)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a whole parquet file ({' '.join(str(error).split())})") from error


def _hugging_face(documents: HuggingFaceDataset, unreadable: Unreadable) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise _missing_extra("datasets", "Hugging Face data sets") from error
    name = documents.name if documents.subset is None else f"{documents.name}/{documents.subset}"
    place = f"{name}[{documents.split}]"
    try:
        for row, record in enumerate(
            datasets.load_dataset(documents.name, documents.subset, split=documents.split, streaming=True), start=1
        ):
            if documents.text_key not in record:
                raise UserError(f"{place}: has no column {documents.text_key!r}, only {sorted(record)}; set text_key")
            yield from _value(record[documents.text_key], place, row, documents.text_key, unreadable)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: Hugging Face datasets cannot read it ({type(error).__name__}: {reason})") from error


def _missing_extra(package: str, what: str) -> UserError:
    return UserError(f"{what} need the package {package}; install it with: {pip_install('maxlm[hub]')}")
