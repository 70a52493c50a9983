"""The train step through a target's own compiler: what it holds in memory, what it sends, which kernels it calls.

What no compiler tells is the time that a step takes: its estimates are of single instructions, and count what a loop
does once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from maxlm.config import RunConfig, UserError
from maxlm.plan.analysis import CompilerReport, Json, gib
from maxlm.plan.audit import forbidden, smallest_matrix
from maxlm.plan.collectives import Collective, collectives, summed
from maxlm.plan.hlo import Program
from maxlm.plan.kernels import Kernel, kernels, spilled, total_spills
from maxlm.plan.machines import CpuMachine, GpuMachine, Machine, TpuMachine, gpu_config, memory_limit, tpu_topology
from maxlm.plan.objectives import objective_of
from maxlm.plan.out_of_memory import Buffer, DoesNotFit, largest_arrays, parse_refusal, with_sources
from maxlm.sharding import make_layout
from maxlm.training import make_trainer


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs."""

    arguments: int
    """State and batch."""
    temporary: int
    """All else that the step allocates; as the compiler sums it up, which may be more than is there at one time."""
    peak: int
    """Most at one time, arguments and on TPUs the program's code included. It leaves out what is no part of the
    program: the runtime's own memory (of a GPU the context and NCCL's buffers, which live in the quarter that jax does
    not take), the next batch on its way, the state that a checkpoint copies."""


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What the compiler made of the train step."""

    memory: Memory
    largest: tuple[Buffer, ...]
    """The largest arrays that the program takes or makes, not all of them alive at one time."""
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    spills: int | None
    """Bytes of registers that our GPU kernels store to memory and load again; None: not known, as on every TPU."""
    forbidden: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """Of jax, while it traced and compiled: as of memory that a result could not take over. Each one's first line."""
    cpu_seconds: float
    """Of processor time, to trace and compile."""


def target_devices(target: Machine) -> Sequence[jax.Device]:
    """The target's devices; those of TPUs and GPUs can be compiled for, and nothing else.

    Raises:
        UserError: the compiler knows no such machine.
    """
    topology: Any = topologies.get_topology_desc
    try:
        match target:
            case CpuMachine():
                found = jax.devices("cpu")
                if len(found) < target.devices:
                    raise UserError(
                        f"--target {target}: this process has {len(found)} CPU devices; use cpu:{len(found)}"
                    )
                return found[: target.devices]
            case TpuMachine():
                name, options = tpu_topology(target)
                return topology(platform="tpu", topology_name=name, **options).devices
            case GpuMachine():
                shape, config = f"1x{target.hosts}x{target.per_host}", gpu_config(target.chip)
                return topology(platform="cuda", topology_name="", target_config=config, topology=shape).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--target {target}: {str(error).splitlines()[0]}") from None


def compile_step(config: RunConfig, target: Machine) -> CompiledStep | DoesNotFit:
    """Compile the step that `maxlm.train` would run on the target.

    Raises:
        UserError: the config has a mistake, or does not suit the number of devices, or the compiler knows no such
            machine.
    """
    config.validate(target.devices)
    limit = memory_limit(target)
    start = time.process_time()
    with _compiler_output() as log, warnings.catch_warnings(record=True) as caught:
        layout = make_layout(config.sharding, target_devices(target))
        trainer = make_trainer(config, layout, objective_of(config, layout))
        lowered = trainer.step.lower(trainer.state, trainer.batch)
        try:
            compiled: jax.stages.Compiled | DoesNotFit = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiled = _refused(lowered, error, target)
    seconds, said = time.process_time() - start, tuple(dict.fromkeys(str(one.message).split("\n")[0] for one in caught))
    if isinstance(compiled, DoesNotFit):
        return dataclasses.replace(compiled, warnings=said, cpu_seconds=seconds)
    _spills.update(spilled(log[0]))
    program, memory = Program(compiled.as_text() or ""), _memory(compiled, target)
    if limit is not None and memory.peak > limit:
        share = " (three quarters of the GPU's memory, or XLA_CLIENT_MEM_FRACTION)"
        return DoesNotFit(
            message=f"needs {gib(memory.peak)}, {gib(memory.peak - limit)} too much: a program may have {gib(limit)}"
            + (share if isinstance(target, GpuMachine) else ""),
            wanted=memory.peak,
            available=limit,
            largest=largest_arrays(program),
            warnings=said,
            cpu_seconds=seconds,
        )
    found, called = collectives(program, layout.mesh.shape), kernels(program)
    return CompiledStep(
        memory=memory,
        largest=largest_arrays(program),
        collectives=tuple(found),
        kernels=called,
        spills=total_spills(called, _spills),
        forbidden=tuple(forbidden(layout, found, matrix_bytes=smallest_matrix(config, layout), log=log[0])),
        warnings=said,
        cpu_seconds=seconds,
    )


