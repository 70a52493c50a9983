"""What each chip can do: FLOP/s, memory and links of one JAX device, with the source of every figure."""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.config import Dtype


@dataclass(frozen=True)
class Peak:
    """Dense (never sparse) matrix FLOP/s of one JAX device, in units of 1e12."""

    bfloat16: float | None
    """None: the device has no bfloat16 matrix unit."""
    float32: float
    """As JAX multiplies float32 at its default precision: one bfloat16 pass on TPUs, TF32 on NVIDIA since Ampere."""

    def of(self, dtype: Dtype) -> float | None:
        """FLOP/s; None: the device has no such matrix unit."""
        terms = self.bfloat16 if dtype is Dtype.BFLOAT16 else self.float32
        return None if terms is None else terms * 1e12


@dataclass(frozen=True, kw_only=True)
class Torus:
    """TPUs of a slice, each joined to its neighbours."""

    dims: int
    """2 or 3."""
    link: float
    """Bytes/s of one link, one way; a device has two links along each dim that is longer than 2."""
    between_slices: float
    """Bytes/s of one device over the data centre's network, one way."""


@dataclass(frozen=True, kw_only=True)
class Switched:
    """GPUs that reach all others of their host through a switch."""

    within_host: float
    """Bytes/s of one GPU, one way."""
    per_host: int
    between_hosts: float
    """Bytes/s of one GPU, one way: its share of the host's network cards."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device (a TPU 7x chip has two of them)."""

    peak: Peak
    memory: int
    """Bytes of high-bandwidth memory that a program may have, as the chip's compiler or driver tells."""
    bandwidth: float
    """Bytes/s to and from that memory."""
    network: Torus | Switched
