"""What a plan tells of one config on one machine: arithmetic first, then the compiler's word where it was asked."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from maxlm.config import RunConfig, ShardingConfig, UserError
from maxlm.hardware import Chip
from maxlm.plan.bound import TimeBound, estimate_time
from maxlm.plan.breaks import what_breaks_first
from maxlm.plan.memory import MemoryEstimate, cache_bytes, estimate_memory
from maxlm.plan.targets import CpuTarget, GpuTarget, Target, TpuTarget, chip, memory_limit, platform
from maxlm.plan.traffic import AxisTraffic, estimate_traffic
from maxlm.shapes import FlopsPerToken, ParameterCount, flops_per_token, parameter_count

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

SMALL_MARGIN = 0.1
"""Of the limit: below it the arithmetic, whose error is of this size, cannot promise that a step fits."""
LARGE_BUBBLE = 0.2


class Tier(enum.Enum):
    """Who decides whether a run fits."""

    ANALYTIC = "analytic"
    COMPILED = "compiled"

    @property
    def words(self) -> str:
        """As in: it fits, by arithmetic."""
        return {Tier.ANALYTIC: "by arithmetic", Tier.COMPILED: "by the compiler"}[self]


@dataclass(frozen=True, kw_only=True)
class CompilerReport:
    """What a target's own compiler says, without any of jax's types."""

    fits: bool
    """It found a way to run the step in the device's memory."""
    peak: int
    """Bytes on a device; of what does not fit those that it wanted."""
    at_least: bool = False
    """`peak` is a lower bound: the compiler gave up before it knew more."""
    details: Mapping[str, Json]
    """Everything else, as it goes into the JSON."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A plan."""

    config: RunConfig
    target: Target
    parameters: ParameterCount
    mesh: Mapping[str, int]
    hbm_bytes: int | None
    """That a program may have on a device; None: not known."""
    chip: Chip | None
    memory: MemoryEstimate
    cache: int
    """Bytes a device of the keys and values of training's batch at `model.max_seq_len`, if it were decoded."""
    flops: FlopsPerToken
    traffic: Sequence[AxisTraffic]
    bound: TimeBound | None
    """None: the speed of the target's devices is not known."""
    breaks: Sequence[str]
    """What breaks first when things grow."""
    compiled: CompilerReport | None = None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def peak(self) -> int:
        """Bytes on the fullest device, by the best tier that was asked."""
        return self.memory.peak if self.compiled is None else self.compiled.peak

    @property
    def fits(self) -> bool:
        """By the compiler where it was asked, else by arithmetic. Where no limit is known, everything fits."""
        refused = self.compiled is not None and not self.compiled.fits
        return not refused and (self.hbm_bytes is None or self.peak <= self.hbm_bytes)

    @property
    def tier(self) -> Tier:
        """Which of the two decides `fits`."""
        return Tier.ANALYTIC if self.compiled is None else Tier.COMPILED


def analyse(config: RunConfig, target: Target) -> Report:
    """The analytic tier: milliseconds, without jax.

    Raises:
        UserError: the config has a mistake or does not suit the number of devices, of slices or of hosts.
    """
    config.validate(target.devices)
    _check_slices(config.sharding, target)
    traffic = estimate_traffic(config, target)
    staged = config.sharding.sizes(target.devices)["stage"] > 1 and config.sharding.remat_stages
    return Report(
        config=config,
        target=target,
        parameters=parameter_count(config.model),
        mesh=config.sharding.sizes(target.devices),
        hbm_bytes=memory_limit(target),
        chip=chip(target),
        memory=estimate_memory(config, target.devices, platform(target)),
        cache=cache_bytes(config, target.devices),
        flops=flops_per_token(config.model, config.train.seq_len, config.execution.remat, remat_stages=staged),
        traffic=traffic,
        bound=estimate_time(config, target, traffic),
        breaks=what_breaks_first(config, target),
    )


