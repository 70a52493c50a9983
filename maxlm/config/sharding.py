"""How one program is laid out over many devices: sizes of the mesh axes, and what the fsdp axis shards."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Positive, Range, config

MESH_AXES = ("data", "fsdp", "stage", "seq", "tensor", "expert")
"""Every mesh axis, slowest network first. `maxlm/sharding.py` says which dims of which array each one cuts."""

AxisSize = Annotated[int, Range(ge=1, also=(-1,), note="-1 takes what remains")]


class Zero(enum.Enum):
    """What the fsdp axis shards (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054)."""

    OPTIMIZER = "optimizer"
    """ZeRO-1: the optimizer state."""
    GRADIENTS = "gradients"
    """ZeRO-2: the optimizer state and the gradients."""
    PARAMETERS = "parameters"
    """ZeRO-3, also called FSDP: the optimizer state, the gradients and the parameters."""


class Context(enum.Enum):
    """How attention sees the keys of a sequence that the seq axis cuts."""

    ALL_GATHER = "all_gather"
    """Every device gathers all keys and values (Llama 3, arXiv:2407.21783, section 3.3.2)."""
    RING = "ring"
    """Keys and values go round the devices (arXiv:2310.01889), which hold a chunk from the front and one from the back
    of each sequence, so that all have the same share of causal work: memory stays flat as sequences and axis grow."""
    ULYSSES = "ulysses"
    """Each device takes some heads of the whole sequence instead of all heads of a part (arXiv:2309.14509)."""


class SlicesAxis(enum.Enum):
    """The mesh axis that crosses the slow network between slices or hosts; all others stay within one."""

    DATA = "data"
    """Sums every gradient over the slices, once a step."""
    STAGE = "stage"
    """Hands a micro-batch's activations to the next slice: less than the gradients where the model is large for its
    batch, and each slice holds its own layers only."""


@config("sharding.", changes=Changes.TRAINING)
class ShardingConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    One of them may be -1: what remains. `data` is that one by default, and is 1 when another axis claims it.
    """

    data: AxisSize = -1
    """Copies of the model, each with a part of the batch."""
    fsdp: AxisSize = 1
    """Part of the batch, and a shard of what `zero` names."""
    stage: AxisSize = 1
    """Pipeline stages, each with a part of the layers; `train.micro_batches` flow through them."""
    seq: AxisSize = 1
    """Part of every sequence (context parallelism)."""
    tensor: AxisSize = 1
    """Part of the heads, of d_ff and of the vocabulary (Megatron, arXiv:1909.08053)."""
    expert: AxisSize = 1
    """Part of the experts (GShard, arXiv:2006.16668); everywhere else part of the batch, as `data`."""
    context: Context = Context.ALL_GATHER
    """How attention sees keys on other devices of the seq axis: gather all, pass them round, or exchange heads."""
    virtual_stages: Positive[int] = 1
    """Groups of layers on each stage. 1 is GPipe (arXiv:1811.06965); more is the circular, or interleaved, schedule,
    whose bubble is that many times smaller (Narayanan et al. 2021, arXiv:2104.04473)."""
    remat_stages: bool = True
    """Keep only a stage's input of each micro-batch for the backward pass, and run the stage again there;
    `execution.remat` then rules what that second run keeps."""
    zero: Zero = Zero.PARAMETERS
    """What the fsdp axis shards: the optimizer state (ZeRO-1), gradients too (ZeRO-2), or parameters too (ZeRO-3)."""
    sequence_parallel: bool = False
    """Shard the residual stream between blocks over `tensor` too (Korthikanti et al. 2022, arXiv:2205.05198)."""
    slices: Positive[int] = 1
    """TPU slices, or hosts of GPUs, joined by the slow network; the axis below must be a multiple of it."""
    slices_axis: SlicesAxis = SlicesAxis.DATA
    """The axis that crosses the slow network; the others stay within a slice."""
    float32_gradients: bool = False
    """Sum gradients over devices in float32 even where the computation runs in bfloat16 (twice the traffic)."""

    def __post_init__(self) -> None:
        free = [axis for axis in MESH_AXES if getattr(self, axis) == -1 and axis != "data"]
        if len(free) > 1:
            raise UserError(
                f"sharding.{free[0]} and sharding.{free[1]} are both -1; at most one axis takes what remains"
            )

    def with_sizes(self, sizes: Mapping[str, Any]) -> ShardingConfig:
        """The same with these sizes of mesh axes."""
        return replace(self, **{axis: size for axis, size in sizes.items() if axis in MESH_AXES})

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
            needed, remedy = f"{fixed} devices", f"use sizes whose product is {n_devices}"
            if free:
                divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
                needed, remedy = f"a multiple of {fixed} devices", f"use sizes whose product is one of {divisors}"
            elif n_devices % fixed == 0:
                remedy = "set one axis to -1 to take what remains"
            raise UserError(f"sharding: {listed} needs {needed}, there are {n_devices}; {remedy}")
        for axis in free:
            sizes[axis] = n_devices // fixed
        return sizes

    def for_decoding(self, n_devices: int, d_model: int) -> ShardingConfig:
        """The same devices for decoding, with no -1; `maxlm.sharding.decoding_layout` says what becomes of each axis.

        Raises:
            UserError: as `sizes`.
        """
        sizes = self.sizes(n_devices)
        stages, home = sizes["stage"], "data" if d_model % (sizes["fsdp"] * sizes["stage"]) else "fsdp"
        for axis, other in (("seq", "data"), ("stage", home)):
            sizes[other], sizes[axis] = sizes[other] * sizes[axis], 1
        return replace(
            self.with_sizes(sizes),
            context=Context.ALL_GATHER,
            virtual_stages=1,
            sequence_parallel=False,
            zero=Zero.PARAMETERS if stages > 1 else self.zero,
        )


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


def pipeline_ticks(stages: int, virtual_stages: int, micro_batches: int) -> int:
    """Turns that a pipeline takes forward: S - 1 more than its busiest stage works, whole rounds of S micro-batches."""
    return -(-micro_batches // stages) * stages * virtual_stages + stages - 1


def pipeline_bubble(stages: int, virtual_stages: int, micro_batches: int) -> float:
    """Share of its time that a stage idles, 0..1: (S - 1) / (V M + S - 1) where S divides M.

    GPipe's (K - 1) / (K - 1 + M) (arXiv:1811.06965, section 2.3) with K = S and V = 1; arXiv:2104.04473, section 2.2.
    """
    return 1 - micro_batches * virtual_stages / pipeline_ticks(stages, virtual_stages, micro_batches)
