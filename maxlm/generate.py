"""`python -m maxlm.generate --run RUN_DIR --prompt TEXT`: continue a text with a trained model."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import dataclasses
import json
from collections.abc import Generator as Stream
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maxlm.config import SamplingConfig, ShardingConfig, UserError, WeightFormat
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import NotNegative, PathName, Positive, Seed, config

if TYPE_CHECKING:
    from maxlm.inference.generator import Generation

_DESCRIPTION = """Continue a text with a trained model.

The continuation, without the prompt, goes to stdout as it comes; speed goes to stderr. It ends with the document or
after max_new_tokens. Exit code 2: one line says what was wrong."""


@config("--")
class GenerateOptions:
    """What to continue, with which model, and how."""

    run: Annotated[PathName | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """Folder of a training run."""
    hf: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Or the folder of a published model: config.json, safetensors files, tokenizer.json."""
    gguf: Annotated[PathName | None, tyro.conf.arg(metavar="FILE")] = None
    """Or the GGUF file of a published model."""
    prompt: str = ""
    """What the text starts with; empty: the beginning of a document. One that begins with - is given as
    --prompt=-..."""
    max_new_tokens: Positive[int] = 128
    """Length of the continuation, unless the document ends before."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()
    """How the next token is drawn."""
    seed: Seed = 0
    """The same seed gives the same text."""
    weights: WeightFormat = WeightFormat.DTYPE
    """Format in which weights are held: that of execution.dtype, or 8 bits."""
    step: NotNegative[int] | None = None
    """Checkpoint of the run to use; None: the newest intact one."""
    sharding: ShardingConfig = field(default_factory=lambda: ShardingConfig(data=1))
    """One device by default; --sharding.tensor=-1 cuts the model over all of them."""
    json: bool = False
    """Print one JSON object at the end: text, tokens (the ids), tokens_per_s."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if [self.run, self.hf, self.gguf].count(None) != 2:
            raise UserError(
                "name one model: --run RUN_DIR, a training run, or a published model, --hf DIR or --gguf FILE"
            )
        if self.run is None and self.step is not None:
            raise UserError(f"--step {self.step} is of a training run; leave it out with --hf and --gguf")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the run folder, the checkpoint or an option does not fit.
    """
    options = parse(GenerateOptions, argv, prog="python -m maxlm.generate", description=_DESCRIPTION, flags=True)

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.hub.models import KINDS, load_published
    from maxlm.inference.generator import Generator
    from maxlm.inference.load import load_run

    enable_compilation_cache()
    if options.run is not None:
        run = load_run(Path(options.run), step=options.step, sharding=options.sharding)
    else:
        kind, place = next((kind, place) for kind in KINDS if (place := getattr(options, kind)) is not None)
        run = load_published(KINDS[kind](Path(place)), sharding=options.sharding)
    generator = Generator(run, weights=options.weights)
    stream = generator.stream(
        options.prompt, max_new_tokens=options.max_new_tokens, sampling=options.sampling, seed=options.seed
    )
    generation = _drain(stream, show=not options.json)
    if options.json:
        print(json.dumps(dataclasses.asdict(generation)))
    else:
        print(flush=True)
        speed = f", {generation.tokens_per_s:.1f} tokens/s" if generation.tokens_per_s is not None else ""
        print(f"[{len(generation.tokens)} tokens{speed}]", file=sys.stderr)


def _drain(stream: Stream[str, None, Generation], *, show: bool) -> Generation:
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            generation: Generation = end.value
            return generation
        if show:
            print(piece, end="", flush=True)


if __name__ == "__main__":
    run_command(main)
