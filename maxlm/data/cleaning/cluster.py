"""Stages past one machine, by datatrove's executors: SLURM arrays, a Ray cluster, or its processes on this machine.

A task is a process of the same worker as on this machine, so the folder of the job must be one that all machines see.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from maxlm.config import UserError
from maxlm.config.cleaning.engines import CleaningEngine, SlurmArrays
from maxlm.config.errors import MachineFailure, pip_install
from maxlm.data.claimed import write_json
from maxlm.data.cleaning.cleaning_work import CleaningWork
from maxlm.data.cleaning.local_pool import OK, worker_command, worker_environment
from maxlm.data.cleaning.stages import CleaningStage

_LOGS = "logs"
JOBS = "work/slurm.json"
"""Numbers of the arrays that were handed to SLURM."""
PAUSE_S = 30.0
"""Between two looks at SLURM's queue."""


@dataclass(frozen=True)
class ClusterTask:
    """What is left of a stage, as datatrove calls it: its ranks count the tasks that were not done."""

    out: str
    stage: int
    tasks: tuple[int, ...]
    folder: str
    """Where the command was given, which is where the paths of the input begin; Ray's processes are elsewhere."""

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Any]:
        """Do the task in a process of its own.

        Raises:
            MachineFailure: it failed; datatrove writes that into its log, and does not mark the task as done.
        """
        task = self.tasks[rank]
        done = subprocess.run(
            worker_command(Path(self.out)),
            input=f"{self.stage} {task}\n",
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=worker_environment(),
            check=False,
        )
        answer = done.stdout.strip()
        if answer != OK:
            reason = json.loads(answer) if answer else f"exit code {done.returncode}"
            raise MachineFailure(f"task {task} of stage {self.stage} failed: {reason}")
        return iter(())


def run_on_cluster(work: CleaningWork, engine: CleaningEngine, workers: int, slurm: SlurmArrays) -> None:
    """Do all tasks that are not done; to SLURM they are handed, and waited for if that is asked for.

    Args:
        work: of the job.
        engine: not `LOCAL`.
        workers: processes of this machine, for `DATATROVE`.
        slurm: what is asked for, for `SLURM`.

    Raises:
        UserError: datatrove or Ray is not installed; there is no SLURM, or it takes neither the folder's name nor the
            jobs.
        MachineFailure: a task failed; SLURM or Ray does not answer.
    """
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

        if engine is CleaningEngine.RAY:
            import ray
    except ImportError as error:
        raise UserError(
            f"--engine {engine.value} needs the package {error.name}; install it with: {pip_install('maxlm[cluster]')}"
        ) from error
    if engine is CleaningEngine.SLURM:
        _by_slurm(work, slurm)
        return
    if engine is CleaningEngine.RAY:
        try:
            ray.init(ignore_reinit_error=True)
        except ConnectionError as error:
            raise MachineFailure(
                "--engine ray: the Ray cluster that RAY_ADDRESS or the last `ray start` on this machine names does not "
                f"let this command in ({' '.join(str(error).split())}); start it, or take that name away to let Ray "
                "begin on this machine"
            ) from error
    for number, stage in enumerate(work.stages):
        left = _left(work, stage)
        if not left:
            continue
        common = _common(work, number, left)
        match engine:
            case CleaningEngine.DATATROVE:
                LocalPipelineExecutor(**common, workers=workers).run()
            case CleaningEngine.RAY:
                RayPipelineExecutor(**common).run()
            case CleaningEngine.LOCAL | CleaningEngine.SLURM:
                raise ValueError("not done by an executor that is waited for")
            case _:
                assert_never(engine)
        if failed := _left(work, stage):
            raise MachineFailure(
                f"{_not_done(work, stage, failed)}, mend that, and run the same command again to go on"
            )


def _by_slurm(work: CleaningWork, slurm: SlurmArrays) -> None:
    """Hand in what is left, once; or until nothing is left."""
    for number in itertools.count(1):
        _hand_in(work, slurm)
        if not slurm.wait:
            return
        while _in_queue(json.loads((work.out / JOBS).read_text())):
            time.sleep(PAUSE_S)
        left = next(((stage, tasks) for stage in work.stages if (tasks := _left(work, stage))), None)
        if left is None:
            return
        if number == slurm.tries:
            raise MachineFailure(
                f"{_not_done(work, *left)}, after {number} tries (--slurm.tries); mend that, and run the same command "
                "again to go on"
            )


