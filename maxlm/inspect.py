"""`python -m maxlm.inspect RUN_DIR`: list the checkpoints of a run, verify them, and hash their state."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import contextlib
import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from maxlm.checkpoint import manifest, retention
from maxlm.config.cli import parse, run_command
from maxlm.config.errors import UserError
from maxlm.config.fields import NotNegative, PathName, config
from maxlm.observe.text import gibibytes
from maxlm.surroundings import console

_DESCRIPTION = """List the checkpoints of a run, verify them, and hash their state.

Reads only, but for --seal, and may be used while the run is training. Exit code 0: nothing damaged was found; 1: a
checkpoint is damaged, or there is none to hash; 2: the question was wrong (no such folder, no such step)."""


@config("--")
class InspectOptions:
    """What to look at, and how closely."""

    run_dir: Annotated[tyro.conf.Positional[PathName], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run; its checkpoints lie in RUN_DIR/checkpoints."""
    step: NotNegative[int] | None = None
    """Look at this step only."""
    verify: bool = False
    """Read every byte and compare it with the manifest."""
    hash: bool = False
    """Print the SHA-256 of the state (parameters, optimizer, step, data position) of the newest intact step."""
    seal: NotNegative[int] | None = None
    """Give this step, which has lost its manifest, a new one, first. Whether its bytes are those that were written,
    only you can know; that every array opens is checked."""
    json: bool = False
    """Print one JSON object instead of a table."""
    debug: bool = False
    """Show tracebacks."""


class StepStatus(enum.Enum):
    """What is known of a step."""

    FINISHED = "finished"
    """It has a manifest that is right in itself; the files it speaks of have not been read."""
    OK = "ok"
    """Every file is what the manifest says."""
    UNFINISHED = "unfinished"
    """Being written or deleted, or left so by a run that was stopped."""
    UNSEALED = "unsealed"
    """It has no manifest."""
    DAMAGED = "damaged"


