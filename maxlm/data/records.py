"""Documents of files that hold many: lines of JSON, other JSON, CSV and TSV, parquet.

A document is the text under a `key`; where that is None, the whole record, as JSON.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from maxlm.data.documents import (
    MAX_DOCUMENT_BYTES,
    UTF8_MARK,
    Document,
    RefusedInput,
    Unreadable,
    check_beginning,
    text_of,
    too_large,
)
from maxlm.data.input_files import DAMAGE, damage, missing_extra

_SKIPPED = 16
"""A line that is too long is passed over up to so many times the limit; what follows is not read."""
_WHITE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_int=lambda digits: float(digits) if len(digits) > 4000 else int(digits))
"""Python refuses to make an int of more than 4300 digits."""


def begin(stream: IO[bytes]) -> None:
    """Pass over a byte order mark, and see that what follows may be text.

    Raises:
        RefusedInput: it is another format, or another encoding than UTF-8.
    """
    start = stream.peek(8)[:8]  # type: ignore[attr-defined]
    if start.startswith(UTF8_MARK):
        stream.read(len(UTF8_MARK))
    check_beginning(start)


def json_lines(stream: IO[bytes], file: str, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    """One document a line, under `key`."""
    for row, line in _lines(stream, file, unreadable):
        yield from _json_line(line, file, row, key, unreadable)


def other_json(stream: IO[bytes], file: str, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    """JSON of any shape: a list of objects, objects one after the other, or lines of JSON.

    Lines are read one by one, as in a `.jsonl` file; all else is held in memory whole.
    """
    first = [stream.readline(MAX_DOCUMENT_BYTES + 1) for _ in range(2)]
    listed = first[0].lstrip().startswith(b"[")
    if _is_object(first[0]) or (_is_object(first[1]) and not listed):
        yield from json_lines(_Ahead(first, stream), file, key, unreadable)  # type: ignore[arg-type]
        return
    content = b"".join([*first, stream.read(max(0, MAX_DOCUMENT_BYTES + 1 - sum(map(len, first))))])
    if len(content) > MAX_DOCUMENT_BYTES:
        raise RefusedInput(f"JSON of {too_large()} that is not one object a line; convert it: jq -c '.[]' FILE > NEW")
    for row, value in _values(text_of(content)):
        yield from _record(value, file, row, key, unreadable)


class _Ahead:
    """A stream of which some lines have been read already."""

    def __init__(self, lines: list[bytes], stream: IO[bytes]) -> None:
        self._lines, self._stream = [line for line in lines if line], stream

    def readline(self, size: int) -> bytes:
        return self._lines.pop(0) if self._lines else self._stream.readline(size)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_DECODER.decode(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _values(text: str) -> Iterator[tuple[int, object]]:
    """The items of a list, or the values that stand one after the other, each with its line."""
    at = _after_white(text, 0)
    ends = text.startswith("[", at)
    at, between = _after_white(text, at + ends), False
    row = 1 + text.count("\n", 0, at)
    while at < len(text) and not (ends and text[at] == "]"):
        if ends and between:
            if text[at] != ",":
                raise RefusedInput("not JSON (expected , or ] after an item); what follows is not read", row)
            start, at = at, _after_white(text, at + 1)
            row += text.count("\n", start, at)
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise RefusedInput(f"not JSON ({_reason(error)}); what follows is not read", row) from error
        yield row, value
        end = _after_white(text, end)
        row += text.count("\n", at, end)
        at, between = end, True
    if ends and at >= len(text):
        raise RefusedInput("not JSON (the list has no end)", row)


def _after_white(text: str, at: int) -> int:
    found = _WHITE.match(text, at)
    assert found is not None, "it matches nothing too"
    return found.end()


def delimited(
    stream: IO[bytes], file: str, key: str | None, delimiter: str, unreadable: Unreadable
) -> Iterator[Document]:
    """CSV (RFC 4180) or TSV with names of columns in the first row: one document a row, in the column `key`."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = (line.decode(errors="surrogateescape") for _, line in _lines(stream, file, unreadable, blank=True))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise RefusedInput(f"not a table: {error}", 1) from error
    if key is not None and key not in names:
        raise RefusedInput(f"has no column {key!r}, only {names[:8]}; set text_key, or leave it out with pattern", 1)
    column = len(names) - 1 if key is None else names.index(key)
    while True:
        row = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            unreadable.report(file, row, f"not a row of {delimiter!r} and quotes ({error})")
            continue
        if not cells:
            continue
        if len(cells) <= column:
            unreadable.report(file, row, f"has {len(cells)} columns, {names[column]!r} is number {column + 1}")
        elif key is None:
            yield from _record(dict(zip(names, cells, strict=False)), file, row, key, unreadable)
        elif "\0" in cells[column]:
            unreadable.report(file, row, f"{key!r} holds NUL bytes, which no text has")
        else:
            yield from document(cells[column], file, row, key, unreadable)


