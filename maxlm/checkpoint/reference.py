"""Arrays that a run reads and does not train: saved as where they lie and what they are, never as a copy."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from maxlm.checkpoint import retention
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.state_hash import state_hash
from maxlm.checkpoint.store import Tree
from maxlm.config.errors import UserError
from maxlm.config.run import CheckpointConfig

PUBLISHED = "published"
"""Folder of a run that was made from a published model: with its tokenizer's files, chat template and family."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The parameters in one checkpoint of another run."""

    folder: str
    """Of the checkpoints, absolute."""
    step: int
    fingerprint: str
    """`state_hash` of the step's item `params`."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_and_step(place: str) -> tuple[Path, int | None]:
    """Run folder and step of RUN_DIR or RUN_DIR/checkpoints/STEP; without a step, the newest is meant."""
    path = Path(place)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def keep_published(folder: Path, run_dir: Path) -> None:
    """Copy what a run has of a published model into another one's folder."""
    if (folder / PUBLISHED).is_dir():
        shutil.copytree(folder / PUBLISHED, run_dir / PUBLISHED, dirs_exist_ok=True)


def read_reference(place: str, shapes: Tree, saved: dict[str, Any] | None) -> tuple[Tree, Reference]:
    """The parameters at `place`, in the shardings of `shapes`, and how a checkpoint refers to them.

    Args:
        place: a run folder, or RUN_DIR/checkpoints/STEP.
        shapes: of ShapeDtypeStructs.
        saved: what the run's own checkpoint has of `Reference.to_json`; None in a new run. A run that goes on reads the
            step that it began with, whatever newer ones there are.

    Raises:
        UserError: no such checkpoint, it is damaged, holds other arrays than `shapes`, or is not what the run began
            with.
    """
    run, step = run_and_step(place)
    folder = (run / "checkpoints").absolute()
    if saved is not None:
        step = saved["step"] if step is None else step
        if step not in retention.finished(folder):
            raise UserError(
                f"{folder}: has no finished checkpoint of step {step}, whose parameters this run reads and does not "
                f"train (it began with those of {saved['folder']}/{saved['step']}); bring it back, or name the place "
                "that it was moved to"
            )
    with Checkpointer(folder, CheckpointConfig(every=1)) as checkpointer:
        restored = checkpointer.restore_params(step, shapes)
    found = Reference(
        folder=str(folder), step=restored.step, fingerprint=state_hash(folder, restored.step, items=("params",))
    )
    if saved is not None and found.fingerprint != saved["fingerprint"]:
        raise UserError(
            f"{folder / str(found.step)}: its parameters have fingerprint {found.fingerprint[:12]}..., this run began "
            f"with {saved['fingerprint'][:12]}... of {saved['folder']}/{saved['step']}; bring those back, or set "
            "another run_dir"
        )
    return restored.params, found
