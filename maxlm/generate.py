"""`python -m maxlm.generate --run RUN_DIR --prompt TEXT`: continue a text with a trained model."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import dataclasses
import json
from collections.abc import Generator as Stream
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from maxlm.config import (
    BeamConfig,
    ChosenModel,
    ContrastiveConfig,
    EngineConfig,
    GuidanceConfig,
    SamplingConfig,
    Speculation,
    UserError,
)
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import Positive, Seed, config
from maxlm.surroundings import printable

if TYPE_CHECKING:
    from maxlm.inference.generator import Generation

_DESCRIPTION = """Continue a text with a trained model.

The continuation, without the prompt, goes to stdout as it comes; speed goes to stderr. It ends with the document or
after max_new_tokens. Several (--n, or --beams with --n_best) come at the end, one after the other. Exit code 2: one
line says what was wrong."""
_SLOTS = 8
"""Several texts are decoded at once, up to so many."""


@config("--")
class GenerateOptions:
    """What to continue, with which model, and how."""

    model: Annotated[ChosenModel, tyro.conf.arg(name="")]
    """Which model."""
    prompt: str = ""
    """What the text starts with; empty: the beginning of a document. One that begins with - is given as
    --prompt=-..."""
    max_new_tokens: Positive[int] = 128
    """Length of the continuation, unless the document ends before."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()
    """How the next token is drawn."""
    beams: Annotated[BeamConfig, tyro.conf.arg(name="")] = BeamConfig()
    """Whether texts are searched for in place of being drawn."""
    contrastive: Annotated[ContrastiveConfig, tyro.conf.arg(name="")] = ContrastiveConfig()
    """Whether likely tokens are searched for that repeat nothing."""
    guidance: Annotated[GuidanceConfig, tyro.conf.arg(name="")] = GuidanceConfig()
    """Whether texts are led away from another prompt."""
    n: Positive[int] = 1
    """Texts that are drawn."""
    seed: Seed = 0
    """The same seed gives the same texts."""
    speculation: Speculation | None = None
    """Where drafts come from, which make it faster and change no text: lookup, lookup:ngram=4,drafts=10, or
    draft:run=DIR, another run or published model with the same tokenizer."""
    json: bool = False
    """Print one JSON object at the end: text, tokens (the ids), tokens_per_s, with --beams also score; where several
    texts are asked for, a list of them."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        searches = [
            name for name, n in (("beams", self.beams.beams), ("contrastive_k", self.contrastive.contrastive_k)) if n
        ]
        if searches and self.guidance.guidance_scale != 1:
            raise UserError(f"--guidance_scale with --{searches[0]}: a search is not guided; use one of them")
        if self.beams.beams and self.contrastive.contrastive_k:
            raise UserError("--beams and --contrastive_k are two searches; use one of them")
        if self.beams.beams:
            self.beams.searched(self.sampling)
            if self.n != 1:
                raise UserError(f"--n {self.n} with --beams: nothing is drawn; ask for the best ones by --n_best")
        if self.contrastive.contrastive_k:
            self.contrastive.searched(self.sampling)
            if self.n != 1:
                raise UserError(f"--n {self.n} with --contrastive_k: nothing is drawn, and there is one text")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the run folder, the checkpoint or an option does not fit.
    """
    options = parse(GenerateOptions, argv, prog="python -m maxlm.generate", description=_DESCRIPTION, flags=True)

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.hub.models import load_chosen, load_draft
    from maxlm.inference.checks import check_prompt
    from maxlm.inference.generator import Generator, Ranked

    enable_compilation_cache()
    texts = options.n if options.guidance.guidance_scale == 1 else 2 * options.n
    slots = min(max(options.beams.beams, options.contrastive.contrastive_k, texts), _SLOTS)
    run = load_chosen(options.model)
    check_prompt(run, options.prompt, options.max_new_tokens)
    generator = Generator(
        run,
        weights=options.model.weights,
        engine=EngineConfig(slots=slots, speculation=options.speculation),
        draft=load_draft(options.speculation),
    )
    found: Sequence[Generation]
    if options.beams.beams:
        [found] = generator.search(
            [options.prompt], max_new_tokens=options.max_new_tokens, beams=options.beams, sampling=options.sampling
        )
    elif options.contrastive.contrastive_k:
        found = generator.contrast(
            [options.prompt],
            max_new_tokens=options.max_new_tokens,
            contrastive=options.contrastive,
            sampling=options.sampling,
        )
    elif options.n > 1:
        found = generator.generate(
            [options.prompt] * options.n,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            seed=options.seed,
            guidance=options.guidance,
        )
    else:
        stream = generator.stream(
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            seed=options.seed,
            guidance=options.guidance,
        )
        found = [_drain(stream, show=not options.json)]
    several = options.n > 1 or options.beams.n_best > 1
    if options.json:
        values = [dataclasses.asdict(one) for one in found]
        print(json.dumps(values if several else values[0]))
        return
    streamed = not several and not options.beams.beams and not options.contrastive.contrastive_k
    for one in found:
        print("" if streamed else _shown(one.text), flush=True)
        speed = f", {one.tokens_per_s:.1f} tokens/s" if one.tokens_per_s is not None else ""
        score = f", score {one.score:.4f}" if isinstance(one, Ranked) else ""
        print(f"[{len(one.tokens)} tokens{speed}{score}]", file=sys.stderr)
    if options.speculation is not None:
        stats = generator.engine.stats
        share = f"{stats.accepted_tokens} of {stats.drafted_tokens} drafts came true"
        print(f"[{share}, {stats.generated_tokens / stats.steps:.2f} tokens a step]", file=sys.stderr)


def _shown(text: str) -> str:
    """As it is, for a file or another program; for a terminal without what that would obey."""
    return printable(text) if sys.stdout.isatty() else text


def _drain(stream: Stream[str, None, Generation], *, show: bool) -> Generation:
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            generation: Generation = end.value
            return generation
        if show:
            print(_shown(piece), end="", flush=True)


if __name__ == "__main__":
    run_command(main)
