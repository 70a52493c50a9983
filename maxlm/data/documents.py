"""A document, what becomes of those that cannot be read, and what bytes must be to be text."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from maxlm.config import UserError

MAX_DOCUMENT_BYTES = 256 << 20
"""Of one document, one line of JSON or CSV, and one whole `.json` file that is not JSON lines."""
_EXAMPLES = 5
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_BEGINNINGS = (
    (b"\x1f\x8b", "gzip; let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd; let its name end in .zst"),
    (b"BZh", "bzip2; let its name end in .bz2"),
    (b"\xfd7zXZ\0", "xz; let its name end in .xz"),
    (b"PAR1", "parquet; let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive or an office document; unpack it, or save it as text"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"%PDF-", "a PDF; save it as text (pdftotext)"),
    (b"\x89PNG", "a PNG picture; leave it out with pattern"),
    (b"\xff\xd8\xff", "a JPEG picture; leave it out with pattern"),
    (b"GIF8", "a GIF picture; leave it out with pattern"),
    (b"\x7fELF", "a program; leave it out with pattern"),
)
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it stands: a file, and the line or row in it (from 1) where a file holds many; perhaps what
    its record says of it."""

    text: str
    file: str
    row: int | None = None
    tag: str | None = None

    @property
    def kind(self) -> str:
        """The tag; without one the ending of the file's name, as `.py`; the name itself where it has none."""
        return self.tag or Path(self.file).suffix or Path(self.file).name


class RefusedInput(Exception):
    """A file, or what follows a place in it, cannot be read; other files can."""

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.row = reason, row


@dataclass
class Unreadable:
    """What could not be read: how much, and the first few places. And what was left out for another reason."""

    strict: bool = False
    """Stop at the first."""
    count: int = 0
    """A file of which nothing, or not the rest, can be read counts as one."""
    examples: list[str] = field(default_factory=list)
    left_out: int = 0
    """Files and folders that would have been read twice, or that `prepare` itself wrote."""
    left_out_examples: list[str] = field(default_factory=list)

    def report(self, file: str, row: int | None, reason: str) -> None:
        """Count a document that is not usable.

        Raises:
            UserError: `strict` is set.
        """
        place = printable(file if row is None else f"{file}:{row}")
        if self.strict:
            raise UserError(f"{place}: {reason}; mend it, or leave strict off to pass over such documents")
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{place}: {reason}")

    def leave_out(self, file: str, reason: str) -> None:
        """Say of a file or folder, which may be as it is, that it is not read."""
        self.left_out += 1
        if len(self.left_out_examples) < _EXAMPLES:
            self.left_out_examples.append(f"{printable(file)}: {reason}")

    def summary(self) -> str:
        """For each kind a line with the count, then the first few places; empty where all was read."""
        lines = []
        if self.count:
            lines += [f"{self.count:,} documents could not be read and were passed over:", *self.examples]
        if self.left_out:
            lines += [f"{self.left_out:,} files or folders were left out:", *self.left_out_examples]
        return "\n".join(lines)


def printable(name: str) -> str:
    """A file's name in one line that moves no terminal: line ends and the like are written out, as `\\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def check_beginning(start: bytes) -> None:
    """Compare the first bytes of what should be text with the marks of what is not.

    Raises:
        RefusedInput: it is text in UTF-16 or UTF-32, or a known format of another kind.
    """
    for mark, name in _MARKS:
        if start.startswith(mark):
            raise RefusedInput(f"{name}, must be UTF-8; convert it: iconv -f {name} -t UTF-8 FILE > NEW")
    for mark, what in _BEGINNINGS:
        if start.startswith(mark):
            raise RefusedInput(f"not text: it begins as {what}")


def text_of(content: bytes) -> str:
    """The text that the bytes of a whole document spell, without a byte order mark at its start.

    Raises:
        RefusedInput: it is too large, not UTF-8, or holds NUL bytes.
    """
    if len(content) > MAX_DOCUMENT_BYTES:
        raise RefusedInput(f"one document of {too_large()}; cut it into several files")
    check_beginning(content[:8])
    if (nul := content.find(b"\0")) >= 0:
        raise RefusedInput(
            "holds NUL bytes, which no text has: a binary file, or UTF-16 without its mark; leave it out with pattern, "
            "or convert it to UTF-8",
            _line(content, nul),
        )
    try:
        return content.removeprefix(UTF8_MARK).decode()
    except UnicodeDecodeError as error:
        at = error.start + len(UTF8_MARK) * content.startswith(UTF8_MARK)
        raise RefusedInput(
            f"not UTF-8 (byte 0x{content[at]:02x}); convert it (iconv -f latin1 -t UTF-8 FILE > NEW), or leave it out",
            _line(content, at),
        ) from error


def too_large() -> str:
    """The limit in words."""
    return f"more than {MAX_DOCUMENT_BYTES >> 20} MiB"


def shown(file: Path) -> str:
    """The path in characters that can be printed."""
    return os.fsencode(file).decode(errors="replace")


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1
