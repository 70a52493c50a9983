"""Machines to plan for, by name, and the compilers that they need. No jax here: it must be told before it is imported.

tpu:v5p:4x4x4      64 chips of TPU v5p as a 4 x 4 x 4 torus; v4, v5e, v6e and 7x are other chips
tpu:v5p:4x4x4:2    two such slices
gpu:h200:8         one host with 8 H200; gpu:h200:16x8 are 16 such hosts; `--targets` lists the other chips
cpu:8              8 devices of this machine's processor, for a try
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib.metadata
import itertools
import math
import operator
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.hardware import CHIPS, Chip, Switched, Torus

COMPILERS = Path(sys.prefix, "compilers")
"""Where `make compilers` puts them: jax would try them in every command of an environment that has them."""


class Platform(enum.Enum):
    """Which of the three compilers makes the program."""

    CPU = "cpu"
    TPU = "tpu"
    GPU = "gpu"


@dataclass(frozen=True)
class CpuMachine:
    """Devices that XLA makes of this machine's processor."""

    devices: int
    platform: ClassVar = Platform.CPU
    hardware: ClassVar = None
    """Of the other machines a `Chip`: what one device can do."""

    def __str__(self) -> str:
        return f"cpu:{self.devices}"


@dataclass(frozen=True)
class TpuMachine:
    """One or more slices of TPUs, all of one shape."""

    chip: str
    topology: str
    """As 4x4x4."""
    slices: int = 1
    """Joined by the data centre's network."""
    platform: ClassVar = Platform.TPU

    @property
    def hardware(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.sides) * TPUS[self.chip].devices_per_chip

    @property
    def sides(self) -> list[int]:
        """Chips along each dim of a slice's torus."""
        return [int(side) for side in self.topology.split("x")]

    def __str__(self) -> str:
        return f"tpu:{self.chip}:{self.topology}" + (f":{self.slices}" if self.slices > 1 else "")


@dataclass(frozen=True)
class GpuMachine:
    """Hosts with the same number of GPUs each."""

    chip: str
    hosts: int
    per_host: int
    platform: ClassVar = Platform.GPU

    @property
    def hardware(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    def __str__(self) -> str:
        return f"gpu:{self.chip}:{self.hosts}x{self.per_host}"


Machine = CpuMachine | TpuMachine | GpuMachine


@dataclass(frozen=True, kw_only=True)
class _Gpu:
    """What XLA's compiler would ask a driver for, beyond what CHIPS has; figures of xla/backends/gpu/target_config."""

    capability: str
    """Major and minor number of the instructions that it has."""
    multiprocessors: int
    float32_units: int
    """Of a multiprocessor."""
    ghz: float
    l2_bytes: int
    shared_bytes: int
    """Memory next to a multiprocessor, of which 1 KiB is for the system and one block of threads may have the rest."""


_HOPPER = _Gpu(
    capability="major: 9", multiprocessors=132, float32_units=128, ghz=1.98, l2_bytes=52_428_800, shared_bytes=233_472,
)  # fmt: skip
GPUS = {
    "a100": _Gpu(
        capability="major: 8", multiprocessors=108, float32_units=64, ghz=1.41, l2_bytes=41_943_040,
        shared_bytes=167_936,
    ),
    "h100": _HOPPER,
    "h200": dataclasses.replace(_HOPPER, l2_bytes=62_914_560),
    "b200": dataclasses.replace(
        _HOPPER, capability="major: 10", multiprocessors=148, ghz=1.965, l2_bytes=132_644_864
    ),
}  # fmt: skip
TPUS = {name: chip.network for name, chip in CHIPS.items() if isinstance(chip.network, Torus)}
_HOSTS = {name: chip.network for name, chip in CHIPS.items() if isinstance(chip.network, Switched)}

# XLA's GpuTargetConfig as a text proto.
_GPU_CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ {gpu.capability} }} core_count: {gpu.multiprocessors} fpus_per_core: {gpu.float32_units}
  clock_rate_ghz: {gpu.ghz} l2_cache_size: {gpu.l2_bytes}
  device_memory_size: {chip.memory} memory_bandwidth: {chip.bandwidth:.0f}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block_optin: {block_shared_bytes}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
