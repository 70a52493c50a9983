"""The input in parts: files of about so many bytes together, and their documents as pages."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

from maxlm.config import Files, StandardLibrary
from maxlm.data import records
from maxlm.data.cleaning.findings import Page
from maxlm.data.documents import Document, Unreadable
from maxlm.data.input_files import counted, input_files, walk
from maxlm.data.sources import NOT_LIBRARY, RECORDS, ending_of, file_documents

_ID, _TEXT = "id", "text"
"""Keys of a page on its way; a record's own are the tags `source_id` and `source_text`."""
_LIKE_A_ROW = re.compile(r":[\d.]+$")


def parts_of(
    documents: Files | StandardLibrary, part_bytes: int, unreadable: Unreadable, except_for: Path
) -> list[list[str]]:
    """The files of the input in order of their names, in parts: the same for any order of `documents.paths`.

    Raises:
        UserError: a path is missing, or nothing is found at all.
        MachineFailure: the disk fails.
    """
    match documents:
        case Files():
            files = sorted(input_files(documents, unreadable, except_for))
        case StandardLibrary():
            library = Path(sysconfig.get_path("stdlib"))
            files = sorted(walk(library, "*.py", unreadable=unreadable, skip=NOT_LIBRARY))
        case _:
            assert_never(documents)
    parts: list[list[str]] = []
    size = part_bytes
    for file in files:
        if size >= part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(str(file))
        with counted(file, unreadable):
            size += file.stat().st_size
    return parts


def read_pages(files: list[str], documents: Files | StandardLibrary, unreadable: Unreadable) -> Iterator[Page]:
    """The documents of a part, with what their records say beside the text as tags."""
    key = documents.text_key if isinstance(documents, Files) else Files.text_key
    for file in map(Path, files):
        place, before, again = _place(file), 0, 0
        with counted(file, unreadable):
            for document in file_documents(file, None, unreadable):
                if ending_of(file) not in RECORDS:
                    yield Page(f"{place}:1" if _LIKE_A_ROW.search(place) else place, document.text)
                    continue
                row = document.row or 1
                again = again + 1 if row == before else 1  # of JSON, several may begin in one line
                before = row
                id = f"{place}:{row}" if again == 1 else f"{place}:{row}.{again}"
                yield from _of_record(document, id, key, unreadable)


def _place(file: Path) -> str:
    """The name of the file; of one that is no UTF-8 with a hash, as several look the same."""
    name = os.fsencode(file)
    try:
        return name.decode()
    except UnicodeDecodeError:
        return f"{name.decode(errors='replace')}#{hashlib.blake2b(name, digest_size=8).hexdigest()}"


def _of_record(document: Document, id: str, key: str, unreadable: Unreadable) -> Iterator[Page]:
    row = document.row or 1
    record = json.loads(document.text, parse_float=_finite, parse_constant=lambda _: None)
    if key not in record:
        unreadable.report(document.file, row, f"has no key {key!r}, only {sorted(record)[:8]}; set text_key")
        return
    for found in records.document(record.pop(key), document.file, row, key, unreadable):
        for taken in (_ID, _TEXT):
            if taken in record:
                name = f"source_{taken}"
                while name in record:
                    name = f"source_{name}"
                record[name] = record.pop(taken)
        yield Page(id, found.text, record)


def _finite(digits: str) -> float | None:
    """JSON has no other numbers, though Python reads and writes some."""
    return value if math.isfinite(value := float(digits)) else None


def write_line(page: Page) -> bytes:
    """A page as a line of JSON."""
    record: dict[str, Any] = {_ID: page.id, _TEXT: page.text, **page.tags}
    return json.dumps(record, ensure_ascii=False, check_circular=False).encode(errors="replace") + b"\n"


def read_lines(file: Path) -> Iterator[Page]:
    """What `write_line` wrote."""
    with file.open("rb") as stream:
        for line in stream:
            record = json.loads(line)
            yield Page(record.pop(_ID), record.pop(_TEXT), record)
