"""A config with the same kinds of everything and small sizes, so that a minute on any machine is enough."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, assert_never

from maxlm.config import (
    MESH_AXES,
    Alibi,
    Attention,
    BlockConfig,
    Capacity,
    ConstantSchedule,
    Dropless,
    ExpertGroups,
    Experts,
    FixedPattern,
    GatedMlp,
    GlmRope,
    GroupedQuery,
    LatentAttention,
    Learned,
    LmHead,
    Mlp,
    ModelConfig,
    NoisyTopKRouter,
    Pretrain,
    RelativeBias,
    RelativeSinusoids,
    Rope,
    RunConfig,
    ShardingConfig,
    SigmoidRouter,
    StridedPattern,
    TopKRouter,
    serialize,
)
from maxlm.config.mixture import ExpertChoiceRouter, Router
from maxlm.config.model import MlpConfig

SEQ_LEN = 64
BATCH_SIZE = 16
"""A multiple of what any mesh of axes of two devices cuts it into, twice over."""
MICRO_BATCHES = 2
D_MODEL, D_FF, VOCAB_SIZE = 128, 256, 256
_WINDOW, _CHUNK = 16, 16
_HEADS, _EXPERTS, _EXPERT_WIDTH, _CHOICES = 4, 8, 128, 4


def mesh_kinds(sharding: ShardingConfig, n_devices: int | None) -> list[str]:
    """The mesh axes that cut something on so many devices; of a machine that nobody named, also what takes the rest."""
    if n_devices is not None:
        return [axis for axis, size in sharding.sizes(n_devices).items() if size > 1]
    return [axis for axis in MESH_AXES if getattr(sharding, axis) != 1]


class Shrunk(NamedTuple):
    """What is checked in place of a config."""

    config: RunConfig
    changes: list[str]
    """`key old -> new`, of each."""
    devices: int
    """That its mesh has: two along each axis."""


def shrink(config: RunConfig, n_devices: int | None) -> Shrunk:
    """The config with small sizes: its kinds of blocks, their pattern, its kernels, number format, optimizer and axes
    of the mesh stay; what learns otherwise than by the next token becomes that.

    Args:
        config: any.
        n_devices: of the machine that it is meant for; None: not known.

    Raises:
        UserError: the mesh does not fit that machine.
    """
    kinds = mesh_kinds(config.sharding, n_devices) or ["data"]
    sharding = _small_mesh(config.sharding, kinds)
    model = _small_model(config.model, max(1, sharding.stage) * sharding.virtual_stages)
    small = replace(
        config,
        model=model,
        sharding=sharding,
        train=replace(
            config.train,
            steps=10_000,
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            micro_batches=MICRO_BATCHES,
            loss_chunk=min(config.train.loss_chunk, 100),
            profile_steps=None,
            phases=(),
            rollback=None,
        ),
        optimizer=replace(config.optimizer, schedule=ConstantSchedule()),
        checkpoint=replace(config.checkpoint, init_from=None),
        task=Pretrain(),
    )
    return Shrunk(small, _changes(config, small), 2 ** len(kinds))


def fit_mesh(sharding: ShardingConfig, n_devices: int) -> ShardingConfig | None:
    """The mesh of twos on so many devices: axes are left out, the slowest network's first; None: it is one device."""
    kinds = [axis for axis in MESH_AXES if getattr(sharding, axis) == 2]
    while 2 ** len(kinds) > n_devices:
        kinds.pop(0)
    return _small_mesh(sharding, kinds) if kinds else None


def _small_mesh(sharding: ShardingConfig, kinds: list[str]) -> ShardingConfig:
    sizes = {axis: 2 if axis in kinds else 1 for axis in MESH_AXES}
    groups = min(sharding.virtual_stages, 2) if "stage" in kinds else 1
    return replace(sharding.with_sizes(sizes), virtual_stages=groups, slices=1)


def _small_model(model: ModelConfig, multiple: int) -> ModelConfig:
    """Its repeats are a multiple of `multiple`."""
    first = tuple(dict.fromkeys(_small_block(block) for block in model.first_blocks))
    blocks = tuple(_small_block(block) for block in model.blocks)
    repeats = math.lcm(multiple, 2 if len(blocks) <= 2 else 1)
    head = model.lm_head or LmHead()
    if head.scale is not None:  # so that logits are as large as those of the wide model
        head = replace(head, scale=head.scale * math.sqrt(model.d_model / D_MODEL))
    return replace(
        model,
        vocab_size=VOCAB_SIZE,
        d_model=D_MODEL,
        n_layers=len(first) + repeats * len(blocks),
        first_blocks=first,
        blocks=blocks,
        # The others know positions beyond it, or choose how they stretch by it.
        max_seq_len=SEQ_LEN if isinstance(model.embedded_position, Learned) else max(model.max_seq_len, SEQ_LEN),
        mup_base_width=None if model.mup_base_width is None else max(1, round(D_MODEL / model.wider)),
        head=head,
        medusa=None,
        mtp=None,
        adapter=None,
    )


