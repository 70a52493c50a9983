"""The input in parts: files of about so many bytes together, and their documents as pages."""

from __future__ import annotations

import json
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
"""Keys of a page on its way; a record's own `id` is the tag `source_id`."""


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
        with counted(file, unreadable):
            for document in file_documents(file, None, unreadable):
                if ending_of(file) in RECORDS:
                    yield from _of_record(document, document.row or 1, key, unreadable)
                elif document.text.strip():
                    yield Page(document.file, document.text)


def _of_record(document: Document, row: int, key: str, unreadable: Unreadable) -> Iterator[Page]:
    record = json.loads(document.text)
    if key not in record:
        unreadable.report(document.file, document.row, f"has no key {key!r}, only {sorted(record)[:8]}; set text_key")
        return
    for found in records.document(record.pop(key), document.file, row, key, unreadable):
        if _ID in record:
            record["source_id"] = record.pop(_ID)
        record.pop(_TEXT, None)
        yield Page(f"{found.file}:{found.row}", found.text, record)


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
