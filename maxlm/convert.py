"""`python -m maxlm.convert --from hf:DIR --to run:DIR`: published models to run folders, and back."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import enum
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import config

_DESCRIPTION = """Convert a model between a published folder (config.json and safetensors) and a run folder, or from a
GGUF file to either.

It ends with what it wrote: the number of parameters, a checksum of all of them and, where the package transformers is
installed, the largest difference of its logits to ours."""


_TARGETS = {"hf": "hf:DIR (a published model)", "run": "run:DIR (a run folder)"}
_SOURCES = _TARGETS | {"gguf": "gguf:FILE (a published model in one file)"}


class FileDtype(enum.Enum):
    """Number formats of published weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@config("--")
class ConvertOptions:
    """From where, to where, and in which number format."""

    source: Annotated[str, tyro.conf.arg(name="from", metavar="hf:DIR|gguf:FILE|run:DIR")]
    """The model: hf: and the folder of a published one, gguf: and a file of one, or run: and a run folder, or one of
    its checkpoints, run:RUN_DIR/checkpoints/STEP."""
    target: Annotated[str, tyro.conf.arg(name="to", metavar="hf:DIR|run:DIR")]
    """A new folder. A run's parameters are float32, and can be asked, exported and started from."""
    dtype: FileDtype | None = None
    """Number format of the files of hf:DIR; None: that of the source, where float32 loses nothing of a run
    or of quantised weights."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a folder or an option does not fit.
    """
    options = parse(ConvertOptions, argv, prog="python -m maxlm.convert", description=_DESCRIPTION, flags=True)
    source_kind, source = _place("--from", options.source, _SOURCES)
    target_kind, target = _place("--to", options.target, _TARGETS)

    if target_kind == "run" and options.dtype is not None:
        raise UserError("--dtype is of files of hf:DIR; a run folder has float32: leave it out")

    from maxlm.hub import converting  # imports jax: --help stays instant
    from maxlm.hub.folder import require_new
    from maxlm.hub.models import KINDS

    require_new(target)
    if source_kind == "run":
        model = converting.open_run(source)
    else:
        model = converting.open_published(KINDS[source_kind](source))
    if target_kind == "hf":
        converting.write_published(model, target, None if options.dtype is None else options.dtype.value)
    else:
        converting.write_run(model, target)
    print(f"{options.target} is written")
    if (source_kind, target_kind) != ("run", "run"):
        folder = target if target_kind == "hf" else source if source_kind == "hf" else None
        for line in converting.report(model, folder):
            print(line)


def _place(option: str, text: str, kinds: dict[str, str]) -> tuple[str, Path]:
    kind, colon, path = text.partition(":")
    if not colon or kind not in kinds or not path:
        raise UserError(f"{option} {text} must be {' or '.join(kinds.values())}")
    return kind, Path(path)


if __name__ == "__main__":
    run_command(main)
