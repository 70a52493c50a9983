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
    import numpy as np
    import numpy.typing as npt

    from maxlm.evaluation.side_by_side import Question, Said
    from maxlm.observe.comparison import Compared
    from maxlm.recipes.model_reward import RewardModel

    Files = dict[str, list[Question]]
    """What is asked of each file."""

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
        runs = _asked(runs, files, options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(out, runs, shown)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    columns, rows = table_of(runs)
    said = Table(*columns)
    for row in rows:
        said.add_row(*row)
    console(width=None if sys.stdout.isatty() else _WIDTH).print(said)
    print(f"{out} is written")


def _asked(runs: list[Compared], files: Files, options: CompareOptions) -> list[Compared]:
    """With their answers, those that write text, and what these are worth."""
    import dataclasses
    import functools

    import jax

    from maxlm.compile_cache import enable_compilation_cache
    from maxlm.config import LmHead, ModelReward, ShardingConfig
    from maxlm.evaluation.side_by_side import answers
    from maxlm.hub.models import load_run
    from maxlm.recipes.model_reward import RewardModel

    enable_compilation_cache()

    @functools.cache
    def judge(tokenizer: str) -> RewardModel:
        assert options.judge is not None
        return RewardModel(ModelReward(run=options.judge), tokenizer=tokenizer, sharding=ShardingConfig(data=1))

    questions = [question for some in files.values() for question in some]
    found: list[Compared] = []
    rewards: dict[str, npt.NDArray[np.float64]] = {}
    for run in runs:
        loaded = load_run(run.folder)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.parameters))
        run = dataclasses.replace(run, figures={**run.figures, "weights, MB": f"{size / 1e6:.2f}"})
        if isinstance(loaded.config.model.head, LmHead):
            print(f"{run.folder}: answers {len(questions)} prompts", file=sys.stderr, flush=True)
            try:
                said = answers(loaded, questions, options.max_new_tokens)
            except UserError as error:
                raise UserError(f"{run.folder}: {error}") from error
            run = dataclasses.replace(_marked(run, files, said, options.shown), talks=loaded.chat is not None)
            if options.judge is not None:
                scores = _scores(judge(loaded.tokenizer.fingerprint), questions, said)
                figures = {**run.figures, **_compared_by_reward(run.name, scores, rewards)}
                run, rewards[run.name] = dataclasses.replace(run, figures=figures), scores
        found.append(run)
    return found


def _marked(run: Compared, files: Files, said: Sequence[Said], shown: int) -> Compared:
    """With its answers, and the share of each file that is exactly right."""
    import dataclasses

    from maxlm.evaluation.marking import exact_match, proportion
    from maxlm.observe.comparison import Answered

    figures, answers, done = dict(run.figures), list[Answered](), 0
    for path, questions in files.items():
        texts = [one.text for one in said[done : done + len(questions)]]
        done += len(questions)
        marked = [
            Answered(text, bool(exact_match(text, one.answers)) if one.answers else None)
            for one, text in zip(questions, texts, strict=True)
        ]
        if known := [one.right for one in marked if one.right is not None]:
            share = proportion(sum(known), len(known))
            figures[Path(path).stem] = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
        answers += marked[:shown]
    return dataclasses.replace(run, figures=figures, answers=answers)


def _scores(judge: RewardModel, questions: Sequence[Question], said: Sequence[Said]) -> npt.NDArray[np.float64]:
    """Of each answer."""
    import numpy as np

    from maxlm.data.prompts import Prompt
    from maxlm.recipes.completions import Completion

    prompts = [
        Prompt(n, answer.ids, one.turns, {} if one.tools is None else {"tools": one.tools})
        for n, (one, answer) in enumerate(zip(questions, said, strict=True))
    ]
    found = judge(
        [Completion(prompt, one.text, one.tokens, one.finish) for prompt, one in zip(prompts, said, strict=True)]
    )
    for question, score in zip(questions, found, strict=True):
        if isinstance(score, str):
            raise UserError(f"--judge: has no score for an answer to {question.text[:60]!r}: {score}")
    return np.array(found, np.float64)


def _compared_by_reward(
    name: str, scores: npt.NDArray[np.float64], others: dict[str, npt.NDArray[np.float64]]
) -> dict[str, str]:
    """The mean, and how often the answers are better than those of the first run, a draw as half a win."""
    from maxlm.evaluation.ratings import by_reward, win_rate

    figures = {"reward": f"{scores.mean():.3f}"}
    for first in list(others)[:1]:
        share = win_rate(by_reward(name, first, scores, others[first]), name, first)
        assert share is not None, "they have met"
        figures[f"wins against {first}"] = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
    return figures


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
