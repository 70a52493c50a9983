"""Every parameter of a model from its config alone: name, shape, dims, and the bytes that a device holds of it.

The models themselves declare their parameters where they use them (`maxlm/models/`), which needs jax. Here is the same
list as plain arithmetic, so that a plan takes milliseconds; tests hold the two together.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import assert_never

from maxlm.config import (
    CUT_BY_FSDP,
    PARAMETER_DIMS,
    AttentionConfig,
    BlockConfig,
    Dtype,
    ExpertChoiceRouter,
    FfnConfig,
    GluConfig,
    ModelConfig,
    MoeConfig,
    NoisyTopKRouter,
    Router,
    SigmoidRouter,
    StatePart,
    TopKRouter,
    Zero,
)

FLOAT32 = Dtype.FLOAT32.itemsize


class Part(enum.Enum):
    """What a parameter belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    """Projections, their biases, and the norms of query and key heads."""
    FFN = "ffn"
    """What every token uses: dense MLPs, shared experts and routers."""
    EXPERTS = "experts"
    """Routed experts."""
    NORMS = "norms"
    """Of the residual stream."""
    UNEMBEDDING = "unembedding"


@dataclass(frozen=True, kw_only=True)
class ParameterArray:
    """One array of the parameter tree."""

    name: str
    """Its path in the tree, as blocks/0/attention/q_proj."""
    part: Part
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    """The name of each dim, as in `PARAMETER_DIMS`; "layers" first where layers are stacked."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> int:
        """Layers in the stack; 1 for an array outside of it."""
        return self.shape[0] if self.dims[0] == "layers" else 1


@functools.cache  # a search asks thousands of times for one model
def parameter_arrays(model: ModelConfig) -> tuple[ParameterArray, ...]:
    """Every parameter, in the order of the real tree's leaves (dicts sorted by key)."""
    table = (model.vocab_size, model.d_model), ("vocab", "embed")
    found = [
        ParameterArray(name="embed", part=Part.EMBEDDING, shape=table[0], dims=table[1]),
        ParameterArray(name="final_norm/scale", part=Part.NORMS, shape=(model.d_model,), dims=("vector",)),
    ]
    for i, block in enumerate(model.blocks):
        found += _block(f"blocks/{i}", block, model.d_model, model.repeats)
    for i, block in enumerate(model.first_blocks):
        found += _block(f"first_blocks/{i}", block, model.d_model, None)
    if not model.tie_embeddings:
        found.append(ParameterArray(name="unembed", part=Part.UNEMBEDDING, shape=table[0], dims=table[1]))
    return tuple(sorted(found, key=lambda array: array.name.split("/")))


def device_shape(
    array: ParameterArray, sizes: Mapping[str, int], zero: Zero, part: StatePart = StatePart.PARAMETERS
) -> tuple[int, ...]:
    """Shape of a device's shard of a parameter, or of its gradient or moment.

    Args:
        array: a parameter.
        sizes: mesh axis -> size, as `ShardingConfig.sizes`.
        zero: what the fsdp axis cuts.
        part: which of the arrays of the parameter's shape.
    """
    return _shard(array.shape, array.dims, tuple(sizes.items()), part in CUT_BY_FSDP[zero])


@functools.cache  # a search asks millions of times for a few thousand
def _shard(
    shape: tuple[int, ...], dims: tuple[str, ...], sizes: tuple[tuple[str, int], ...], by_fsdp: bool
) -> tuple[int, ...]:
    parts = {axis: size for axis, size in sizes if axis != "fsdp" or by_fsdp}
    cuts = [math.prod(parts.get(axis, 1) for axis in PARAMETER_DIMS[dim]) for dim in dims]
    return tuple(-(-size // cut) for size, cut in zip(shape, cuts, strict=True))


def device_bytes(
    array: ParameterArray, sizes: Mapping[str, int], zero: Zero, part: StatePart, itemsize: float = 4
) -> int:
    """Bytes of a device's shard, with `itemsize` bytes a number; arguments as `device_shape`.

    With Adam in mixed precision these are the formulas of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1).
    """
    return round(math.prod(device_shape(array, sizes, zero, part)) * itemsize)


def _block(prefix: str, block: BlockConfig, d_model: int, repeats: int | None) -> Iterator[ParameterArray]:
    """One entry of the pattern, stacked over its repeats, or a block that is used once."""

    stack = {} if repeats is None else {"layers": repeats}

    def array(name: str, part: Part, dims: dict[str, int]) -> ParameterArray:
        whole = stack | dims
        return ParameterArray(name=f"{prefix}/{name}", part=part, shape=tuple(whole.values()), dims=tuple(whole))

    for norm in ("attention_norm", "mlp_norm"):
        yield array(f"{norm}/scale", Part.NORMS, {"vector": d_model})
    for name, dims in _attention(block.attention, d_model):
        yield array(f"attention/{name}", Part.ATTENTION, dims)
    for name, part, dims in _ffn(block.ffn, d_model):
        yield array(f"mlp/{name}", part, dims)


def _attention(attention: AttentionConfig, d_model: int) -> Iterator[tuple[str, dict[str, int]]]:
    H = attention.head_dim
    heads = {"heads": attention.n_heads, "head_dim": H}
    kv_heads = {"kv_heads": attention.n_kv_heads, "head_dim": H}
    for letter, cut in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield f"{letter}_proj", {"embed": d_model} | cut
        if attention.qkv_bias:
            yield f"{letter}_bias", cut
    yield "o_proj", heads | {"embed": d_model}
    if attention.out_bias:
        yield "o_bias", {"vector": d_model}
    if attention.qk_norm:
        yield "q_norm/scale", {"head_dim": H}
        yield "k_norm/scale", {"head_dim": H}


def _ffn(ffn: FfnConfig, d_model: int) -> Iterator[tuple[str, Part, dict[str, int]]]:
    match ffn:
        case GluConfig():
            yield from _glu("", Part.FFN, d_model, ffn.d_ff)
            if ffn.bias:
                yield "gate_bias", Part.FFN, {"mlp": ffn.d_ff}
                yield "up_bias", Part.FFN, {"mlp": ffn.d_ff}
                yield "down_bias", Part.FFN, {"vector": d_model}
        case MoeConfig():
            for name, part, dims in _glu("", Part.EXPERTS, d_model, ffn.d_ff):
                yield name, part, {"experts": ffn.n_experts} | dims
            if ffn.n_shared_experts:
                yield from _glu("shared_experts/", Part.FFN, d_model, ffn.n_shared_experts * ffn.d_ff)
            for name, dims in _router(ffn.router, d_model, ffn.n_experts):
                yield name, Part.FFN, dims
        case _:
            assert_never(ffn)


def _glu(prefix: str, part: Part, d_model: int, d_ff: int) -> Iterator[tuple[str, Part, dict[str, int]]]:
    yield f"{prefix}gate_proj", part, {"embed": d_model, "mlp": d_ff}
    yield f"{prefix}up_proj", part, {"embed": d_model, "mlp": d_ff}
    yield f"{prefix}down_proj", part, {"mlp": d_ff, "embed": d_model}


def _router(router: Router, d_model: int, n_experts: int) -> Iterator[tuple[str, dict[str, int]]]:
    yield "router", {"embed": d_model, "router": n_experts}
    match router:
        case NoisyTopKRouter():
            yield "router_noise", {"embed": d_model, "router": n_experts}
        case SigmoidRouter():
            yield "router_bias", {"router": n_experts}
        case TopKRouter() | ExpertChoiceRouter():
            pass
        case _:
            assert_never(router)
