"""What devices can do at best, and how much memory they use."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maxlm.config import Dtype

_TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """Dense (never sparse) matrix FLOP/s of one JAX device, in units of 1e12."""

    bfloat16: float | None
    """None: the device has no bfloat16 matrix unit."""
    float32: float
    """As JAX multiplies float32 at its default precision: one bfloat16 pass on TPUs, TF32 on NVIDIA since Ampere."""


# Keys are `jax.Device.device_kind`. Names must be equal but for case and spaces: a variant (PCIe, NVL, a MIG slice) has
# another peak than its namesake, so a device that is not listed is unknown rather than guessed.
# NVIDIA's datasheets print figures "with sparsity", twice the dense ones given here.
PEAKS: Mapping[str, Peak] = {
    # TPU: docs.cloud.google.com/tpu/docs, "peak compute per chip". v2, v3 and 7x show two JAX devices a chip,
    # each with half of the chip's figure.
    "TPU v2": Peak(22.5, 22.5),  # 45 a chip
    "TPU v3": Peak(61.5, 61.5),  # 123 a chip
    "TPU v4": Peak(275, 275),
    "TPU v5 lite": Peak(197, 197),  # v5e
    "TPU v5e": Peak(197, 197),
    "TPU v5": Peak(459, 459),  # v5p
    "TPU v5p": Peak(459, 459),
    "TPU v6 lite": Peak(918, 918),  # v6e, Trillium
    "TPU v6e": Peak(918, 918),
    "TPU7x": Peak(1153.5, 1153.5),  # Ironwood, 2307 a chip
    # NVIDIA Volta and Turing have float16 matrix units only. V100 and T4 datasheets, single precision.
    "Tesla V100-SXM2-16GB": Peak(None, 15.7),
    "Tesla V100-SXM2-32GB": Peak(None, 15.7),
    "Tesla V100-PCIE-16GB": Peak(None, 14),
    "Tesla V100-PCIE-32GB": Peak(None, 14),
    "Tesla T4": Peak(None, 8.1),
    # A100 datasheet.
    "NVIDIA A100-SXM4-40GB": Peak(312, 156),
    "NVIDIA A100-SXM4-80GB": Peak(312, 156),
    "NVIDIA A100-PCIE-40GB": Peak(312, 156),
    "NVIDIA A100 80GB PCIe": Peak(312, 156),
    # A10 datasheet; the A10G is Amazon's variant with fewer units in use (EC2 G5 documentation).
    "NVIDIA A10": Peak(125, 62.5),
    "NVIDIA A10G": Peak(70, 35),
    # GA102 whitepaper, float32 accumulation.
    "NVIDIA GeForce RTX 3090": Peak(71, 35.6),
    "NVIDIA RTX A6000": Peak(154.8, 77.4),
    # H100, H200 and GH200 datasheets.
    "NVIDIA H100 80GB HBM3": Peak(989.4, 494.7),  # SXM
    "NVIDIA H100 PCIe": Peak(756, 378),
    "NVIDIA H100 NVL": Peak(835.5, 417.5),
    "NVIDIA H200": Peak(989.4, 494.7),  # SXM
    "NVIDIA H200 NVL": Peak(835.5, 417.5),
    "NVIDIA GH200 480GB": Peak(989.4, 494.7),
    "NVIDIA GH200 120GB": Peak(989.4, 494.7),
    # HGX B200 and GB200 NVL72 datasheets, per GPU.
    "NVIDIA B200": Peak(2250, 1125),
    "NVIDIA GB200": Peak(2500, 1250),
    # L4 and L40S datasheets; Ada whitepaper, float32 accumulation.
    "NVIDIA L4": Peak(121, 60),
    "NVIDIA L40S": Peak(362, 183),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 82.6),
}


class Device(Protocol):
    """The part of `jax.Device` that is read here."""

    @property
    def device_kind(self) -> str: ...
    @property
    def process_index(self) -> int: ...
    def memory_stats(self) -> Mapping[str, int] | None: ...


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes, of the fullest device; of this process where devices do not tell (CPU)."""

    in_use: int
    peak: int
    limit: int | None
    """What may be allocated; None: unknown."""


def peak_flops(device_kind: str, dtype: Dtype) -> float | None:
    """Dense matrix FLOP/s of one device of that kind; None for CPUs and whatever is not in `PEAKS`."""
    peak = _PEAKS_BY_NAME.get(_normal(device_kind))
    if peak is None:
        return None
    match dtype:
        case Dtype.BFLOAT16:
            return None if peak.bfloat16 is None else peak.bfloat16 * _TERA
        case Dtype.FLOAT32:
            return peak.float32 * _TERA


def memory_in_use(devices: Sequence[Device]) -> MemoryUse:
    """Memory of the fullest of this process's devices."""
    stats = [stat for device in devices if (stat := device.memory_stats())]
    if not stats:
        return _process_memory()
    fullest = max(stats, key=lambda stat: stat["bytes_in_use"])
    return MemoryUse(
        in_use=fullest["bytes_in_use"],
        peak=max(stat.get("peak_bytes_in_use", stat["bytes_in_use"]) for stat in stats),
        limit=fullest.get("bytes_limit"),
    )


def _process_memory() -> MemoryUse:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes on macOS, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak
    return MemoryUse(in_use=resident, peak=max(peak, resident), limit=None)


def _normal(name: str) -> str:
    return " ".join(name.lower().split())


_PEAKS_BY_NAME = {_normal(name): peak for name, peak in PEAKS.items()}
