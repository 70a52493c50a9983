"""How long a call takes on the device, on an idle machine, with cold caches; and on what machine that was.

A sample is one compiled loop of many calls, less the same loop without them, divided by the number of calls: launch and
waiting times cancel, and no clock is needed but the host's. Before every call the loop writes a buffer larger than any
last-level cache, so that operands come from memory as they do in a model.
"""

from __future__ import annotations

import functools
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FLUSH_BYTES = 128 * 2**20
"""Read and written between calls; an H200 has 60 MiB of L2."""

_SAMPLE_S = 0.01
_MAX_CALLS = 2000


class Call(NamedTuple):
    """A function, and the arrays (or trees of arrays) to call it with."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over the samples."""

    median: float
    first_quartile: float
    third_quartile: float
    calls: int
    """Calls in a sample."""


def compare(
    calls: Mapping[str, Call], *, warmups: int = 10, samples: int = 20, flush_bytes: int = FLUSH_BYTES
) -> dict[str, Timing | Exception]:
    """Times calls side by side: every round takes one sample of each, so that a drift of the clocks meets all alike.

    Args:
        calls: by name. Results are not looked at; check them before.
        warmups: rounds that are thrown away.
        samples: rounds that count.
        flush_bytes: size of the buffer written between two calls.

    Returns:
        For each name its timing, or what it raised; one that raises does not stop the others.
    """
    samplers: dict[str, _Sampler] = {}
    failures: dict[str, Exception] = {}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        try:
            samplers[name] = _Sampler(call, flush_bytes)
        except Exception as error:  # whatever a compiler or a driver throws belongs to this call alone
            failures[name] = error
    for _ in range(warmups + samples):
        for name, sampler in samplers.items():
            try:
                if name not in failures:
                    found[name].append(sampler.sample())
            except Exception as error:
                failures[name] = error
    return {name: failures.get(name) or _summary(found[name][warmups:], samplers[name].calls) for name in calls}


def _summary(seconds: list[float], calls: int) -> Timing:
    first, median, third = statistics.quantiles((s * 1e6 for s in seconds), n=4, method="inclusive")
    return Timing(median, first, third, calls)


class _Sampler:
    def __init__(self, call: Call, flush_bytes: int) -> None:
        self._operands = call.operands
        self._with, self._without = _loop(call.function, flush_bytes), _empty_loop(flush_bytes)
        self.calls = 1
        self.sample()  # compiles
        once = self.sample()
        self.calls = max(1, min(_MAX_CALLS, math.ceil(_SAMPLE_S / max(once, 1e-6))))

    def sample(self) -> float:
        """Seconds of one call."""
        for _ in range(20):
            seconds = self._seconds(self._with) - self._seconds(self._without)
            if seconds > 0:  # else something stopped the shorter loop meanwhile
                return seconds / self.calls
        raise RuntimeError("the machine is too busy to time anything: a loop without the calls took as long as with")

    def _seconds(self, loop: Callable[..., jax.Array]) -> float:
        start = time.perf_counter()
        loop(self.calls, self._operands).block_until_ready()
        return time.perf_counter() - start


def _loop(function: Callable[..., Any], flush_bytes: int) -> Callable[..., jax.Array]:
    """A compiled function of (number of calls, operands) that makes these calls one after the other."""

    @jax.jit
    def loop(calls: jax.Array, operands: tuple[Any, ...]) -> jax.Array:
        def once(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            buffer, seen = carry
            # The first barrier makes the operands depend on the step, so that the call is not moved out of the loop;
            # the second keeps the compiler from computing no more of the results than the elements that are looked at.
            inputs, buffer = lax.optimization_barrier((operands, buffer + 1))
            results = lax.optimization_barrier(jax.tree.leaves(function(*inputs)))
            return buffer, seen + sum(x[(0,) * x.ndim].astype(jnp.float32) for x in results)

        start = jnp.zeros(flush_bytes // 4, jnp.float32), jnp.float32(0)
        buffer, seen = lax.fori_loop(0, calls, once, start)
        return seen + buffer[0]

    return loop


@functools.cache
def _empty_loop(flush_bytes: int) -> Callable[..., jax.Array]:
    return _loop(lambda *operands: operands, flush_bytes)


def machine() -> dict[str, Any]:
    """Device and versions, for a report."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "runtime": " ".join(device.client.platform_version.split()),
        "host": platform.machine(),
        "nvidia_smi": nvidia_smi(),
    }


_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks (MHz), temperature (C) and power (W) of the first GPU at this moment; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_SMI_FIELDS, (field.strip() for field in answer.strip().split(",")), strict=False))
