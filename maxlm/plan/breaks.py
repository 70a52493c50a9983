"""What stands in the way of a run on more chips: the config as it is, laid out over 4,096 and 65,536 of them on paper.

Growing means more of the data axis, since tensor, seq, stage, expert and fsdp change what a device computes: so the
batch runs out first. All else is looked at with the smallest batch that such a mesh can share out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from maxlm.config import Dropless, Experts, RunConfig, SlicesAxis, pipeline_bubble
from maxlm.plan.bound import TimeBound, estimate_time
from maxlm.plan.targets import CpuTarget, GpuTarget, Target, TpuTarget, larger
from maxlm.plan.traffic import AxisTraffic, Link, estimate_traffic, local_tokens, whole_torus

SCALES = (4_096, 65_536)
"""Devices to grow to."""
LARGE_BUBBLE = 0.1
"""Idle share of a pipeline that is worth a word."""
LARGEST_BATCH = 15_360 * 4_096
"""Tokens: DeepSeek-V3's (arXiv:2412.19437, section 4.2), the largest batch that we know of."""
SHORTEST_PART = 128
"""Tokens of a sequence that a device of the seq axis may come down to: less is no full block of our kernels."""


@dataclass(frozen=True, kw_only=True)
class _Break:
    about: str
    """What breaks; of each the first scale alone is told."""
    severity: float
    """How many times slower than compute alone, or larger than allowed; a run that cannot start comes first."""
    line: str


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """The config on one machine."""

    config: RunConfig
    target: Target
    cuts: int
    """Parts of the batch, micro-batches included: the fewest sequences."""
    traffic: Sequence[AxisTraffic]
    bound: TimeBound

    @property
    def at(self) -> str:
        return f"on {self.target.devices:,} devices ({self.target})"


def what_breaks_first(config: RunConfig, target: Target) -> list[str]:
    """What stops or slows a config on its target, on 4,096 devices or on 65,536, the worst first; each with the key,
    its value, and what to do. Empty for processors.

    Raises:
        UserError: the mesh does not suit the target.
    """
    if isinstance(target, CpuTarget):
        return []
    found: dict[str, _Break] = {}
    for machine in (target, *(grown for devices in SCALES if (grown := larger(target, devices)) is not None)):
        scale = _scaled(config, target, machine)
        for one in _breaks(config, scale) if isinstance(scale, _Scale) else (scale,):
            found.setdefault(one.about, one)
    return [one.line for one in sorted(found.values(), key=lambda one: -one.severity)]


def _scaled(config: RunConfig, target: Target, machine: Target) -> _Scale | _Break:
    """The config with a longer data axis, and a larger batch if need be; or why there is none."""
    sizes = config.sharding.sizes(target.devices)
    rest = target.devices // sizes["data"]
    slices = machine.slices if isinstance(machine, TpuTarget) else 1
    sharding = config.sharding
    if machine is not target:
        data = machine.devices // rest
        if data * rest != machine.devices or data % slices:
            each = machine.devices // slices
            return _Break(
                about="other axes",
                severity=1e8,
                line=f"on {machine.devices:,} devices ({machine}): the axes besides sharding.data take {rest:,} "
                f"devices, which do not divide {each:,}{' of a slice' if slices > 1 else ''}; use powers of two",
            )
        sizes["data"] = data
        # The other axes as they are: one of them may be -1.
        fsdp, stage, seq, tensor, expert = (sizes[axis] for axis in ("fsdp", "stage", "seq", "tensor", "expert"))
        sharding = replace(sharding, data=data, fsdp=fsdp, stage=stage, seq=seq, tensor=tensor, expert=expert)
        sharding = replace(sharding, slices=slices, slices_axis=SlicesAxis.DATA)
    # More devices share the batch out, so nothing but a pipeline needs micro-batches any more.
    parts = config.train.micro_batches if machine is target or sizes["stage"] > 1 else 1
    cuts = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert")) * math.lcm(sizes["stage"], parts)
    train = replace(config.train, batch_size=max(config.train.batch_size, cuts), micro_batches=parts)
    scaled = replace(config, sharding=sharding, train=train)
    traffic = estimate_traffic(scaled, machine)
    bound = estimate_time(scaled, machine, traffic)
    assert bound is not None  # of processors alone, which do not come here
    return _Scale(config=scaled, target=machine, cuts=cuts, traffic=traffic, bound=bound)


def _breaks(config: RunConfig, scale: _Scale) -> Iterator[_Break]:
    yield from _batch(config, scale)
    yield from _links(scale)
    yield from _pipeline(scale)
    yield from _fsdp(scale)


def _batch(config: RunConfig, scale: _Scale) -> Iterator[_Break]:
    """A sequence for each part of the batch, and a batch that still teaches as much a token."""
    train, cuts = config.train, scale.cuts
    if cuts > train.batch_size:
        missing = cuts / train.batch_size
        limits = " x ".join(f"{axis} {limit}" for axis, limit in _room(scale).items() if limit > 1)
        room = math.prod(_room(scale).values())
        enough = "" if room >= missing else f", which is not enough for {missing:,.1f} times"
        yield _Break(
            about="batch",
            severity=1e6 * missing,
            line=f"{scale.at}: train.batch_size = {train.batch_size:,} cannot be cut into {cuts:,} parts; use at least "
            f"{cuts:,}, or more of the axes that share a sequence or a matrix (they can still grow by "
            f"{limits or 'nothing'}{enough})",
        )
    tokens = scale.config.train.batch_size * train.seq_len
    if tokens > LARGEST_BATCH:
        yield _Break(
            about="critical batch",
            severity=tokens / LARGEST_BATCH,
            line=f"{scale.at}: train.batch_size = {scale.config.train.batch_size:,} makes {tokens:,} tokens a step, "
            f"DeepSeek-V3 had {LARGEST_BATCH:,}; beyond the critical batch size, which grows as the loss falls "
            "(arXiv:1812.06162), a larger batch saves few steps: use more of tensor or seq instead of data",
        )


