"""Which model a command works with."""

from __future__ import annotations

from typing import Annotated

import tyro

from maxlm.config.errors import UserError
from maxlm.config.fields import NotNegative, PathName, config


@config("--")
class ModelSource:
    """One of three places, as options of a command."""

    run: Annotated[PathName | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """Folder of a training run."""
    hf: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Or the folder of a published model: config.json, safetensors files, tokenizer.json."""
    gguf: Annotated[PathName | None, tyro.conf.arg(metavar="FILE")] = None
    """Or the GGUF file of a published model."""
    step: NotNegative[int] | None = None
    """Checkpoint of the run to use; None: the newest intact one."""

    def __post_init__(self) -> None:
        if [self.run, self.hf, self.gguf].count(None) != 2:
            raise UserError(
                "name one model: --run RUN_DIR, a training run, or a published model, --hf DIR or --gguf FILE"
            )
        if self.run is None and self.step is not None:
            raise UserError(f"--step {self.step} is of a training run; leave it out with --hf and --gguf")
