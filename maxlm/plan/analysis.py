"""One config on one machine: what arithmetic says of it, and the compiler's word where it was asked."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from maxlm.config import RunConfig, ShardingConfig, UserError
from maxlm.plan.bound import TimeBound, compute_time, estimate_time, step_flops
from maxlm.plan.machines import CpuMachine, GpuMachine, Machine, TpuMachine, memory_limit
from maxlm.plan.memory import MemoryEstimate, cache_bytes, estimate_memory
from maxlm.plan.traffic import AxisTraffic, estimate_traffic
from maxlm.shapes import FlopsPerToken, ParameterCount, parameter_count

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
        return "by arithmetic" if self is Tier.ANALYTIC else "by the compiler"


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


@dataclass(frozen=True)
class Forecast:
    """A config on a machine. Each figure is counted when it is first asked for: milliseconds, without jax."""

    config: RunConfig
    target: Machine
    compiled: CompilerReport | None = None

    @cached_property
    def mesh(self) -> dict[str, int]:
        return self.config.sharding.sizes(self.target.devices)

    @cached_property
    def parameters(self) -> ParameterCount:
        return parameter_count(self.config.model)

    @cached_property
    def limit(self) -> int | None:
        """Bytes that a program may have on a device; None: not known."""
        return memory_limit(self.target)

    @cached_property
    def memory(self) -> MemoryEstimate:
        return estimate_memory(self.config, self.target.devices, self.target.platform)

    @cached_property
    def cache(self) -> int:
        """Bytes a device of the keys and values of training's batch at `model.max_seq_len`, if it were decoded."""
        return cache_bytes(self.config, self.target.devices)

    @cached_property
    def flops(self) -> FlopsPerToken:
        return step_flops(self.config, self.mesh)

    @cached_property
    def traffic(self) -> Sequence[AxisTraffic]:
        return estimate_traffic(self.config, self.target)

    @cached_property
    def bound(self) -> TimeBound | None:
        """None: the speed of the target's devices is not known."""
        return estimate_time(self.config, self.target, self.traffic)

    @cached_property
    def compute_time(self) -> float:
        """Seconds that the step's bound is not below, much faster to count. The speed of the devices is known."""
        return compute_time(self.config, self.target)

    @property
    def busiest_link(self) -> float:
        """Seconds that the step's bound is not below, nor with more recomputation or, without a pipeline, with more
        micro-batches."""
        return max((one.seconds or 0.0 for one in self.traffic), default=0.0)

    @property
    def time(self) -> TimeBound:
        """`bound`, where it is known."""
        assert self.bound is not None
        return self.bound

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def peak(self) -> int:
        """Bytes on the fullest device, by the best tier that was asked; an engine's beside a compiled step by
        arithmetic."""
        return self.memory.peak if self.compiled is None else self.compiled.peak + self.memory.engine

    @property
    def margin(self) -> int:
        """Bytes left on a device at the peak, where the limit is known; negative: missing."""
        assert self.limit is not None
        return self.limit - self.peak

    @property
    def analytic_margin(self) -> int:
        """The same by arithmetic, whoever decides."""
        return self.margin + self.peak - self.memory.peak

    @property
    def fits(self) -> bool:
        """By the compiler where it was asked, else by arithmetic. Where no limit is known, everything fits."""
        refused = self.compiled is not None and not self.compiled.fits
        return not refused and (self.limit is None or self.margin >= 0)

    @property
    def tier(self) -> Tier:
        """Who decides `fits`."""
        return Tier.ANALYTIC if self.compiled is None else Tier.COMPILED

    @property
    def cost(self) -> float:
        """Device-seconds a token, at the least: comparable between batches and machines of one chip."""
        return self.time.step_seconds * self.target.devices / self.tokens

    def with_compiled(self, answer: CompilerReport) -> Forecast:
        """The same with what the compiler said."""
        return dataclasses.replace(self, compiled=answer)


