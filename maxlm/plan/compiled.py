"""The train step through a target's own compiler: what it holds in memory, and what it sends."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from maxlm.config import RunConfig, UserError
from maxlm.plan.audit import forbidden, smallest_matrix
from maxlm.plan.collectives import Collective, collectives
from maxlm.plan.targets import TPUS, CpuTarget, GpuTarget, Target, TpuTarget, gpu_config
from maxlm.sharding import Layout, make_layout
from maxlm.training import make_trainer


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs."""

    arguments: int
    """State and batch."""
    temporary: int
    """All else that the step allocates; as the compiler sums it up, which may be more than is there at one time."""
    peak: int
    """Most at one time, arguments included."""


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler made of the train step."""

    layout: Layout
    memory: Memory
    collectives: list[Collective]
    forbidden: list[str]
    cpu_seconds: float
    """Of processor time, to trace and compile."""


@dataclass(frozen=True)
class DoesNotFit:
    """The compiler found no way to run the step in the device's memory."""

    layout: Layout
    message: str
    cpu_seconds: float


def target_devices(target: Target) -> Sequence[jax.Device]:
    """The target's devices; those of TPUs and GPUs can be compiled for, and nothing else.

    Raises:
        UserError: the compiler knows no such machine.
    """
    if isinstance(target, CpuTarget):
        found = jax.devices("cpu")
        if len(found) < target.devices:
            raise UserError(f"--target {target}: this process has {len(found)} CPU devices; use cpu:{len(found)}")
        return found[: target.devices]
    try:
        return _topology(target)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--target {target}: {str(error).splitlines()[0]}") from None


def compile_step(config: RunConfig, target: Target) -> CompiledStep | DoesNotFit:
    """Compile the step that `maxlm.train` would run on the target.

    Raises:
        UserError: the config has a mistake, or does not suit the number of devices, or the compiler knows no such
            machine.
    """
    config.validate(target.devices)
    layout = make_layout(config.sharding, target_devices(target))
    start = time.process_time()
    trainer = make_trainer(config, layout)
    with _standard_error() as log:
        try:
            compiled = trainer.step.lower(trainer.state, trainer.batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return DoesNotFit(layout, _first_sentences(str(error)), time.process_time() - start)
    seconds = time.process_time() - start
    found = collectives(compiled.as_text() or "", layout.mesh.shape)
    broken = forbidden(layout, found, matrix_bytes=smallest_matrix(config, layout), log=log[0])
    return CompiledStep(layout, _memory(compiled, target), found, broken, seconds)


def _topology(target: TpuTarget | GpuTarget) -> Sequence[Any]:
    match target:
        case TpuTarget():
            name = f"{TPUS[target.chip].prefix}:{target.topology}"
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        case GpuTarget():
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=gpu_config(target.chip),
                topology=f"1x{target.hosts}x{target.per_host}",
            ).devices


def _memory(compiled: jax.stages.Compiled, target: Target) -> Memory:
    stats = compiled.memory_analysis()
    assert stats is not None  # all three compilers have it
    new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    summed = stats.argument_size_in_bytes + new_outputs + stats.temp_size_in_bytes
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        # The processor's compiler leaves temporaries out of its peak.
        peak=summed if isinstance(target, CpuTarget) else stats.peak_memory_in_bytes,
    )


def _first_sentences(message: str) -> str:
    """Wanted and available memory, without the list of allocations that follows."""
    return re.split(r"\n|Largest program allocations|Total hbm usage", message)[0].strip()


@contextlib.contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Keeps what compilers, which know nothing of Python, write to standard error; the list's one entry has it after.

    If the block raises, it is written after all.
    """
    log = [""]
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        failed = True
        try:
            yield log
            failed = False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            log[0] = file.read().decode(errors="replace")
            if failed:
                os.write(2, log[0].encode())
