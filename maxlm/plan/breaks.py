"""What stands in the way of a run on more chips: the config as it is, laid out over 4,096 and 65,536 of them on paper.

Growing means more of the data axis, since tensor, seq, stage, expert and fsdp change what a device computes: so the
batch runs out first. All else is looked at with the smallest batch that such a mesh can share out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from maxlm.config import Dropless, Experts, RunConfig, SlicesAxis, pipeline_bubble
from maxlm.plan.analysis import Forecast
from maxlm.plan.machines import CpuMachine, GpuMachine, Machine, TpuMachine, larger
from maxlm.plan.search import LANES
from maxlm.plan.traffic import Link, whole_torus
from maxlm.plan.work import local_tokens

SCALES = (4_096, 65_536)
"""Devices to grow to."""
LARGE_BUBBLE = 0.1
"""Idle share of a pipeline that is worth a word."""
LARGEST_BATCH = 15_360 * 4_096
"""Tokens: DeepSeek-V3's (arXiv:2412.19437, section 4.2), the largest batch that we know of."""
SHORTEST_PART = 128
"""Tokens of a sequence that a device of the seq axis may come down to: less is no full block of our kernels."""


class _Break(NamedTuple):
    about: str
    """What breaks; of each the first scale alone is told."""
    severity: float
    """How many times slower than compute alone, or larger than allowed; a run that cannot start comes first."""
    line: str


def what_breaks_first(config: RunConfig, target: Machine) -> list[str]:
    """What stops or slows a config on its target, on 4,096 devices or on 65,536, the worst first; each with the key,
    its value, and what to do. Empty for processors.

    Raises:
        UserError: the mesh does not suit the target.
    """
    if isinstance(target, CpuMachine):
        return []
    found: dict[str, _Break] = {}
    grown = [larger(target, devices) for devices in SCALES]
    for machine in (target, *(one for one in grown if one is not None)):
        for one in _breaks(config, target, machine):
            at = f"on {machine.devices:,} devices ({machine})"
            found.setdefault(one.about, one._replace(line=f"{at}: {one.line}"))
    return [one.line for one in sorted(found.values(), key=lambda one: -one.severity)]


def _breaks(config: RunConfig, target: Machine, machine: Machine) -> Iterator[_Break]:
    """Of the config with a data axis that fills the machine, and a larger batch if need be."""
    sizes, sharding = config.sharding.sizes(target.devices), config.sharding
    if machine is not target:
        slices = machine.slices if isinstance(machine, TpuMachine) else 1
        rest = target.devices // sizes["data"]
        sizes["data"], left = divmod(machine.devices, rest)
        if left or sizes["data"] % slices:
            each = f"{machine.devices // slices:,}{' of a slice' if slices > 1 else ''}"
            yield _Break(
                "other axes",
                1e8,
                f"the axes besides sharding.data take {rest:,} devices, which do not divide {each}; use powers of two",
            )
            return
        # The other axes as they are: one of them may be -1.
        sharding = replace(sharding.with_sizes(sizes), slices=slices, slices_axis=SlicesAxis.DATA)
    # More devices share the batch out, so nothing but a pipeline needs micro-batches any more.
    parts = config.train.micro_batches if machine is target or sizes["stage"] > 1 else 1
    cuts = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert")) * math.lcm(sizes["stage"], parts)
    train = replace(config.train, batch_size=max(config.train.batch_size, cuts), micro_batches=parts)
    scaled = Forecast(replace(config, sharding=sharding, train=train), machine)
    yield from _batch(config.train.batch_size, scaled, cuts)
    yield from _links(scaled)
    yield from _pipeline(scaled, cuts)
    yield from _fsdp(scaled)


def _batch(batch_size: int, scaled: Forecast, cuts: int) -> Iterator[_Break]:
    """A sequence for each of so many parts of the batch, and a batch that still teaches as much a token."""
    if cuts > batch_size:
        missing, room = cuts / batch_size, _room(scaled)
        limits = " x ".join(f"{axis} {limit}" for axis, limit in room.items() if limit > 1)
        enough = "" if math.prod(room.values()) >= missing else f", which is not enough for {missing:,.1f} times"
        yield _Break(
            "batch",
            1e6 * missing,
            f"train.batch_size = {batch_size:,} cannot be cut into {cuts:,} parts; use at least {cuts:,}, "
            "or more of the axes that share a sequence or a matrix (they can still grow by "
            f"{limits or 'nothing'}{enough})",
        )
    if scaled.tokens > LARGEST_BATCH:
        yield _Break(
            "critical batch",
            scaled.tokens / LARGEST_BATCH,
            f"train.batch_size = {scaled.config.train.batch_size:,} makes {scaled.tokens:,} tokens a step, "
            f"DeepSeek-V3 had {LARGEST_BATCH:,}; beyond the critical batch size, which grows as the loss falls "
            "(arXiv:1812.06162), a larger batch saves few steps: use more of tensor or seq instead of data",
        )


