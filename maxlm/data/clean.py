"""`python -m maxlm.data clean`: documents through a pipeline of steps, restartable, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maxlm.config import Files, StandardLibrary, UserError
from maxlm.config.cleaning.cleaning_job import CleaningJob, KeptOfRemoved
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.cleaning_recipes import RECIPES, cleaning_recipe
from maxlm.config.cleaning.engines import CleaningEngine, SlurmArrays
from maxlm.config.cli import parse
from maxlm.config.fields import NotEmpty, PathName, Positive, Range, config
from maxlm.config.json_file import read_object
from maxlm.config.python_file import value_of
from maxlm.data.claimed import claimed
from maxlm.data.cleaning.clean_report import PAGE, funnel
from maxlm.data.cleaning.cleaning_work import CleaningWork, clear, finished, plan_cleaning
from maxlm.data.cleaning.cluster import run_on_cluster
from maxlm.data.cleaning.local_pool import run_locally, serve_tasks
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.documents import Unreadable
from maxlm.data.input_files import CLEANED, REPORT
from maxlm.surroundings import console, usable_cores

PROG = "python -m maxlm.data clean"
_RECIPES = ", ".join(RECIPES)


@config("--")
class CleanCommand:
    """Which documents, which steps, and where the result goes."""

    paths: tyro.conf.Positional[tuple[PathName, ...]] = ()
    """Files and folders."""
    stdlib: bool = False
    """The Python standard library's own sources."""
    out: PathName
    """Folder to write: documents/, removed/, report.html, report.json."""
    recipe: NotEmpty[str] | None = None
    """Steps as published: fineweb, gopher, c4, code, zh; of LLaMA those of a source, as llama_arxiv."""
    pipeline: PathName | None = None
    """A Python file with `get_pipeline()`, which returns a CleaningPipeline."""
    pattern: NotEmpty[str] = Files.pattern
    """Names taken from folders, as in the shell."""
    text_key: NotEmpty[str] = Files.text_key
    """Key or column of the text in records; the others are tags of the document."""
    part_bytes: Positive[int] = CleaningJob.part_bytes
    """The input is cut into parts of about so many bytes, between files."""
    removed: KeptOfRemoved = CleaningJob.removed
    """What removed/ holds of documents that were dropped or changed."""
    workers: Annotated[int, Range(ge=0, note="0 means one for each core")] = 0
    """Processes; 0: one for each core."""
    engine: CleaningEngine = CleaningEngine.LOCAL
    """What runs them."""
    slurm: SlurmArrays = field(default_factory=SlurmArrays)
    """What SLURM is asked for."""
    force: bool = False
    """Go on although none of the first documents is kept."""

    def __post_init__(self) -> None:
        if self.engine is CleaningEngine.SLURM and self.slurm.partition is None:
            raise UserError("--engine slurm needs --slurm.partition NAME; sinfo lists them")

    def job(self) -> CleaningJob:
        """All of it that decides the result.

        Raises:
            UserError: there is not one source, or not one pipeline.
        """
        if bool(self.paths) == self.stdlib:
            raise UserError("name files and folders, or say --stdlib for the Python standard library's own sources")
        paths = Files(paths=self.paths, pattern=self.pattern, text_key=self.text_key) if self.paths else None
        return CleaningJob(
            pipeline=self._pipeline(),
            documents=paths or StandardLibrary(),
            part_bytes=self.part_bytes,
            removed=self.removed,
        )

    def _pipeline(self) -> CleaningPipeline:
        match self.recipe, self.pipeline:
            case (str(name), None):
                return cleaning_recipe(name)
            case (None, str(path)):
                if not Path(path).is_file():
                    raise UserError(f"--pipeline {path}: no such file")
                return value_of(path, "get_pipeline", CleaningPipeline, "--pipeline")[0]
            case _:
                raise UserError(f"say --recipe with one of {_RECIPES}, or --pipeline FILE, and not both")


def checked_for_slurm(argv: Sequence[str]) -> tuple[str, ...]:
    """Options of a cleaning that a job of SLURM is to run, if they can be right.

    Raises:
        UserError: they are not, or say what runs it.
    """
    if any(word == "--engine" or word.startswith("--engine=") for word in argv):
        raise UserError("--engine is slurm here; leave it out")
    command = parse(CleanCommand, [*argv, "--engine", "slurm"], prog=PROG, description="Clean documents.", flags=True)
    command.job()
    return tuple(argv)


_OF_WORDS = ("step", "most by rule")
"""Columns of the funnel."""
_WIDTH = 110
"""Of the funnel, where nobody says how wide a line may be."""


def main(argv: list[str], models: CleaningModels) -> int:
    """Clean, and say how many documents could not be read."""
    match argv:
        case ["work", folder]:
            serve_tasks(CleaningWork.open(Path(folder), models), sys.stdin, sys.stdout)
            return 0
        case _:
            pass
    command = parse(CleanCommand, argv, prog=PROG, description="Clean documents.", flags=True)
    job, out = command.job(), Path(command.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with claimed(out, "cleans") as lock:
            unreadable = Unreadable()
            plan = plan_cleaning(job, out, unreadable)
            if not finished(out):
                work = CleaningWork(out, job, plan.parts, models)
                if not command.force and (told := work.try_first()):
                    raise UserError(f"{out}: {told}; change the pipeline, or go on with --force")
                plan.put_down()
                workers = command.workers or usable_cores()
                if command.engine is CleaningEngine.LOCAL:
                    with _progress() as show:
                        run_locally(work, workers, show, lock)
                else:
                    run_on_cluster(work, command.engine, workers, command.slurm)
                if not finished(out):  # SLURM has it now
                    return 0
            clear(out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror}; make room or choose another folder, then run the same command "
            "again to go on"
        ) from error
    return _tell(out, unreadable)


def _tell(out: Path, unreadable: Unreadable) -> int:
    """Print the funnel of a finished folder, and return how many documents could not be read."""
    record = read_object(out / REPORT, "the report of a cleaning")
    shown = console(highlight=False)
    names, rows = funnel(record)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in _OF_WORDS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    if not shown.is_terminal:
        shown.width = _WIDTH
    shown.print(table)
    kept, read = record["kept"], record["read"]
    shown.print(
        f"{out / CLEANED}: {kept['documents']:,} of {read['documents']:,} documents, {kept['bytes']:,} of "
        f"{read['bytes']:,} bytes; see {out / PAGE}",
        soft_wrap=True,
        markup=False,
    )
    if not kept["documents"]:
        print(f"{out}: nothing was kept", file=sys.stderr)
    unread = record["unreadable"]
    if unread["count"]:
        print(f"{unread['count']:,} documents could not be read:", *unread["examples"], sep="\n", file=sys.stderr)
    if summary := unreadable.summary():
        print(summary, file=sys.stderr)
    return int(unread["count"]) + unreadable.count


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line on the terminal that a call with a stage, its tasks that are done, and all of them brings up to date."""
    terminal = console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as progress:
        line = progress.add_task("", total=None)

        def show(stage: str, done: int, tasks: int) -> None:
            progress.update(line, description=stage, completed=done, total=tasks)

        yield show
