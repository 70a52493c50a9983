"""What runs the tasks of a cleaning job."""

from __future__ import annotations

import enum

from maxlm.config.fields import NotEmpty, Positive, config


class CleaningEngine(enum.Enum):
    """Who starts the processes; the result is the same, byte for byte."""

    LOCAL = "local"
    """Processes of this machine."""
    DATATROVE = "datatrove"
    """datatrove's processes of this machine, to try what SLURM and Ray would do."""
    SLURM = "slurm"
    """Arrays of jobs, one after the other, by datatrove."""
    RAY = "ray"
    """A Ray cluster, by datatrove."""


@config("--slurm.")
class SlurmArrays:
    """What SLURM is asked for, for each task."""

    partition: NotEmpty[str] | None = None
    """As SLURM knows it; needed."""
    time: NotEmpty[str] = "12:00:00"
    """The longest that a task takes."""
    memory_gb: Positive[int] = 4
    """Of a task."""
    tasks_at_once: Positive[int] | None = None
    """Of an array; None: as many as there is room for."""
    qos: str = ""
    """As SLURM knows it; empty: its default."""
    account: NotEmpty[str] | None = None
    """That pays, as SLURM knows it; None: its default."""
    wait: bool = False
    """Stay until all is done, and hand in again what failed."""
    tries: Positive[int] = 3
    """Times that jobs are handed in, if they are waited for."""
