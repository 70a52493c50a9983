"""The folder of checkpoints: which steps it holds, which are kept, and how they are removed.

checkpoints/1000/                       a step; finished once it holds manifest.json
checkpoints/2000.orbax-checkpoint-tmp/  being written, or left by a run that was killed
checkpoints/1500.set-aside/             a finished step that a later run did not continue from; never read
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from maxlm.checkpoint import manifest

_STEP = re.compile(r"(0|[1-9]\d*)")
_TEMPORARY = re.compile(r"(0|[1-9]\d*)\.orbax-checkpoint-tmp.*")
_ASIDE = ".set-aside"


def finished(folder: Path) -> list[int]:
    """Steps that have a manifest, in rising order. Whether they are intact is for `manifest.verify` to say."""
    return sorted(int(p.name) for p in _folders(folder) if _STEP.fullmatch(p.name) and (p / manifest.NAME).exists())


def unfinished(folder: Path) -> list[Path]:
    """Folders of steps without a manifest: being written, half deleted, or left by a run that was killed."""
    return [p for p in _folders(folder) if _is_unfinished(p)]


def set_aside(folder: Path) -> list[Path]:
    """Folders that `move_aside` made."""
    return [p for p in _folders(folder) if p.name.endswith(_ASIDE)]


def number(path: Path) -> int:
    """The step that a folder of any of the three kinds belongs to."""
    return int(path.name.split(".", 1)[0])


def remove(path: Path) -> None:
    """Delete a step. Killed in the middle, it leaves an unfinished step, never a damaged one."""
    (path / manifest.NAME).unlink(missing_ok=True)
    manifest.sync_folder(path)
    shutil.rmtree(path)


def move_aside(folder: Path, step: int) -> Path:
    """Rename a finished step so that it is never restored, and return its new place. Replaces an earlier one."""
    target = folder / f"{step}{_ASIDE}"
    if target.exists():
        shutil.rmtree(target)
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


def _is_unfinished(path: Path) -> bool:
    if _TEMPORARY.fullmatch(path.name):
        return True
    return bool(_STEP.fullmatch(path.name)) and not (path / manifest.NAME).exists()


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
