"""The kernels beside their rivals, on the device at hand: right first, then fast.

    python -m kernels_pallas.bench [--only attention|glu|grouped|paged] [--quick] [--json FILE]

Every case is computed by the kernel and by each rival, compared with a float32 reference, and only then timed, all in
one process and in turns. Under ten minutes on an H200. On a CPU `--quick --backend xla` tries the command at tiny
sizes. Exit code 1: a kernel gave wrong numbers or broke; 2: the arguments make no sense here.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernels_pallas import dispatch
from kernels_pallas.measuring.cases import CEILINGS, RIVALS_MAY, Case
from kernels_pallas.measuring.contest import CaseRow, Effort, Entry, device_answers, measure
from kernels_pallas.measuring.isolate import Worker, WorkerError
from kernels_pallas.measuring.shapes import attention_cases, glu_cases, grouped_cases, paged_cases, quick_cases, tiny
from kernels_pallas.measuring.timing import machine

_CASES: dict[str, Callable[[], Sequence[Case]]] = {
    "attention": attention_cases,
    "glu": glu_cases,
    "grouped": grouped_cases,
    "paged": paged_cases,
}


def run(
    cases: list[Case], backend: str, effort: Effort, worker: Worker, *, budget_s: float, case_s: float
) -> Iterator[CaseRow]:
    """Yields a CaseRow for each case, whatever happens in it."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > budget_s:
            yield CaseRow.lost(case, backend, f"the {budget_s:.0f} s of --budget are over", "skipped")
            continue
        try:
            row = worker.call(measure, case, backend, effort, limit_s=case_s)
        except WorkerError as error:
            row = CaseRow.lost(case, backend, str(error))
        if any(entry.status == "failed" for entry in (row.kernel, *row.rivals.values())):
            try:
                worker.call(device_answers, limit_s=60)
            except WorkerError:
                worker.stop()
        yield row


def print_header(facts: dict[str, Any], backend: str, effort: Effort) -> None:
    """Device, versions and method, then the heads of the columns."""
    print(f"{backend} on {facts['device']}, jax {facts['jax']}, {facts['runtime']}, Python {facts['python']}")
    if facts["nvidia_smi"]:
        print(", ".join(f"{key} {value}" for key, value in facts["nvidia_smi"].items()))
    if facts["platform"] == "cpu":
        print("On a CPU these figures mean nothing: tiny sizes, to try the command.")
    print(f"Microseconds: median of {effort.samples} samples after {effort.warmups}, [quartiles]; error / ceiling.")
    print("Ratio: times as fast as the fastest rival of the goal; more is better.\n")


def print_row(row: CaseRow) -> None:
    """A case: one line, and one for each contestant."""
    goal = ""
    if row.goal is not None:
        stretch = "-" if row.goal["stretch"] is None else f"{row.goal['stretch']:.2f}"
        goal = f"   ship {row.goal['ship']:.2f}  aim {row.goal['aim']:.2f}  stretch {stretch}"
    ratio = "no ratio" if row.ratio is None else f"ratio {row.ratio:.2f} to {row.fastest_rival}"
    print(f"{row.name}: {ratio}{goal}{'' if row.verdict is None else f'  -> {row.verdict}'}")
    for name, entry in {row.backend + " (ours)": row.kernel, **row.rivals}.items():
        print(f"    {name:<28}{_told(entry, 1 if entry is row.kernel else RIVALS_MAY)}", flush=True)


def _told(entry: Entry, allowance: float) -> str:
    if entry.microseconds is None or entry.tflops is None:
        return f"{entry.status}: {entry.reason}"
    t = entry.microseconds
    worst = max(entry.errors or {"": 0.0}, key=lambda key: (entry.errors or {})[key] / CEILINGS[key])
    accuracy = f"{worst} {(entry.errors or {})[worst]:.1e}/{allowance * CEILINGS[worst]:g}"
    spread = f"[{t.first_quartile:.1f} .. {t.third_quartile:.1f}]"
    told = f"{t.median:>10.1f} us  {spread:<24}{entry.tflops:>7.1f} TFLOP/s  {accuracy}"
    return told if entry.status == "ok" else f"{told}  {entry.status}: {entry.reason}"


def print_summary(rows: list[CaseRow]) -> None:
    """The table: one line a case."""
    print(f"\n{'case':<72}{'us':>10}{'rival us':>10}{'ratio':>7}{'ship':>6}{'aim':>6}{'stretch':>8}  verdict")
    for row in rows:
        goal = row.goal or {}
        figures = (
            (row.median, 10, 1),
            (row.rival_median, 10, 1),
            (row.ratio, 7, 2),
            (goal.get("ship"), 6, 2),
            (goal.get("aim"), 6, 2),
            (goal.get("stretch"), 8, 2),
        )
        cells = "".join(f"{'-':>{w}}" if x is None else f"{x:>{w}.{digits}f}" for x, w, digits in figures)
        print(f"{row.name:<72}{cells}  {row.verdict or (row.kernel.status if row.kernel.status != 'ok' else '-')}")


def report(facts: dict[str, Any], effort: Effort, rows: list[CaseRow], *, complete: bool) -> dict[str, Any]:
    """What `--json` writes; the same keys whatever happened."""
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "kernels_pallas.bench", *sys.argv[1:]]),
        "complete": complete,
        "machine": facts,
        "method": {**asdict(effort), "ceilings": CEILINGS, "rivals_may": RIVALS_MAY},
        "cases": [asdict(row) for row in rows],
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=tuple(_CASES), help="one of the operations")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a few cases; on a CPU, at tiny sizes")
    parser.add_argument(
        "--backend", choices=("gpu", "tpu", "loop", "xla"), help="the body to time; default: the device's kernel"
    )
    parser.add_argument("--budget", type=float, default=540, metavar="S", help="start no case after this (540)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, anew after each case")
    options = parser.parse_args(argv)
    with Worker() as worker:
        facts = worker.call(machine, limit_s=120)
        on_cpu = facts["platform"] == "cpu"
        if on_cpu and not (options.quick and options.backend == "xla"):
            parser.error("no accelerator here; --quick --backend xla tries the command on a CPU")
        backend = options.backend or facts["platform"]
        effort = Effort(warmups=2, samples=5, flush_bytes=4096) if on_cpu else Effort()
        known = {
            "attention": dispatch.ATTENTION,
            "glu": dispatch.GLU,
            "grouped": dispatch.GROUPED,
            "paged": dispatch.PAGED,
        }
        ops = [options.only] if options.only else [op for op, bodies in known.items() if backend in bodies]
        cases: list[Case] = []
        for op in ops:
            cases += quick_cases(op) if options.quick else _CASES[op]()
        cases = [tiny(case) if on_cpu else case for case in cases if options.match in case.name]
        if not cases:
            parser.error(f"--match {options.match!r} leaves no case")
        print_header(facts, backend, effort)
        rows: list[CaseRow] = []
        for row in run(cases, backend, effort, worker, budget_s=options.budget, case_s=120):
            rows.append(row)
            print_row(row)
            if options.json:
                write(options.json, report(facts, effort, rows, complete=len(rows) == len(cases)))
    print_summary(rows)
    if any(row.kernel.status in ("wrong", "failed") for row in rows):
        sys.exit(1)


def write(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: a run that is killed leaves the file of the case before."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _finite(content: Any) -> Any:
    """The same with null for what is no number: JSON has no word for it."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


if __name__ == "__main__":
    main()