def analyse(config: RunConfig, target: Machine) -> Forecast:
    """The forecast of a config that keeps every rule.

    Raises:
        UserError: the config has a mistake or does not suit the number of devices, of slices or of hosts.
    """
    config.validate(target.devices)
    check_slices(config.sharding, target)
    found = Forecast(config, target)
    _ = found.bound  # now, for it may refuse the dtype
    return found


def check_slices(sharding: ShardingConfig, target: Machine) -> None:
    """As `sharding.make_layout` will, on the machine.

    Raises:
        UserError: the machine has another number of slices, or hosts.
    """
    match target:
        case CpuMachine():
            groups, allowed, kind = 1, {1}, "host"
        case TpuMachine(slices=groups):
            allowed, kind = {groups}, "slice"
        case GpuMachine(hosts=groups):
            allowed, kind = {1, groups}, "host"
    if sharding.slices not in allowed:
        raise UserError(
            f"sharding.slices = {sharding.slices}, but {target} has {groups} {kind}{'s' if groups > 1 else ''}; use "
            + " or ".join(f"--sharding.slices {number}" for number in sorted(allowed))
        )


def warnings(found: Forecast) -> list[str]:
    """What to know before trusting or starting this run, a line each."""
    lines = []
    if found.limit is None:
        lines.append("the memory and speed of this target's devices are not known: it counts as fitting")
    elif found.compiled is None and abs(found.margin) < SMALL_MARGIN * found.limit:
        lines.append(
            f"{abs(found.margin) / 2**30:.2f} GiB from the limit is less than arithmetic can be trusted with: "
            "--compile asks the compiler"
        )
    if found.compiled is not None and found.compiled.fits:
        ratio = found.memory.peak / found.peak
        if abs(ratio - 1) > SMALL_MARGIN:
            lines.append(f"arithmetic finds {ratio:.2f} times the compiler's peak; the compiler's decides")
    if not found.config.execution.scan_layers:
        lines.append("arithmetic counts the layers as a loop runs them, and execution.scan_layers = False unrolls it")
    if found.bound is not None and found.bound.bubble > LARGE_BUBBLE:
        lines.append(
            f"stages idle {found.bound.bubble:.0%} of the time: more train.micro_batches or sharding.virtual_stages"
        )
    return lines


def to_json(found: Forecast, breaks: Sequence[str]) -> dict[str, Json]:
    """Plain values; sizes in bytes, times in seconds. `breaks`: what breaks first when things grow."""
    memory, flops = found.memory, found.flops
    bound = {} if found.bound is None else dataclasses.asdict(found.bound)
    of_run = {key: bound.pop(key, None) for key in ("tokens_per_day", "device_hours", "days")}
    values: dict[str, Json] = {
        "parameters": dataclasses.asdict(found.parameters) | {"total": found.parameters.total},
        "target": str(found.target),
        "devices": found.target.devices,
        "mesh": found.mesh,
        "fits": found.fits,
        "tier": found.tier.value,
        "hbm_bytes": found.limit,
        "peak_bytes": {"analytic": memory.peak, "compiled": None if found.compiled is None else found.peak},
        "bytes": dataclasses.asdict(memory),
        "bytes_at_peak": memory.at_peak,
        "cache_bytes": found.cache,
        "flops_per_token": flops.total,
        "flops_per_step": flops.total * found.tokens,
        "flops": dataclasses.asdict(flops),
        "tokens_per_step": found.tokens,
        "traffic": [
            {"axis": one.axis, "link": one.link.value, "bytes": one.sent, "seconds": one.seconds, "what": one.what}
            for one in found.traffic
        ],
        "bound": bound or None,
        **of_run,
        "breaks_first": list(breaks),
        "warnings": warnings(found),
    }
    return values | ({} if found.compiled is None else dict(found.compiled.details))


def mesh_text(mesh: Mapping[str, int]) -> str:
    """As data 2 x fsdp 32; axes of one device are left out."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def gib(size: float) -> str:
    """Bytes as GiB, for people."""
    return f"{size / 2**30:,.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.2f} MiB"
