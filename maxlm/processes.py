"""Several processes, one program: joining them, process 0 first, and stopping all of them at the same step."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.config import UserError


def initialize_distributed() -> None:
    """Join the other processes of this run, if it was launched as several; otherwise do nothing.

    Recognised: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, srun of SLURM, mpirun of Open MPI,
    and TPU VMs. Must be called before jax touches a device.

    Raises:
        UserError: the variables are incomplete, or the others do not answer.
    """
    if jax.distributed.is_initialized():
        return
    environment = os.environ
    try:
        if address := environment.get("JAX_COORDINATOR_ADDRESS"):
            jax.distributed.initialize(
                address, int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
            )
        elif (
            ("SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1)
            or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
            or _on_tpu_vm()
        ):
            jax.distributed.initialize()
    except KeyError as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set but {error.args[0]} is not; set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, "
            "or unset the address to run as one process"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"joining the other processes failed: {' '.join(str(error).split())}") from error


def _on_tpu_vm() -> bool:
    device_files = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return (
        device_files
        and importlib.util.find_spec("libtpu") is not None
        and jax.config.values["jax_platforms"] in (None, "tpu")
    )


def main_says(value: bool) -> bool:
    """What process 0 passes, on every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value))) if jax.process_count() > 1 else value


@contextlib.contextmanager
def main_first(task: str) -> Iterator[None]:
    """All processes wait at the end of the block for process 0; what fails there ends all of them."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # told to the others first, or they would wait for ever
        failure = error
    done = main_says(failure is None)
    if failure is not None:
        raise failure
    if not done:
        raise UserError(f"process 0 could not {task}; its message says why")


class Interruption:
    """Turns SIGTERM and SIGINT into a request to stop after the current step; a second one stops at once.

    Use as a context manager, in the main thread; elsewhere (a notebook's worker) it leaves signals alone.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            # With several processes jax's own SIGTERM notice is what brings all of them to the same step.
            watched = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._before = {number: signal.signal(number, self._ask) for number in watched}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to save and stop now. Every process must ask at every step; all get the same answer."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if jax.process_count() > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._asked = True
        with contextlib.suppress(OSError):  # `print` is not safe inside a signal handler
            os.write(2, b"stopping after this step, and saving; a second signal stops at once, without\n")
        for watched in self._before:
            signal.signal(watched, signal.SIG_DFL)
