"""From what a launcher set in the environment to ranks that have met.

jax joins processes by a service in rank 0, and ends every process by SIGABRT when a rank is missing, or when that
service goes away. So ranks meet here first, at the address that jax would use, and only then begin jax's own meeting,
at another port of rank 0. The others speak to its service through a relay of their own, which does not pass on its
end: what a lost rank 0 means is said by `link`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.config import LimitsConfig, UserError
from maxlm.processes.hub import Hub
from maxlm.processes.ranks import RankError, Ranks
from maxlm.processes.spoke import Spoke
from maxlm.processes.wire import Wire

T = TypeVar("T")

_JOIN_S, _JOIN_HERE_S = 300.0, 60.0
"""What `limits.join_s` is by default: over several machines, and on this one alone."""
_END_S = 10
"""What jax waits for the others at the end of a process."""
_SLURM_PORTS = 2**12
"""A port below 2^16 for each job number, modulo so many: jax's rule."""

_ranks = Ranks()


def ranks() -> Ranks:
    """This process's way to the other ranks.

    Where jax was told of other processes by somebody else (a script, a test), they are connected at the first call.
    """
    if _ranks.size == 1 and jax.distributed.is_initialized() and jax.process_count() > 1:
        _connect_by_devices(LimitsConfig())
    return _ranks


@contextlib.contextmanager
def joined(limits: LimitsConfig) -> Iterator[Ranks]:
    """Join the other processes of this run, if it was launched as several. What fails in the block ends all of them.

    Recognised: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, srun of Slurm, mpirun of Open MPI,
    and TPU VMs. Must be entered before jax touches a device.

    Raises:
        UserError: the variables are incomplete or contradict each other, or the others do not come.
    """
    if not jax.distributed.is_initialized():
        _join(limits)
    try:
        yield ranks()
    except BaseException as error:
        ranks().tell(error)
        raise


def on_rank_0(what: str, call: Callable[[], T]) -> T:
    """What `call` gives on rank 0, a value of JSON, on every rank; the others wait for it.

    Args:
        what: that the call does, for messages: "prepare the data".

    Raises:
        UserError: it takes longer than limits.prepare_s.
        RankError: on the other ranks, if the call raises.
    """
    here = ranks()
    if here.rank == 0:
        try:
            value = call()
        except BaseException as error:
            here.say(what, {"failed": here.report(error)})
            raise
        here.say(what, {"value": value})
        return value
    said = here.say(what)
    if "failed" in said:
        raise RankError(said["failed"])
    return said["value"]


class Launched(NamedTuple):
    """One of several processes, as its launcher describes it."""

    host: str
    """Of rank 0."""
    port: int
    size: int
    rank: int
    local_devices: list[int] | None
    """Numbers of the devices that are this process's; None: all of its machine, or jax decides."""

    @property
    def place(self) -> str:
        """Where the ranks meet."""
        return f"{self.host}:{self.port}"


