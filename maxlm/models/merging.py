"""An adapter made a part of its base, taken out again, weaker or stronger, or one with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import (
    AdaLora,
    Adapter,
    Bottleneck,
    DyLora,
    Ia3,
    LlamaAdapter,
    Lora,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    UserError,
)
from maxlm.models.adapters import at, changed, replaced, targets
from maxlm.models.weights.around import plain


def merged(config: ModelConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the model without its adapter that computes the same, but for rounding.

    Args:
        config: the model, with its adapter.
        parameters: of it.

    Returns:
        Weights that the adapter changes as float32 arrays, the others as they are.

    Raises:
        UserError: its kind is no change of weights.
    """
    adapter = _mergeable(config)

    def one(weight: Any, own: dict[str, Any]) -> jax.Array:
        return plain(changed(adapter, weight, own))

    return _changed(config, parameters, parameters[shapes.PREFIX], one, jnp.multiply)


def unmerged(config: ModelConfig, whole: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """What `merged` was made of, but for rounding.

    Args:
        config: the model, with its adapter.
        whole: of `merged`.
        arrays: the adapter's, `parameters["adapter"]`.

    Returns:
        Parameters of the model with its adapter.

    Raises:
        UserError: as of `merged`; or its kind forgets what the base was.
    """
    adapter = _mergeable(config)
    kind = adapter.kind
    if isinstance(kind, Lora) and kind.dora:
        raise UserError(
            "model.adapter.kind.dora = True: what the lengths of the base's weights were is not known after merging; "
            "keep the base"
        )

    def one(weight: Any, own: dict[str, Any]) -> jax.Array:
        if isinstance(kind, Ia3):
            inverse = {name: 1 / factors for name, factors in own.items()}
            return plain(changed(adapter, weight, inverse))
        return plain(weight) - plain(changed(adapter, jnp.zeros(weight.shape), own))

    return {**_changed(config, whole, arrays, one, jnp.divide), shapes.PREFIX: arrays}


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with what it adds times a factor, of the same arrays.

    Raises:
        UserError: its kind has no scale.
    """
    match kind := adapter.kind:
        case Lora() | DyLora() | AdaLora():
            return replace(adapter, kind=replace(kind, alpha=kind.alpha * factor))
        case Bottleneck():
            return replace(adapter, kind=replace(kind, scale=kind.scale * factor))
        case Ia3():
            raise UserError("model.adapter.kind = Ia3 has no scale; merge it, or take it as it is")
        case PromptTuning() | PrefixTuning() | LlamaAdapter():
            raise UserError(f"model.adapter.kind = {type(kind).__name__} has no scale; take it as it is")
        case _:
            assert_never(kind)


class Weighted(NamedTuple):
    """One of several adapters."""

    model: ModelConfig
    """With the adapter."""
    arrays: dict[str, Any]
    """`parameters["adapter"]`."""
    weight: float


def weighted_sum(adapters: Sequence[Weighted]) -> tuple[Adapter, dict[str, Any]]:
    """One adapter that adds to each matrix the sum of weight * what each adds: its rank is the sum of their ranks.

    Returns:
        A `Lora` with scale 1, and its arrays.

    Raises:
        UserError: one has a kind other than LoRA's, DoRA's lengths, or arrays of the base of its own.
    """
    found: dict[str, list[tuple[Any, Any]]] = {}
    declared: dict[str, shapes.Array] = {}
    for one in adapters:
        adapter = one.model.adapter
        assert adapter is not None
        kind = adapter.kind
        if not isinstance(kind, Lora | DyLora | AdaLora) or (isinstance(kind, Lora) and kind.dora):
            raise UserError(f"model.adapter.kind = {type(kind).__name__} adds no matrix of low rank; sum LoRA's kinds")
        if adapter.full:
            raise UserError(f"model.adapter.full = {adapter.full} cannot be summed; use adapters without")
        for array in targets(one.model):
            weight: Any = changed(adapter, jnp.zeros(()), at(one.arrays, array.name))
            declared[array.name] = array
            found.setdefault(array.name, []).append((weight.a, weight.b * (one.weight * weight.scale)))
    rank = max(sum(a.shape[-1] for a, _ in pairs) for pairs in found.values())
    arrays: dict[str, Any] = {}
    for name, pairs in found.items():
        layers = int(declared[name].dims[0] == "layers")
        a = jnp.concatenate([a for a, _ in pairs], axis=-1)
        b = jnp.concatenate([b for _, b in pairs], axis=layers)
        short = rank - a.shape[-1]
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, short)])
        b = jnp.pad(b, [(0, short if axis == layers else 0) for axis in range(b.ndim)])
        arrays = replaced(arrays, name.split("/"), {"a": a, "b": b})
    return Adapter(kind=Lora(rank=rank, alpha=float(rank), targets=tuple(sorted(found)))), arrays


def _mergeable(config: ModelConfig) -> Adapter:
    assert config.adapter is not None
    match kind := config.adapter.kind:
        case Lora() | DyLora() | AdaLora() | Ia3():
            return config.adapter
        case PromptTuning() | PrefixTuning():
            raise UserError(
                f"model.adapter.kind = {type(kind).__name__} is tokens of its own, which no weight can be merged with"
            )
        case Bottleneck() | LlamaAdapter():
            raise UserError(
                f"model.adapter.kind = {type(kind).__name__} is a layer of its own, which no weight can be merged with"
            )
        case _:
            assert_never(kind)


def _changed(
    config: ModelConfig,
    parameters: dict[str, Any],
    adapter: dict[str, Any],
    one: Callable[[Any, dict[str, Any]], jax.Array],
    of_bias: Callable[[jax.Array, jax.Array], jax.Array],
) -> dict[str, Any]:
    """The base's tree with other weights where the adapter has arrays, and other biases where it multiplies outputs."""
    found = {name: tree for name, tree in parameters.items() if name != shapes.PREFIX}
    for array in targets(config):
        own, path = at(adapter, array.name), array.name.split("/")
        run = jax.vmap(one) if array.dims[0] == "layers" else one
        found = replaced(found, path, run(at(parameters, array.name), own))
        module, bias = at(parameters, "/".join(path[:-1])), f"{path[-1].removesuffix('_proj')}_bias"
        if "outputs" in own and bias in module:
            found = replaced(found, [*path[:-1], bias], of_bias(module[bias], own["outputs"]))
    return found
