"""Where a run is launched, and how many devices it finds there.

Names, shapes and machine types of TPUs are those of Google Cloud's documentation (docs.cloud.google.com/tpu/docs and
.../kubernetes-engine/docs/concepts/plan-tpus).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from maxlm.config.errors import UserError, require_positive

SHARED = "/shared"
"""Where containers and rented machines see the storage that all of them share and that outlives them."""


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
        raise UserError(f"--accelerator {accelerator!r} is not a TPU that is known here; 8 chips are {examples}")
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
                f"--topology {topology!r} must be {form} with a product of {count // per_chip} chips for "
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


@dataclass(frozen=True, kw_only=True)
class Local:
    """This machine."""

    devices: int | None = None
    """Devices that jax finds here, if the mesh is to be checked before anything starts."""

    def __post_init__(self) -> None:
        _positive(self, "devices")


@dataclass(frozen=True, kw_only=True)
class TpuVm:
    """A TPU VM, from a shell on it: one host, the whole slice."""

    accelerator: str
    """Such as v6e-8 or v5p-8."""
    python: str = "python3"
    """Python 3.11 or newer, to make the environment with; TPU VMs come with 3.10."""

    def __post_init__(self) -> None:
        if self.slice.hosts > 1:
            raise UserError(
                f"--accelerator {self.accelerator} has {self.slice.hosts} hosts, and this target is one host; use "
                "--target tpu-pod"
            )
        _no_control_characters("--python", self.python)

    @property
    def slice(self) -> TpuSlice:
        return tpu_slice(self.accelerator)


@dataclass(frozen=True, kw_only=True)
class TpuPod:
    """All hosts of one or more TPU slices, through gcloud, from any machine."""

    name: str
    """Of the queued resource; it is made if it is not there."""
    zone: str
    """Such as us-east5-a."""
    accelerator: str
    """Such as v5p-128, v5e-64 or v6e-256."""
    slices: int = 1
    """Slices of that size, joined by the data centre's network."""
    spot: bool = False
    """Rent slices that may be taken away at any time."""
    repo: str
    """Git address of this repository, which every host clones."""
    folder: str = "maxlm"
    """The clone's folder on the hosts, below the home folder."""
    python: str = "python3"
    """Python 3.11 or newer on the hosts, to make the environment with; TPU VMs come with 3.10."""
    restarts: int = 100
    """Times that a run which was preempted is continued."""

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _name("--zone", self.zone)
        _positive(self, "slices", "restarts")
        if self.slice.generation.runtime is None:
            raise UserError(f"--accelerator {self.accelerator} is rented through GKE alone; use --target gke")
        for key in ("repo", "folder", "python"):
            _no_control_characters(f"--{key}", getattr(self, key))

    @property
    def slice(self) -> TpuSlice:
        return tpu_slice(self.accelerator)


@dataclass(frozen=True, kw_only=True)
class Gke:
    """TPU slices of Google Kubernetes Engine, as a JobSet."""

    name: str
    """Of the JobSet."""
    accelerator: str
    """Such as v5p-128, v6e-256 or 7x-128."""
    topology: str | None = None
    """Such as 4x4x12, where the usual shape of that size is not the one wanted."""
    slices: int = 1
    """Slices of that size, joined by the data centre's network; each is a node pool."""
    image: str
    """Container image with this repository in its working folder and its packages installed."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) of the data and the run folders; containers see it as /shared."""
    spot: bool = False
    """Use spot nodes."""
    restarts: int = 10
    """Failures after which the whole set starts again; those that a preemption caused do not count."""

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _name("--claim", self.claim)
        _positive(self, "slices", "restarts")
        _matches("--image", self.image, r"[\w.:/@-]+", "registry/name:tag")

    @property
    def slice(self) -> TpuSlice:
        return tpu_slice(self.accelerator, self.topology)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """GPU nodes under Slurm: one process a node."""

    nodes: int
    gpus_per_node: int = 8
    name: str = "maxlm"
    """Of the job."""
    time: str | None = None
    """Limit of one turn in the queue, such as 24:00:00; the job goes back to the queue when it is over."""
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _positive(self, "nodes", "gpus_per_node")
        if self.time is not None:
            _matches("--time", self.time, r"[\d:-]+", "days-hours:minutes:seconds")
        for key in ("partition", "account"):
            if getattr(self, key) is not None:
                _matches(f"--{key}", getattr(self, key), r"[\w.,-]+", "a name as Slurm knows it")


@dataclass(frozen=True, kw_only=True)
class SkyPilot:
    """GPU nodes or one TPU slice, on whatever cloud SkyPilot finds them, as a managed job."""

    name: str = "maxlm"
    """Of the job."""
    accelerator: str
    """GPUs of a node, such as H100:8, or a TPU slice, such as v6e-16."""
    nodes: int = 1
    """Nodes with those GPUs."""
    bucket: str
    """Bucket of the data and the run folders, such as gs://mine; nodes see it as /shared."""
    spot: bool = False
    """Use spot machines."""

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _positive(self, "nodes")
        _matches("--bucket", self.bucket, r"[a-z0-9]+://[\w./-]+", "such as gs://mine or s3://mine")
        tpu = any(self.accelerator.startswith(f"{name}-") for generation in GENERATIONS for name in generation.names)
        if not tpu and not self.gpus_per_node:
            form = "a node's GPUs, such as H100:8, or a TPU slice, such as v6e-16"
            raise UserError(f"--accelerator {self.accelerator!r} must be {form}")
        if self.slice is not None and self.nodes > 1:
            raise UserError(
                f"--nodes {self.nodes}: SkyPilot rents one TPU slice a job; use a larger one, or --target gke"
            )

    @property
    def slice(self) -> TpuSlice | None:
        """None for GPUs."""
        return None if self.gpus_per_node else tpu_slice(self.accelerator)

    @property
    def gpus_per_node(self) -> int:
        """0 for a TPU."""
        found = re.fullmatch(r"[\w.-]+:([1-9]\d*)", self.accelerator)
        return int(found.group(1)) if found else 0


Target = Local | TpuVm | TpuPod | Gke | Slurm | SkyPilot

TARGETS: dict[str, type[Target]] = {
    "local": Local,
    "tpu-vm": TpuVm,
    "tpu-pod": TpuPod,
    "gke": Gke,
    "slurm": Slurm,
    "skypilot": SkyPilot,
}
"""What `--target` may say."""


def _name(key: str, value: str) -> None:
    _matches(key, value, r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "lower-case letters, digits and hyphens, at most 40")


def _matches(key: str, value: str, pattern: str, form: str) -> None:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise UserError(f"{key} {value!r} must be {form}")


def _positive(target: Target, *keys: str) -> None:
    for key in keys:
        if getattr(target, key) is not None:
            require_positive(f"--{key}", getattr(target, key))


def _no_control_characters(key: str, value: str) -> None:
    if not value.isprintable():
        raise UserError(f"{key} {value!r} has a line break or another control character; leave it out")
