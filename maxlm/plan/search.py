"""Which layout to rent a machine for: every sensible mesh, remat policy, micro-batches, ZeRO stage and optimizer, by
arithmetic."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from maxlm.config import (
    Adafactor,
    AdamW,
    Dtype,
    Experts,
    Lion,
    Muon,
    OptimizerConfig,
    Remat,
    RunConfig,
    Sgd,
    ShardingConfig,
    UserError,
    Zero,
)
from maxlm.config.serialize import flatten
from maxlm.plan.analysis import Forecast, Json
from maxlm.plan.machines import GpuMachine, Machine, TpuMachine, memory_limit
from maxlm.plan.traffic import whole_torus

LONGEST_TENSOR = 16
"""Of TPUs. Beyond, a device's part of a matrix is too small for its matrix unit; GPUs end at their host."""
LONGEST_STAGE = 16
SHORTEST_PIECE = 1024
"""Tokens of a sequence that a device of the seq axis has at least, so that computing on them hides sending them."""
LANES = 128
"""Numbers in a TPU's vector: shards of d_model are whole ones (docs/plan.md)."""
MOST_ROUNDS = 8
"""Micro-batches for each stage of a pipeline: its bubble is then a tenth."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What fits on a target, best first."""

    config: RunConfig
    target: Machine
    space: int
    """Configs to choose from; of many, it is enough to know that a better one fits, or that one like it does not."""
    ranked: tuple[Forecast, ...]
    """The fastest that fits of each mesh, by `preference`. Another optimizer than the config's, which learns something
    else, is there only where it is faster than the config's on the same mesh."""

    @property
    def preferred(self) -> list[Forecast]:
        """The ranking, those with the config's optimizer first."""
        return sorted(self.ranked, key=lambda one: one.config.optimizer != self.config.optimizer)

    @property
    def best(self) -> Forecast | None:
        """The first with the config's optimizer; where that never fits the first; None: nothing fits."""
        return next(iter(self.preferred), None)


def search(config: RunConfig, target: Machine) -> Search:
    """Rank what fits. Model, batch and sequence length stay as they are.

    Raises:
        UserError: memory or speed of the target's devices is not known.
    """
    if memory_limit(target) is None:
        raise UserError(
            f"--search --target {target}: this processor's speed and memory are not known; name a machine with TPUs or "
            "GPUs, for example --target gpu:h200:8"
        )
    spaces = [MeshSpace(config, target, sharding) for sharding in layouts(config, target)]
    ranked = sorted((one for space in spaces for one in space.best(optimizers(config.optimizer))), key=preference)
    return Search(config=config, target=target, space=sum(space.size for space in spaces), ranked=tuple(ranked))


def fastest(config: RunConfig, target: Machine, choices: Sequence[OptimizerConfig]) -> Forecast | None:
    """The first that a search with these optimizers alone would rank; None: nothing fits.

    As nobody asks for the rest, little is counted of what is slower than the fastest so far. Layouts come with the
    meshes first that have no pipeline, and so no bubble.
    """
    best, within = list[Forecast](), math.inf
    for sharding in layouts(config, target):
        space = MeshSpace(config, target, sharding)
        if space.least_time <= within:
            best = sorted([*best, *space.best(choices, within)], key=preference)[:1]
            within = best[0].time.step_seconds if best else math.inf
    return best[0] if best else None


def fitting(configs: Iterable[RunConfig], target: Machine) -> Iterator[Forecast]:
    """Those that fit, by arithmetic."""
    return (one for one in (Forecast(config, target) for config in configs) if one.fits)


def layouts(config: RunConfig, target: Machine) -> Iterator[ShardingConfig]:
    """Every mesh that the rules of `config/layout_rules.py` may allow on the target, within sensible limits."""
    model, train, devices = config.model, config.train, target.devices
    experts = [block.mlp.n_experts for block in model.blocks if isinstance(block.mlp, Experts)]
    blocks = [*model.first_blocks, *model.blocks]
    widths = [n for one in blocks for n in (one.attention.n_heads, one.attention.n_kv_heads, one.mlp.d_ff)]
    longest = target.per_host if isinstance(target, GpuMachine) else LONGEST_TENSOR
    pieces = [n for n in _divisors(math.gcd(devices, train.seq_len)) if n * SHORTEST_PIECE <= train.seq_len]
    allowed = {
        "stage": [n for n in _divisors(math.gcd(devices, model.repeats)) if n <= LONGEST_STAGE],
        "seq": pieces or [1],
        "tensor": [n for n in _divisors(math.gcd(devices, model.vocab_size, *widths)) if n <= longest],
        "expert": _divisors(math.gcd(devices, *experts)) if experts else [1],
        "fsdp": [n for n in _divisors(math.gcd(devices, model.d_model)) if _suits_chip(n, model.d_model, target)],
    }
    slices = target.slices if isinstance(target, TpuMachine) else 1
    for chosen in itertools.product(*allowed.values()):
        data, rest = divmod(devices, math.prod(chosen))
        sizes = {"data": data, **dict(zip(allowed, chosen, strict=True))}
        if rest or train.batch_size % (data * sizes["fsdp"] * sizes["expert"]):
            continue
        if sizes[config.sharding.slices_axis.value] % slices:
            continue
        groups = config.sharding.virtual_stages if sizes["stage"] > 1 else 1
        yield replace(
            config.sharding.with_sizes(sizes),
            virtual_stages=groups if model.repeats % (sizes["stage"] * groups) == 0 else 1,
            sequence_parallel=sizes["tensor"] > 1 and train.seq_len % (sizes["seq"] * sizes["tensor"]) == 0,
            slices=slices,
        )


