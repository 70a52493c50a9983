"""`python -m maxlm.compare RUN... --out FILE`: several runs on one page, with their answers to the same prompts."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import Filled, NotNegative, PathName, Positive, config

_DESCRIPTION = """Several runs on one page.

A table with a row for each run, in the order given, and their curves, from the files in the run folders. With --prompts
each run answers the same prompts, always with the likeliest token: where records have the key answer, the table has the
share that is exactly right, and the page has the texts side by side. With --judge a reward model says how often a run's
answers are better than those of the first run. A run may be a folder that maxlm.quantize wrote.
Exit code 2: one line says what was wrong."""

_WIDTH = 160
"""Of the table where nobody looks at a terminal."""


@config("--")
class CompareOptions:
    """Which runs, and what they are asked."""

    runs: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name run folders")]]
    """Run folders."""
    out: Annotated[PathName, tyro.conf.arg(metavar="FILE")]
    """The page to write, HTML; a file that is there is replaced."""
    prompts: Annotated[tuple[PathName, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of records that can be prompts (docs/posttrain.md), perhaps with the key answer; or folders prepared with
    --purpose prompts, of which those held out are asked."""
    judge: Annotated[PathName | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """A run of task = Reward that scores the answers; None: nobody does."""
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
        if self.judge is not None and not self.prompts:
            raise UserError(f"--judge {self.judge} scores answers; name what is asked with --prompts FILE")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a run, a file or an option does not fit.
    """
    options = parse(CompareOptions, argv, prog="python -m maxlm.compare", description=_DESCRIPTION, flags=True)

    from maxlm.observe.comparison import Compared, as_table, table_of, write_comparison
    from maxlm.surroundings import console

    names = _names(options.runs)
    runs = [
        Compared(name=name, folder=Path(run), figures=_quantised(Path(run)))
        for name, run in zip(names, options.runs, strict=True)
    ]
    table_of(runs)  # mistakes come before the first model is read
    out, shown = Path(options.out), list[str]()
    if options.prompts:
        from maxlm.compile_cache import enable_compilation_cache
        from maxlm.evaluation.side_by_side import read_questions
        from maxlm.recipes.compared import asked

        enable_compilation_cache()
        files = {path: read_questions(path, options.limit) for path in options.prompts}
        shown = [one.text for questions in files.values() for one in questions[: options.shown]]
        runs = asked(
            runs,
            files,
            max_new_tokens=options.max_new_tokens,
            shown=options.shown,
            judge=options.judge,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(out, runs, shown)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    console(width=None if sys.stdout.isatty() else _WIDTH).print(as_table(*table_of(runs)))
    print(f"{out} is written")


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