def _small_block(block: BlockConfig) -> BlockConfig:
    return replace(block, attention=_small_attention(block.attention), mlp=_small_mlp(block.mlp))


def _small_attention(attention: Attention) -> Attention:
    match attention:
        case GroupedQuery():
            heads = min(attention.n_heads, _HEADS)
            groups = min(attention.n_kv_heads, 2) if attention.n_kv_heads < attention.n_heads else heads
            return replace(
                attention,
                n_heads=heads,
                n_kv_heads=groups,
                position=_small_position(attention.position),
                window=None if attention.window is None else min(attention.window, _WINDOW),
                pattern=_small_pattern(attention.pattern),
                log_length=None if attention.log_length is None else min(attention.log_length, _WINDOW),
            )
        case LatentAttention():
            rank = attention.query_rank
            return replace(
                attention,
                n_heads=min(attention.n_heads, _HEADS),
                kv_rank=min(attention.kv_rank, 64),
                query_rank=None if rank is None else min(rank, 96),
            )
        case _:
            assert_never(attention)


def _small_position(position: Any) -> Any:
    match position:
        case RelativeSinusoids(dims=dims):
            return RelativeSinusoids(dims=min(dims, D_MODEL))
        case Rope() | GlmRope() | Alibi() | RelativeBias() | None:
            return position
        case _:
            assert_never(position)


def _small_pattern(pattern: StridedPattern | FixedPattern | None) -> StridedPattern | FixedPattern | None:
    match pattern:
        case None:
            return None
        case StridedPattern(stride=stride):
            return StridedPattern(stride=min(stride, _CHUNK))
        case FixedPattern(chunk=chunk, summary=summary):
            return FixedPattern(chunk=min(chunk, _CHUNK), summary=min(summary, chunk, _CHUNK // 4))
        case _:
            assert_never(pattern)


def _small_mlp(mlp: MlpConfig) -> MlpConfig:
    match mlp:
        case Mlp() | GatedMlp():
            return replace(mlp, d_ff=min(mlp.d_ff, D_FF))
        case Experts(n_experts=n_experts, dispatch=dispatch):
            match dispatch:
                case Capacity(group_size=size):
                    dispatch = replace(dispatch, group_size=None if size is None else min(size, _CHUNK))
                case Dropless(buffer=buffer):  # with two devices an even share twice over is room for the worst case
                    dispatch = replace(dispatch, buffer=None if buffer is None else max(buffer, 2.0))
                case _:
                    assert_never(dispatch)
            n_experts = min(n_experts, _EXPERTS)
            return replace(
                mlp,
                n_experts=n_experts,
                d_ff=min(mlp.d_ff, _EXPERT_WIDTH),
                n_shared_experts=min(mlp.n_shared_experts, 2),
                router=_small_router(mlp.router, n_experts),
                dispatch=dispatch,
            )
        case _:
            assert_never(mlp)


def _small_router(router: Router, n_experts: int) -> Router:
    match router:
        case ExpertChoiceRouter():
            return router
        case NoisyTopKRouter(top_k=top_k):
            return replace(router, top_k=min(top_k, _CHOICES, n_experts))
        case TopKRouter(top_k=top_k, groups=groups) | SigmoidRouter(top_k=top_k, groups=groups):
            if groups is not None:
                groups = ExpertGroups(n_groups=n_experts // 2, top_groups=min(groups.top_groups, n_experts // 2, 2))
                n_experts = 2 * groups.top_groups  # that a token may choose among
            return replace(router, top_k=min(top_k, _CHOICES, n_experts), groups=groups)
        case _:
            assert_never(router)


def without_balancing(model: ModelConfig) -> ModelConfig:
    """The model without the losses that are about one micro-batch each (`train.micro_batches`)."""

    def plain(block: BlockConfig) -> BlockConfig:
        match block.mlp:
            case Experts(router=TopKRouter() as router):
                quiet: Router = replace(router, load_balance=0.0)
            case Experts(router=NoisyTopKRouter() as router):
                quiet = replace(router, importance_loss=0.0, load_loss=0.0)
            case _:
                return block
        return replace(block, mlp=replace(block.mlp, router=quiet))

    return replace(model, blocks=tuple(map(plain, model.blocks)))


def _changes(before: RunConfig, after: RunConfig) -> list[str]:
    old, new = serialize.flatten(before), serialize.flatten(after)
    lines = [f"{key} {value} -> {new[key]}" for key, value in old.items() if key in new and new[key] != value]
    gone = [key for key in old if key not in new and isinstance(old[key], str) and old[key][:1].isupper()]
    return lines + [f"{key} left out" for key in gone]
