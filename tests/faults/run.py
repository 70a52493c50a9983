"""All cases, with a bar and a table: `make faults`. Words choose those whose names hold one: `ARGS="ranks SIGKILL"`."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from faults.case import Case
from faults.groups import all_cases

_PLAIN: dict[str, Any] = {"markup": False, "highlight": False}


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
                if not (outcome.holds and console.is_terminal):  # a log has the rows of a harness that is stopped
                    console.print(f"{_verdict(outcome)} {outcome.case.name}: {outcome.seen}", **_PLAIN)
    table = Table("case", "expected", "seen", "s", title="What was done, and what came of it")
    order = {case.name: number for number, case in enumerate(chosen)}
    for outcome in sorted(outcomes, key=lambda one: order[one.case.name]):
        seen = outcome.seen[:100] if outcome.holds else f"BROKEN {outcome.seen[:200]}"
        table.add_row(outcome.case.name, outcome.case.expected, seen, f"{outcome.seconds:.1f}")
    console.print(table, **_PLAIN)
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.name.split(":")[0], []).append(outcome)
    for group, members in sorted(groups.items()):
        console.print(f"{group}: {_summary(members)}", **_PLAIN)
    console.print(f"in all: {_summary(outcomes)}", **_PLAIN)
    return 0 if all(outcome.holds for outcome in outcomes) else 1


def _verdict(outcome: Outcome) -> str:
    return "holds" if outcome.holds else "BROKEN"


def _summary(outcomes: list[Outcome]) -> str:
    broken = sum(not outcome.holds for outcome in outcomes)
    return f"{len(outcomes)} cases, {broken} broken, {sum(outcome.seconds for outcome in outcomes):.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