@dataclass(kw_only=True)
class InspectedStep:
    """One step as it is listed."""

    step: int
    status: StepStatus
    manifest: manifest.Manifest | None = None
    """None if it has none that can be read."""
    kept: str | None = None
    problems: list[str] = field(default_factory=list)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        UserError: the folder, its checkpoints or the step do not exist.
    """
    options = parse(InspectOptions, argv, prog="python -m maxlm.inspect", description=_DESCRIPTION, flags=True)
    folder = Path(options.run_dir) / "checkpoints"
    if options.seal is not None:
        _seal(folder, options.seal)
    everything = _entries(folder)
    entries = [entry for entry in everything if options.step in (None, entry.step)]
    if not entries:
        there = sorted({entry.step for entry in everything})
        raise UserError(f"--step {options.step}: {folder} has no such step; there are {there}")
    if options.verify:
        for entry in entries:
            _verify(folder, entry)
    report: dict[str, Any] = {
        "run_dir": options.run_dir,
        "steps": [],
        "set_aside": [path.name for path in retention.set_aside(folder)],
    }
    if options.hash:
        report["hash_step"] = step = _newest_intact(folder, entries)
        report["hash"] = None if step is None else _hash(folder, step)
    report["steps"] = [_json(entry) for entry in entries]
    report["latest"] = max(
        (e.step for e in everything if e.status in (StepStatus.FINISHED, StepStatus.OK)), default=None
    )
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        _print_table(entries)
        for line in _remarks(entries, report):
            print(line)
    damaged = any(entry.status is StepStatus.DAMAGED for entry in entries)
    return 1 if damaged or (options.hash and report["hash"] is None) else 0


def _entries(folder: Path) -> list[InspectedStep]:
    if not folder.parent.is_dir():
        raise UserError(f"RUN_DIR = {folder.parent}: no such folder; name the run_dir of a run")
    entries = [
        InspectedStep(step=retention.number(path), status=StepStatus.UNFINISHED) for path in retention.temporary(folder)
    ]
    entries += [InspectedStep(step=step, status=StepStatus.UNSEALED) for step in retention.unsealed(folder)]
    entries += [_finished(folder, step) for step in retention.finished(folder)]
    if not entries:
        raise UserError(f"{folder}: no checkpoints; is {folder.parent} the run_dir of a run that has saved?")
    entries.sort(key=lambda entry: entry.step)
    if readable := [entry for entry in entries if entry.manifest]:
        rule = readable[-1].manifest
        assert rule is not None
        reasons = retention.kept([e.step for e in readable], keep_last=rule.keep_last, keep_every=rule.keep_every)
        for entry in readable:
            entry.kept = reasons.get(entry.step, "until the next save")
    return entries


def _finished(folder: Path, step: int) -> InspectedStep:
    try:
        return InspectedStep(step=step, status=StepStatus.FINISHED, manifest=manifest.load(folder / str(step)))
    except manifest.ManifestError as error:
        return InspectedStep(step=step, status=StepStatus.DAMAGED, problems=[f"{manifest.NAME}: {error}"])
    except FileNotFoundError:  # the run is deleting it right now
        return InspectedStep(step=step, status=StepStatus.UNFINISHED)


def _verify(folder: Path, entry: InspectedStep) -> None:
    """Read the files of a step that has a readable manifest."""
    if entry.status is not StepStatus.FINISHED:
        return
    path = folder / str(entry.step)
    with contextlib.suppress(FileNotFoundError):
        entry.problems = [str(problem) for problem in manifest.verify(path, entry.step)]
    entry.status = StepStatus.DAMAGED if entry.problems else StepStatus.OK
    if not (path / manifest.NAME).exists():  # the run deleted it meanwhile
        entry.status, entry.problems = StepStatus.UNFINISHED, []


def _newest_intact(folder: Path, entries: list[InspectedStep]) -> int | None:
    for entry in reversed(entries):
        _verify(folder, entry)
        if entry.status is StepStatus.OK:
            return entry.step
    return None


def _seal(folder: Path, step: int) -> None:
    if step not in (there := retention.unsealed(folder)):
        raise UserError(f"--seal {step}: {folder} has no step {step} without a manifest; there are {there or 'none'}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    from maxlm.checkpoint.lock import lock_run
    from maxlm.checkpoint.store import Store
    from maxlm.config.run import CheckpointConfig

    rule = CheckpointConfig()
    with lock_run(folder.parent), contextlib.closing(Store()) as store:
        try:
            store.check(folder.absolute() / str(step))
            manifest.write(folder / str(step), step=step, keep_last=rule.keep_last, keep_every=rule.keep_every)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"--seal {step}: {folder / str(step)} is not whole ({why}); use another step") from error


def _hash(folder: Path, step: int) -> str:
    os.environ["JAX_PLATFORMS"] = "cpu"  # leave the accelerators to the run
    from maxlm.checkpoint.state_hash import state_hash  # imports jax: --help and listing stay instant

    return state_hash(folder, step)


def _json(entry: InspectedStep) -> dict[str, Any]:
    found = entry.manifest
    return {
        "step": entry.step,
        "status": entry.status.value,
        "written": found and found.written,
        "bytes": found and found.total_bytes,
        "files": found and len(found.files),
        "kept": entry.kept,
        "problems": entry.problems,
    }


def _print_table(entries: list[InspectedStep]) -> None:
    from rich import box  # imported where a table is drawn: --help stays instant
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("step", "written (UTC)", "size", "files", "state", "kept because"):
        table.add_column(name, justify="right" if name in ("step", "size", "files") else "left", no_wrap=True)
    for entry in entries:
        found = entry.manifest
        written, size, files = (
            (found.written[:19].replace("T", " "), gibibytes(found.total_bytes), str(len(found.files)))
            if found
            else ("-", "-", "-")
        )
        table.add_row(str(entry.step), written, size, files, entry.status.value, entry.kept or "-")
    console().print(table)


def _remarks(entries: list[InspectedStep], report: dict[str, Any]) -> Iterator[str]:
    for entry in entries:
        for problem in entry.problems:
            yield f"step {entry.step} is damaged: {problem}"
        if entry.status is StepStatus.UNFINISHED:
            yield f"step {entry.step} is unfinished: being written, or left by a run that was stopped; never restored"
        if entry.status is StepStatus.UNSEALED:
            yield (
                f"step {entry.step} has no {manifest.NAME}: nothing says that it is whole, and it is never restored; "
                f"if you know that it is: --seal {entry.step}"
            )
    for name in report["set_aside"]:
        yield f"{name}: set aside by a run that did not continue from it; delete it once you no longer want it"
    if any(entry.status is StepStatus.FINISHED for entry in entries):
        yield "finished: has its manifest; the files were not compared with it (--verify does)"
    if "hash" in report:
        known = f"state hash of step {report['hash_step']}: {report['hash']}"
        yield known if report["hash"] else "no intact checkpoint to hash"


if __name__ == "__main__":
    run_command(main)
