"""Documents, one after the other and always in the same order, with the place where each one stands."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import assert_never

from maxlm.config import Conversations, Documents, Files, HuggingFaceDataset, StandardLibrary, UserError
from maxlm.data import records
from maxlm.data.documents import MAX_DOCUMENT_BYTES, Document, RefusedInput, Unreadable, shown, text_of
from maxlm.data.input_files import COMPRESSED, counted, input_files, missing_extra, opened, walk

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files that hold many documents."""
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
"""Folders of the standard library that are left out."""


def iterate_documents(
    documents: Documents, unreadable: Unreadable, except_for: Path | None = None
) -> Iterator[Document]:
    """Every document that can be read, in an order that depends on names and contents alone.

    What cannot be read (docs/data.md has the table of endings) is told to `unreadable`, and the rest is read. Memory:
    `MAX_DOCUMENT_BYTES` for the longest document, several times over, and what `input_files.opened` says.

    Args:
        documents: where they are.
        unreadable: told of what cannot be read, and what is left out.
        except_for: a folder whose files are left out: the one that is being written.

    Raises:
        UserError: a path is missing, nothing is found at all, an extra is not installed, or `unreadable.strict`.
        MachineFailure: the disk fails.
    """
    match documents:
        case StandardLibrary():
            library = Path(sysconfig.get_path("stdlib"))
            for file in walk(library, "*.py", unreadable=unreadable, skip=NOT_LIBRARY):
                with counted(file, unreadable):
                    yield from _text_file(file)
        case Files():
            for file in input_files(documents, unreadable, except_for):
                with counted(file, unreadable):
                    yield from file_documents(file, documents.text_key, unreadable)
        case Conversations(paths=paths, pattern=pattern):
            files = Files(paths=paths, pattern=pattern)
            for file in input_files(files, unreadable, except_for):
                with counted(file, unreadable):
                    if (ending := ending_of(file)) not in RECORDS:
                        raise RefusedInput(f"ends in {ending or 'nothing'}; records are in {', '.join(RECORDS)}")
                    yield from file_documents(file, None, unreadable)
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
        case Files(paths=paths) | Conversations(paths=paths):
            return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        case HuggingFaceDataset(name=name, split=split):
            return f"{name}[{split}]"
        case _:
            assert_never(documents)


def ending_of(file: Path) -> str:
    """Of its name, without that of a compression."""
    name = file.name.lower()
    name = name.rpartition(".")[0] if name.endswith(COMPRESSED) else name
    return name[name.rfind(".") :] if "." in name else ""


def file_documents(file: Path, key: str | None, unreadable: Unreadable) -> Iterator[Document]:
    """The documents of a file, as the ending of its name says. `key`: of their text; None: whole records, as JSON.

    Raises:
        RefusedInput: nothing of it can be read.
    """
    place, ending = shown(file), ending_of(file)
    if ending == ".parquet":
        if file.name.lower().endswith(COMPRESSED):
            raise RefusedInput("parquet inside another compression; decompress it first")
        yield from records.parquet(file, place, key, unreadable)
    elif ending in RECORDS:
        with opened(file) as stream:
            records.begin(stream)
            match ending:
                case ".json":
                    yield from records.other_json(stream, place, key, unreadable)
                case ".csv" | ".tsv":
                    delimiter = "," if ending == ".csv" else "\t"
                    yield from records.delimited(stream, place, key, delimiter, unreadable)
                case _:
                    yield from records.json_lines(stream, place, key, unreadable)
    else:
        yield from _text_file(file)


def _text_file(file: Path) -> Iterator[Document]:
    with opened(file) as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    yield Document(text_of(content), shown(file))


def _hugging_face(documents: HuggingFaceDataset, unreadable: Unreadable) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "Hugging Face data sets") from error
    name = documents.name if documents.subset is None else f"{documents.name}/{documents.subset}"
    place = f"{name}[{documents.split}]"
    try:
        for row, record in enumerate(
            datasets.load_dataset(documents.name, documents.subset, split=documents.split, streaming=True), start=1
        ):
            if documents.text_key not in record:
                raise UserError(f"{place}: has no column {documents.text_key!r}, only {sorted(record)}; set text_key")
            yield from records.document(record[documents.text_key], place, row, documents.text_key, unreadable)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: Hugging Face datasets cannot read it ({type(error).__name__}: {reason})") from error
