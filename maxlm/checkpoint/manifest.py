"""The manifest of a checkpoint step: size and SHA-256 of each of its files, written last.

Array files carry no checksum that is looked at when they are read, so one flipped bit would be restored as a wrong
number. The manifest finds it. It also marks a step as finished: it is written after every other file is on disk, in
one atomic rename, and removed first when a step is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from maxlm.config import UserError
from maxlm.config.json_file import parse_object

NAME = "manifest.json"
_FORMAT = 1
_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter lock; beyond 8 the disk is the limit


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished step: its files by path relative to the step's folder, and the keep rule it was written under."""

    step: int
    written: str
    """UTC, ISO 8601."""
    keep_last: int
    keep_every: int
    files: dict[str, FileRecord]

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


@dataclass(frozen=True, kw_only=True)
class BrokenFile:
    """Why a step is not what was written."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class ManifestError(Exception):
    """The manifest is there but cannot be trusted."""


def write(folder: Path, *, step: int, keep_last: int, keep_every: int) -> Manifest:
    """Record every file of a step that is complete. On return all of it has reached the disk.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    names = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(lambda name: _record(folder / name, flush=True), names)
        manifest = Manifest(
            step=step,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            keep_last=keep_last,
            keep_every=keep_every,
            files=dict(zip(names, records, strict=True)),
        )
    for inner in sorted({parent for name in names for parent in (folder / name).parents if parent >= folder}):
        sync_folder(inner)
    sync_folder(folder.parent)
    draft = folder / f"{NAME}.tmp"
    with draft.open("wb") as file:
        file.write(_encode(manifest))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / NAME)
    sync_folder(folder)
    return manifest


def load(folder: Path) -> Manifest:
    """Read the manifest of a step and check it against itself.

    Raises:
        FileNotFoundError: there is none.
        ManifestError: it cannot be read, is empty, cut off, changed, or of a format that this version does not know.
    """
    if not exists(folder):
        raise FileNotFoundError(folder / NAME)
    try:
        raw = _read(folder / NAME)
    except OSError as error:
        raise ManifestError(f"cannot be read ({error.strerror})") from error
    try:
        body = parse_object(raw, folder / NAME)
        if body["format"] != _FORMAT:
            raise ManifestError(f"has format {body['format']!r}, this version reads {_FORMAT}")
        manifest = Manifest(
            step=body["step"],
            written=body["written"],
            keep_last=body["keep_last"],
            keep_every=body["keep_every"],
            files={name: FileRecord(**record) for name, record in body["files"].items()},
        )
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"not a manifest ({len(raw)} bytes; empty, cut off or changed)") from error
    # Encoding again must give the very bytes that were read: that covers the checksum inside and every byte around it.
    if _encode(manifest) != raw:
        raise ManifestError("has been changed (its own checksum does not match)")
    return manifest


def exists(folder: Path) -> bool:
    """Whether a step has a manifest, readable or not: then it was finished once."""
    try:
        os.lstat(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # what cannot be looked at is damaged, not absent
        return True
    return True


def verify(folder: Path, step: int, *, checksums: bool = True, skip: Collection[str] = ()) -> list[BrokenFile]:
    """Compare a step with its manifest; an empty list means it is what was written.

    Names and sizes are always compared. `checksums=False` leaves the contents unread; `skip` names top folders of the
    step whose contents stay unread.

    Raises:
        FileNotFoundError: the step has no manifest.
    """
    try:
        manifest = load(folder)
    except ManifestError as error:
        return [BrokenFile(file=NAME, reason=str(error))]
    if manifest.step != step:
        return [BrokenFile(file=NAME, reason=f"is that of step {manifest.step}; this folder is step {step}")]
    found = _files(folder)
    problems = [BrokenFile(file=name, reason="missing") for name in sorted(manifest.files.keys() - set(found))]
    for name in sorted(set(found) - manifest.files.keys()):
        problems.append(BrokenFile(file=name, reason="not in the manifest; delete it if it was put there by hand"))
    to_read = []
    for name in sorted(manifest.files.keys() & set(found)):
        expected = manifest.files[name].bytes
        try:
            seen = (folder / name).stat()
        except OSError as error:
            problems.append(BrokenFile(file=name, reason=f"cannot be read ({error.strerror})"))
            continue
        if not stat.S_ISREG(seen.st_mode):
            problems.append(BrokenFile(file=name, reason="not a file"))
        elif seen.st_size != expected:
            problems.append(BrokenFile(file=name, reason=f"{seen.st_size} bytes, expected {expected}"))
        elif checksums and name.split("/", 1)[0] not in skip:
            to_read.append(name)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, problem in zip(
            to_read, pool.map(lambda n: _compare(folder / n, manifest.files[n]), to_read), strict=True
        ):
            if problem:
                problems.append(BrokenFile(file=name, reason=problem))
    return problems


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name not in (NAME, f"{NAME}.tmp")]


def _read(path: Path) -> bytes:
    """What a file holds, and an OSError for anything else, such as a pipe, which would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file")
    return path.read_bytes()


def _record(path: Path, *, flush: bool = False) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return FileRecord(bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def _compare(path: Path, expected: FileRecord) -> str | None:
    try:
        seen = _record(path).sha256
    except OSError as error:  # a disk that fails is a damaged file, not a reason to stop
        return f"cannot be read ({error.strerror})"
    return None if seen == expected.sha256 else f"sha256 {seen}, expected {expected.sha256}"


def _encode(manifest: Manifest) -> bytes:
    """The manifest as JSON with a checksum over all the rest; equal manifests give equal bytes."""
    body = {"format": _FORMAT, **asdict(manifest)}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "checksum": checksum}, indent=1, sort_keys=True) + "\n").encode()
