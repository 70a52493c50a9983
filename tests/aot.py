"""Compiles for TPUs and GPUs with the vendors' compilers, on a machine that has neither chip.

A compiler proves that a kernel is legal for the chip, that its blocks fit the chip's memory next to the cores, that its
registers suffice, and what the program around it holds: which kernels, which collectives, how much memory. It proves
nothing of speed. The compilers are ordinary wheels that jax loads; `make compilers` puts them into a folder of their
own, because jax would try them in every command of an environment that has them.

Each `compile_all` runs in one process of its own: registering a platform cannot be undone, and a compiler that meets a
bug aborts.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.plan import machines
from maxlm.plan.compiled import target_devices
from maxlm.plan.machines import GpuMachine, TpuMachine

ROOT = Path(__file__).parent.parent

# The VMEM that the compiler gives a kernel which does not ask for more.
_DEFAULT_VMEM = {"tpu_v5e": 16 << 20, "tpu_v5p": 16 << 20, "tpu_v6e": 32 << 20, "tpu_7x": 32 << 20}

# Of the chips that our kernels are compiled for: our kernels' name -> the smallest machine, or a host of GPUs.
_TARGETS: dict[str, TpuMachine | GpuMachine] = {
    "tpu_v5e": TpuMachine("v5e", "2x2"),
    "tpu_v5p": TpuMachine("v5p", "2x2x1"),
    "tpu_v6e": TpuMachine("v6e", "2x2"),
    "tpu_7x": TpuMachine("7x", "2x2x1"),
    "h100": GpuMachine("h100", 1, 8),
    "h200": GpuMachine("h200", 1, 8),
}
TPUS = tuple(name for name, target in _TARGETS.items() if isinstance(target, TpuMachine))
GPUS = tuple(name for name, target in _TARGETS.items() if isinstance(target, GpuMachine))
CHIPS = (*TPUS, *GPUS)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and what its compiled form must be like on each device."""

    lower: Callable[[Sequence[Any]], jax.stages.Lowered]
    """Given the devices of the machine."""
    kernels: Collection[str]
    """How the names of its Mosaic kernels begin; there must be one of each, and no other."""
    temporary_bytes: int
    """The most that it may allocate beyond arguments and results."""
    square: int | None = None
    """No tensor may have two dims this large: attention's scores."""
    collectives: Collection[str] = ()
    """The kinds that must be there; no other may."""
    products: Collection[str] | None = None
    """Formats of what is multiplied, as "s8 x s8": each must be there, no other may. None: whatever they are."""
    on_chip_bytes: int | None = None
    """What our model says of the VMEM of the largest kernel; it may be wrong by a quarter. Not known of GPUs."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Without an error everything is known."""

    name: str
    seconds: float
    """Of processor time."""
    error: str | None = None
    kernels: list[str] = dataclasses.field(default_factory=list)
    collectives: list[str] = dataclasses.field(default_factory=list)
    products: list[str] = dataclasses.field(default_factory=list)
    shapes: list[list[int]] = dataclasses.field(default_factory=list)
    """Every distinct shape of the program with two dims or more."""
    argument_bytes: int = 0
    output_bytes: int = 0
    temporary_bytes: int = 0
    spills: dict[str, int] = dataclasses.field(default_factory=dict)
    """GPU: bytes of registers that each kernel stores to and loads from memory."""
    vmem: dict[str, int] = dataclasses.field(default_factory=dict)
    """TPU: bytes of VMEM that each kernel occupies."""
    raised_vmem: dict[str, int] = dataclasses.field(default_factory=dict)
    """TPU: the limit of each kernel that asks for more than the default."""


def sharded(
    function: Callable[..., Any], *shards: jax.ShapeDtypeStruct, specs: tuple[P, ...], out_specs: Any
) -> Callable[[Sequence[Any]], jax.stages.Lowered]:
    """`Case.lower` of a function of each device's shards, under shard_map on a mesh (data 2, tensor what remains)."""

    def lower(devices: Sequence[Any]) -> jax.stages.Lowered:
        mesh = Mesh(np.array(devices).reshape(2, -1), ("data", "tensor"))

        def whole(shard: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
            cuts = [1 if axis is None else mesh.shape[axis] for axis in (*spec, *[None] * (shard.ndim - len(spec)))]
            shape = tuple(np.multiply(shard.shape, cuts).tolist())
            return jax.ShapeDtypeStruct(shape, shard.dtype, sharding=NamedSharding(mesh, spec))

        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped).lower(*map(whole, shards, specs))

    return lower


def devices(chip: str, count: int = 8) -> Sequence[Any]:
    """The smallest TPU machine, or one of `count` GPUs; for programs that are compiled and never run."""
    target = _TARGETS[chip]
    return target_devices(target if isinstance(target, TpuMachine) else GpuMachine(chip, 1, count))


