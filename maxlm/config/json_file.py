"""JSON that this project wrote, read with limits: a damaged or foreign file is one line that names file and key."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config.errors import UserError

MAX_BYTES = 64 << 20
"""Of a file."""
MAX_DEPTH = 64
"""Objects and lists inside each other."""
MAX_DIGITS = 300
"""Of an integer."""


_WHAT = "a JSON object that maxlm wrote"


@dataclass(frozen=True)
class _TooLong:
    """Stands where an integer had too many digits, until its key is known."""

    digits: int


class _Twice(ValueError):
    """A key stands twice in an object."""


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """All bytes of a regular file. A pipe, which might never end, is not opened.

    Raises:
        OSError: it cannot be read, is no regular file, or has more bytes than `limit`.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # what opening a folder says is clear
        raise OSError(0, f"{kind_of(mode)}, not a file", str(path))
    with path.open("rb") as stream:
        content = stream.read() if limit is None else stream.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise OSError(0, f"more than {limit:,} bytes", str(path))
    return content


def kind_of(mode: int) -> str:
    """What `st_mode` says a path is, where it is no regular file."""
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def no_folder(path: Path) -> str | None:
    """What to say of a path that is no folder; None: it is one."""
    if path.is_dir():
        return None
    if path.exists():
        return "is a file, must be a folder"
    return "is a link to nothing" if path.is_symlink() else "no such folder"


def read_object(path: Path, what: str = _WHAT) -> dict[str, Any]:
    """The object in a file.

    Args:
        path: the file.
        what: what it must be, for messages.

    Raises:
        UserError: the file cannot be read, or `parse_object` refuses it.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), must be {what}") from error
    return parse_object(content, path, what)


def parse_object(content: bytes, path: Path, what: str = _WHAT) -> dict[str, Any]:
    """The object that the bytes of a file spell. A byte order mark is passed over.

    Raises:
        UserError: it is not UTF-8, not JSON or no object, a key stands twice, it is nested deeper than `MAX_DEPTH`, or
            an integer has more than `MAX_DIGITS` digits.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_int=_integer, object_pairs_hook=_object)
    except RecursionError as error:
        raise UserError(f"{path}: {_too_deep('the outermost value')}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, must be {what}")
    for key, depth, inner in _values(value):
        if depth > MAX_DEPTH:
            raise UserError(f"{path}: {_too_deep(key[:60])}")
        if isinstance(inner, _TooLong):
            raise UserError(
                f"{path}: {key} is an integer of {inner.digits:,} digits, must have at most {MAX_DIGITS}; restore the "
                "file"
            )
    return value


def _too_deep(key: str) -> str:
    return f"not JSON that maxlm wrote: {key} is nested more than {MAX_DEPTH} deep; restore the file"


def _integer(digits: str) -> int | _TooLong:
    return int(digits) if len(digits) <= MAX_DIGITS else _TooLong(len(digits.lstrip("-")))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def _values(value: Any) -> Iterator[tuple[str, int, Any]]:
    """Every value inside: its dotted key, how deep it lies, itself."""
    rest: list[tuple[str, int, Any]] = [("", 0, value)]
    while rest:
        key, depth, inner = rest.pop()
        yield key, depth, inner
        if depth <= MAX_DEPTH and isinstance(inner, dict | list):
            pairs = inner.items() if isinstance(inner, dict) else enumerate(inner)
            rest += [(f"{key}.{name}" if key else str(name), depth + 1, item) for name, item in pairs]
