"""What serving a model costs on a machine: bytes of weights and cache, FLOPs and bytes of a decoded token and of a
prompt, and the speed that the roofline allows.

A step lasts as long as its products at the device's peak, or as what it reads at full bandwidth: weights once, and each
text's keys and values. What devices send each other is not counted, nor what a step writes: a real one takes longer.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import (
    ACTIVATION_DIMS,
    EngineConfig,
    LmHead,
    RunConfig,
    ShardingConfig,
    StatePart,
    UserError,
)
from maxlm.config.layout_rules import broken_layout_rules
from maxlm.hardware import Chip
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Quantised
from maxlm.plan.analysis import Json, check_slices
from maxlm.plan.bound import peak_flops
from maxlm.plan.machines import Machine, Platform, memory_limit
from maxlm.plan.serving_load import ServingLoad
from maxlm.shapes import FLOAT32, Array, Part

_ENDLESS = 2**40
"""More texts than any memory has room for."""


@dataclass(frozen=True, kw_only=True)
class DeviceWork:
    """What a device does, and how long at least."""

    flops: float
    """An equal part of the tensor axis's; what that axis does not cut comes on top."""
    weight_bytes: float
    """Read: of experts those that the tokens are sent to, in expectation, if all are equally likely."""
    cache_bytes: float
    """Read: keys and values within reach."""
    compute_seconds: float | None
    """FLOPs at the peak rate of the compute dtype; None, here and below: the speed is not known."""
    memory_seconds: float | None
    """Both kinds of bytes at the memory's bandwidth."""

    @property
    def seconds(self) -> float | None:
        """At least."""
        if self.compute_seconds is None or self.memory_seconds is None:
            return None
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def limited_by(self) -> str | None:
        """ "compute" or "memory"."""
        return None if self.seconds is None else "compute" if self.seconds == self.compute_seconds else "memory"


