"""Where figures go besides the run's own files: TensorBoard always, Weights & Biases on demand."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import tensorboardX

from maxlm.config import UserError
from maxlm.config.errors import pip_install


class Writer(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in `run_dir/tensorboard`. A resumed run hides the points after `resume_step` of its earlier lives."""

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        self._writer = tensorboardX.SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resume_step + 1, flush_secs=30
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run whose id is kept in `run_dir/wandb_id`, so that a resumed run continues it.

    The x-axis is the figure `step`; after a resume from an older checkpoint the steps in between show twice.
    WANDB_MODE=offline and wandb's other variables work as usual.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
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
