"""What the program is compiled for, which need not be what this process runs on."""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections.abc import Iterator
from dataclasses import dataclass

import jax


class Family(enum.Enum):
    """Which of the bodies can be compiled at all."""

    CPU = "cpu"
    TPU = "tpu"
    GPU = "gpu"


HOPPER_SHARED_BYTES = 232_448
"""Shared memory that one block of threads may have."""


@dataclass(frozen=True)
class Target:
    """A chip, by the short name that tuning tables use."""

    name: str
    family: Family
    hopper: bool = False
    """NVIDIA sm_90: has the instructions (wgmma, TMA) that our GPU bodies are made of."""

    @property
    def kernel_bytes(self) -> int:
        """Memory next to the cores that one kernel has: shared memory, or the VMEM that it gets without asking."""
        if self.family is Family.TPU:
            return 2**20 * (32 if self.name in ("tpu_v6e", "tpu_7x") else 16)
        return HOPPER_SHARED_BYTES if self.hopper else 0


# What jax calls the chip -> what we call it. TPU v5e and v5p are "lite" and plain in jax's names, v6e is "lite" too.
_CHIPS = {
    "TPU v4": "tpu_v4",
    "TPU v5 lite": "tpu_v5e",
    "TPU v5e": "tpu_v5e",
    "TPU v5": "tpu_v5p",
    "TPU v5p": "tpu_v5p",
    "TPU v6 lite": "tpu_v6e",
    "TPU v6e": "tpu_v6e",
    "TPU7x": "tpu_7x",
    "TPU v7x": "tpu_7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA GH200": "h200",
    "NVIDIA A100": "a100",
    "NVIDIA B200": "b200",
}


def target_of(device_kind: str, platform: str) -> Target:
    """The target that jax describes by these two words of a device."""
    if platform == "cpu":
        return Target("cpu", Family.CPU)
    matches = [kind for kind in _CHIPS if device_kind.startswith(kind)]
    name = _CHIPS[max(matches, key=len)] if matches else device_kind
    family = Family.TPU if platform == "tpu" or device_kind.startswith("TPU") else Family.GPU
    return Target(name, family, hopper=name in ("h100", "h200"))


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("assumed target", default=None)


@contextlib.contextmanager
def assume(target: Target | None) -> Iterator[None]:
    """Decide for this target inside the block, whatever the mesh and the devices; None changes nothing."""
    token = _assumed.set(target or _assumed.get())
    try:
        yield
    finally:
        _assumed.reset(token)


def named(name: str) -> Target:
    """The target of a short name, as "tpu_v5p".

    Raises:
        ValueError: no chip of that name is known.
    """
    for kind, chip in _CHIPS.items():
        if chip == name:
            return target_of(kind, "tpu" if chip.startswith("tpu") else "gpu")
    if name == "cpu":
        return target_of("cpu", "cpu")
    raise ValueError(f"target = {name!r} is unknown; use cpu, {', '.join(sorted(set(_CHIPS.values())))}")


def current_target(device: jax.Device | None = None) -> Target:
    """The chip of the mesh in whose context we trace, as inside `shard_map`; without a mesh, jax's default device.

    `device`: one that is there or is compiled for, where the caller knows better.
    """
    if (assumed := _assumed.get()) is not None:
        return assumed
    if device is not None:
        return target_of(device.device_kind, device.platform)
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return target_of(abstract.device_kind, abstract.platform)
    default = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(default, str):  # jax.default_device("cpu")
        default = jax.devices(default)[0]
    return target_of(default.device_kind, default.platform)
