"""Which model a command is for: a training run, or a published model."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

import tyro

from maxlm.config.errors import UserError
from maxlm.config.execution import WeightFormat
from maxlm.config.fields import NotNegative, PathName, config
from maxlm.config.sharding import ShardingConfig


@config("--")
class ChosenModel:
    """One of three, and how it is held."""

    run: Annotated[PathName | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """Folder of a training run."""
    hf: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Or the folder of a published model: config.json, safetensors files, tokenizer.json."""
    gguf: Annotated[PathName | None, tyro.conf.arg(metavar="FILE")] = None
    """Or the GGUF file of a published model."""
    weights: WeightFormat = WeightFormat.DTYPE
    """Format in which weights are held: that of execution.dtype, or 8 bits."""
    step: NotNegative[int] | None = None
    """Checkpoint of the run to use; None: the newest intact one."""
    sharding: ShardingConfig = field(default_factory=lambda: ShardingConfig(data=1))
    """One device by default; --sharding.tensor=-1 cuts the model over all of them."""

    def __post_init__(self) -> None:
        if [self.run, self.hf, self.gguf].count(None) != 2:
            raise UserError(
                "name one model: --run RUN_DIR, a training run, or a published model, --hf DIR or --gguf FILE"
            )
        if self.run is None and self.step is not None:
            raise UserError(f"--step {self.step} is of a training run; leave it out with --hf and --gguf")

    @property
    def place(self) -> str:
        """Its folder or file."""
        return self.run or self.hf or self.gguf or ""
