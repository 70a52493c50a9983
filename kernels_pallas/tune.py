"""Finds block sizes on the chip at hand and records them in `kernels_pallas/tuning/<chip>.json`.

    python -m kernels_pallas.tune [--op OP] [--missing] [--table FILE] [--dry-run [--chip CHIP]]

For each class of shapes: every candidate that fits the chip's on-chip memory by the body's own model is computed,
compared with a float32 reference and timed, forward and backward by themselves; the winner then meets its rivals as in
`kernels_pallas.bench`, and becomes a row of the table. `--dry-run` lists the candidates and their bytes for any chip.
On a CPU, with `--table FILE`, the blocks of the XLA body are tried at tiny sizes: a trial of the command.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as fields_of
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from kernels_pallas import decision, dispatch
from kernels_pallas.attention.problem import AttentionBlocks
from kernels_pallas.glu.problem import GluBlocks
from kernels_pallas.grouped.problem import GroupedBlocks
from kernels_pallas.measuring.cases import AttentionCase, Case, GluCase, GroupedCase, PagedCase
from kernels_pallas.measuring.contest import CaseRow, Effort, measure
from kernels_pallas.measuring.isolate import Worker, WorkerError, one_line
from kernels_pallas.measuring.shapes import attention_cases, tiny
from kernels_pallas.measuring.timing import Call, machine
from kernels_pallas.paged.problem import PagedBlocks
from kernels_pallas.targets import Family, Target, assume, named, target_of

TunedBlocks = AttentionBlocks | GluBlocks

_BODIES = {Family.GPU: "gpu", Family.TPU: "tpu", Family.CPU: "xla"}


# Field -> sizes to try, for the forward pass; the backward pass has the same choice.
_CHOICES: dict[str, dict[Family, dict[str, tuple[int, ...]]]] = {
    "flash_attention": {
        Family.GPU: {"q": (64, 128), "k": (64, 128, 192, 256), "stages": (2, 3, 4)},
        Family.TPU: {"q": (256, 512, 1024, 2048), "k": (256, 512, 1024, 2048)},
        Family.CPU: {"q": (64,), "k": (32, 64)},
    },
    "fused_glu": {
        Family.GPU: {"m": (128,), "f": (64, 96, 128), "d": (32, 64), "stages": (2, 3, 4, 5)},
        Family.TPU: {"m": (256, 512, 1024), "f": (256, 512, 1024), "d": (512, 1024, 2048)},
        Family.CPU: {},
    },
}
_CHOICES["fused_glu_mlp"] = _CHOICES["fused_glu"]


@dataclass(frozen=True)
class ShapeClass:
    """Problems that share a row, and what stands for them: a forward case and one with the gradient."""

    op: str
    match: dict[str, Any]
    cases: tuple[Case, Case]


@dataclass(frozen=True)
class JudgedBlocks:
    """Blocks, what they take on the chip by the body's model, and why they are out of the question, if they are."""

    blocks: TunedBlocks
    on_chip_bytes: int
    refused: str | None


