"""One launch: where, with which arguments, and whether the run fits there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from maxlm.config import RunConfig, UserError
from maxlm.launching.destinations import SHARED, Destination, Gke, Local, SkyPilot, Slurm, SlurmClean, TpuPod, TpuVm
from maxlm.launching.tpu_slices import TpuSlice


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What was asked: where, and with which arguments of `maxlm.train`."""

    target: Destination
    config: RunConfig | None
    """None: nothing is trained, as `SlurmClean` says."""
    arguments: tuple[str, ...]
    """CONFIG and the overrides, or the options of a cleaning, as they were typed."""

    @property
    def command(self) -> list[str]:
        """What every target ends in."""
        if self.config is None:
            return ["python", "-m", "maxlm.data", "clean", *self.arguments]
        config, *overrides = self.arguments
        return ["python", "-m", "maxlm.train", "--config", config, *overrides]


@dataclass(frozen=True)
class Devices:
    """What the run finds at its target."""

    count: int
    groups: int
    """TPU slices, or hosts of GPUs: what `sharding.slices` may say."""
    hosts: int
    words: str


def devices(target: Destination) -> Devices | None:
    """The devices of a target; None if nobody said how many this machine has, or none are needed."""
    match target:
        case Local():
            count = target.devices
            return None if count is None else Devices(count, 1, 1, f"{count} devices of this machine")
        case SlurmClean():
            return None
        case TpuVm():
            return _tpu_devices(target.slice, 1)
        case TpuPod() | Gke():
            return _tpu_devices(target.slice, target.slices)
        case SkyPilot() if target.slice is not None:
            return _tpu_devices(target.slice, 1)
        case Slurm() | SkyPilot():
            count = target.nodes * target.gpus_per_node
            words = f"{count} GPUs: {target.nodes} x {target.gpus_per_node}"
            return Devices(count, target.nodes, target.nodes, words)
    assert_never(target)


def _tpu_devices(part: TpuSlice, slices: int) -> Devices:
    shape = "x".join(map(str, part.topology))
    words = (
        f"{part.devices * slices} devices: {slices} x {part.name}, {shape} chips on {part.hosts} hosts of "
        f"{part.chips_per_host}"
    )
    return Devices(part.devices * slices, slices, part.hosts * slices, words)


def check(launch: Launch) -> None:
    """Everything that can be known before a machine is rented.

    Raises:
        UserError: the mesh does not fit the devices, or files would be written where they are lost.
    """
    found, target, config = devices(launch.target), launch.target, launch.config
    for word in launch.arguments:
        if not word.isprintable():
            raise UserError(f"{word!r} has a line break or another control character; leave it out")
    if found is None or config is None:
        return
    config.validate(found.count)
    slices = config.sharding.slices
    crosses = isinstance(target, Gke | TpuPod)
    if slices != found.groups and (crosses or slices != 1):
        raise UserError(
            f"sharding.slices = {slices}, but these are {found.groups} "
            f"{'TPU slice(s)' if isinstance(target, Gke | TpuPod | TpuVm) else 'host(s)'}; "
            f"add --sharding.slices={found.groups}"
        )
    match target:
        case Gke(claim=storage) | SkyPilot(bucket=storage):
            folder = SHARED + "/"
            why = f"only {SHARED}, where the machines see {storage}, outlives them"
        case TpuPod() if found.hosts > 1:
            folder, why = "/", "all hosts must see the same folder, a mounted bucket or file system"
        case Local() | TpuVm() | TpuPod() | Slurm() | SlurmClean():
            return
        case _:
            assert_never(target)
    paths = {"run_dir": config.run_dir} | {
        f"data.datasets.{i}.path": dataset.path for i, dataset in enumerate(config.data.datasets)
    }
    wrong = [
        f"{key} = {path}: {why}; use --{key}={folder if len(folder) > 1 else '/MOUNTED/'}{path.lstrip('/')}"
        for key, path in paths.items()
        if not path.startswith(folder)
    ]
    if wrong:
        raise UserError("\n".join(wrong))
