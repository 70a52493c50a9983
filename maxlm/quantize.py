"""`python -m maxlm.quantize --run RUN_DIR --method int8 --out DIR`: smaller weights, and a table of what they cost."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import json
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import QuantMethod, UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import NotNegative, PathName, Positive, config

_DESCRIPTION = """Make the weights of a trained model smaller.

Writes a run folder that generate, evaluate and convert take, with a table of bytes, perplexity, KL divergence to the
full model and speed in its quantization.json. With --method all it writes that table alone, of all methods. Text to
measure on comes from --data. Exit code 2: one line says what was wrong."""


_WIDTH = 130
"""Of the table where nobody looks at a terminal."""


@config("--")
class QuantizeOptions:
    """Which model, how, and measured on what."""

    method: QuantMethod
    """How; all: compare all of them."""
    out: Annotated[PathName, tyro.conf.arg(metavar="DIR")]
    """A new folder."""
    run: Annotated[PathName | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """Folder of a training run, or one of its checkpoints, RUN_DIR/checkpoints/STEP."""
    hf: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Or the folder of a published model: config.json, safetensors files, tokenizer.json."""
    gguf: Annotated[PathName | None, tyro.conf.arg(metavar="FILE")] = None
    """Or the GGUF file of a published model."""
    data: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Data prepared with the model's tokenizer: its training split is calibrated on, its validation split measured on.
    None: no figures but bytes, weights and speed, and no method that needs text."""
    calibration_tokens: Positive[int] = 16384
    """Tokens of the training split that methods look at."""
    evaluation_tokens: Positive[int] = 16384
    """Tokens of the validation split that are measured, or all, if there are fewer."""
    seq_len: Positive[int] = 512
    """Tokens of a window, at most the model's max_seq_len."""
    group_size: Annotated[Positive[int], tyro.conf.arg(metavar="N")] = 128
    """Numbers of 4 bits that share a scale: the largest common divisor of this and of the inputs."""
    speed_tokens: NotNegative[int] = 32
    """Tokens that are decoded for the speed; 0: it is not measured."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if [self.run, self.hf, self.gguf].count(None) != 2:
            raise UserError(
                "name one model: --run RUN_DIR, a training run, or a published model, --hf DIR or --gguf FILE"
            )
        if self.data is None and self.method.calibrated:
            raise UserError(f"--method {self.method.value} looks at text; name prepared data with --data DIR")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the model, the data or an option does not fit.
    """
    options = parse(QuantizeOptions, argv, prog="python -m maxlm.quantize", description=_DESCRIPTION, flags=True)

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.hub import converting
    from maxlm.hub.folder import appearing, require_new
    from maxlm.hub.models import KINDS
    from maxlm.quantization.table import NAME, as_table, to_json
    from maxlm.quantization.trials import Trials, methods_for, read_text
    from maxlm.surroundings import console

    out = Path(options.out)
    require_new(out)
    enable_compilation_cache()
    if options.run is not None:
        opened = converting.open_run(Path(options.run))
    else:
        kind, place = next((kind, place) for kind in KINDS if (place := getattr(options, kind)) is not None)
        opened = converting.open_published(KINDS[kind](Path(place)))
    text = None
    if options.data is not None:
        text = read_text(
            Path(options.data),
            opened,
            seq_len=options.seq_len,
            calibration_tokens=options.calibration_tokens,
            evaluation_tokens=options.evaluation_tokens,
        )
    trials = Trials(opened, text, group=options.group_size, speed_tokens=options.speed_tokens)
    rows = [trials.as_it_was()]
    every = options.method is QuantMethod.ALL
    for method in methods_for(text, blocks=options.gguf is not None) if every else [options.method]:
        row, parameters = trials.trial(method)
        rows.append(row)
        print(f"{method.value}: {row.bytes / 1e6:.2f} MB", file=sys.stderr, flush=True)
    said = {"model": str(opened.place), "data": options.data, "group_size": options.group_size}
    if every:
        with appearing(out) as folder:
            (folder / NAME).write_text(json.dumps(to_json(rows, said), indent=1) + "\n")
    else:
        converting.write_run(opened, out, parameters=parameters)
        (out / NAME).write_text(json.dumps(to_json(rows, said), indent=1) + "\n")
    console(width=None if sys.stdout.isatty() else _WIDTH).print(as_table(rows))
    print(f"{out} is written")


if __name__ == "__main__":
    run_command(main)