def _room(scale: _Scale) -> dict[str, int]:
    """Axis -> by how much it can still grow, of those that do not cut the batch, as a pipeline's stages do too."""
    model, sizes = scale.config.model, scale.config.sharding.sizes(scale.target.devices)
    attentions = [block.attention for block in (*model.first_blocks, *model.blocks)]
    widest = math.gcd(*(one.n_heads for one in attentions), *(one.n_kv_heads for one in attentions), model.vocab_size)
    if isinstance(scale.target, GpuTarget):
        widest = math.gcd(widest, scale.target.per_host)
    return {
        "tensor": max(1, widest // sizes["tensor"]),
        "seq": max(1, scale.config.train.seq_len // SHORTEST_PART // sizes["seq"]),
    }


def _links(scale: _Scale) -> Iterator[_Break]:
    """Axes that send for longer than their devices compute."""
    sizes = scale.config.sharding.sizes(scale.target.devices)
    compute = scale.bound.compute_seconds / (1 - scale.bound.bubble)
    for one in scale.traffic:
        if one.seconds is None or one.seconds <= compute:
            continue
        ratio = one.seconds / compute
        tokens = local_tokens(scale.config, sizes)
        match one.axis:
            case "data" | "fsdp":
                # Parameters cost the same whatever the batch: what hides them is tokens.
                fewer = ", fewer train.micro_batches" if scale.config.train.micro_batches > 1 else ""
                where = "; more of the other axes" if one.link is Link.NETWORK else ""
                remedy = (
                    f"a device has {tokens:,} tokens a step and needs {math.ceil(tokens * ratio):,}: a larger "
                    f"train.batch_size{fewer}{where}"
                )
            case "expert" if _without_buffer(scale.config):
                remedy = (
                    "model.blocks[].mlp.dispatch = Dropless() sends room for the worst case; use Dropless(buffer=2)"
                )
            case "stage" | "seq" | "expert":
                remedy = f"it crosses the {one.link.value}; use a smaller sharding.{one.axis}, or longer sequences"
            case _:
                remedy = f"use a smaller sharding.{one.axis}"
        yield _Break(
            about=f"{one.axis} over {one.link.value}",
            severity=ratio,
            line=f"{scale.at}: sharding.{one.axis} = {sizes[one.axis]:,} sends {one.sent / 1e9:,.3f} GB a step over "
            f"{one.link.value}, {one.seconds:,.3g} s against {compute:,.3g} s of compute; {remedy}",
        )


def _without_buffer(config: RunConfig) -> bool:
    ffns = [block.mlp for block in config.model.blocks]
    return any(
        isinstance(mlp, Experts) and isinstance(mlp.dispatch, Dropless) and mlp.dispatch.buffer is None for mlp in ffns
    )


def _pipeline(scale: _Scale) -> Iterator[_Break]:
    """Idle stages, and layers that stages do not divide."""
    sharding, model = scale.config.sharding, scale.config.model
    stages = sharding.sizes(scale.target.devices)["stage"]
    if stages == 1:
        return
    parts = stages * sharding.virtual_stages
    if model.repeats % parts:
        yield _Break(
            about="layers",
            severity=1e9,
            line=f"model.n_layers: {model.repeats} repeats of model.blocks do not divide into sharding.stage x "
            f"sharding.virtual_stages = {parts}; use a divisor of {model.repeats}",
        )
    if scale.bound.bubble > LARGE_BUBBLE:
        wanted = next(
            number
            for number in itertools.count(stages, stages)
            if pipeline_bubble(stages, sharding.virtual_stages, number) <= LARGE_BUBBLE
        )
        rows = scale.cuts // math.lcm(stages, scale.config.train.micro_batches) * wanted
        batch = f"with a train.batch_size that {rows:,} divides, " if scale.config.train.batch_size % rows else ""
        yield _Break(
            about="bubble",
            severity=1 / (1 - scale.bound.bubble),
            line=f"{scale.at}: train.micro_batches = {scale.config.train.micro_batches} leaves {stages} stages idle "
            f"{scale.bound.bubble:.0%} of the time; use {wanted} for {LARGE_BUBBLE:.0%}, {batch}"
            "or more sharding.virtual_stages",
        )


def _fsdp(scale: _Scale) -> Iterator[_Break]:
    """What the TPU compiler does with an fsdp axis that it does not like (docs/plan.md)."""
    sizes = scale.config.sharding.sizes(scale.target.devices)
    size, data = sizes["fsdp"], sizes["data"]
    if not isinstance(scale.target, TpuTarget) or size == 1:
        return
    if whole_torus(scale.target, size):
        yield _Break(
            about="whole torus",
            severity=2,
            line=f"{scale.at}: sharding.fsdp = {size} is the whole torus, where the TPU compiler sums whole arrays "
            f"instead of gathering and scattering: twice the bytes; use {size // 2} with sharding.data = {2 * data}",
        )
    shard = scale.config.model.d_model // size
    if shard % 128:
        yield _Break(
            about="narrow shards",
            severity=1.2,
            line=f"{scale.at}: sharding.fsdp = {size} cuts model.d_model = {scale.config.model.d_model} into shards of "
            f"{shard}, no multiple of 128 lanes; use at most {max(1, scale.config.model.d_model // 128)}",
        )
