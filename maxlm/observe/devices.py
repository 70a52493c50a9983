"""What devices can do at best, and how much memory they use."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maxlm.config import Dtype
from maxlm.hardware import PEAKS


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
    """Dense matrix FLOP/s of one device of that kind; None for CPUs and whatever is not in `PEAKS`.

    Kinds must be equal but for case and spaces.
    """
    peak = _PEAKS_BY_NAME.get(_normal(device_kind))
    return None if peak is None else peak.of(dtype)


def multiplies(device_kind: str, dtype: Dtype) -> bool:
    """Whether devices of that kind have a matrix unit for it; so are taken those that are not in `PEAKS`, but for TPUs,
    none of which has one for float16."""
    peak = _PEAKS_BY_NAME.get(_normal(device_kind))
    if peak is None:
        return dtype is not Dtype.FLOAT16 or not _normal(device_kind).startswith("tpu")
    return peak.of(dtype) is not None


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
