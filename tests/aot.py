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
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).parent.parent
COMPILERS = Path(sys.prefix, "compilers")

# The VMEM that the compiler gives a kernel which does not ask for more.
_DEFAULT_VMEM = {"tpu_v5e": 16 << 20, "tpu_v5p": 16 << 20, "tpu_v6e": 32 << 20, "tpu_7x": 32 << 20}

# The smallest machine that the compiler knows with the chip.
_TPU_TOPOLOGIES = {"tpu_v5e": "v5e:2x2", "tpu_v5p": "v5p:2x2x1", "tpu_v6e": "v6e:2x2", "tpu_7x": "tpu7x:2x2x1"}

_GPU_SPECIFICS = {
    "h100": "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048",
    "h200": "memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150754820096",
}
# XLA's GpuTargetConfig as a text proto: what it would ask a Hopper's driver for.
_GPU_TARGET = """
gpu_device_info {{
  {specifics} cuda_compute_capability {{ major: 9 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
"""

TPUS, GPUS = tuple(_TPU_TOPOLOGIES), tuple(_GPU_SPECIFICS)
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
    if chip in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=_TPU_TOPOLOGIES[chip]).devices
    target = _GPU_TARGET.format(specifics=_GPU_SPECIFICS[chip], name=chip.upper())
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target, topology=f"1x1x{count}"
    ).devices


def requirements(platform: Literal["tpu", "gpu"]) -> list[str]:
    """What pip must install, without dependencies, for the jax that is installed."""
    wanted = {"tpu": ("libtpu", 'extra == "tpu"'), "gpu": ("jax-cuda13-plugin", 'extra == "cuda13-local"')}[platform]
    (pinned,) = (
        line.split(";")[0]
        for line in importlib.metadata.requires("jax") or []
        if line.startswith(wanted[0]) and line.endswith(wanted[1])
    )
    if platform == "tpu":
        return [pinned]
    # nvcc brings ptxas and nvvm the device library; absl is what Mosaic's Python part imports.
    return [pinned, pinned.replace("plugin", "pjrt"), "nvidia-cuda-nvcc>=13,<14", "nvidia-nvvm>=13,<14", "absl-py"]


def require_compiler(chip: str) -> None:
    """Skip the test where the chip's compiler is not installed; fail if MAXLM_REQUIRE_COMPILERS=1."""
    found = importlib.metadata.distributions(path=[*sys.path, str(COMPILERS)])
    installed = {distribution.name.lower().replace("_", "-") for distribution in found}
    wanted = requirements("tpu" if chip in TPUS else "gpu")
    missing = [line for line in wanted if re.split("[<>=]", line)[0] not in installed]
    if missing:
        quoted = " ".join(f"'{line}'" for line in missing)
        reason = f"no compiler for {chip}: make compilers, or pip install --no-deps {quoted}"
        if os.environ.get("MAXLM_REQUIRE_COMPILERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def compile_all(chip: str, module: str, names: Iterable[str]) -> dict[str, Report]:
    """Compile the named entries of `cases(chip)` of a test module, in one new process.

    Raises:
        AssertionError: the process died; with the last lines it wrote.
    """
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", ""), str(COMPILERS)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # there is no GPU to time candidates on
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # tests run in parallel
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
    print("\n".join(requirements("tpu") + requirements("gpu")))
