"""Stages past one machine, by datatrove's executors: SLURM arrays, a Ray cluster, or its processes on this machine.

A task is a process of the same worker as on this machine, so the folder of the job must be one that all machines see.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from maxlm.config import UserError
from maxlm.config.cleaning.engines import CleaningEngine, SlurmArrays
from maxlm.config.errors import MachineFailure, pip_install
from maxlm.data.claimed import write_json
from maxlm.data.cleaning.cleaning_work import CleaningWork
from maxlm.data.cleaning.local_pool import OK, ONE_THREAD, worker_command

_LOGS = "logs"
JOBS = "work/slurm.json"
"""Numbers of the arrays that were handed to SLURM."""


@dataclass(frozen=True)
class ClusterTask:
    """A stage as datatrove calls it: its rank is the task's number."""

    out: str
    stage: int

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Any]:
        """Do the task in a process of its own.

        Raises:
            MachineFailure: it failed; datatrove writes that into its log, and does not mark the task as done.
        """
        done = subprocess.run(
            worker_command(Path(self.out)),
            input=f"{self.stage} {rank}\n",
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
            check=False,
        )
        answer = done.stdout.strip()
        if answer != OK:
            reason = json.loads(answer) if answer else f"exit code {done.returncode}"
            raise MachineFailure(f"task {rank} of stage {self.stage} failed: {reason}")
        return iter(())


def run_on_cluster(work: CleaningWork, engine: CleaningEngine, workers: int, slurm: SlurmArrays) -> None:
    """Do all stages that are not done; to SLURM they are handed, and nobody waits for them.

    Args:
        work: of the job.
        engine: not `LOCAL`.
        workers: processes of this machine, for `DATATROVE`.
        slurm: what is asked for, for `SLURM`.

    Raises:
        UserError: datatrove or Ray is not installed.
        MachineFailure: a task failed.
    """
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

        if engine is CleaningEngine.RAY:
            import ray  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--engine {engine.value} needs the package {error.name}; install it with: {pip_install('maxlm[cluster]')}"
        ) from error
    jobs_file = work.out / JOBS
    if engine is CleaningEngine.SLURM and jobs_file.exists() and (left := _in_queue(json.loads(jobs_file.read_text()))):
        print(f"{work.out}: {left} of its jobs are in SLURM's queue; the same command says later what became of them")
        return
    arrays: list[Any] = []
    for number, stage in enumerate(work.stages):
        if len(work.done(stage)) == stage.tasks:
            continue
        task = ClusterTask(str(work.out.resolve()), number)
        logs = str(work.out.resolve() / _LOGS / stage.name)
        # What is done says maxlm alone: datatrove's own marks would outlive a folder that is begun again.
        common: dict[str, Any] = {"pipeline": [task], "logging_dir": logs, "skip_completed": False}
        match engine:
            case CleaningEngine.DATATROVE:
                LocalPipelineExecutor(**common, tasks=stage.tasks, workers=workers).run()
            case CleaningEngine.RAY:
                RayPipelineExecutor(**common, tasks=stage.tasks).run()
            case CleaningEngine.SLURM:
                executor = SlurmPipelineExecutor(
                    **common,
                    tasks=stage.tasks,
                    time=slurm.time,
                    partition=slurm.partition,
                    mem_per_cpu_gb=slurm.memory_gb,
                    workers=slurm.tasks_at_once or -1,
                    qos=slurm.qos,
                    job_name=f"maxlm-{stage.name}",
                    slurm_logs_folder=f"{logs}/slurm",
                    depends=arrays[-1] if arrays else None,
                )
                arrays.append(executor)
                continue
            case CleaningEngine.LOCAL:
                raise ValueError("the machine's own processes are run_locally's")
            case _:
                assert_never(engine)
        if left := stage.tasks - len(work.done(stage)):
            raise MachineFailure(
                f"{left} of {stage.tasks} tasks of {stage.name} failed; see {logs}, mend that, and run the same "
                "command again to go on"
            )
    if arrays:
        arrays[-1].run()
        write_json(jobs_file, [one.job_id for one in arrays])
        print(
            f"{work.out}: {len(arrays)} arrays of jobs are in SLURM's queue; the same command says later what became "
            "of them"
        )


def _in_queue(jobs: list[str]) -> int:
    """How many of the jobs, and of the tasks of arrays, wait or run."""
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"]
    return len(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())