def parquet(path: Path, file: str, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    """One document a row, in the column `key`. Memory: that column of one row group, or all of them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", ".parquet files") from error
    row = 0
    with path.open("rb") as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            if key is not None and key not in table.schema_arrow.names:
                raise RefusedInput(f"has no column {key!r}, only {table.schema_arrow.names[:8]}; set text_key")
            for batch in table.iter_batches(batch_size=256, columns=None if key is None else [key]):
                for cell in batch.to_struct_array() if key is None else batch.column(0):
                    row += 1
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError:
                        unreadable.report(file, row, "not UTF-8")
                    else:
                        give = _record if key is None else document
                        yield from give(value, file, row, key, unreadable)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise RefusedInput(f"not a whole parquet file ({reason})", row + 1 if row else None) from error


def document(value: object, file: str, row: int, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    """The document that is the value of a record's text key."""
    place = "the record" if key is None else repr(key)
    if not isinstance(value, str):
        unreadable.report(file, row, f"{place} holds {_kind(value)}, not text")
        return
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character; in CSV it stands for a byte that is not UTF-8.
        half = ord(value[error.start])
        what = f"byte 0x{half - 0xDC00:02x}" if 0xDC80 <= half <= 0xDCFF else "half of a surrogate pair"
        unreadable.report(file, row, f"{place} holds {what}, which is not Unicode text")
        return
    if size > MAX_DOCUMENT_BYTES:
        unreadable.report(file, row, f"{place} holds {too_large()}; cut it into several documents")
    else:
        yield Document(value, file, row)


def _lines(stream: IO[bytes], file: str, unreadable: Unreadable, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, as far as the file goes. Lines without text only if `blank`."""
    for row in itertools.count(1):
        try:
            line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            too_long = len(line) > MAX_DOCUMENT_BYTES
            if too_long:
                _to_the_end(stream, line, row)
        except DAMAGE as error:
            if (refused := damage(error, row)) is None:
                raise
            raise refused from error
        if not line:
            return
        if too_long:
            unreadable.report(file, row, f"a line of {too_large()}; cut it into several documents")
        elif blank or line.strip():
            yield row, line


def _to_the_end(stream: IO[bytes], line: bytes, row: int) -> None:
    """Pass over what remains of a line that is too long."""
    rest = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(1 << 20)
        rest += len(line)
        if rest > _SKIPPED * MAX_DOCUMENT_BYTES:
            raise RefusedInput(
                f"a line of more than {_SKIPPED * MAX_DOCUMENT_BYTES >> 30} GiB; what follows is not read"
            )


def _json_line(line: bytes, file: str, row: int, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    try:
        record = _DECODER.decode(line.decode())
    except UnicodeDecodeError:
        unreadable.report(file, row, "not UTF-8")
    except (ValueError, RecursionError) as error:
        unreadable.report(file, row, f"not JSON ({_reason(error)})")
    else:
        yield from _record(record, file, row, key, unreadable)


def _record(record: object, file: str, row: int, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    if not isinstance(record, dict):
        unreadable.report(file, row, f"holds {_kind(record)}, not an object")
    elif key is None:
        try:
            text = json.dumps(record, ensure_ascii=False)
        except TypeError as error:
            unreadable.report(file, row, f"the record holds what JSON cannot ({error})")
        else:
            yield from document(text, file, row, key, unreadable)
    elif key not in record:
        known = [name[:40] for name in sorted(record)[:8]]
        remedy = "set text_key (or purpose, of conversations and the like), or leave it out with pattern"
        unreadable.report(file, row, f"has no key {key!r}, only {known}; {remedy}")
    else:
        yield from document(record[key], file, row, key, unreadable)


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _kind(value: Any) -> str:
    kinds = {
        type(None): "null",
        float: "a number",
        int: "a number",
        bool: "true or false",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)
