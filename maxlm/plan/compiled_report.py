"""What a compiler made of a step: plain values that need no jax to be read, and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from maxlm.plan.analysis import CompilerReport, Json, gib
from maxlm.plan.collectives import UNKNOWN, summed
from maxlm.plan.compiled import CompiledStep, DoesNotFit
from maxlm.plan.out_of_memory import Buffer


def compiler_report(result: CompiledStep | DoesNotFit) -> CompilerReport:
    """For the report of a plan; sizes in bytes."""
    details: dict[str, Json] = {
        "compile_cpu_seconds": round(result.cpu_seconds, 1),
        "largest": [dataclasses.asdict(one) | {"allocation": one.allocation.value} for one in result.largest],
        "compiler_warnings": list(result.warnings),
    }
    match result:
        case DoesNotFit():
            details |= {"message": result.message, "peak_at_least": result.at_least}
            return CompilerReport(fits=False, peak=result.wanted, at_least=result.at_least, details=details)
        case CompiledStep():
            details |= {
                "memory": dataclasses.asdict(result.memory),
                "collectives": [
                    {
                        "kind": one.kind.value,
                        "axes": list(one.axes),
                        "group": one.group,
                        "number": number,
                        "runs": one.runs.count,
                        "runs_exact": one.runs.exact,
                        "bytes_each": one.bytes_each,
                        "bytes_sent": one.sent,
                        "asynchronous": one.asynchronous,
                        "operation": one.operation,
                    }
                    for one, number in summed(result.collectives)
                ],
                "forbidden": list(result.forbidden),
                "kernels": [
                    {
                        "maker": one.maker.value,
                        "name": one.name,
                        "calls": one.calls,
                        "runs": one.runs.count,
                        "runs_exact": one.runs.exact,
                        "source": one.source,
                    }
                    for one in result.kernels
                ],
                "spills": result.spills,
            }
            return CompilerReport(fits=True, peak=result.memory.peak, details=details)


def print_compiled(result: CompiledStep | DoesNotFit, console: Console, *, cached: bool = False) -> None:
    """Memory, collectives, kernels, and what is wrong with them."""
    after = "from the cache; it took" if cached else "after"
    console.print(f"\n[bold]The compiler's word[/], {after} {result.cpu_seconds:.0f} CPU seconds")
    match result:
        case DoesNotFit():
            console.print(f"does not fit: {result.message}", markup=False)
            if result.at_least:
                console.print(f"needs at least {gib(result.wanted)}; how much more, the compiler does not say")
            console.print(_largest(result.largest))
        case CompiledStep():
            memory = result.memory
            console.print(
                f"a device: {gib(memory.arguments)} state and batch, {gib(memory.temporary)} temporary, "
                f"{gib(memory.peak)} at the peak"
            )
            console.print(_collectives(result))
            sent = sum(one.sent for one in result.collectives)
            exact = all(one.runs.exact for one in result.collectives)
            console.print(f"a device sends {'' if exact else 'at least '}{sent / 1e9:,.3f} GB a step")
            if any(one.axes == UNKNOWN for one in result.collectives):
                console.print("?: its devices are written in a way that is not known; counted as all", style="yellow")
            if result.kernels:
                console.print(_kernels(result))
            if result.spills:
                console.print(f"kernels spill {result.spills:,} bytes of registers", style="yellow")
            for line in result.forbidden:
                console.print(f"against the layout: {line}", markup=False)
    for line in result.warnings:
        console.print(f"the compiler warns: {line}", style="yellow", markup=False)


def _largest(buffers: Sequence[Buffer]) -> Table:
    """Those that look alike as one: they differ in the operation, which is not shown."""
    alike: dict[tuple[str, ...], int] = {}
    for one in buffers:
        row = (one.shape or one.allocation.value, gib(one.size), one.source or one.allocation.value)
        alike[row] = alike.get(row, 0) + one.number
    table = Table("largest arrays", box=None, pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("number", justify="right")
    table.add_column("from")
    for (shape, size, source), number in alike.items():
        table.add_row(shape, size, str(number), source)
    return table


def _kernels(result: CompiledStep) -> Table:
    table = Table("kernel", "maker", box=None, pad_edge=False)
    for name in ("calls", "runs"):
        table.add_column(name, justify="right")
    table.add_column("from")
    for one in result.kernels:
        runs = f"{one.runs.count:,}" if one.runs.exact else f"{one.runs.count:,}+"
        table.add_row(one.name, one.maker.value, str(one.calls), runs, one.source)
    return table


def _collectives(result: CompiledStep) -> Table:
    table = Table("collective", "axes", box=None, pad_edge=False)
    for name in ("devices", "in text", "runs", "MB each", "MB sent"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("overlaps")
    for one, number in summed(result.collectives):
        runs = f"{one.runs.count:,}" if one.runs.exact else f"{one.runs.count:,}+"
        table.add_row(
            one.kind.value, " x ".join(one.axes) or "-", str(one.group), str(number), runs,
            f"{one.bytes_each / 1e6:,.3f}", f"{one.sent / 1e6:,.3f}", "yes" if one.asynchronous else "",
        )  # fmt: skip
    return table