"""

LARGEST_SLICE = 4_096
"""Chips, of machines that `larger` makes up: a power of two that every chip with a 3-D torus is rented out in."""
_N = "[1-9][0-9]{0,6}"
_CPU = re.compile(f"cpu:({_N})")
_TPU = re.compile(f"tpu:({'|'.join(TPUS)}):({_N}(?:x{_N})+)(?::({_N}))?")
_GPU = re.compile(f"gpu:({'|'.join(_HOSTS)}):(?:({_N})x)?({_N})")


def parse_machine(text: str) -> Machine:
    """The machine of a name.

    Raises:
        UserError: there is no such machine; with the nearest names that there are.
    """
    if found := _CPU.fullmatch(text):
        return CpuMachine(int(found[1]))
    if found := _TPU.fullmatch(text):
        machine = TpuMachine(found[1], found[2], int(found[3] or 1))
        if len(machine.sides) == TPUS[machine.chip].dims:
            return _checked_tpu(machine)
    if found := _GPU.fullmatch(text):
        return _checked_gpu(GpuMachine(found[1], int(found[2] or 1), int(found[3])))
    raise UserError(f"--target {text} is unknown; use a name like {', '.join(_nearest(text))}")


def _checked_tpu(machine: TpuMachine) -> TpuMachine:
    """The machine, if there is such a slice.

    Rules: those by which the compiler (libtpu 0.0.42) takes a topology, and the size of a pod.
    """
    torus, sides, name = TPUS[machine.chip], machine.sides, f"tpu:{machine.chip}:"
    chips, near = math.prod(sides), [name + one for one in _near_topologies(machine)]
    if chips > 1 and (sides[0] % 2 or sides[1] % 2):
        raise UserError(
            f"--target {name}{machine.topology}: hosts have 2 x 2 chips, so the first two sizes must be even; use "
            + ", ".join(near)
        )
    if chips > torus.largest or (torus.dims == 2 and max(sides) > torus.ring):
        pod = f"{torus.ring}x{torus.ring}" if torus.dims == 2 else f"{torus.largest} chips"
        raise UserError(
            f"--target {name}{machine.topology}: a slice has {pod} at most; use {near[0]}, or several slices, such as "
            f"{near[0]}:2"
        )
    return machine


def _checked_gpu(machine: GpuMachine) -> GpuMachine:
    """The machine, if there are such hosts."""
    most = _HOSTS[machine.chip].per_host
    if machine.per_host > most:
        near = GpuMachine(machine.chip, math.ceil(machine.devices / most), most)
        raise UserError(f"--target {machine}: a host has {most} GPUs at most; use {near}")
    return machine


def memory_limit(target: Machine) -> int | None:
    """Bytes that a program may have on a device; None: not known.

    jax gives a program on a GPU three quarters of the memory, unless XLA_CLIENT_MEM_FRACTION (or its older name,
    XLA_PYTHON_CLIENT_MEM_FRACTION) says otherwise.

    Raises:
        UserError: that variable is not a fraction, or both are set.
    """
    match target:
        case CpuMachine():
            return None
        case TpuMachine():
            return target.hardware.memory
        case GpuMachine():
            return int(target.hardware.memory * _gpu_fraction())


def limit_rule(target: Machine) -> str | None:
    """How the limit follows from the memory that a GPU has; None: a program may have all of it."""
    if not isinstance(target, GpuMachine):
        return None
    share, memory = _gpu_fraction(), target.hardware.memory / 2**30
    return (
        f"{share:.0%} of the {memory:.1f} GiB of each {target.chip}, as jax takes for a program; "
        "XLA_CLIENT_MEM_FRACTION sets another share"
    )


def _gpu_fraction() -> float:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    chosen = {name: text for name in names if (text := os.environ.get(name))}
    if len(chosen) == 2:
        raise UserError(f"{names[0]} and {names[1]} are both set, which jax refuses; unset {names[1]}, the older name")
    for name, text in chosen.items():
        if re.fullmatch(r"0?\.\d+|1(\.0*)?", text) is None:
            raise UserError(f"{name} = {text!r} must be a fraction up to 1, such as 0.9")
        return float(text)
    return 0.75


def tpu_topology(target: TpuMachine) -> tuple[str, dict[str, Any]]:
    """The compiler's name of a machine that is not there, and the options that go with it."""
    options: dict[str, Any] = {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    if target.chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as on a machine
    if math.prod(target.sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    prefix = "tpu7x" if target.chip == "7x" else target.chip
    return f"{prefix}:{target.topology}", options


def gpu_config(chip: str) -> str:
    """What XLA's compiler is told of a GPU that is not there."""
    gpu = GPUS[chip]
    rest = gpu.shared_bytes - 1024
    return _GPU_CONFIG.format(gpu=gpu, chip=CHIPS[chip], name=chip.upper(), block_shared_bytes=rest)


def environment(target: Machine) -> Mapping[str, str]:
    """Variables that jax must find when it is imported."""
    match target:
        case CpuMachine():
            flags = _flags(f"--xla_force_host_platform_device_count={target.devices}")
            return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        case TpuMachine():
            return {
                "JAX_PLATFORMS": "cpu",  # arrays, of which there are none, would be there
                "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud what machine this is
                "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers may run side by side
            }
        case GpuMachine():
            return {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": _flags("--xla_gpu_autotune_level=0"),  # there is no GPU to time candidates on
                "MOSAIC_GPU_DUMP_PTXAS": "1",  # ptxas tells of registers
            }


def _flags(last: str) -> str:
    """XLA_FLAGS with one more at the end, where it wins; once, however often it is added."""
    return f"{os.environ.get('XLA_FLAGS', '').removesuffix(last).strip()} {last}".strip()


def requirements(platform: Platform) -> list[str]:
    """What pip must install, without dependencies, for the jax that is installed; for a CPU nothing."""
    if platform is Platform.CPU:
        return []
    tpu = platform is Platform.TPU
    name, extra = ("libtpu", "tpu") if tpu else ("jax-cuda13-plugin", "cuda13-local")
    lines = importlib.metadata.requires("jax") or []
    (pinned,) = (one.split(";")[0] for one in lines if one.startswith(name) and one.endswith(f'extra == "{extra}"'))
    if tpu:
        return [pinned]
    # nvcc brings ptxas and nvvm the device library; absl is what Mosaic's Python part imports.
    return [pinned, pinned.replace("plugin", "pjrt"), "nvidia-cuda-nvcc>=13,<14", "nvidia-nvvm>=13,<14", "absl-py"]


def installed() -> dict[str, str]:
    """Package -> version, of all that this process or a compiler can import; the first on the path is the one."""
    versions: dict[str, str] = {}
    for found in importlib.metadata.distributions(path=[*sys.path, str(COMPILERS)]):
        if {"Name", "Version"} <= set(found.metadata):  # what an interrupted installation left has neither
            versions.setdefault(found.name.lower().replace("_", "-"), found.version)
    return versions


def missing_compiler(target: Machine) -> str | None:
    """What to do about a compiler that is not installed, or is of another jax, with which it may crash; None: it is."""
    have = installed()
    wanted = {line: re.split("[<>=]", line)[0] for line in requirements(target.platform)}
    missing = {line: name for line, name in wanted.items() if name not in have or not _suits(have[name], line)}
    if not missing:
        return None
    others = ", ".join(f"{name} {have[name]}" for name in missing.values() if name in have)
    reason = f"{others} does not go with jax {have['jax']}; " if others else ""
    return f"no compiler for {target}: {reason}make compilers, or {pip_install('--no-deps', *missing)}"


_COMPARISONS = {"==": operator.eq, ">=": operator.ge, "<=": operator.le, "<": operator.lt}


def _suits(version: str, requirement: str) -> bool:
    """Whether a version keeps a requirement like those above, as far as the requirement's own digits go."""
    for sign, bound in re.findall(r"([<>=]+)([\d.]+)", requirement):
        wanted, found = ([int(digits) for digits in re.findall(r"\d+", text)] for text in (bound, version))
        if not _COMPARISONS[sign](found[: len(wanted)], wanted):
            return False
    return True


def prepare_compiler(target: Machine) -> None:
    """Make this process one that can compile for the target; call it before jax is imported. A second call changes
    nothing.

    Raises:
        UserError: the compiler is not installed, or is of another jax.
    """
    if isinstance(target, GpuMachine) and target.chip not in GPUS:
        raise UserError(
            f"--target {target}: {target.chip} is planned for by arithmetic only; leave out --compile, or name one of "
            f"{', '.join(GPUS)}"
        )
    if (advice := missing_compiler(target)) is not None:
        raise UserError(advice)
    os.environ.update(environment(target))
    if not isinstance(target, CpuMachine) and COMPILERS.is_dir() and str(COMPILERS) not in sys.path:
        sys.path.append(str(COMPILERS))


def _topologies(chip: str) -> list[tuple[int, ...]]:
    """Slices that can be rented, but for the odd shape: the documentation's tables and rule (multiples of 4)."""
    if TPUS[chip].dims == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    cubes = itertools.combinations_with_replacement(range(4, 33, 4), 3)
    small = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    return [*small, *(sides for sides in cubes if math.prod(sides) <= TPUS[chip].largest)]


def larger(target: Machine, devices: int) -> Machine | None:
    """The same kind of machine with so many devices, a power of two, or the next that there is: full hosts of GPUs,
    TPUs in slices as large and as near to a cube as can be. None: the target has as many already."""
    match target:
        case CpuMachine():
            return None
        case GpuMachine(chip=chip):
            per_host = target.per_host if target.hosts > 1 else min(devices, _HOSTS[chip].per_host)
            grown: Machine = GpuMachine(chip, math.ceil(devices / per_host), per_host)
        case TpuMachine(chip=chip):
            chips = devices // TPUS[chip].devices_per_chip
            powers = [sides for sides in _topologies(chip) if math.prod(sides).bit_count() == 1]
            most = min(LARGEST_SLICE, max(map(math.prod, powers)))
            enough = (sides for sides in powers if math.prod(sides) >= min(chips, most))
            sides = min(enough, key=lambda sides: (math.prod(sides), sum(sides)))
            grown = TpuMachine(chip, "x".join(map(str, sides)), max(1, chips // math.prod(sides)))
    return grown if grown.devices > target.devices else None


def _near_topologies(machine: TpuMachine) -> list[str]:
    """Three of about as many chips; of those with as many, the one of the most similar sides."""

    def distance(sides: tuple[int, ...]) -> tuple[float, int]:
        pairs = zip(sorted(sides), sorted(machine.sides), strict=True)
        return abs(math.log(math.prod(sides) / math.prod(machine.sides))), sum(abs(a - b) for a, b in pairs)

    return ["x".join(map(str, sides)) for sides in sorted(_topologies(machine.chip), key=distance)[:3]]


def _nearest(text: str) -> list[str]:
    """Names most like the text; of the chip that it names, if it does."""
    known = ["cpu:8"]
    for chip, torus in TPUS.items():
        known += [f"tpu:{chip}:{size}" for size in (("2x2", "8x8") if torus.dims == 2 else ("2x2x1", "4x4x4"))]
    known += [f"gpu:{chip}:{size}" for chip in _HOSTS for size in (8, "2x8")]
    chips = CHIPS.keys() & text.lower().split(":")
    same_chip = [name for name in known if name.split(":")[1] in chips]
    return difflib.get_close_matches(text.lower(), same_chip or known, n=3, cutoff=0.4) or (same_chip or known)[:3]
