"""Where figures go besides the run's own files: TensorBoard always, Weights & Biases on demand."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from maxlm.config import UserError
from maxlm.config.errors import pip_install


class Writer(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in `run_dir/tensorboard`. A resumed run hides the points after `resume_step` of its earlier lives.

    Written as they come: tensorboardX's own SummaryWriter has a queue and a thread, and hangs once that has died of a
    full disk.
    """

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        folder = run_dir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._add(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._events.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        figures = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=figures)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


def import_wandb(project: str) -> ModuleType:
    """
    Raises:
        UserError: the package wandb is absent.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"observe.wandb_project = {project!r} needs the package wandb, which is not installed; "
            f"{pip_install('wandb')}, or leave observe.wandb_project at None"
        ) from error
    found: ModuleType = wandb
    return found


class WandbWriter:
    """A Weights & Biases run whose id is kept in `run_dir/wandb_id`, so that a resumed run continues it.

    The x-axis is the figure `step`; after a resume from an older checkpoint the steps in between show twice.
    WANDB_MODE=offline and wandb's other variables work as usual.
    """

    def __init__(self, wandb: ModuleType, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            id=id_file.read_text().strip(),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            resume="allow",
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
