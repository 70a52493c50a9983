"""What each chip can do: FLOP/s, memory and links of one JAX device, with the source of every figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.config import Dtype


@dataclass(frozen=True)
class Peak:
    """Dense (never sparse) matrix FLOP/s of one JAX device, in units of 1e12."""

    bfloat16: float | None
    """None: the device has no bfloat16 matrix unit."""
    float32: float
    """As JAX multiplies float32 at its default precision: one bfloat16 pass on TPUs, TF32 on NVIDIA since Ampere."""
    int8: float | None = None
    """Integer operations; None, here and below: the data sheet has no figure."""
    float8: float | None = None
    float16: float | None = None
    """None: the device has no float16 matrix unit, as no TPU has."""

    def of(self, dtype: Dtype) -> float | None:
        """FLOP/s; None: the device has no such matrix unit."""
        match dtype:
            case Dtype.BFLOAT16:
                return None if self.bfloat16 is None else self.bfloat16 * 1e12
            case Dtype.FLOAT16:
                return None if self.float16 is None else self.float16 * 1e12
            case Dtype.FLOAT32:
                return self.float32 * 1e12


def _nvidia(bfloat16: float, float32: float, **others: float) -> Peak:
    """Since Ampere NVIDIA's float16 is as fast as its bfloat16."""
    return Peak(bfloat16, float32, float16=bfloat16, **others)


@dataclass(frozen=True, kw_only=True)
class Torus:
    """TPUs of a slice, each joined to its neighbours."""

    dims: int
    """2 or 3."""
    link: float
    """Bytes/s of one device over one link, one way; a chip has two links along each dim that is longer than 2."""
    ring: int
    """A dim closes to a ring if its length is a multiple of this; the others have two ends."""
    largest: int
    """Chips of the largest machine; in 2 dims no side is longer than a ring."""
    between_slices: float
    """Bytes/s of one device over the data centre's network, one way."""
    devices_per_chip: int = 1
    """That JAX shows; they share the chip's memory, links and network, and every figure here is one device's share."""


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
    """Bytes of high-bandwidth memory: of a TPU, what its compiler gives to a program, a little less than the data
    sheet's; of a GPU, what its driver tells."""
    bandwidth: float
    """Bytes/s to and from that memory."""
    network: Torus | Switched


_GIB = 2**30

# DGX and HGX boards, which have eight GPUs around a switch. NVLink: 12 links of 25 GB/s (A100), 18 of 25 (H100, H200)
# and 18 of 50 (B200), one way. Network: a card of 200 Gbit/s (DGX A100 user guide) or 400 (DGX H100, H200 and B200) for
# each GPU. A rented machine may have less: that is its provider's to say.
_A100_BOARD = Switched(within_host=300e9, per_host=8, between_hosts=25e9)
_HOPPER_BOARD = Switched(within_host=450e9, per_host=8, between_hosts=50e9)
_B200_BOARD = Switched(within_host=900e9, per_host=8, between_hosts=50e9)

# A workstation: GPUs on PCIe 4.0 or 5.0 x16 (31.5 and 63 GB/s, one way, by the standard), from one to the other through
# the host's memory; and a network of 10 Gbit/s. Yours may differ.
_PCIE_4 = Switched(within_host=31.5e9, per_host=8, between_hosts=1.25e9)
_PCIE_5 = Switched(within_host=63e9, per_host=8, between_hosts=1.25e9)

_A100 = _nvidia(312, 156, int8=624)  # A100 datasheet
_HOPPER = _nvidia(989.4, 494.7, int8=1978.9, float8=1978.9)  # H100, H200 and GH200 datasheets, SXM
_A10G = _nvidia(70, 35)  # Amazon's variant of the A10 with fewer units in use (EC2 G5 documentation)
_L4 = _nvidia(121, 60)  # L4 datasheet
# GA102 whitepaper; Ada whitepaper; RTX Blackwell whitepaper; float32 accumulation.
_RTX_3090, _RTX_4090, _RTX_5090 = _nvidia(71, 35.6), _nvidia(165.2, 82.6), _nvidia(209.5, 104.8)
_HOPPER_NVL = _nvidia(835.5, 417.5, int8=1670.5, float8=1670.5)