def require_compiler(chip: str) -> None:
    """Skip the test where the chip's compiler is not installed; fail if MAXLM_REQUIRE_COMPILERS=1."""
    if (reason := machines.missing_compiler(_TARGETS[chip])) is not None:
        if os.environ.get("MAXLM_REQUIRE_COMPILERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def compile_all(chip: str, module: str, names: Iterable[str]) -> dict[str, Report]:
    """Compile the named entries of `cases(chip)` of a test module, in one new process.

    Raises:
        AssertionError: the process died; with the last lines it wrote.
    """
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", ""), str(machines.COMPILERS)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **machines.environment(_TARGETS[chip]),
    }
    command = [sys.executable, "-c", "import aot; aot.child()", chip, module, *names]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    reports = [Report(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (
        f"the compiler for {chip} died with {done.returncode} after {[report.name for report in reports]}:\n"
        + done.stderr[-3000:]
    )
    return {report.name: report for report in reports}


def complaints(case: Case, report: Report) -> list[str]:
    """Where the compiled program is not what the case says."""
    if report.error is not None:
        return [f"{report.name}: {report.error}"]
    found = []
    begins = {kernel: next(filter(kernel.startswith, case.kernels), None) for kernel in report.kernels}
    if set(begins.values()) != set(case.kernels):
        found.append(f"kernels are {sorted(begins)}; one of each of {sorted(case.kernels)} belongs there")
    if set(report.collectives) != set(case.collectives):
        found.append(f"collectives are {sorted(set(report.collectives))}, not {sorted(set(case.collectives))}")
    if case.products is not None and set(report.products) != set(case.products):
        found.append(f"multiplies {report.products}, not {sorted(case.products)}")
    if report.temporary_bytes > case.temporary_bytes:
        found.append(f"allocates {report.temporary_bytes:,} bytes, more than {case.temporary_bytes:,}")
    if case.square is not None:
        squares = [shape for shape in report.shapes if sum(dim >= case.square for dim in shape) >= 2]
        found += [f"holds a tensor {shape} with two dims >= {case.square}" for shape in squares]
    found += [f"{kernel} spills {count} bytes of registers" for kernel, count in report.spills.items() if count]
    found += [f"{kernel} asks for {limit:,} bytes of VMEM" for kernel, limit in report.raised_vmem.items()]
    if case.on_chip_bytes is not None and report.vmem:
        used = max(report.vmem.values())
        # Planning needs an upper bound: far too high wastes the chip, too low is a program that does not compile.
        if not 0.95 * used <= case.on_chip_bytes <= 2.5 * used:
            found.append(f"takes {used:,} bytes of VMEM, and the model says {case.on_chip_bytes:,}")
    return [f"{report.name}: {line}" for line in found]


def child() -> None:
    """What `compile_all` runs: chip, module and names are the arguments, one JSON object a line is the answer."""
    chip, module, *names = sys.argv[1:]
    cases = importlib.import_module(module).cases(chip)
    answers = os.fdopen(os.dup(1), "w")
    spills: dict[str, int] = {}
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)  # ptxas writes to the C library's standard output
        for name in names:
            report = _compile(name, cases[name], chip, log, spills)
            print(json.dumps(dataclasses.asdict(report)), file=answers, flush=True)


def _compile(name: str, case: Case, chip: str, log: Any, known_spills: dict[str, int]) -> Report:
    start = time.process_time()
    log_start = log.seek(0, os.SEEK_END)
    try:
        compiled = case.lower(devices(chip)).compile()
    except Exception as error:  # whatever a compiler refuses a program with
        return Report(name, time.process_time() - start, error=f"{type(error).__name__}: {error}"[:2000])
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None
    kernels = _kernels(text)
    log.seek(log_start)
    known_spills |= _spills(log.read().decode())  # of the new kernels: jax keeps those that it compiled before
    vmem, limits = (
        {
            kernel: int(size)
            for kernel, line in kernels
            for size in re.findall(rf'"{field}":\[{{[^]]*"size":"(\d+)"', line)
        }
        for field in ("used_scoped_memory_configs", "scoped_memory_configs")
    )
    return Report(
        name,
        time.process_time() - start,
        kernels=[kernel for kernel, _ in kernels],
        collectives=re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text),
        products=_products(text),
        shapes=_shapes(text),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        spills={kernel: known_spills[kernel] for kernel, _ in kernels} if chip in GPUS else {},
        vmem=vmem,
        raised_vmem={kernel: limit for kernel, limit in limits.items() if limit > _DEFAULT_VMEM[chip]},
    )


def _kernels(text: str) -> list[tuple[str, str]]:
    """Name and line of each call of a Mosaic kernel: the operation's name has it, as in transpose(jvp(NAME))/call."""
    found = []
    for line in text.splitlines():
        if re.search('custom_call_target="(tpu_custom_call|mosaic_gpu_v2)"', line):
            names = re.findall(r'op_name="[^"]*?(\w+)\)*/[^/"]+"', line)
            found.append((names[0] if names else line.split(" = ")[0].strip(), line))  # XLA's own have no op_name
    return found


def _products(text: str) -> list[str]:
    """Formats of both factors of each dot or convolution."""
    formats = dict(re.findall(r"(%[\w.-]+) = ([a-z]+\d\w*)\[", text))
    pairs = re.findall(r" (?:dot|convolution)\((%[\w.-]+), (%[\w.-]+)\)", text)
    return sorted({f"{formats[left]} x {formats[right]}" for left, right in pairs})


def _shapes(text: str) -> list[list[int]]:
    found = set(re.findall(r"\b(?:pred|[a-z]+\d\w*)\[(\d+(?:,\d+)+)\]", text))
    return sorted([int(size) for size in dims.split(",")] for dims in found)


def _spills(log: str) -> dict[str, int]:
    """Kernel -> bytes spilled, from the words of ptxas."""
    pattern = r"properties for (\S+?)(?:_mosaic_gpu_kernel)?\n.*? (\d+) bytes spill stores, (\d+) bytes spill loads"
    spills: dict[str, int] = {}
    for kernel, stores, loads in re.findall(pattern, log):
        spills[kernel] = max(spills.get(kernel, 0), int(stores) + int(loads))
    return spills


if __name__ == "__main__":  # make compilers
    print("\n".join(machines.requirements(machines.Platform.TPU) + machines.requirements(machines.Platform.GPU)))