@dataclass(frozen=True)
class ServingForecast:
    """A model that is served on a machine."""

    config: RunConfig
    target: Machine
    load: ServingLoad

    @cached_property
    def sharding(self) -> ShardingConfig:
        """As decoding uses the devices."""
        return self.config.sharding.for_decoding(self.target.devices, self.config.model.d_model)

    @cached_property
    def mesh(self) -> dict[str, int]:
        return self.sharding.sizes(self.target.devices)

    @property
    def shards(self) -> int:
        """Of the texts."""
        return math.prod(self.mesh[axis] for axis in ACTIVATION_DIMS["batch"])

    @property
    def texts(self) -> int:
        """On all devices."""
        return self.load.slots * self.shards

    @property
    def context(self) -> int:
        """Tokens of a text."""
        return self.load.context or self.config.model.max_seq_len

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return self.load.prompt or self.context

    @property
    def tokens_per_step(self) -> int:
        """Of a shard, at most."""
        engine = EngineConfig(slots=self.load.slots, tokens_per_step=self.load.tokens_per_step)
        return engine.most_tokens(on_cpu=self.target.platform is Platform.CPU)

    # Memory of a device.

    @cached_property
    def weight_bytes(self) -> int:
        """Of a device's weights, as decoding holds them."""
        return sum(self._held(array, self.mesh) for array in shapes.arrays(self.config.model))

    @cached_property
    def cache_bytes(self) -> int:
        """Of a device's part of the cache: the engine's, with `cache_tokens`."""
        return self.cache_of(self.load.slots)

    @property
    def cache_tokens(self) -> int:
        """Positions of a shard's texts, in whole blocks: what to say to `maxlm.serve` as --engine.cache_tokens."""
        return self.load.slots * self._rounded

    @cached_property
    def limit(self) -> int | None:
        """Bytes that a program may have on a device; None: not known."""
        return memory_limit(self.target)

    @cached_property
    def most_slots(self) -> int | None:
        """Texts of this length for which a shard has memory, at most; 0: the weights alone leave too little for one.
        A fifth of what the weights leave is the step's own. None: the memory is not known."""
        if self.limit is None:
            return None
        room = shapes.CACHE_SHARE * (self.limit - self.weight_bytes)
        return bisect.bisect_right(range(1, _ENDLESS), room, key=self.cache_of)

    @property
    def fits(self) -> bool:
        """Where no limit is known, everything fits."""
        return self.most_slots is None or self.load.slots <= self.most_slots

    def cache_of(self, slots: int) -> int:
        """Bytes of a device's part of the cache for so many texts of a shard."""
        model, C = self.config.model, self.load.block_size
        most = max(self.tokens_per_step, slots)
        blocks = shapes.cache_blocks(
            model, positions=slots * self._rounded, slots=slots, tokens_per_step=most, block_size=C
        )
        return self._pools_bytes(blocks, C)

    # Work of a device.

    @cached_property
    def step(self) -> DeviceWork:
        """One more token of every text."""
        slots, flops = self.load.slots, shapes.decoding_flops(self.config.model, self.context)
        read = {window: slots * min(self.context, window or self.context) for window in self._windows}
        return self._work(slots * flops, self._weights_read(slots), read)

    @cached_property
    def prefill(self) -> DeviceWork:
        """A prompt on every shard, read in as few steps as can be, with no other text beside it."""
        tokens, most = self.prompt, self.tokens_per_step
        pieces = [min(most, tokens - first) for first in range(0, tokens, most)]
        ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
        both = list(zip(ends, pieces, strict=True))
        read = {window: sum(min(end, window + n if window else end) for end, n in both) for window in self._windows}
        weights = {n: self._weights_read(n) for n in set(pieces)}
        return self._work(shapes.prefill_flops(self.config.model, tokens), sum(weights[n] for n in pieces), read)

    @property
    def tokens_per_s(self) -> float | None:
        """Of one text, at most, while all are decoded; None, here and below: not known."""
        return None if self.step.seconds is None else 1 / self.step.seconds

    @property
    def all_tokens_per_s(self) -> float | None:
        """Of all texts together."""
        return None if self.tokens_per_s is None else self.texts * self.tokens_per_s

    @cached_property
    def fullest(self) -> ServingForecast | None:
        """The same with as many texts as there is memory for; None: not known, or none fits."""
        if not self.most_slots:
            return None
        most = max(self.tokens_per_step, self.most_slots)
        return dataclasses.replace(
            self, load=dataclasses.replace(self.load, slots=self.most_slots, tokens_per_step=most)
        )

    @property
    def _itemsize(self) -> int:
        return self.config.execution.dtype.itemsize

    @property
    def _windows(self) -> tuple[int, ...]:
        return shapes.windows(self.config.model)

    @property
    def _rounded(self) -> int:
        """Positions of a text's blocks."""
        return -(-self.context // self.load.block_size) * self.load.block_size

    def _pools_bytes(self, blocks: Mapping[int, int], block_size: int) -> int:
        return shapes.pools_bytes(
            self.config.model,
            blocks,
            block_size,
            dtype=self.config.execution.dtype,
            tensor=self.mesh["tensor"],
            kept_in=self.load.kv_cache,
        )

    def _held(self, array: Array, sizes: Mapping[str, int]) -> int:
        """Bytes of a device's part of a weight, cut as `models.weights.holding` cuts it."""
        made = jax.eval_shape(
            lambda w: quantised(w, array, self.load.weights), jax.ShapeDtypeStruct(array.shape, jnp.float32)
        )
        if not isinstance(made, Quantised):
            itemsize = self._itemsize if array.role.casts else FLOAT32
            return shapes.device_bytes(array, sizes, self.sharding.zero, StatePart.PARAMETERS, itemsize)

        def part(leaf: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> int:
            cuts = shapes.device_cuts(names, sizes, self.sharding.zero)
            kept = [n if n % cut else n // cut for n, cut in zip(leaf.shape, cuts, strict=True)]
            return math.prod(kept) * leaf.dtype.itemsize

        return sum(jax.tree.leaves(jax.tree.map(part, made, made.dims(array.dims, array.inputs))))

    def _weights_read(self, rows: int) -> float:
        """Bytes of the weights that so many tokens on each shard need; what fsdp cuts is gathered first."""
        read = 0.0
        for array in shapes.arrays(self.config.model):
            share = 1.0
            if array.uses == 0:  # a table of which each token looks up a row
                share = min(1.0, rows / array.shape[0])
            elif array.part is Part.EXPERTS:
                share = experts_touched(array.uses, rows * self.mesh["expert"])
            read += share * self._held(array, self.mesh | {"fsdp": 1})
        return read

    def _work(self, flops: float, weight_bytes: float, positions: Mapping[int, int]) -> DeviceWork:
        """FLOPs of a shard, bytes of a device, and for each window how many positions are read."""
        chip, tensor, cache = self.target.hardware, self.mesh["tensor"], self._pools_bytes(positions, 1)
        seconds = (None, None) if chip is None else self._seconds(chip, flops / tensor, weight_bytes + cache)
        return DeviceWork(
            flops=flops / tensor,
            weight_bytes=weight_bytes,
            cache_bytes=cache,
            compute_seconds=seconds[0],
            memory_seconds=seconds[1],
        )

    def _seconds(self, chip: Chip, flops: float, read: float) -> tuple[float, float]:
        return flops / peak_flops(self.config, self.target, chip), read / chip.bandwidth


def experts_touched(share: float, tokens: int) -> float:
    """Of all experts, how many at least one of so many tokens is sent to: in expectation, 0..1, where each token takes
    this share of the experts, all equally likely, and knows nothing of the others: 1 - (1 - k/E)^n."""
    return 1 - (1 - share) ** tokens


def analyse_serving(config: RunConfig, target: Machine, load: ServingLoad) -> ServingForecast:
    """The forecast of a model that can be served on the machine, in the config's layout.

    Raises:
        UserError: the model has no cache or no logits, a text is longer than the model takes, or the layout does not
            suit the model or the machine.
    """
    model, devices = config.model, target.devices
    if not model.decodes:
        raise UserError(f"{model.looks_ahead}: such a model looks at later tokens and cannot be served")
    if not isinstance(model.head, LmHead):
        raise UserError(f"model.head = {type(model.head).__name__} gives no logits, so there is nothing to serve")
    for name, value in (("context", load.context), ("prompt", load.prompt)):
        if value is not None and value > model.max_seq_len:
            raise UserError(f"--{name} {value} is more than model.max_seq_len = {model.max_seq_len}; use at most that")
    sizes = config.sharding.sizes(devices)
    failures = broken_layout_rules(
        model,
        config.sharding,
        config.execution,
        n_devices=devices,
        batch_size=math.prod(sizes[axis] for axis in ACTIVATION_DIMS["batch"]),
        seq_len=model.max_seq_len,
        micro_batches=1,
    )
    if failures:
        raise UserError("\n".join(failures))
    check_slices(config.sharding, target)
    found = ServingForecast(config, target, load)
    _ = found.step, found.tokens_per_step  # now, for they may refuse the dtype, or the tokens of a step
    return found


def serving_warnings(found: ServingForecast) -> list[str]:
    """What to know before trusting these figures, a line each."""
    lines = []
    if found.limit is None:
        lines.append("the memory and speed of this target's devices are not known: it counts as fitting")
    if found.sharding.fsdp > 1:
        lines.append(
            "every step gathers the weights that fsdp cuts, over links that are not counted; serve with tensor, or "
            "with data where a device has room for all"
        )
    return lines


def serving_json(found: ServingForecast) -> dict[str, Json]:
    """Plain values; sizes in bytes, times in seconds."""
    model, fullest = found.config.model, found.fullest
    work = lambda one: dataclasses.asdict(one) | {"seconds": one.seconds, "limited_by": one.limited_by}
    return {
        "target": str(found.target),
        "devices": found.target.devices,
        "mesh": found.mesh,
        "texts": found.texts,
        "slots": found.load.slots,
        "context": found.context,
        "prompt": found.prompt,
        "tokens_per_step": found.tokens_per_step,
        "weights": found.load.weights.value,
        "kv_cache": found.load.kv_cache.value,
        "dtype": found.config.execution.dtype.value,
        "fits": found.fits,
        "hbm_bytes": found.limit,
        "weight_bytes": found.weight_bytes,
        "cache_bytes": found.cache_bytes,
        "cache_tokens": found.cache_tokens,
        "most_slots": found.most_slots,
        "flops_per_decoded_token": shapes.decoding_flops(model, found.context),
        "flops_of_prompt": shapes.prefill_flops(model, found.prompt),
        "step": work(found.step),
        "prefill": work(found.prefill),
        "tokens_per_s": found.tokens_per_s,
        "all_tokens_per_s": found.all_tokens_per_s,
        "most_tokens_per_s": None if fullest is None else fullest.all_tokens_per_s,
        "warnings": serving_warnings(found),
    }
