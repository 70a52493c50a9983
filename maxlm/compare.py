"""`python -m maxlm.compare RUN... --out FILE`: several runs on one page, with their answers to the same prompts."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maxlm.config import UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import Filled, NotNegative, PathName, Positive, config

if TYPE_CHECKING:
    from maxlm.evaluation.side_by_side import Question
    from maxlm.observe.comparison import Compared

_DESCRIPTION = """Several runs on one page.

A table with a row for each run, in the order given, and their curves, from the files in the run folders. With --prompts
each run answers the same prompts, always with the likeliest token: where records have the key answer, the table has the
share that is exactly right, and the page has the texts side by side. A run may be a folder that maxlm.quantize wrote.
Exit code 2: one line says what was wrong."""


@config("--")
class CompareOptions:
    """Which runs, and what they are asked."""

    runs: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name run folders")]]
    """Run folders."""
    out: Annotated[PathName, tyro.conf.arg(metavar="FILE")]
    """The page to write, HTML; a file that is there is replaced."""
    prompts: Annotated[tuple[PathName, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of records that can be prompts (docs/posttrain.md), perhaps with the key answer."""
    limit: Positive[int] | None = None
    """Prompts of each file, from the first; None: all."""
    shown: NotNegative[int] = 8
    """Prompts of each file whose answers the page shows."""
    max_new_tokens: Positive[int] = 64
    """Length of an answer."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if twice := [run for run in self.runs if self.runs.count(run) > 1]:
            raise UserError(f"{twice[0]} is named twice; name each run once")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a run, a file or an option does not fit.
    """
    options = parse(CompareOptions, argv, prog="python -m maxlm.compare", description=_DESCRIPTION, flags=True)

    from rich.table import Table

    from maxlm.observe.comparison import Compared, table_of, write_comparison
    from maxlm.surroundings import console

    names = _names(options.runs)
    runs = [
        Compared(name=name, folder=Path(run), figures=_quantised(Path(run)))
        for name, run in zip(names, options.runs, strict=True)
    ]
    table_of(runs)  # mistakes come before the first model is read
    out, shown = Path(options.out), list[str]()
    if options.prompts:
        from maxlm.evaluation.side_by_side import read_questions

        files = {path: read_questions(path, options.limit) for path in options.prompts}
        shown = [one.text for questions in files.values() for one in questions[: options.shown]]
        runs = [_asked(run, files, options) for run in runs]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(out, runs, shown)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    columns, rows = table_of(runs)
    said = Table(*columns)
    for row in rows:
        said.add_row(*row)
    console().print(said)
    print(f"{out} is written")


def _asked(run: Compared, files: dict[str, list[Question]], options: CompareOptions) -> Compared:
    """With its answers, if it is a model that writes text."""
    import dataclasses

    import jax

    from maxlm.compile_cache import enable_compilation_cache
    from maxlm.config import LmHead
    from maxlm.evaluation.marking import exact_match, proportion
    from maxlm.evaluation.side_by_side import answers
    from maxlm.hub.models import load_run
    from maxlm.observe.comparison import Answered

    enable_compilation_cache()
    loaded = load_run(run.folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.parameters))
    figures, shown = {**run.figures, "weights, MB": f"{size / 1e6:.2f}"}, list[Answered]()
    if not isinstance(loaded.config.model.head, LmHead):
        return dataclasses.replace(run, figures=figures)
    every = [question for questions in files.values() for question in questions]
    print(f"{run.folder}: answers {len(every)} prompts", file=sys.stderr, flush=True)
    try:
        said = iter(answers(loaded, every, options.max_new_tokens))
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from error
    for path, questions in files.items():
        texts = [next(said) for _ in questions]
        right = [bool(exact_match(text, one.answers)) if one.answers else None
                 for text, one in zip(texts, questions, strict=True)]  # fmt: skip
        known = [one for one in right if one is not None]
        if known:
            share = proportion(sum(known), len(known))
            figures[Path(path).stem] = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
        shown += map(Answered, texts[: options.shown], right[: options.shown])
    return dataclasses.replace(run, figures=figures, answers=shown, talks=loaded.chat is not None)


def _quantised(folder: Path) -> dict[str, str]:
    """What the table says of a folder that `maxlm.quantize` wrote, in place of how its model was trained."""
    from maxlm.config.json_file import read_object
    from maxlm.quantization.table import NAME

    if not (folder / NAME).is_file():
        return {}
    said = read_object(folder / NAME, "an object, as maxlm.quantize wrote it")
    try:
        return {"learned by": f"quantised, {said['methods'][-1]['method']}", "from": str(said["model"])}
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder / NAME}: is not what maxlm.quantize wrote; quantise the model again") from error


def _names(runs: Sequence[str]) -> list[str]:
    """The last part of each folder's name, if that tells them apart."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(runs) else list(runs)


if __name__ == "__main__":
    run_command(main)
