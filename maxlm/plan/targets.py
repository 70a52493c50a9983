"""Machines to plan for, by name, and the compilers that they need. No jax here: it must be told before it is imported.

tpu:v5p:4x4x4    64 chips of TPU v5p as a 4 x 4 x 4 torus
gpu:h200:8       one host with 8 H200; gpu:h200:16x8 are 16 such hosts
cpu:8            8 devices of this machine's processor, for a try
"""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maxlm.config import UserError

COMPILERS = Path(sys.prefix, "compilers")
"""Where `make compilers` puts them: jax would try them in every command of an environment that has them."""

_GIB = 2**30


@dataclass(frozen=True)
class CpuTarget:
    """Devices that XLA makes of this machine's processor."""

    devices: int

    def __str__(self) -> str:
        return f"cpu:{self.devices}"


@dataclass(frozen=True)
class TpuTarget:
    """A slice of TPUs."""

    chip: str
    topology: str
    """Chips along each dim of the torus, as 4x4x4."""

    @property
    def devices(self) -> int:
        cores = 2 if self.chip == "7x" else 1
        return cores * math.prod(int(size) for size in self.topology.split("x"))

    def __str__(self) -> str:
        return f"tpu:{self.chip}:{self.topology}"


@dataclass(frozen=True)
class GpuTarget:
    """Hosts with the same number of GPUs each."""

    chip: str
    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    def __str__(self) -> str:
        return f"gpu:{self.chip}:{self.hosts}x{self.per_host}"


Target = CpuTarget | TpuTarget | GpuTarget


@dataclass(frozen=True)
class _Tpu:
    prefix: str
    """How the compiler's names of topologies begin."""
    smallest: str
    """The smallest machine that the compiler knows with the chip."""
    memory: int
    """Bytes a device that its compiler gives to a program; a little less than the data sheet's."""


TPUS = {
    "v5e": _Tpu("v5e", "2x2", int(15.75 * _GIB)),
    "v5p": _Tpu("v5p", "2x2x1", int(95.74 * _GIB)),
    "v6e": _Tpu("v6e", "2x2", int(31.25 * _GIB)),
    "7x": _Tpu("tpu7x", "2x2x1", int(94.75 * _GIB)),
}

_GPU_SPECIFICS = {
    "h100": {"memory_bandwidth": 3_352_320_000_000, "l2_cache_size": 52_428_800, "device_memory_size": 84_978_434_048},
    "h200": {"memory_bandwidth": 4_800_000_000_000, "l2_cache_size": 62_914_560, "device_memory_size": 150_754_820_096},
}
# XLA's GpuTargetConfig as a text proto: what it would ask a Hopper's driver for.
_GPU_CONFIG = """
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
GPUS = tuple(_GPU_SPECIFICS)


def parse_target(text: str) -> Target:
    """The machine of a name.

    Raises:
        UserError: there is no such machine; with the nearest names that there are.
    """
    match text.split(":"):
        case ["cpu", count] if _is_number(count):
            return CpuTarget(int(count))
        case ["tpu", chip, topology] if chip in TPUS and _is_topology(chip, topology):
            return TpuTarget(chip, topology)
        case ["gpu", chip, size] if chip in _GPU_SPECIFICS and _is_number(size):
            return GpuTarget(chip, 1, int(size))
        case ["gpu", chip, size] if chip in _GPU_SPECIFICS and all(_is_number(part) for part in size.split("x")):
            if size.count("x") == 1:
                hosts, per_host = size.split("x")
                return GpuTarget(chip, int(hosts), int(per_host))
    known = ["cpu:8", *(f"tpu:{chip}:{tpu.smallest}" for chip, tpu in TPUS.items())]
    known += [
        "tpu:v5e:8x8",
        "tpu:v5p:4x4x4",
        "tpu:v6e:8x8",
        *(f"gpu:{chip}:{size}" for chip in GPUS for size in (8, "2x8")),
    ]
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.4) or known[:3]
    raise UserError(f"--target {text} is unknown; use a name like {', '.join(near)}")


def memory_limit(target: Target) -> int | None:
    """Bytes that a program may have on a device; None: not known.

    jax gives a program on a GPU three quarters of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    match target:
        case CpuTarget():
            return None
        case TpuTarget():
            return TPUS[target.chip].memory
        case GpuTarget():
            fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
            return int(_GPU_SPECIFICS[target.chip]["device_memory_size"] * fraction)


def gpu_config(chip: str) -> str:
    """What XLA's compiler is told of a GPU that is not there."""
    specifics = " ".join(f"{key}: {value}" for key, value in _GPU_SPECIFICS[chip].items())
    return _GPU_CONFIG.format(specifics=specifics, name=chip.upper())


def environment(target: Target) -> Mapping[str, str]:
    """Variables that jax must find when it is imported."""
    flags = os.environ.get("XLA_FLAGS", "")
    match target:
        case CpuTarget():
            return {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={target.devices}".strip(),
            }
        case TpuTarget():
            return {
                "JAX_PLATFORMS": "cpu",  # arrays, of which there are none, would be there
                "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud what machine this is
                "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers may run side by side
            }
        case GpuTarget():
            # There is no GPU to time candidates on.
            return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0".strip()}


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


def missing_compiler(target: Target) -> str | None:
    """What to do about a compiler that is not installed; None: it is."""
    match target:
        case CpuTarget():
            return None
        case TpuTarget() | GpuTarget():
            wanted = requirements("tpu" if isinstance(target, TpuTarget) else "gpu")
    found = importlib.metadata.distributions(path=[*sys.path, str(COMPILERS)])
    installed = {distribution.name.lower().replace("_", "-") for distribution in found}
    if missing := [line for line in wanted if re.split("[<>=]", line)[0] not in installed]:
        quoted = " ".join(f"'{line}'" for line in missing)
        return f"no compiler for {target}: make compilers, or pip install --no-deps {quoted}"
    return None


def prepare(target: Target) -> None:
    """Make this process one that can compile for the target; call it before jax is imported.

    Raises:
        UserError: the compiler is not installed.
    """
    if (advice := missing_compiler(target)) is not None:
        raise UserError(advice)
    os.environ.update(environment(target))
    if not isinstance(target, CpuTarget) and COMPILERS.is_dir():
        sys.path.append(str(COMPILERS))


def _is_number(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _is_topology(chip: str, text: str) -> bool:
    sizes = text.split("x")
    return len(sizes) == TPUS[chip].smallest.count("x") + 1 and all(map(_is_number, sizes))