def _room(scaled: Forecast) -> dict[str, int]:
    """Axis -> by how much it can still grow, of those that do not cut the batch, as a pipeline's stages do too."""
    model, sizes = scaled.config.model, scaled.mesh
    attentions = [block.attention for block in model.layers]
    widest = math.gcd(*(one.n_heads for one in attentions), *(one.n_kv_heads for one in attentions), model.vocab_size)
    if isinstance(scaled.target, GpuMachine):
        widest = math.gcd(widest, scaled.target.per_host)
    return {
        "tensor": max(1, widest // sizes["tensor"]),
        "seq": max(1, scaled.config.train.seq_len // SHORTEST_PART // sizes["seq"]),
    }


def _links(scaled: Forecast) -> Iterator[_Break]:
    """Axes that send for longer than their devices compute."""
    sizes, config = scaled.mesh, scaled.config
    tokens, compute = local_tokens(config, sizes), scaled.time.compute_seconds / (1 - scaled.time.bubble)
    mlps = [block.mlp for block in config.model.blocks]
    for one in scaled.traffic:
        if one.seconds is None or one.seconds <= compute:
            continue
        ratio = one.seconds / compute
        match one.axis:
            case "data" | "fsdp":
                # Parameters cost the same whatever the batch: what hides them is tokens.
                fewer = ", fewer train.micro_batches" if config.train.micro_batches > 1 else ""
                where = "; more of the other axes" if one.link is Link.NETWORK else ""
                remedy = (
                    f"a device has {tokens:,} tokens a step and needs {math.ceil(tokens * ratio):,}: a larger "
                    f"train.batch_size{fewer}{where}"
                )
            case "expert" if any(isinstance(mlp, Experts) and mlp.dispatch == Dropless() for mlp in mlps):
                remedy = (
                    "model.blocks[].mlp.dispatch = Dropless() sends room for the worst case; use Dropless(buffer=2)"
                )
            case "stage" | "seq" | "expert":
                remedy = f"it crosses the {one.link.value}; use a smaller sharding.{one.axis}, or longer sequences"
            case _:
                remedy = f"use a smaller sharding.{one.axis}"
        yield _Break(
            f"{one.axis} over {one.link.value}",
            ratio,
            f"sharding.{one.axis} = {sizes[one.axis]:,} sends {one.sent / 1e9:,.3f} GB a step over "
            f"{one.link.value}, {one.seconds:,.3g} s against {compute:,.3g} s of compute; {remedy}",
        )


def _pipeline(scaled: Forecast, cuts: int) -> Iterator[_Break]:
    """Idle stages."""
    train, groups, stages = scaled.config.train, scaled.config.sharding.virtual_stages, scaled.mesh["stage"]
    if (bubble := scaled.time.bubble) > LARGE_BUBBLE:
        enough = lambda number: pipeline_bubble(stages, groups, number) <= LARGE_BUBBLE
        wanted = next(filter(enough, itertools.count(stages, stages)))
        rows = cuts // math.lcm(stages, train.micro_batches) * wanted
        batch = f"with a train.batch_size that {rows:,} divides, " if train.batch_size % rows else ""
        yield _Break(
            "bubble",
            1 / (1 - bubble),
            f"train.micro_batches = {train.micro_batches} leaves {stages} stages idle {bubble:.0%} of the time; "
            f"use {wanted} for {LARGE_BUBBLE:.0%}, {batch}or more sharding.virtual_stages",
        )


def _fsdp(scaled: Forecast) -> Iterator[_Break]:
    """What the TPU compiler does with an fsdp axis that it does not like (docs/plan.md)."""
    size, data, width = scaled.mesh["fsdp"], scaled.mesh["data"], scaled.config.model.d_model
    if not isinstance(scaled.target, TpuMachine) or size == 1:
        return
    if whole_torus(scaled.target, size):
        yield _Break(
            "whole torus",
            2,
            f"sharding.fsdp = {size} is the whole torus, where the TPU compiler sums whole arrays "
            f"instead of gathering and scattering: twice the bytes; use {size // 2} with sharding.data = {2 * data}",
        )
    if width // size % LANES:
        yield _Break(
            "narrow shards",
            1.2,
            f"sharding.fsdp = {size} cuts model.d_model = {width} into shards of {width // size}, no multiple of "
            f"{LANES} lanes; use at most {max(1, width // LANES)}",
        )