_changed = functools.cache(replace)
"""As `dataclasses.replace`, for parts of a config of which many configs have the same."""


@dataclass(frozen=True)
class MeshSpace:
    """What may be chosen on one mesh."""

    config: RunConfig
    target: Machine
    sharding: ShardingConfig
    """With the sizes of the mesh; its `zero` is chosen."""

    @property
    def size(self) -> int:
        """Of the space."""
        return math.prod(len(choices) for choices in self._choices)

    def configs(self) -> Iterator[RunConfig]:
        """All of them."""
        return (self.choose(*one) for one in itertools.product(*self._choices))

    @property
    def _choices(self) -> tuple[Sequence[OptimizerConfig], Sequence[Zero], Sequence[int], Sequence[Remat]]:
        return optimizers(self.config.optimizer), self.zeros, self.parts, remats(self.config)

    @property
    def zeros(self) -> list[Zero]:
        return list(Zero) if self.sharding.fsdp > 1 else [self.sharding.zero]

    @functools.cached_property
    def parts(self) -> list[int]:
        """Numbers of micro-batches that keep every rule; in a pipeline at most MOST_ROUNDS times the stages."""
        train, sharding = self.config.train, self.sharding
        rows = train.batch_size // (sharding.data * sharding.fsdp * sharding.expert)
        most = rows if sharding.stage == 1 else MOST_ROUNDS * sharding.stage
        powers = {2**n for n in range(rows.bit_length()) if rows % 2**n == 0 and 2**n <= most}
        whole = replace(self.config, sharding=sharding)
        broken = functools.partial(whole.broken_layout_rules, self.target.devices)
        return [parts for parts in sorted(powers | {train.micro_batches}) if not broken(parts)]

    @property
    def least_time(self) -> float:
        """Seconds that no step on this mesh can be faster than: of its products, done once, and the smallest bubble."""
        own, most = self.config.train.micro_batches, MOST_ROUNDS * self.sharding.stage
        choose = functools.partial(self.choose, self.config.optimizer, self.sharding.zero, remat=remats(self.config)[0])
        return min(Forecast(choose(parts), self.target).compute_time for parts in (own, most))

    def choose(self, optimizer: OptimizerConfig, zero: Zero, parts: int, remat: Remat) -> RunConfig:
        config = self.config
        return replace(
            config,
            execution=_changed(config.execution, remat=remat),
            train=_changed(config.train, micro_batches=parts),
            sharding=_changed(self.sharding, zero=zero),
            optimizer=optimizer,
        )

    def best(self, choices: Sequence[OptimizerConfig], within: float = math.inf) -> list[Forecast]:
        """The fastest with the first optimizer, and with others where these are faster, because the first needs more
        micro-batches or recomputation to fit; what takes more than `within` seconds a step may be left out."""
        found: list[Forecast] = []
        for optimizer in choices:
            first = min(self._fitting(optimizer, within), key=preference, default=None)
            if first is None or (found and found[-1].time.step_seconds <= first.time.step_seconds):
                continue
            found.append(first)
            train, remat = first.config.train, first.config.execution.remat
            if train.micro_batches == self.parts[0] and remat is remats(self.config)[0]:
                break  # it does as it likes
        return found

    def _fitting(self, optimizer: OptimizerConfig, within: float) -> Iterator[Forecast]:
        """Of each ZeRO stage and number of micro-batches the one that recomputes least. Without a pipeline more
        micro-batches only take longer, so they must save something: recomputation."""
        forecast = lambda *choices: Forecast(self.choose(optimizer, *choices), self.target)
        least, *_, most = remats(self.config)
        # The least memory there is: many micro-batches have few activations, one needs no room to add up gradients.
        room = lambda zero: any(forecast(zero, self.parts[end], most).fits for end in (-1, 0))
        for zero in self.zeros if self.parts and room(self.zeros[-1]) else ():  # the last one cuts most
            policies = remats(self.config)
            if not room(zero):
                continue
            if self.sharding.stage == 1 and forecast(zero, self.parts[0], least).busiest_link > within:
                continue
            for parts in self.parts:
                if not policies:
                    break
                if forecast(zero, parts, least).compute_time > within or not forecast(zero, parts, most).fits:
                    continue
                for i, remat in enumerate(policies):
                    if (one := forecast(zero, parts, remat)).compute_time > within:
                        break  # and so of those that recompute more
                    if one.fits:
                        yield one
                        policies = policies[:i] if self.sharding.stage == 1 else policies
                        break