def _check_slices(sharding: ShardingConfig, target: Target) -> None:
    """As `sharding.make_layout` will, on the machine."""
    match target:
        case CpuTarget():
            groups, allowed, kind = 1, {1}, "host"
        case TpuTarget(slices=groups):
            allowed, kind = {groups}, "slice"
        case GpuTarget(hosts=groups):
            allowed, kind = {1, groups}, "host"
    if sharding.slices not in allowed:
        raise UserError(
            f"sharding.slices = {sharding.slices}, but {target} has {groups} {kind}{'s' if groups > 1 else ''}; use "
            + " or ".join(f"--sharding.slices {number}" for number in sorted(allowed))
        )


def with_compiled(report: Report, compiled: CompilerReport) -> Report:
    """The report with what the compiler said."""
    return dataclasses.replace(report, compiled=compiled)


def warnings(report: Report) -> list[str]:
    """What to know before trusting or starting this run, a line each."""
    lines = []
    limit, peak = report.hbm_bytes, report.peak
    if limit is None:
        lines.append("the memory and speed of this target's devices are not known: it counts as fitting")
    elif report.compiled is None and abs(limit - peak) < SMALL_MARGIN * limit:
        lines.append(
            f"{abs(limit - peak) / 2**30:.2f} GiB from the limit is less than arithmetic can be trusted with: "
            "--compile asks the compiler"
        )
    if report.compiled is not None and report.compiled.fits:
        ratio = report.memory.peak / report.compiled.peak
        if abs(ratio - 1) > SMALL_MARGIN:
            lines.append(f"arithmetic finds {ratio:.2f} times the compiler's peak; the compiler's decides")
    if not report.config.execution.scan_layers:
        lines.append("arithmetic counts the layers as a loop runs them, and model.scan_layers = False unrolls it")
    if report.bound is not None and report.bound.bubble > LARGE_BUBBLE:
        lines.append(
            f"stages idle {report.bound.bubble:.0%} of the time: more train.micro_batches or sharding.virtual_stages"
        )
    return lines


def to_json(report: Report) -> dict[str, Json]:
    """Plain values; sizes in bytes, times in seconds."""
    memory, flops, bound = report.memory, report.flops, report.bound
    values: dict[str, Json] = {
        "parameters": dataclasses.asdict(report.parameters) | {"total": report.parameters.total},
        "target": str(report.target),
        "devices": report.target.devices,
        "mesh": dict(report.mesh),
        "fits": report.fits,
        "tier": report.tier.value,
        "hbm_bytes": report.hbm_bytes,
        "peak_bytes": {
            "analytic": memory.peak,
            "compiled": None if report.compiled is None else report.compiled.peak,
        },
        "bytes": dataclasses.asdict(memory),
        "bytes_at_peak": memory.at_peak,
        "cache_bytes": report.cache,
        "flops_per_token": flops.total,
        "flops_per_step": flops.total * report.tokens,
        "flops": dataclasses.asdict(flops),
        "tokens_per_step": report.tokens,
        "traffic": [
            {"axis": one.axis, "link": one.link.value, "bytes": one.sent, "seconds": one.seconds, "what": one.what}
            for one in report.traffic
        ],
        "bound": None if bound is None else _bound(bound),
        "tokens_per_day": None if bound is None else bound.tokens_per_day,
        "device_hours": None if bound is None else bound.device_hours,
        "days": None if bound is None else bound.days,
        "breaks_first": list(report.breaks),
        "warnings": list(warnings(report)),
    }
    if report.compiled is not None:
        values |= report.compiled.details
    return values


def _bound(bound: TimeBound) -> dict[str, Json]:
    return {
        field.name: getattr(bound, field.name)
        for field in dataclasses.fields(bound)
        if field.name not in ("tokens_per_day", "device_hours", "days")
    }


def mesh_text(mesh: Mapping[str, int]) -> str:
    """As data 2 x fsdp 32; axes of one device are left out."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def gib(size: float) -> str:
    """Bytes as GiB, for people."""
    return f"{size / 2**30:,.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.2f} MiB"
