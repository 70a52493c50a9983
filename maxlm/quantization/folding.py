"""Scales moved from the inputs of products into what makes them: the model computes what it did.

x w = (x / s) (s w). Where x is what a norm gives, its scale and bias are divided by s; where it is what another product
gives, through nothing that mixes its numbers, the outputs of that product are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import (
    BlockConfig,
    GatedMlp,
    GroupedQuery,
    LatentAttention,
    Mlp,
    ModelConfig,
    Parallel,
    PreNorm,
    RmsNorm,
    Sandwich,
)
from maxlm.models.weights.watched import SeenInputs
from maxlm.shapes import Array

LayerArrays = Mapping[str, Any]
"""Of one layer, by names such as `attention/q_proj`."""


class Fold(NamedTuple):
    """Where scales can go."""

    source: str
    """A norm, or a product whose outputs are the inputs of the targets."""
    targets: tuple[str, ...]
    shared: int = 1
    """So many heads of the inputs, one after the other, are made of one head of the source."""


def folds(block: BlockConfig, model: ModelConfig) -> tuple[Fold, ...]:
    """Of a layer, in the order of its products. Norms whose result is used otherwise too have none: those after the sum
    (PostNorm), and those before experts, which routers see."""
    found = []
    in_front = isinstance(block.residual, PreNorm | Sandwich | Parallel) and model.norm.initial_scale is not None
    one_norm = isinstance(block.residual, Parallel) and not block.residual.two_norms
    match block.attention:
        case GroupedQuery():
            of_attention: tuple[str, ...] = ("attention/q_proj", "attention/k_proj", "attention/v_proj")
            heads = block.attention.n_heads // block.attention.n_kv_heads
        case LatentAttention(query_rank=rank):
            first = "attention/q_proj" if rank is None else "attention/q_down_proj"
            of_attention, heads = (first, "attention/kv_down_proj", "attention/k_rope_proj"), 1
    of_mlp: tuple[str, ...] = ()
    if isinstance(block.mlp, GatedMlp | Mlp):
        of_mlp = ("mlp/gate_proj", "mlp/up_proj") if isinstance(block.mlp, GatedMlp) else ("mlp/up_proj",)
    if in_front and not one_norm:
        found += [Fold("attention_norm", of_attention)]
    if in_front and one_norm and of_mlp:
        found += [Fold("attention_norm", of_attention + of_mlp)]
    found += [Fold("attention/v_proj", ("attention/o_proj",), heads)]
    if in_front and not one_norm and of_mlp:
        found += [Fold("mlp_norm", of_mlp)]
    if isinstance(block.mlp, GatedMlp):  # activation(gate) * up: linear in up
        found += [Fold("mlp/up_proj", ("mlp/down_proj",))]
    return tuple(found)


def shared_by_heads(fold: Fold, values: jax.Array, declared: Mapping[str, Array]) -> jax.Array:
    """[I]: the mean over inputs that are made of one number of the source, for each of them."""
    if fold.shared == 1:
        return values
    by_head = values.reshape(-1, fold.shared, declared[fold.targets[0]].shape[1])
    return jnp.broadcast_to(by_head.mean(1, keepdims=True), by_head.shape).reshape(-1)


def folded(
    fold: Fold,
    s: jax.Array,
    layer: LayerArrays,
    seen: Mapping[str, SeenInputs],
    declared: Mapping[str, Array],
    norm: Any,
) -> tuple[dict[str, Any], dict[str, SeenInputs]]:
    """The layer with the inputs of the targets divided by s [I], and what those see then.

    Args:
        fold: where.
        s: the same for inputs that share a number of the source, see `shared_by_heads`.
        layer: its plain arrays.
        seen: of its products.
        declared: what the arrays are, by the same names.
        norm: `ModelConfig.norm`.
    """
    layer, seen = dict(layer), dict(seen)
    for name in fold.targets:
        layer[name] = layer[name] * by_inputs(s, declared[name])
        old = seen[name]
        seen[name] = SeenInputs(old.gram / s / s[:, None], old.size / s, old.largest / s)
    if f"{fold.source}/scale" in layer:
        scale = layer[f"{fold.source}/scale"]
        layer[f"{fold.source}/scale"] = (
            (1 + scale) / s - 1 if isinstance(norm, RmsNorm) and norm.one_plus else scale / s
        )
        if (bias := f"{fold.source}/bias") in layer:
            layer[bias] = layer[bias] / s
        return layer, seen
    array = declared[fold.source]
    outputs = tuple(size for size, dim in zip(array.shape, array.dims, strict=True) if dim not in array.inputs)
    of_source = s
    if fold.shared > 1:
        of_source = s.reshape(outputs[0], fold.shared, -1)[:, 0]
    layer[fold.source] = layer[fold.source] / of_source.reshape(outputs)
    if (bias := fold.source.replace("_proj", "_bias")) in layer:
        layer[bias] = layer[bias] / of_source.reshape(outputs)
    return layer, seen


def by_inputs(s: jax.Array, array: Array) -> jax.Array:
    """[I] in a shape that multiplies the array along its inputs, which come first."""
    inputs = array.shape[: len(array.inputs)]
    assert math.prod(inputs) == s.size
    return s.reshape(*inputs, *[1] * (len(array.shape) - len(inputs)))
