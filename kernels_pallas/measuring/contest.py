"""One case: is the kernel right, are its rivals, and how long does each take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.measuring.cases import CEILINGS, RIVALS_MAY, Case
from kernels_pallas.measuring.isolate import one_line
from kernels_pallas.measuring.timing import FLUSH_BYTES, Call, Timing, compare, nvidia_smi
from kernels_pallas.targets import target_of

GOAL_CHIP = "h200"
"""The chip that the goals are set for."""

# Dense bfloat16 TFLOP/s of one device, from the makers' datasheets: what is faster than that was not computed.
_PEAK = {
    "a100": 312,
    "h100": 989.4,
    "h200": 989.4,
    "b200": 2250,
    "tpu_v4": 275,
    "tpu_v5e": 197,
    "tpu_v5p": 459,
    "tpu_v6e": 918,
    "tpu_7x": 1153.5,
}

_Status = Literal["ok", "refused", "failed", "wrong", "skipped"]


@dataclass(frozen=True)
class Effort:
    """How thoroughly to time."""

    warmups: int = 10
    samples: int = 20
    flush_bytes: int = FLUSH_BYTES


@dataclass(kw_only=True)
class Entry:
    """What became of one contestant of a case."""

    status: _Status
    reason: str = ""
    errors: dict[str, float] | None = None
    """By result: the largest difference from the reference, as a part of the reference's largest magnitude."""
    microseconds: Timing | None = None
    tflops: float | None = None


@dataclass(kw_only=True)
class CaseRow:
    """What became of one case."""

    name: str
    op: str
    backend: str
    kernel: Entry
    rivals: dict[str, Entry]
    goal: dict[str, Any] | None = None
    ratio: float | None = None
    """How many times as fast as the fastest rival, of the goal's if there is a goal."""
    fastest_rival: str | None = None
    verdict: str | None = None
    gpu: dict[str, str] | None = None
    """Clocks, temperature and power right after the timing."""

    @classmethod
    def lost(cls, case: Case, backend: str, reason: str, status: _Status = "failed") -> CaseRow:
        """Of a case that was not measured."""
        return cls(name=case.name, op=case.op, backend=backend, kernel=Entry(status=status, reason=reason), rivals={})

    @property
    def median(self) -> float | None:
        """Microseconds of the kernel."""
        timing = self.kernel.microseconds
        return timing.median if timing is not None and self.kernel.status == "ok" else None

    @property
    def rival_median(self) -> float | None:
        """Microseconds of the fastest rival."""
        timing = self.rivals[self.fastest_rival].microseconds if self.fastest_rival else None
        return None if timing is None else timing.median


def measure(case: Case, backend: str, effort: Effort, blocks: Any = None, *, alone: bool = False) -> CaseRow:
    """Checks the case's kernel and its rivals (not with `alone`), and times those that are right, if the kernel is."""
    arrays = case.arrays()
    reference = case.reference(arrays)
    calls: dict[str, Call] = {}

    def check(name: str, make: Callable[[], Call]) -> Entry:
        try:
            call = make()
            errors = errors_of(jax.jit(call.function)(*call.operands), reference)
        except Exception as error:  # of compilers and drivers too: it is one contestant's own affair
            mine = name == "kernel" and not isinstance(error, ValueError | NotImplementedError)
            return Entry(status="failed" if mine else "refused", reason=one_line(error))
        allowed = {key: CEILINGS[key] * (1 if name == "kernel" else RIVALS_MAY) for key in errors}
        if too_far := [key for key, error in errors.items() if not error <= allowed[key]]:
            told = ", ".join(f"{key} is off by {errors[key]:.2g} (at most {allowed[key]:g})" for key in too_far)
            return Entry(status="wrong", reason=told, errors=errors)
        calls[name] = call
        return Entry(status="ok", errors=errors)

    row = CaseRow(
        name=case.name,
        op=case.op,
        backend=backend,
        kernel=check("kernel", lambda: case.kernel(arrays, backend, blocks)),
        rivals={},
    )
    if row.kernel.status != "ok":
        row.rivals = {
            name: Entry(status="skipped", reason="there is no kernel to compare with") for name in case.rivals(arrays)
        }
        return row
    if not alone:
        row.rivals = {name: check(name, make) for name, make in case.rivals(arrays).items()}
    timings = compare(calls, warmups=effort.warmups, samples=effort.samples, flush_bytes=effort.flush_bytes)
    row.gpu = nvidia_smi()
    for name, timing in timings.items():
        _enter(row.kernel if name == "kernel" else row.rivals[name], timing, case.flops)
    _judge(row, case)
    return row


def errors_of(results: Any, reference: dict[str, jax.Array]) -> dict[str, float]:
    """The largest difference of each result from its reference, as a part of the reference's largest magnitude."""

    @jax.jit
    def error(result: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(result.astype(jnp.float32) - wanted)) / jnp.max(jnp.abs(wanted))

    pairs = zip(reference.items(), jax.tree.leaves(results), strict=True)
    return {key: float(error(result, wanted)) for (key, wanted), result in pairs}


def _enter(entry: Entry, timing: Timing | Exception, flops: int) -> None:
    if isinstance(timing, Exception):
        entry.status, entry.reason = "failed", one_line(timing)
        return
    device = jax.devices()[0]
    peak = _PEAK.get(target_of(device.device_kind, device.platform).name)
    entry.microseconds = timing
    entry.tflops = flops / timing.median / 1e6 if timing.median > 0 else float("inf")
    if entry.tflops == float("inf") or (peak is not None and entry.tflops > peak):
        entry.status, entry.reason = "failed", f"timed at {entry.tflops:.0f} TFLOP/s, which the chip cannot do"


def _judge(row: CaseRow, case: Case) -> None:
    device = jax.devices()[0]
    goal = case.goal if target_of(device.device_kind, device.platform).name == GOAL_CHIP else None
    row.goal = None if goal is None else asdict(goal)
    medians = {
        name: entry.microseconds.median
        for name, entry in row.rivals.items()
        if entry.status == "ok" and entry.microseconds is not None and (goal is None or name in goal.rivals)
    }
    if row.kernel.status != "ok" or row.kernel.microseconds is None or not medians:
        return
    row.fastest_rival = min(medians, key=lambda name: medians[name])
    row.ratio = medians[row.fastest_rival] / row.kernel.microseconds.median
    row.verdict = None if goal is None else goal.verdict(row.ratio)


def device_answers() -> None:
    """Raises where the device is beyond use, as after a kernel's illegal access."""
    jax.clear_caches()
    jnp.add(jnp.ones(8), 1).block_until_ready()