# TPU: peaks, bandwidth of the memory, largest slices and the network's share of a chip from the chip's page under
# docs.cloud.google.com/tpu/docs; `memory` from the message of the chip's compiler (the least of libtpu 0.0.42 and
# 0.0.50) about a program that does not fit; `link` and `ring` from "How to Scale Your Model", chapter 2
# (jax-ml.github.io/scaling-book/tpus), whose links are a tenth slower than those of Google's pages (their
# "bidirectional bandwidth per chip", by links and by 2).
# NVIDIA: peaks from datasheets, which print figures "with sparsity", twice the dense ones given here; memory and its
# bandwidth as the driver tells them, listed in XLA's sources (xla/backends/gpu/target_config/specs).
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(  # two cores, which JAX shows as one device
        peak=Peak(275, 275, int8=275),
        memory=int(30.75 * _GIB),
        bandwidth=1200e9,
        # No page tells the network's share of a v4; the book takes that of v5p.
        network=Torus(dims=3, link=45e9, ring=4, largest=4096, between_slices=6.25e9),
    ),
    "v5e": Chip(
        peak=Peak(197, 197, int8=393),
        memory=int(15.75 * _GIB),
        bandwidth=819e9,
        # Hosts of 8 chips with two cards of 100 Gbit/s.
        network=Torus(dims=2, link=45e9, ring=16, largest=256, between_slices=3.125e9),
    ),
    "v5p": Chip(
        peak=Peak(459, 459, int8=918, float8=459),  # int8: the book
        memory=int(95.73 * _GIB),
        bandwidth=2765e9,
        # Of a machine of 8960 chips one job may have 6144; the compiler takes all of them.
        network=Torus(dims=3, link=90e9, ring=4, largest=8960, between_slices=6.25e9),
    ),
    "v6e": Chip(
        peak=Peak(918, 918, int8=1836, float8=918),
        memory=int(31.24 * _GIB),
        bandwidth=1638e9,
        network=Torus(dims=2, link=90e9, ring=16, largest=256, between_slices=12.5e9),
    ),
    "7x": Chip(  # a chip: 2307, of float8 4614; 7380 GB/s; links of 90 GB/s; 100 Gbit/s of network
        peak=Peak(1153.5, 1153.5, float8=2307),
        memory=int(94.74 * _GIB),
        bandwidth=3690e9,
        network=Torus(dims=3, link=45e9, ring=4, largest=9216, between_slices=6.25e9, devices_per_chip=2),
    ),
    "a100": Chip(peak=_A100, memory=85_100_068_864, bandwidth=2.03904e12, network=_A100_BOARD),  # 80 GB
    "h100": Chip(peak=_HOPPER, memory=84_942_979_072, bandwidth=3.35232e12, network=_HOPPER_BOARD),
    # As nvidia-smi shows it, 143,771 MiB; XLA's list has 0.4 % more.
    "h200": Chip(peak=_HOPPER, memory=150_754_820_096, bandwidth=4.8e12, network=_HOPPER_BOARD),
    "b200": Chip(
        peak=_nvidia(2250, 1125, int8=4500, float8=4500),  # HGX B200 datasheet, per GPU
        memory=191_514_411_008,
        bandwidth=7.67232e12,
        network=_B200_BOARD,
    ),
    # Memory and bandwidth by the same sources as the peaks; no compiler is told of these.
    "rtx3090": Chip(peak=_RTX_3090, memory=24 * _GIB, bandwidth=936e9, network=_PCIE_4),
    "rtx4090": Chip(peak=_RTX_4090, memory=24 * _GIB, bandwidth=1008e9, network=_PCIE_4),
    "rtx5090": Chip(peak=_RTX_5090, memory=32 * _GIB, bandwidth=1792e9, network=_PCIE_5),
    "l4": Chip(peak=_L4, memory=24 * _GIB, bandwidth=300e9, network=_PCIE_4),
    "a10g": Chip(peak=_A10G, memory=24 * _GIB, bandwidth=600e9, network=_PCIE_4),
}
"""Chips that can be planned for, by their names in targets."""

# A variant (PCIe, NVL, a MIG slice) has another peak than its namesake, so a device that is not listed is unknown
# rather than guessed.
PEAKS: Mapping[str, Peak] = {
    # TPU v2 and v3 show two JAX devices a chip, as 7x does: half of 45 and of 123.
    "TPU v2": Peak(22.5, 22.5),
    "TPU v3": Peak(61.5, 61.5),
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5e": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v5p": CHIPS["v5p"].peak,
    "TPU v6 lite": CHIPS["v6e"].peak,
    "TPU v6e": CHIPS["v6e"].peak,
    "TPU7x": CHIPS["7x"].peak,
    # NVIDIA Volta and Turing have float16 matrix units only. V100 and T4 datasheets: tensor and single precision.
    "Tesla V100-SXM2-16GB": Peak(None, 15.7, float16=125),
    "Tesla V100-SXM2-32GB": Peak(None, 15.7, float16=125),
    "Tesla V100-PCIE-16GB": Peak(None, 14, float16=112),
    "Tesla V100-PCIE-32GB": Peak(None, 14, float16=112),
    "Tesla T4": Peak(None, 8.1, float16=65),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A10": _nvidia(125, 62.5),  # A10 datasheet
    "NVIDIA A10G": _A10G,
    "NVIDIA GeForce RTX 3090": _RTX_3090,
    "NVIDIA RTX A6000": _nvidia(154.8, 77.4),
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H100 PCIe": _nvidia(756, 378),
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA H200": _HOPPER,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA GH200 480GB": _HOPPER,
    "NVIDIA GH200 120GB": _HOPPER,
    "NVIDIA B200": CHIPS["b200"].peak,
    "NVIDIA GB200": _nvidia(2500, 1250),  # GB200 NVL72 datasheet, per GPU
    "NVIDIA L4": _L4,
    "NVIDIA L40S": _nvidia(362, 183),  # L40S datasheet
    "NVIDIA GeForce RTX 4090": _RTX_4090,
    "NVIDIA GeForce RTX 5090": _RTX_5090,
}
"""By `jax.Device.device_kind`."""
