"""How one program is laid out over many devices: sizes of the mesh axes, and what the fsdp axis shards."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from maxlm.config.errors import UserError

MESH_AXES = ("data", "fsdp", "stage", "seq", "tensor", "expert")
"""Every mesh axis, slowest network first. `maxlm/sharding.py` says which dims of which array each one cuts."""


class Zero(enum.Enum):
    """What the fsdp axis shards (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054)."""

    OPTIMIZER = "optimizer"
    """ZeRO-1: the optimizer state."""
    GRADIENTS = "gradients"
    """ZeRO-2: the optimizer state and the gradients."""
    PARAMETERS = "parameters"
    """ZeRO-3, also called FSDP: the optimizer state, the gradients and the parameters."""


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    One of them may be -1: what remains. `data` is that one by default, and is 1 when another axis claims it.
    """

    data: int = -1
    """Copies of the model, each with a part of the batch."""
    fsdp: int = 1
    """Part of the batch, and a shard of what `zero` names."""
    stage: int = 1
    """Pipeline stages (reserved)."""
    seq: int = 1
    """Part of every sequence (context parallelism)."""
    tensor: int = 1
    """Part of the heads, of d_ff and of the vocabulary (Megatron, arXiv:1909.08053)."""
    expert: int = 1
    """Part of the experts (reserved)."""
    zero: Zero = Zero.PARAMETERS
    sequence_parallel: bool = False
    """Shard the residual stream between blocks over `tensor` too (Korthikanti et al. 2022, arXiv:2205.05198)."""
    slices: int = 1
    """TPU slices or hosts joined by the slow network; the data axis spans them, so it must be a multiple."""
    float32_gradients: bool = False
    """Sum gradients over devices in float32 even where the computation runs in bfloat16 (twice the traffic)."""

    def __post_init__(self) -> None:
        free = [axis for axis in MESH_AXES if getattr(self, axis) == -1 and axis != "data"]
        if len(free) > 1:
            raise UserError(
                f"sharding.{free[0]} and sharding.{free[1]} are both -1; at most one axis takes what remains"
            )
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise UserError(f"sharding.{axis} = {size} must be at least 1, or -1 for what remains")

    def sizes(self, n_devices: int) -> dict[str, int]:
        """Size of every mesh axis on `n_devices` devices, with -1 resolved.

        Raises:
            UserError: the axes' product is not `n_devices`.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) == 2:  # __post_init__ allows this for data and one other
            free.remove("data")
            sizes["data"] = 1
        fixed = math.prod(size for size in sizes.values() if size != -1)
        listed = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "data=1"
        if n_devices % fixed or (not free and fixed != n_devices):
            needed, remedy = f"{fixed} devices", "set one axis to -1 to take what remains"
            if free:
                divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
                needed, remedy = f"a multiple of {fixed} devices", f"use sizes whose product is one of {divisors}"
            raise UserError(f"sharding: {listed} needs {needed}, there are {n_devices}; {remedy}")
        for axis in free:
            sizes[axis] = n_devices // fixed
        return sizes


def dp() -> ShardingConfig:
    """Data parallelism: every device holds the whole model."""
    return ShardingConfig(data=-1)


def fsdp(zero: Zero = Zero.PARAMETERS) -> ShardingConfig:
    """Fully sharded data parallelism over all devices."""
    return ShardingConfig(data=1, fsdp=-1, zero=zero)


def fsdp_tp(tensor: int) -> ShardingConfig:
    """FSDP over all devices that tensor parallelism of the given size leaves."""
    return ShardingConfig(data=1, fsdp=-1, tensor=tensor)


def fsdp_tp_sp(tensor: int) -> ShardingConfig:
    """As fsdp_tp, with the residual stream sharded over the tensor axis between blocks."""
    return ShardingConfig(data=1, fsdp=-1, tensor=tensor, sequence_parallel=True)