def launched() -> Launched | None:
    """What the environment says; None: this is the only process, or one of a TPU slice, which jax knows about.

    Raises:
        UserError: what it says is incomplete or wrong.
    """
    seen = os.environ
    if address := seen.get("JAX_COORDINATOR_ADDRESS"):
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if name not in seen:
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS is set but {name} is not; set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, "
                    "or unset the address to run as one process"
                )
        host, _, digits = address.rpartition(":")
        if not host or not digits.isdecimal() or not 0 < int(digits) < 2**16:
            raise UserError(f"JAX_COORDINATOR_ADDRESS = {address!r} must be HOST:PORT, for example 10.0.0.2:8476")
        size, rank = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
        if not rank < size:
            raise UserError(f"JAX_PROCESS_ID = {rank} must be less than JAX_NUM_PROCESSES = {size}; count from 0")
        return Launched(host.strip("[]"), int(digits), size, rank, None)
    if "SLURM_PROCID" in seen and (size := _number("SLURM_NTASKS", 1)) > 1:
        if "SLURM_STEP_NODELIST" not in seen:
            raise UserError(
                f"SLURM_NTASKS = {size}, but no srun started this process (SLURM_STEP_NODELIST is not set); begin the "
                "command with srun, or unset SLURM_NTASKS to run as one process"
            )
        nodes = re.match(r"([^,\[]+)(?:\[(\d+))?", seen["SLURM_STEP_NODELIST"])
        if nodes is None:
            raise UserError(f"SLURM_STEP_NODELIST = {seen['SLURM_STEP_NODELIST']!r} must name nodes; begin with srun")
        port, local = _port(_number("SLURM_JOB_ID")), [_number("SLURM_LOCALID")]
        return Launched(nodes[1] + (nodes[2] or ""), port, size, _number("SLURM_PROCID"), local)
    if (size := _number("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        origin = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,:\]]+)", seen.get("OMPI_MCA_orte_hnp_uri", ""))
        if origin is None:
            raise UserError(
                "mpirun started this process, but does not say where (OMPI_MCA_orte_hnp_uri); set "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            )
        rank, local = _number("OMPI_COMM_WORLD_RANK"), [_number("OMPI_COMM_WORLD_LOCAL_RANK")]
        return Launched(origin[2], _port(int(origin[1])), size, rank, local)
    return None


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UserError(f"{name} = {text} must be a whole number, as the launcher sets it")
    return int(text)


def _port(job: int) -> int:
    return _number("JAX_COORDINATOR_PORT", job % _SLURM_PORTS + 2**16 - _SLURM_PORTS)


def _join(limits: LimitsConfig) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which `Interruption` looks after
    if (here := launched()) is None:
        if _on_tpu_vm():
            try:
                jax.distributed.initialize()
            except (ValueError, RuntimeError) as error:
                raise UserError(f"joining the other processes failed: {' '.join(str(error).split())}") from error
            if jax.process_count() > 1:
                _connect_by_devices(limits)
        return
    if here.size == 1:
        return
    on_this_machine = here.host in ("localhost", "127.0.0.1", "::1")
    seconds = limits.join_s or (_JOIN_HERE_S if on_this_machine else _JOIN_S)
    if here.rank == 0:
        hub = Hub(_listen(here, seconds), here.size, limits)
        _use(hub)
        try:
            hub.wait_for_all(seconds, here.place)
        except BaseException as error:
            hub.tell(error)
            raise
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        hub.start(port)
        address = f"{here.host}:{port}"
    else:
        spoke = Spoke(_call(here, seconds), here.rank, here.size, limits)
        _use(spoke)
        address = f"127.0.0.1:{_relay(here.host, spoke.wait_for_start(seconds))}"
    jax.distributed.initialize(
        address,
        here.size,
        here.rank,
        here.local_devices,
        initialization_timeout=int(seconds) + 1,
        heartbeat_timeout_seconds=int(max(100, 2 * (limits.silent_s or 0))),
        shutdown_timeout_seconds=_END_S,
    )


def _use(new: Hub | Spoke) -> None:
    global _ranks
    _ranks = new
    atexit.register(new.at_exit)  # before jax's own, which waits for all


def _listen(here: Launched, seconds: float) -> socket.socket:
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return socket.create_server(
            ("", here.port), family=family, backlog=4096, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        # Perhaps a second rank 0 of the same run: the first one, told of it, ends them all.
        with contextlib.suppress(UserError):
            Spoke(_call(here, 1.0), 0, here.size, LimitsConfig()).wait_for_start(seconds=0.0)
        raise UserError(
            f"port {here.port} cannot be opened ({error.strerror}); is there another rank 0, or another run, on this "
            "machine? choose another port in JAX_COORDINATOR_ADDRESS"
        ) from error


def _call(here: Launched, seconds: float) -> Wire:
    """A connection to rank 0."""
    began = time.monotonic()
    while True:
        try:
            return Wire(socket.create_connection((here.host, here.port), timeout=5.0))
        except OSError as error:
            if time.monotonic() - began > seconds:
                raise UserError(
                    f"rank {here.rank}: rank 0 did not answer at {here.place} within {seconds:g} s "
                    f"({error.strerror or error}); is it started, and JAX_COORDINATOR_ADDRESS its address? "
                    "limits.join_s waits longer"
                ) from error
            time.sleep(0.2)


def _relay(host: str, port: int) -> int:
    """Pass on what comes to a port of this machine, whose number is returned, to another machine's, and back."""
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, to_the_end: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        if to_the_end:
            target.close()

    def serve() -> None:
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((host, port), timeout=30.0)
            except OSError:
                near.close()  # its owner tries again
                continue
            far.settimeout(None)
            for source, target, to_the_end in ((near, far, True), (far, near, False)):
                threading.Thread(target=pump, args=(source, target, to_the_end), daemon=True).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return int(server.getsockname()[1])


def _connect_by_devices(limits: LimitsConfig) -> None:
    """Connect ranks that jax has joined by itself: a collective brings rank 0's address to all."""
    size, rank = jax.process_count(), jax.process_index()
    listener = socket.create_server(("", 0), backlog=4096) if rank == 0 else None
    own = [] if listener is None else [*socket.inet_aton(_own_address()), listener.getsockname()[1]]
    *parts, port = map(int, multihost_utils.broadcast_one_to_all(np.array(own or [0] * 5, np.int32)))
    here = Launched(".".join(map(str, parts)), port, size, rank, None)
    seconds = limits.join_s or _JOIN_S
    if listener is not None:
        hub = Hub(listener, size, limits)
        _use(hub)
        hub.wait_for_all(seconds, here.place)
        hub.start(port)
    else:
        spoke = Spoke(_call(here, seconds), rank, size, limits)
        _use(spoke)
        spoke.wait_for_start(seconds)


def _own_address() -> str:
    """The IPv4 address by which other machines know this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _on_tpu_vm() -> bool:
    device_files = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return (
        device_files
        and importlib.util.find_spec("libtpu") is not None
        and jax.config.values["jax_platforms"] in (None, "tpu")
    )