def remats(config: RunConfig) -> list[Remat]:
    """Policies to choose from; the host's memory, whose speed is not modelled, only if the config has it already."""
    return [remat for remat in Remat if remat is not Remat.OFFLOAD or config.execution.remat is Remat.OFFLOAD]


def optimizers(own: OptimizerConfig) -> list[OptimizerConfig]:
    """The config's own, then those that keep less."""
    less = replace(own, moment_dtype=Dtype.BFLOAT16)
    found = [own, less] if less != own else [own]
    match own:
        case AdamW():
            common = {
                name: getattr(own, name) for name in ("schedule", "weight_decay", "clip_norm", "groups", "average")
            }
            return [*found, Adafactor(**common)]
        case Adafactor(b1=0.0):
            return [own]
        case Adafactor() | Lion() | Muon() | Sgd():
            return found
        case _:
            assert_never(own)


def differences(config: RunConfig, original: RunConfig) -> tuple[str, ...]:
    """The keys that changed, as key = value; an axis or optimizer appears with all that comes with it."""
    before, after = flatten(original), flatten(config)
    if type(config.optimizer) is not type(original.optimizer):
        after = {key: value for key, value in after.items() if not key.startswith("optimizer.")}
    return tuple(f"{key} = {value}" for key, value in after.items() if key not in before or before[key] != value)


def search_json(found: Search, chosen: Forecast | None, most: int = 100) -> dict[str, Json]:
    """The ranking as plain values, cut after `most`."""
    return {
        "target": str(found.target),
        "devices": found.target.devices,
        "space": found.space,
        "fits": chosen is not None,
        "chosen": None if chosen is None else found.ranked.index(chosen),
        "ranked": [candidate_json(one, found.config) for one in found.ranked[:most]],
    }


def candidate_json(one: Forecast, original: RunConfig) -> dict[str, Json]:
    """A config of a search as plain values; sizes in bytes, times in seconds."""
    config, bound = one.config, one.time
    compiled: dict[str, Json] = {} if one.compiled is None else {"compiled_peak_bytes": one.peak}
    return {
        "changes": differences(config, spelled_out(original, one.target)),
        "mesh": one.mesh,
        "remat": config.execution.remat.value,
        "micro_batches": config.train.micro_batches,
        "zero": config.sharding.zero.value,
        "optimizer": type(config.optimizer).__name__,
        "peak_bytes": one.memory.peak,
        "margin_bytes": one.analytic_margin,
        "step_seconds": bound.step_seconds,
        "mfu_ceiling": bound.mfu_ceiling,
        "limited_by": bound.limited_by,
        "device_seconds_per_token": one.cost,
        "sent_bytes": sum(axis.sent for axis in one.traffic),
        **compiled,
    }


def spelled_out(config: RunConfig, target: Machine) -> RunConfig:
    """The config with the size that stands for -1; as it is if its mesh is for another machine."""
    try:
        sizes = config.sharding.sizes(target.devices)
    except UserError:
        return config
    return replace(config, sharding=config.sharding.with_sizes(sizes))


def preference(one: Forecast) -> tuple[float, float, int]:
    """The smallest bound on the step, then the least work in all, for not everything will overlap; then the margin.

    Of many meshes the bound is the same, that of compute: their links could keep up, at best.
    """
    bound = one.time
    work = bound.compute_seconds + bound.memory_seconds + sum(bound.traffic_seconds.values())
    return bound.step_seconds, work, -one.margin


def _suits_chip(fsdp: int, d_model: int, target: Machine) -> bool:
    """Where TPUs are slow with an fsdp axis: narrow shards, and the whole of a 3-D torus of 64 chips or more
    (docs/plan.md)."""
    if not isinstance(target, TpuMachine) or fsdp == 1:
        return True
    return d_model // fsdp % LANES == 0 and not whole_torus(target, fsdp)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
