"""All cases, with a bar and a table: `make faults`. Words choose those whose names hold one: `ARGS="ranks SIGKILL"`."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from faults.case import Case
from faults.groups import all_cases


class Outcome(NamedTuple):
    """A row of the table."""

    case: Case
    holds: bool
    seen: str
    seconds: float


def judge(case: Case) -> Outcome:
    """Do one case in a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="maxlm-fault-"))
    began = time.monotonic()
    try:
        holds, seen = True, case.check(folder)
    except Exception as error:
        holds, seen = False, f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, holds, " ".join(seen.split()), time.monotonic() - began)


def main(words: list[str]) -> int:
    """Exit code 0 where every promise holds."""
    chosen = [case for case in all_cases() if not words or any(word in case.name for word in words)]
    console = Console(width=None if sys.stdout.isatty() else 200)
    columns = SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAXLM_FAULT_WORKERS", "2"))) as pool:
            for done in concurrent.futures.as_completed([pool.submit(judge, case) for case in chosen]):
                outcomes.append(outcome := done.result())
                progress.update(task, advance=1, description=outcome.case.name)
                if not outcome.holds:
                    console.print(f"BROKEN {outcome.case.name}: {outcome.seen}", markup=False, highlight=False)
    table = Table("case", "expected", "seen", "s", title="What was done, and what came of it")
    order = {case.name: number for number, case in enumerate(chosen)}
    for outcome in sorted(outcomes, key=lambda one: order[one.case.name]):
        seen = outcome.seen[:100] if outcome.holds else f"BROKEN {outcome.seen[:200]}"
        table.add_row(outcome.case.name, outcome.case.expected, seen, f"{outcome.seconds:.1f}")
    console.print(table, markup=False, highlight=False)
    broken = sum(not outcome.holds for outcome in outcomes)
    console.print(f"{len(outcomes)} cases, {broken} broken", highlight=False)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
