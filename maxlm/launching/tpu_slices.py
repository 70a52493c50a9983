"""The TPU slices that can be rented: sizes, shapes and the names that clouds have for them.

Names, shapes and machine types are those of Google Cloud's documentation (docs.cloud.google.com/tpu/docs and
.../kubernetes-engine/docs/concepts/plan-tpus).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from maxlm.config import UserError
from maxlm.config.fields import shown


@dataclass(frozen=True, kw_only=True)
class TpuGeneration:
    """One kind of TPU chip."""

    names: tuple[str, ...]
    """What stands before the number in an accelerator's name."""
    counted_per_chip: int
    """2 where that number counts TensorCores, 1 where it counts chips."""
    devices_per_chip: int
    """That jax shows."""
    torus: int
    """Axes of the network between the chips."""
    gke: str
    """Label cloud.google.com/gke-tpu-accelerator of its nodes."""
    machine: str
    """GKE machine type, less the number of chips."""
    runtime: str | None
    """Image of its TPU VMs; None: it is rented through GKE alone."""


GENERATIONS = (
    TpuGeneration(names=("v4",), counted_per_chip=2, devices_per_chip=1, torus=3,
                  gke="tpu-v4-podslice", machine="ct4p-hightpu", runtime="tpu-ubuntu2204-base"),
    TpuGeneration(names=("v5p",), counted_per_chip=2, devices_per_chip=1, torus=3,
                  gke="tpu-v5p-slice", machine="ct5p-hightpu", runtime="v2-alpha-tpuv5"),
    TpuGeneration(names=("v5litepod", "v5e"), counted_per_chip=1, devices_per_chip=1, torus=2,
                  gke="tpu-v5-lite-podslice", machine="ct5lp-hightpu", runtime="v2-alpha-tpuv5-lite"),
    TpuGeneration(names=("v6e",), counted_per_chip=1, devices_per_chip=1, torus=2,
                  gke="tpu-v6e-slice", machine="ct6e-standard", runtime="v2-alpha-tpuv6e"),
    TpuGeneration(names=("tpu7x", "7x"), counted_per_chip=2, devices_per_chip=2, torus=3,
                  gke="tpu7x", machine="tpu7x-standard", runtime=None),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TpuSlice:
    """Chips that one network of their own joins."""

    generation: TpuGeneration
    name: str
    """As gcloud writes it, such as v5litepod-16."""
    topology: tuple[int, ...]
    hosts: int

    @property
    def chips(self) -> int:
        return math.prod(self.topology)

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def devices(self) -> int:
        """That jax shows on all hosts together."""
        return self.chips * self.generation.devices_per_chip

    @property
    def machine(self) -> str:
        """GKE machine type of its nodes."""
        return f"{self.generation.machine}-{self.chips_per_host}t"


def tpu_slice(accelerator: str, topology: str | None = None) -> TpuSlice:
    """The slice that an accelerator's name stands for, such as v5p-128 (64 chips) or v5e-16 (16 chips).

    Raises:
        UserError: no such generation, a size it does not come in, or a topology of another size.
    """
    prefix, _, number = accelerator.rpartition("-")
    generation = next((g for g in GENERATIONS if prefix in g.names), None)
    if generation is None or not number.isdecimal():
        examples = ", ".join(f"{g.names[-1]}-{8 * g.counted_per_chip}" for g in GENERATIONS)
        raise UserError(f"--accelerator {shown(accelerator)} is not a TPU that is known here; 8 chips are {examples}")
    count, per_chip = int(number), generation.counted_per_chip
    if topology is None:
        shape = _usual_topology(generation, count // per_chip)
        if shape is None or count % per_chip:
            raise UserError(f"--accelerator {accelerator}: {_sizes(generation)}")
    else:
        shape = tuple(int(size) for size in topology.split("x")) if re.fullmatch(r"\d+(x\d+)+", topology) else ()
        if len(shape) != generation.torus or math.prod(shape) * per_chip != count:
            form = "x".join("ABC"[: generation.torus])
            raise UserError(
                f"--topology {shown(topology)} must be {form} with a product of {count // per_chip} chips for "
                f"--accelerator {accelerator}"
            )
    chips = math.prod(shape)
    hosts = 1 if generation.torus == 2 and chips <= 8 else max(1, chips // 4)
    return TpuSlice(generation=generation, name=f"{generation.names[0]}-{count}", topology=shape, hosts=hosts)


def _usual_topology(generation: TpuGeneration, chips: int) -> tuple[int, ...] | None:
    """The shape nearest to a cube or square, for powers of two; None if there is no such slice."""
    if generation.torus == 2:
        sides = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
        return sides.get(chips)
    if chips < 4 or chips.bit_count() != 1:
        return None
    doublings = chips.bit_length() - 1
    return (2, 2, 1) if chips == 4 else tuple(2 ** ((doublings + i) // 3) for i in range(3))


def _sizes(generation: TpuGeneration) -> str:
    name, per_chip = generation.names[-1], generation.counted_per_chip
    if generation.torus == 2:
        return f"{name} comes as {', '.join(f'{name}-{n}' for n in (1, 4, 8, 16, 32, 64, 128, 256))}"
    works = ", ".join(f"{name}-{chips * per_chip}" for chips in (4, 8, 16, 32, 64, 128))
    return f"use {works}, ... (the number counts TensorCores, two a chip), or --target gke with --topology AxBxC"