def _hand_in(work: CleaningWork, slurm: SlurmArrays) -> None:
    """An array of jobs for what is left of each stage; nothing while there are some in the queue."""
    from datatrove.executor import SlurmPipelineExecutor

    if not shutil.which("sbatch"):
        raise UserError("--engine slurm: there is no sbatch here; run the command where jobs are handed to SLURM")
    out = str(work.out.resolve())
    if not _NAME.fullmatch(out):
        raise UserError(
            f"--out {out}: with --engine slurm its whole path may have letters, digits and {_MARKS} only, as it stands "
            "in scripts; name another folder"
        )
    jobs_file = work.out / JOBS
    stages = [(number, stage, left) for number, stage in enumerate(work.stages) if (left := _left(work, stage))]
    if jobs_file.exists():
        if waiting := _in_queue(json.loads(jobs_file.read_text())):
            print(f"{work.out}: {waiting} of its jobs are in SLURM's queue; {_later(slurm)}")
            return
        print(f"{work.out}: {_not_done(work, *stages[0][1:])}; what is left is handed in again")
    # A job's script finds datatrove's commands and maxlm where this process has found them.
    programs, packages = map(shlex.quote, (str(Path(sys.executable).parent), worker_environment()["PYTHONPATH"]))
    before, jobs = None, list[str]()
    for number, stage, left in stages:
        array = SlurmPipelineExecutor(
            **_common(work, number, left),
            time=slurm.time,
            partition=slurm.partition,
            mem_per_cpu_gb=slurm.memory_gb,
            workers=slurm.tasks_at_once or -1,
            qos=slurm.qos,
            job_name=f"maxlm-{stage.name}",
            slurm_logs_folder=f"{_logs(work, stage)}/slurm",
            env_command=f"export PATH={programs}:$PATH PYTHONPATH={packages}",
            # Else the arrays after one that failed would stay in the queue for ever.
            sbatch_args={"kill-on-invalid-dep": "yes"} | ({"account": slurm.account} if slurm.account else {}),
            depends=before,
        )
        try:
            with _outside_of_jobs():
                array.run()
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"--engine slurm: SLURM does not take the jobs of {stage.name}, as sbatch says above; `sinfo` and "
                "`sacctmgr show qos` list what --slurm.partition and --slurm.qos can be"
            ) from error
        jobs.append(array.job_id)
        write_json(jobs_file, jobs)  # after each: the next one may be refused
        before = array
    print(f"{work.out}: {len(jobs)} arrays of jobs are in SLURM's queue; {_later(slurm)}")


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Without the variables of a job that this process may be of: SLURM would pass them on to those that it hands in,
    where they contradict what these ask for."""
    hidden = {
        name: os.environ.pop(name) for name in [*os.environ] if name.startswith("SLURM_") and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def _later(slurm: SlurmArrays) -> str:
    return "this command waits for them" if slurm.wait else "the same command says later what became of them"


_MARKS = "/._+=:@,-"
_NAME = re.compile(rf"[\w{re.escape(_MARKS)}]+")
"""Of a folder, that neither a shell nor SLURM takes for something else; datatrove writes names as they are."""


def _left(work: CleaningWork, stage: CleaningStage) -> tuple[int, ...]:
    """Tasks that are not done. maxlm alone says which: datatrove's marks would outlive a folder that is begun again."""
    done = work.done(stage)
    return tuple(task for task in range(stage.tasks) if task not in done)


def _common(work: CleaningWork, number: int, left: tuple[int, ...]) -> dict[str, Any]:
    """What every executor is told of a stage."""
    return {
        "pipeline": [ClusterTask(str(work.out.resolve()), number, left, os.getcwd())],
        "tasks": len(left),
        "logging_dir": _logs(work, work.stages[number]),
        "skip_completed": False,
    }


def _logs(work: CleaningWork, stage: CleaningStage) -> str:
    return str(work.out.resolve() / _LOGS / stage.name)


def _not_done(work: CleaningWork, stage: CleaningStage, left: tuple[int, ...]) -> str:
    return f"{len(left)} of {stage.tasks} tasks of {stage.name} were not done; see {_logs(work, stage)}"


def _in_queue(jobs: list[str]) -> int:
    """How many tasks of these arrays wait or run."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise MachineFailure(
            f"--engine slurm: squeue does not say whether jobs are in the queue ({asked.stderr.strip()}); run the same "
            "command again when it does"
        )
    return sum(job in jobs for job in asked.stdout.split())