def compiler_report(result: CompiledStep | DoesNotFit) -> CompilerReport:
    """For a plan, without any of jax's types; sizes in bytes."""
    details: dict[str, Json] = {
        "compile_cpu_seconds": round(result.cpu_seconds, 1),
        "largest": [dataclasses.asdict(one) | {"allocation": one.allocation.value} for one in result.largest],
        "compiler_warnings": list(result.warnings),
    }
    if isinstance(result, DoesNotFit):
        details |= {"message": result.message, "peak_at_least": result.at_least}
        return CompilerReport(fits=False, peak=result.wanted, at_least=result.at_least, details=details)
    details |= {
        "memory": dataclasses.asdict(result.memory),
        "collectives": [one.to_json(number) for one, number in summed(result.collectives)],
        "forbidden": list(result.forbidden),
        "kernels": [one.to_json() for one in result.kernels],
        "spills": result.spills,
    }
    return CompilerReport(fits=True, peak=result.memory.peak, details=details)


_spills: dict[str, int] = {}
"""Of every Mosaic GPU kernel that this process has compiled: jax keeps kernels, and ptxas speaks of each once."""


def _refused(lowered: jax.stages.Lowered, error: jax.errors.JaxRuntimeError, target: Machine) -> DoesNotFit:
    """What an error says of memory, with the program's arrays: it is compiled once more, past the end of the memory,
    for a text to read arrays and source lines from.

    Raises:
        UserError: it is about the memory next to the cores.
        JaxRuntimeError: it is about something else.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    refusal = parse_refusal(str(error), memory_limit(target) or 0)
    if refusal is None:
        words, *more = str(error).splitlines()
        if words.endswith(":"):  # the next line names the kernel, and goes on with the text of its call
            words += " " + "".join(more[:1]).split(" = ")[0]
        raise UserError(f"--target {target}: {words}") from None
    with tempfile.TemporaryDirectory() as folder:
        # What lies past the end is compiled, and then cannot always be loaded; its text is in the folder by then.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile({"xla_tpu_no_crash_on_oom": True, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = [file.read_text() for file in Path(folder).glob("*.after_optimizations.txt")]
    if not texts:
        return refusal
    program = Program(max(texts, key=len))
    return dataclasses.replace(refusal, largest=with_sources(refusal.largest, program) or largest_arrays(program))


def _memory(compiled: jax.stages.Compiled, target: Machine) -> Memory:
    """From the compiler's figures, of which `peak_memory_in_bytes` alone may be less than the truth.

    CPU: it leaves temporaries out. GPU: it is the sum of the arrays alive at one time (XLA's `ComputePeakMemory`), but
    a program takes all its temporary memory as one piece, gaps between arrays included. TPU: it leaves out the
    program's code, which lies in HBM and counts in the compiler's own verdict.
    """
    stats = compiled.memory_analysis()
    assert stats is not None  # all three compilers have it
    match target:
        case CpuMachine() | GpuMachine():
            new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
            peak = stats.argument_size_in_bytes + new_outputs + stats.temp_size_in_bytes
        case TpuMachine():
            peak = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    return Memory(arguments=stats.argument_size_in_bytes, temporary=stats.temp_size_in_bytes, peak=peak)


@contextlib.contextmanager
def _compiler_output() -> Iterator[list[str]]:
    """Keeps what compilers, which know nothing of Python, write to standard output and error; the list's one entry has
    it after.

    If the block raises what is no user's mistake, it is written to standard error after all; if the compiler ends the
    process, a shell that waits for this does it.
    """
    log = [""]
    with tempfile.NamedTemporaryFile() as file:
        sys.stdout.flush()
        command = ["sh", "-c", 'read -r line || { cat "$0" >&2; rm "$0"; }', file.name]
        witness = subprocess.Popen(command, stdin=subprocess.PIPE)
        saved = {stream: os.dup(stream) for stream in (1, 2)}
        for stream in saved:
            os.dup2(file.fileno(), stream)
        failed = False
        try:
            yield log
        except BaseException as error:
            failed = not isinstance(error, UserError)
            raise
        finally:
            sys.stdout.flush()
            for stream, copy in saved.items():
                os.dup2(copy, stream)
                os.close(copy)
            witness.communicate(b"\n")
            file.seek(0)
            log[0] = file.read().decode(errors="replace")
            if failed:
                os.write(2, log[0].encode())
