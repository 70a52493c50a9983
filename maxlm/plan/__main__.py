"""Will it fit, and what will it send? `python -m maxlm.plan --config FILE --target tpu:v5p:4x4x4 --compile`.

Exit codes: 0 it fits; 3 it does not; 2 a mistake in config or command line, said in one line each; 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import rich.console
from rich.table import Table

from maxlm.config import UserError
from maxlm.config.cli import describe, parse_run, run_command
from maxlm.plan.targets import Target, memory_limit, parse_target, prepare

if TYPE_CHECKING:
    from maxlm.plan.compiled import CompiledStep, DoesNotFit

EXIT_DOES_NOT_FIT = 3

_DESCRIPTION = """Compile the train step for a machine that need not be there: does it fit, and what does it send?

--target NAME      Machine: tpu:v5p:4x4x4, tpu:v6e:8x8, gpu:h200:8, gpu:h200:16x8 (hosts x GPUs), cpu:8.
--compile          Ask the machine's own compiler.
--json             Print one JSON object instead of tables."""


def command(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--target")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}, for example --target gpu:h200:8") from None
    asked = parse_run(rest, prog="python -m maxlm.plan", description=_DESCRIPTION)
    if asked.print_config:
        print(describe(asked.config, asked.file_config))
        return 0
    if options.target is None:
        raise UserError("--target is missing; name a machine, for example --target tpu:v5p:4x4x4")
    if not options.compile:
        raise UserError("--compile is missing; without a compiler there is nothing to tell yet")
    target = parse_target(options.target)
    asked.config.validate(target.devices)
    prepare(target)
    from maxlm.plan.compiled import DoesNotFit, compile_step  # imports jax, which must find what `prepare` has set

    result = compile_step(asked.config, target)
    limit = memory_limit(target)
    fits = not isinstance(result, DoesNotFit) and (limit is None or result.memory.peak <= limit)
    if options.json:
        print(json.dumps(_json(target, result, limit, fits), indent=1))
    else:
        _print(target, result, limit, fits)
    return 0 if fits else EXIT_DOES_NOT_FIT


def _json(target: Target, result: CompiledStep | DoesNotFit, limit: int | None, fits: bool) -> dict[str, Any]:
    from maxlm.plan.compiled import DoesNotFit

    report: dict[str, Any] = {
        "target": str(target),
        "devices": target.devices,
        "mesh": dict(result.layout.mesh.shape),
        "fits": fits,
        "memory_limit": limit,
        "compile_cpu_seconds": round(result.cpu_seconds, 1),
    }
    if isinstance(result, DoesNotFit):
        return report | {"message": result.message}
    return report | {
        "memory": dataclasses.asdict(result.memory),
        "collectives": [
            {
                "kind": one.kind.value,
                "axes": list(one.axes),
                "group": one.group,
                "runs": one.runs.count,
                "runs_exact": one.runs.exact,
                "bytes_each": one.bytes_each,
                "bytes_sent": one.sent,
                "asynchronous": one.asynchronous,
                "operation": one.operation,
            }
            for one in result.collectives
        ],
        "forbidden": result.forbidden,
    }


def _print(target: Target, result: CompiledStep | DoesNotFit, limit: int | None, fits: bool) -> None:
    from maxlm.plan.collectives import summed
    from maxlm.plan.compiled import DoesNotFit

    console = rich.console.Console(highlight=False, soft_wrap=True)
    mesh = " x ".join(f"{axis} {size}" for axis, size in result.layout.mesh.shape.items() if size > 1) or "one device"
    console.print(f"{target}: {target.devices} devices as {mesh}; compiled in {result.cpu_seconds:.0f} CPU seconds")
    if isinstance(result, DoesNotFit):
        console.print(f"does not fit: {result.message}", markup=False)
        return
    table = Table("collective", "axes", "devices", "in text", "runs", "MB each", "MB sent", "overlaps", box=None)
    for one, number in summed(result.collectives):
        runs = f"{one.runs.count:,}" if one.runs.exact else f"{one.runs.count:,}+"
        table.add_row(
            one.kind.value, " x ".join(one.axes) or "-", str(one.group), str(number), runs,
            f"{one.bytes_each / 1e6:,.3f}", f"{one.sent / 1e6:,.3f}", "yes" if one.asynchronous else "",
        )  # fmt: skip
    console.print(table)
    total = sum(one.sent for one in result.collectives)
    console.print(f"a device sends {total / 1e9:,.3f} GB a step")
    gib = lambda size: f"{size / 2**30:,.2f} GiB"
    memory = result.memory
    room = "" if limit is None else f", of {gib(limit)}: {'fits' if fits else 'does not fit'}"
    console.print(
        f"memory of a device: {gib(memory.arguments)} state and batch, {gib(memory.temporary)} temporary, "
        f"{gib(memory.peak)} at the peak{room}"
    )
    for line in result.forbidden:
        console.print(f"against the layout: {line}", markup=False)


if __name__ == "__main__":
    run_command(command)
