"""The rules between a model, its batch and the mesh: what divides what, so that every device gets an equal part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from maxlm.config.attention import Attention, GroupedQuery, LatentAttention
from maxlm.config.errors import UserError
from maxlm.config.execution import Backend, ExecutionConfig
from maxlm.config.mixture import Capacity, Experts
from maxlm.config.model import BlockConfig, ModelConfig, padded_vocabulary
from maxlm.config.sharding import MESH_AXES, Context, ShardingConfig


def broken_layout_rules(
    model: ModelConfig,
    sharding: ShardingConfig,
    execution: ExecutionConfig,
    *,
    n_devices: int,
    batch_size: int,
    seq_len: int,
    micro_batches: int,
) -> list[str]:
    """One line for each rule that does not hold: key, value, rule, and values that would work.

    Args:
        model: its sizes and blocks.
        sharding: sizes of the mesh axes, with at most one -1.
        execution: of it the kernels.
        n_devices: what the mesh has to fill.
        batch_size, seq_len, micro_batches: as in TrainConfig.
    """
    failures = []
    try:
        sizes = sharding.sizes(n_devices)
    except UserError as error:
        failures.append(str(error))
        sizes = {axis: max(1, getattr(sharding, axis)) for axis in MESH_AXES}
    rules = _Rules(model, sharding, execution, sizes, n_devices, batch_size, seq_len, micro_batches)
    return [*failures, *rules.broken()]


@dataclass(frozen=True)
class _Rules:
    model: ModelConfig
    sharding: ShardingConfig
    execution: ExecutionConfig
    sizes: dict[str, int]
    n_devices: int
    batch_size: int
    seq_len: int
    micro_batches: int

    def broken(self) -> Iterator[str]:
        yield from self._of_slices()
        yield from self._of_batches()
        yield from self._of_sequences()
        yield from self._of_layers()
        yield from self._axis_divides("fsdp", "model.d_model", self.model.d_model)
        vocab = self.model.vocab_size
        for line in self._axis_divides("tensor", "model.vocab_size", vocab):
            padded = padded_vocabulary(vocab, self.sizes["tensor"])
            yield f"{line}; or use model.vocab_size = {padded}, whose last rows no id uses"
        for key, blocks in (("model.first_blocks", self.model.first_blocks), ("model.blocks", self.model.blocks)):
            for i, block in enumerate(blocks):
                yield from self._of_block(f"{key}.{i}", block)

    def _of_slices(self) -> Iterator[str]:
        slices, axis = self.sharding.slices, self.sharding.slices_axis.value
        if self.sizes[axis] % slices == 0:
            return
        works = [d for d in range(1, self.n_devices + 1) if self.n_devices % d == 0]
        remedy = f"sharding.slices may be one of {works}"
        if slices in works:
            remedy = f"sharding.{axis} may be one of {[d for d in works if d % slices == 0]}"
        yield (
            f"sharding.slices = {slices} does not divide sharding.{axis} = {self.sizes[axis]}, which spans the slices; "
            f"{remedy}"
        )

    def _of_batches(self) -> Iterator[str]:
        stages, parts = self.sizes["stage"], self.micro_batches
        rows = {f"sharding.{axis}": self.sizes[axis] for axis in ("data", "fsdp", "expert")}
        if stages == 1:
            rows["train.micro_batches"] = parts
        else:  # a micro-batch is cut over the other axes; outside the pipeline the batch is cut over the stages too
            both = f"least common multiple of sharding.stage {stages} and train.micro_batches {parts}:"
            rows[both] = math.lcm(stages, parts)
        yield from _multiple("train.batch_size", self.batch_size, rows)

    def _of_sequences(self) -> Iterator[str]:
        seq, tensor, context = self.sizes["seq"], self.sizes["tensor"], self.sharding.context
        if seq > 1 and context is Context.RING:
            pieces = {"pieces for sharding.context = ring:": 2, "sharding.seq": seq}
            yield from _multiple("train.seq_len", self.seq_len, pieces)
            if self.execution.kernels.attention is Backend.CUDNN:
                yield (
                    "execution.kernels.attention = cudnn gives no logsumexp, by which sharding.context = ring merges "
                    "its parts; use execution.kernels.attention = auto, or sharding.context = ulysses"
                )
        else:
            yield from self._axis_divides("seq", "train.seq_len", self.seq_len)
        if self.sharding.sequence_parallel and tensor > 1:
            axes = {"sharding.seq": seq, "with sharding.sequence_parallel sharding.tensor": tensor}
            yield from _multiple("train.seq_len", self.seq_len, axes)

    def _of_layers(self) -> Iterator[str]:
        model, groups = self.model, self.sharding.virtual_stages
        stages, experts = self.sizes["stage"], self.sizes["expert"]
        if stages == 1 and groups > 1:
            yield f"sharding.virtual_stages = {groups} needs a pipeline, but sharding.stage = 1; use 1"
        if stages > 1 and model.repeats % (stages * groups):
            below = model.repeats - model.repeats % (stages * groups)
            works = [len(model.first_blocks) + n * len(model.blocks) for n in (below, below + stages * groups) if n]
            yield (
                f"model.n_layers = {model.n_layers} has model.blocks {model.repeats} times, which is not a multiple of "
                f"{stages * groups} (sharding.stage {stages} x sharding.virtual_stages {groups}); "
                f"use {' or '.join(map(str, works))}"
            )
        if experts > 1 and not any(isinstance(block.mlp, Experts) for block in model.blocks):
            yield (
                f"sharding.expert = {experts} finds no experts in this model, and would be one more data axis; use "
                f"sharding.expert = 1 and sharding.data = {self.sizes['data'] * experts}"
            )

    def _of_block(self, key: str, block: BlockConfig) -> Iterator[str]:
        attention = block.attention
        yield from self._axis_divides("tensor", f"{key}.attention.n_heads", attention.n_heads)
        match attention:
            case GroupedQuery(n_kv_heads=n_kv_heads, pattern=pattern):
                yield from self._axis_divides("tensor", f"{key}.attention.n_kv_heads", n_kv_heads)
                if pattern is not None and self.sizes["seq"] > 1 and self.sharding.context is Context.RING:
                    yield (
                        f"{key}.attention.pattern = {type(pattern).__name__} is no window, and sharding.context = ring "
                        "cuts windows alone; use sharding.context = all_gather or ulysses"
                    )
            case LatentAttention(kv_rank=kv_rank, query_rank=query_rank):
                yield from self._axis_divides("fsdp", f"{key}.attention.kv_rank", kv_rank)
                if query_rank is not None:
                    yield from self._axis_divides("fsdp", f"{key}.attention.query_rank", query_rank)
            case _:
                assert_never(attention)
        yield from self._axis_divides("tensor", f"{key}.mlp.d_ff", block.mlp.d_ff)
        if self.sharding.context is Context.ULYSSES:
            yield from self._ulysses(key, attention)
        if isinstance(block.mlp, Experts):
            yield from self._axis_divides("expert", f"{key}.mlp.n_experts", block.mlp.n_experts)
            if isinstance(block.mlp.dispatch, Capacity):
                yield from self._groups(f"{key}.mlp.dispatch.group_size", block.mlp.dispatch)

    def _ulysses(self, key: str, attention: Attention) -> Iterator[str]:
        """Each device takes whole heads, of the queries and of the keys."""
        heads, kv_heads = (max(1, n // self.sizes["tensor"]) for n in (attention.n_heads, attention.n_kv_heads))
        fits = lambda seq: heads % seq == 0 and (kv_heads % seq == 0 or seq % kv_heads == 0)
        if not fits(self.sizes["seq"]):
            works = [seq for seq in range(1, heads + 1) if fits(seq) and self.n_devices % seq == 0]
            yield (
                f"sharding.seq = {self.sizes['seq']} must divide the {heads} query heads that a device of the tensor "
                f"axis has of {key}.attention, and divide or be a multiple of its {kv_heads} key heads, as "
                f"sharding.context = ulysses; sharding.seq may be one of {works}"
            )

    def _groups(self, key: str, dispatch: Capacity) -> Iterator[str]:
        """A group of consecutive tokens lies on one device."""
        halves = 2 if self.sharding.context is Context.RING and self.sizes["seq"] > 1 else 1
        here, rest = divmod(self.seq_len, halves * self.sizes["seq"])
        group = dispatch.group(self.seq_len)
        if not rest and here % group:
            divisors = [size for size in range(1, here + 1) if here % size == 0]
            works = [d for d in divisors if d < group][-1:] + [d for d in divisors if d > group][:1]
            chunk = " in one piece" if halves == 2 else ""
            yield (
                f"{key} = {dispatch.group_size} makes groups of {group} tokens, which do not divide the {here} that a "
                f"device has{chunk} of a sequence (train.seq_len {self.seq_len}, sharding.seq {self.sizes['seq']}); "
                f"use {' or '.join(map(str, works))}"
            )

    def _axis_divides(self, axis: str, key: str, value: int) -> Iterator[str]:
        if value % self.sizes[axis]:
            works = [d for d in range(1, value + 1) if value % d == 0 and self.n_devices % d == 0]
            yield (
                f"sharding.{axis} = {self.sizes[axis]} does not divide {key} = {value}; "
                f"sharding.{axis} may be one of {works}"
            )


def _multiple(key: str, value: int, factors: dict[str, int]) -> Iterator[str]:
    """The value is a multiple of the product of factors, given by name."""
    of = math.prod(factors.values())
    if value % of:
        below = value - value % of
        works = f"{below} or {below + of}" if below else f"{of}"
        why = " x ".join(f"{name} {factor}" for name, factor in factors.items() if factor > 1)
        yield f"{key} = {value} is not a multiple of {of} ({why}); use {works}"
