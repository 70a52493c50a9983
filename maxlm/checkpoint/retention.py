"""The folder of checkpoints: which steps it holds, which are kept, and how they are removed.

checkpoints/1000/            a finished step: it gets this name with its manifest.json inside
checkpoints/2000.writing*/   being written, or left by a run that was killed
checkpoints/500.deleting/    half deleted
checkpoints/1500.set-aside/  a step that a later run did not continue from; never read (also .set-aside-2, ...)
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from maxlm.checkpoint import manifest
from maxlm.config.errors import UserError

_STEP = re.compile(r"(0|[1-9]\d*)")
_WRITING = ".writing"
_DELETING = ".deleting"
_TEMPORARY = re.compile(rf"(0|[1-9]\d*)({_WRITING}|{_DELETING}|\.orbax-checkpoint-tmp).*")
_ASIDE = ".set-aside"
_SET_ASIDE = re.compile(rf".*{_ASIDE}(-\d+)?")


def finished(folder: Path) -> list[int]:
    """Steps that have a manifest, in rising order. Whether they are intact is for `manifest.verify` to say."""
    return sorted(int(p.name) for p in _steps(folder) if manifest.exists(p))


def unsealed(folder: Path) -> list[int]:
    """Steps without a manifest, in rising order: somebody took it away, or the folder was copied in part."""
    return sorted(int(p.name) for p in _steps(folder) if not manifest.exists(p))


def temporary(folder: Path) -> list[Path]:
    """Folders of steps that are being written or deleted, or were when a run was killed."""
    return [p for p in _folders(folder) if _TEMPORARY.fullmatch(p.name)]


def set_aside(folder: Path) -> list[Path]:
    """Folders that `move_aside` made."""
    return [p for p in _folders(folder) if _SET_ASIDE.fullmatch(p.name)]


def writing(folder: Path, step: int) -> Path:
    """Where a step lies until it is sealed."""
    return folder / f"{step}{_WRITING}"


def publish(folder: Path, step: int) -> None:
    """Give a sealed step its name."""
    writing(folder, step).rename(folder / str(step))
    manifest.sync_folder(folder)


def number(path: Path) -> int:
    """The step that a folder of any of these kinds belongs to."""
    return int(path.name.split(".", 1)[0])


def remove(path: Path) -> None:
    """Delete a step. Killed in the middle, it leaves a temporary folder, never a damaged step."""
    if _STEP.fullmatch(path.name):
        path = path.rename(path.with_name(f"{path.name}{_DELETING}"))
        manifest.sync_folder(path.parent)
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def move_aside(folder: Path, step: int) -> Path:
    """Rename a step so that it is never restored, and return its new place, which nothing had before."""
    names = (f"{step}{_ASIDE}" if i == 1 else f"{step}{_ASIDE}-{i}" for i in itertools.count(1))
    target = next(folder / name for name in names if not os.path.lexists(folder / name))
    (folder / str(step)).rename(target)
    manifest.sync_folder(folder)
    return target


def kept(steps: list[int], *, keep_last: int, keep_every: int) -> dict[int, str]:
    """The finished steps that the keep rule keeps, each with the reason."""
    reasons: dict[int, str] = {}
    for step in sorted(steps):
        why = []
        if step in sorted(steps)[-keep_last:]:
            why.append(f"newest {keep_last}")
        if keep_every and step % keep_every == 0:
            why.append(f"multiple of {keep_every}")
        if why:
            reasons[step] = ", ".join(why)
    return reasons


def _steps(folder: Path) -> list[Path]:
    return [p for p in _folders(folder) if _STEP.fullmatch(p.name)]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give this user the right to") from error