def shape_classes(op: str) -> list[ShapeClass]:
    """The classes of an operation, the more special first, as `decision.lookup` takes the first row that fits."""
    base = attention_cases()[0]
    classes = []
    if op == "flash_attention":
        for H, Hv, N, K in ((128, 128, 32, 8), (64, 64, 64, 16), (256, 256, 16, 4), (192, 128, 16, 16)):
            for T, B in ((4096, 4), (1024, 16)):
                case = replace(base, B=B, T=T, N=N, K=K, H=H, Hv=Hv, goal=None)
                match = {"dtype": "bfloat16", "H": H, "Hv": Hv, "min_T": T, "min_S": T, "mask": "causal", "q_offset": 0}
                match |= {"segments": False, "soft_cap": None, "alibi": False, "buckets": None}
                classes.append(_attention_class(match, case))
                if H == 128:
                    packed = replace(case, documents=(T * 5 // 16 + 20, T * 11 // 16 - 20))
                    classes.append(_attention_class({**match, "segments": True}, packed))
        return sorted(classes, key=lambda c: -len(c.match))
    for M, D, F, bounds in (
        (65536, 128, 512, {"max_D": 256, "min_M": 8192}),
        (8192, 8192, 28672, {"min_D": 8192, "min_M": 4096}),
        (8192, 4096, 14336, {"min_D": 1024, "min_M": 4096}),
        (1024, 4096, 14336, {"min_D": 1024, "min_M": 512}),
    ):
        forward = GluCase(op=op, direction="forward", M=M, D=D, F=F)  # type: ignore[arg-type]
        both = replace(forward, direction="forward and backward")
        classes.append(ShapeClass(op, {"dtype": "bfloat16", "save": "none", **bounds}, (forward, both)))
    return classes


def _attention_class(match: dict[str, Any], case: AttentionCase) -> ShapeClass:
    return ShapeClass("flash_attention", match, (case, replace(case, direction="backward")))


def candidates(shape: ShapeClass, target: Target, *, backward: bool, start: TunedBlocks) -> list[JudgedBlocks]:
    """`start`, and every choice of its forward or backward fields, judged without a device."""
    fields = _fields(shape, target, backward)
    tried = [start]
    for sizes in itertools.product(*fields.values()):
        tried.append(replace(start, **dict(zip(fields, sizes, strict=True))))  # type: ignore[arg-type]
    return [_judged(shape, target, blocks, backward) for blocks in dict.fromkeys(tried)]


def _fields(shape: ShapeClass, target: Target, backward: bool) -> dict[str, tuple[int, ...]]:
    """The fields of one pass, with the sizes to try; `AttentionBlocks` has no stages of its own backward."""
    kind = AttentionBlocks if shape.op == "flash_attention" else GluBlocks
    choices = _CHOICES[shape.op][target.family].items()
    named_so = {f"{name}_backward" if backward else name: sizes for name, sizes in choices}
    return {field.name: named_so[field.name] for field in fields_of(kind) if field.name in named_so}


def _judged(shape: ShapeClass, target: Target, blocks: TunedBlocks, backward: bool) -> JudgedBlocks:
    body = (dispatch.ATTENTION if isinstance(blocks, AttentionBlocks) else dispatch.GLU)[_BODIES[target.family]]
    # The model gives the larger of both passes: the other one is made small, so that this one's is seen.
    least = {name: min(sizes) for name, sizes in _fields(shape, target, not backward).items()}
    used = body.on_chip_bytes(_plan(shape, target).problem, replace(blocks, **least))  # type: ignore[arg-type]
    limit = target.kernel_bytes
    if used > limit > 0:
        return JudgedBlocks(blocks, used, f"needs {used} bytes, and the chip has {limit}")
    call = _trial(shape, target, blocks)
    try:
        with assume(target):
            jax.eval_shape(call.function, *call.operands)
    except Exception as error:  # one that breaks while traced is reported like one that refuses
        return JudgedBlocks(blocks, used, one_line(error))
    return JudgedBlocks(blocks, used, None)


def _plan(shape: ShapeClass, target: Target) -> decision.Plan:
    """What the class runs as, with the blocks that it has today."""
    call = _trial(shape, target, None)
    return dispatch.explain(call.function, *call.operands, target=target)


def _todays_blocks(shape: ShapeClass, target: Target) -> TunedBlocks | None:
    blocks = _plan(shape, target).blocks
    assert not isinstance(blocks, GroupedBlocks | PagedBlocks)  # these are not tuned
    return blocks


def _trial(shape: ShapeClass, target: Target, blocks: TunedBlocks | None) -> Call:
    case = shape.cases[1]
    assert not isinstance(case, GroupedCase | PagedCase)
    return case.trial(jax.eval_shape(case.arrays), _BODIES[target.family], blocks)  # type: ignore[arg-type]


def tune(shape: ShapeClass, target: Target, worker: Worker, effort: Effort) -> tuple[dict[str, Any] | None, str]:
    """The row of a class, or None, and what is to be said about it."""
    start = _todays_blocks(shape, target)
    if start is None:
        return None, f"the {_BODIES[target.family]} body has no blocks to choose"
    best = start
    for case, backward in zip(shape.cases, (False, True), strict=True):
        timed: list[tuple[float, TunedBlocks]] = []
        for candidate in candidates(shape, target, backward=backward, start=best):
            if candidate.refused is None:
                row = attempt(worker, case, target, effort, candidate.blocks, alone=True)
                told = row.kernel.reason or "not timed"
                if row.kernel.status == "ok" and row.kernel.microseconds is not None:
                    timed.append((row.kernel.microseconds.median, candidate.blocks))
                    told = f"{row.kernel.microseconds.median:.1f} us"
                print(f"    {case.direction:<21}{_sizes(candidate.blocks)}: {told}", flush=True)
        if not timed:
            return None, f"no blocks of the {case.direction} pass are right"
        best = min(timed, key=lambda pair: pair[0])[1]
    rows = [attempt(worker, case, target, effort, best) for case in shape.cases]
    return _record(shape, target, best, rows)


def attempt(
    worker: Worker, case: Case, target: Target, effort: Effort, blocks: TunedBlocks, *, alone: bool = False
) -> CaseRow:
    """`measure` in the worker; whatever happens there, a CaseRow comes back."""
    call = functools.partial(measure, case, _BODIES[target.family], effort, blocks, alone=alone)
    try:
        return worker.call(call, limit_s=120)
    except WorkerError as error:
        worker.stop()
        return CaseRow.lost(case, _BODIES[target.family], str(error))


def _record(
    shape: ShapeClass, target: Target, blocks: TunedBlocks, rows: list[CaseRow]
) -> tuple[dict[str, Any] | None, str]:
    def total(of: Any) -> float | None:
        """Of a train step: a GLU's second case has both passes, attention's only the backward pass."""
        parts = [of(row) for row in (rows if shape.op == "flash_attention" else rows[1:])]
        return None if None in parts else round(sum(parts), 2)

    microseconds, rival = total(lambda row: row.median), total(lambda row: row.rival_median)
    if microseconds is None or rival is None:
        reasons = [entry.reason for row in rows for entry in (row.kernel, *row.rivals.values()) if entry.reason]
        return None, f"no time beside a rival: {'; '.join(reasons)}"
    row = {
        "op": shape.op,
        "backend": _BODIES[target.family],
        "match": shape.match,
        "blocks": asdict(blocks),
        "provenance": "measured",
        "microseconds": microseconds,
        "rival_microseconds": rival,
        "forward_microseconds": rows[0].median,
        "rival_forward_microseconds": rows[0].rival_median,
        "rivals": [row.fastest_rival for row in rows],
        "measured_on": [row.name for row in rows],
        "date": datetime.now(UTC).date().isoformat(),
        "jax": jax.__version__,
        "command": shlex.join(["python", "-m", "kernels_pallas.tune", *sys.argv[1:]]),
    }
    return row, f"{_sizes(blocks)}: {microseconds} us, fastest rival {rival} us"


def updated(table: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The table with the row in its predecessor's place; measured rows come first, then narrow ones."""
    key = lambda r: (r["op"], r["backend"], r["match"])
    rows = [*(other for other in table["rows"] if key(other) != key(row)), row]

    def order(r: dict[str, Any]) -> tuple[Any, ...]:
        bounds = [value for name, value in sorted(r["match"].items()) if name.startswith("min_")]
        not_measured = r["provenance"] != "measured"
        return r["op"], r["backend"], not_measured, -len(r["match"]), [-bound for bound in bounds]

    return {**table, "rows": sorted(rows, key=order)}


def _sizes(blocks: TunedBlocks) -> str:
    return " ".join(f"{name}={size}" for name, size in asdict(blocks).items())


def dry_run(op: str, target: Target) -> None:
    """Prints every candidate of every class with the bytes of its pass."""
    for shape in shape_classes(op):
        print(f"{shape.op} {shape.match}")
        try:
            start = _todays_blocks(shape, target)
        except ValueError as refusal:
            print(f"    {refusal}")
            continue
        if start is None:
            print(f"    the {_BODIES[target.family]} body has no blocks to choose")
            continue
        for backward in (False, True):
            for candidate in candidates(shape, target, backward=backward, start=start):
                why = "" if candidate.refused is None else f"  refused: {candidate.refused}"
                print(f"    {candidate.on_chip_bytes:>10} bytes  {_sizes(candidate.blocks)}{why}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", choices=tuple(_CHOICES), help="one of the operations")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates with their bytes; time nothing")
    parser.add_argument("--chip", help="with --dry-run: the chip, by its short name; default: the one at hand")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write here; default: the chip's table in the package"
    )
    parser.add_argument("--missing", action="store_true", help="leave out classes that have a measured row")
    parser.add_argument("--budget", type=float, default=3000, metavar="S", help="begin no class after this (3000)")
    options = parser.parse_args(argv)
    # Only the worker may take the accelerator; what is traced here needs none.
    jax.config.update("jax_platforms", "cpu")
    with Worker() as worker:
        facts: dict[str, Any] = {} if options.chip else worker.call(machine, limit_s=120)
        try:
            target = named(options.chip) if options.chip else target_of(str(facts["device"]), str(facts["platform"]))
            named(target.name)
        except ValueError as error:
            parser.error(str(error))
        if target.family is Family.GPU and not target.hopper:
            parser.error(f"the kernels for GPUs are made for H100 and H200; there is nothing to tune on {target.name}")
        ops = [options.op] if options.op else list(_CHOICES)
        if options.dry_run:
            for op in ops:
                try:
                    dry_run(op, target)
                except ValueError as error:
                    parser.error(str(error))
            return
        if options.chip:
            parser.error("--chip is for --dry-run; blocks are timed on the chip at hand")
        if target.family is Family.CPU and options.table is None:
            parser.error("a CPU's times do not belong into the package; give --table FILE, or --dry-run --chip CHIP")
        path = options.table or decision.TUNING / f"{target.name}.json"
        table: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"chip": target.name, "auto": {}, "rows": []}
        )
        known = [(row["op"], row["match"]) for row in table["rows"] if row["provenance"] == "measured"]
        shapes = [shape for op in ops for shape in shape_classes(op)]
        if options.missing:
            shapes = [shape for shape in shapes if (shape.op, shape.match) not in known]
        _tune_all(shapes, target, worker, table, path, time.monotonic() + options.budget)


def _tune_all(
    shapes: list[ShapeClass], target: Target, worker: Worker, table: dict[str, Any], path: Path, deadline: float
) -> None:
    on_cpu = target.family is Family.CPU
    effort = Effort(warmups=1, samples=3, flush_bytes=4096) if on_cpu else Effort()
    for shape in shapes:
        if time.monotonic() > deadline:
            print(f"{shape.op} {shape.match}: not tried, as --budget is over")
            continue
        if on_cpu:
            shape = replace(shape, cases=(tiny(shape.cases[0]), tiny(shape.cases[1])))
        print(f"{shape.op} {shape.match}", flush=True)
        try:
            row, told = tune(shape, target, worker, effort)
        except ValueError as refusal:
            row, told = None, str(refusal)
        print(f"    -> {told}", flush=True)
        if row is not None:
            table = updated(table, row)
            path.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
