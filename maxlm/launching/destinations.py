"""Where a run can be started: what each kind of machine or cluster wants to be told."""

from __future__ import annotations

import re

from maxlm.config import UserError
from maxlm.config.fields import Positive, config, shown
from maxlm.launching.tpu_slices import GENERATIONS, TpuSlice, tpu_slice

SHARED = "/shared"
"""Where containers and rented machines see the storage that all of them share and that outlives them."""


@config("--")
class Local:
    """This machine."""

    devices: Positive[int] | None = None
    """Devices that jax finds here, if the mesh is to be checked before anything starts."""


@config("--")
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


@config("--")
class TpuPod:
    """All hosts of one or more TPU slices, through gcloud, from any machine."""

    name: str
    """Of the queued resource; it is made if it is not there."""
    zone: str
    """Such as us-east5-a."""
    accelerator: str
    """Such as v5p-128, v5e-64 or v6e-256."""
    slices: Positive[int] = 1
    """Slices of that size, joined by the data centre's network."""
    spot: bool = False
    """Rent slices that may be taken away at any time."""
    repo: str
    """Git address of this repository, which every host clones."""
    folder: str = "maxlm"
    """The clone's folder on the hosts, below the home folder."""
    python: str = "python3"
    """Python 3.11 or newer on the hosts, to make the environment with; TPU VMs come with 3.10."""
    restarts: Positive[int] = 100
    """Times that a run which was preempted is continued."""

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _name("--zone", self.zone)
        if self.slice.generation.runtime is None:
            raise UserError(f"--accelerator {self.accelerator} is rented through GKE alone; use --target gke")
        for key in ("repo", "folder", "python"):
            _no_control_characters(f"--{key}", getattr(self, key))

    @property
    def slice(self) -> TpuSlice:
        return tpu_slice(self.accelerator)


@config("--")
class Gke:
    """TPU slices of Google Kubernetes Engine, as a JobSet."""

    name: str
    """Of the JobSet."""
    accelerator: str
    """Such as v5p-128, v6e-256 or 7x-128."""
    topology: str | None = None
    """Such as 4x4x12, where the usual shape of that size is not the one wanted."""
    slices: Positive[int] = 1
    """Slices of that size, joined by the data centre's network; each is a node pool."""
    image: str
    """Container image with this repository in its working folder and its packages installed."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) of the data and the run folders; containers see it as /shared."""
    spot: bool = False
    """Use spot nodes."""
    restarts: Positive[int] = 10
    """Failures after which the whole set starts again; those that a preemption caused do not count."""

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _name("--claim", self.claim)
        _matches("--image", self.image, r"[\w.:/@-]+", "registry/name:tag")

    @property
    def slice(self) -> TpuSlice:
        return tpu_slice(self.accelerator, self.topology)


@config("--")
class Slurm:
    """GPU nodes under Slurm: one process a node."""

    nodes: Positive[int]
    """Nodes of the job; each is one process."""
    gpus_per_node: Positive[int] = 8
    """GPUs of a node."""
    name: str = "maxlm"
    """Of the job."""
    time: str | None = None
    """Limit of one turn in the queue, such as 24:00:00; the job goes back to the queue when it is over."""
    partition: str | None = None
    """As Slurm knows it; None: its default."""
    account: str | None = None
    """That pays, as Slurm knows it; None: its default."""

    def __post_init__(self) -> None:
        _words_of_slurm(self)


@config("--")
class SlurmClean:
    """CPU nodes under Slurm that clean text: what follows are the options of `python -m maxlm.data clean`."""

    name: str = "maxlm-clean"
    """Of the job that hands in the others."""
    time: str | None = None
    """Its limit, such as 2-00:00:00, in which all the others run; None: the partition's."""
    partition: str | None = None
    """Its own, as Slurm knows it (--slurm.partition is that of the others); None: its default."""
    account: str | None = None
    """That pays for it, as Slurm knows it; None: its default."""

    def __post_init__(self) -> None:
        _words_of_slurm(self)


@config("--")
class SkyPilot:
    """GPU nodes or one TPU slice, on whatever cloud SkyPilot finds them, as a managed job."""

    name: str = "maxlm"
    """Of the job."""
    accelerator: str
    """GPUs of a node, such as H100:8, or a TPU slice, such as v6e-16."""
    nodes: Positive[int] = 1
    """Nodes with those GPUs."""
    bucket: str
    """Bucket of the data and the run folders, such as gs://mine; nodes see it as /shared."""
    spot: bool = False
    """Use spot machines."""

    def __post_init__(self) -> None:
        _name("--name", self.name)
        _matches(
            "--bucket", self.bucket, r"[a-z0-9]+://[\w./-]+", "a store and a bucket, such as gs://mine or s3://mine"
        )
        tpu = any(self.accelerator.startswith(f"{name}-") for generation in GENERATIONS for name in generation.names)
        if not tpu and not self.gpus_per_node:
            form = "a node's GPUs, such as H100:8, or a TPU slice, such as v6e-16"
            raise UserError(f"--accelerator {shown(self.accelerator)} must be {form}")
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


Destination = Local | TpuVm | TpuPod | Gke | Slurm | SlurmClean | SkyPilot

DESTINATIONS: dict[str, type[Destination]] = {
    "local": Local,
    "tpu-vm": TpuVm,
    "tpu-pod": TpuPod,
    "gke": Gke,
    "slurm": Slurm,
    "slurm-clean": SlurmClean,
    "skypilot": SkyPilot,
}
"""What `--target` may say."""


def _words_of_slurm(job: Slurm | SlurmClean) -> None:
    _name("--name", job.name)
    if job.time is not None:
        _matches("--time", job.time, r"[\d:-]+", "days-hours:minutes:seconds")
    for key in ("partition", "account"):
        if getattr(job, key) is not None:
            _matches(f"--{key}", getattr(job, key), r"[\w.,-]+", "a name as Slurm knows it")


def _name(key: str, value: str) -> None:
    _matches(key, value, r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "lower-case letters, digits and hyphens, at most 40")


def _matches(key: str, value: str, pattern: str, form: str) -> None:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise UserError(f"{key} {shown(value)} must be {form}")


def _no_control_characters(key: str, value: str) -> None:
    if not value.isprintable():
        raise UserError(f"{key} {shown(value)} has a line break or another control character; leave it out")
