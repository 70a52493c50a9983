"""An adapter's arrays beside its base's: how they begin, and the weights that both make."""

from __future__ import annotations

import dataclasses
from typing import Any, assert_never

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import Adapter, BaseFormat, Lora, ModelConfig, WeightFormat
from maxlm.models.parameters import declared, initial
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Quantised, Weight
from maxlm.models.weights.low_rank import LowRank, lengths


def base_of(config: ModelConfig) -> ModelConfig:
    """The model without its adapter."""
    return config if config.adapter is None else dataclasses.replace(config, adapter=None)


def begin(config: ModelConfig, base: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """Parameters of a model with an adapter that changes nothing yet.

    Args:
        config: the model, with its adapter.
        base: parameters of `base_of` it, of arrays or of `Weight`s, which are left as they are.
        key: for what begins by chance.

    Returns:
        The base as `Adapter.base` says, and the arrays of the adapter.
    """
    assert config.adapter is not None
    adapter, whole = config.adapter, declared(config)
    base = jax.tree.map(lambda array, w: held(array, w, adapter.base), {name: whole[name] for name in base}, base)
    found: dict[str, Any] = {}
    for i, array in enumerate(_leaves(whole.get(shapes.PREFIX, {}))):
        value = initial(array, jax.random.fold_in(key, i))
        _place(found, array.name, value)
    parameters = {**base, **found}
    return parameters if not _has_lengths(adapter) else _with_lengths(config, parameters)


def held(array: shapes.Array, w: Weight, wanted: BaseFormat) -> Weight:
    """One array of the base, as it is held; what is trained, and what is quantised already, as it is."""
    if array.trained or isinstance(w, Quantised):
        return w
    assert isinstance(w, jax.Array)
    match wanted:
        case BaseFormat.FLOAT32:
            return w
        case BaseFormat.BFLOAT16:
            return w.astype(jnp.bfloat16) if array.role.casts else w
        case BaseFormat.INT8:
            return quantised(w, array, WeightFormat.INT8)
        case BaseFormat.NF4:
            return quantised(w, array, WeightFormat.NF4)
        case _:
            assert_never(wanted)


def adapted(config: ModelConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the base's tree, in which the adapter's arrays have become parts of the weights they change."""
    assert config.adapter is not None
    found = {name: tree for name, tree in parameters.items() if name != shapes.PREFIX}
    for array in targets(config):
        weight, own = _at(parameters, array.name), _at(parameters[shapes.PREFIX], array.name)
        found = _replaced(found, array.name.split("/"), changed(config.adapter, weight, own))
    return found


def targets(config: ModelConfig) -> list[shapes.Array]:
    """The arrays of the base that the adapter changes."""
    assert config.adapter is not None
    return shapes.targets(config.adapter.kind, shapes.arrays(base_of(config)))


def changed(adapter: Adapter, weight: Weight, own: dict[str, Any]) -> Weight:
    """One weight of the base with the adapter's arrays for it, `own`."""
    match adapter.kind:
        case Lora() as lora:
            return LowRank(weight, own["a"], own["b"], own.get("magnitude"), None, lora.scale, lora.dropout)
        case _:
            assert_never(adapter.kind)


def _has_lengths(adapter: Adapter) -> bool:
    return isinstance(adapter.kind, Lora) and adapter.kind.dora


def _with_lengths(config: ModelConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """Magnitudes as the base's weights have them."""
    for array in targets(config):
        weight = _at(parameters, array.name)
        dense = weight if isinstance(weight, jax.Array) else weight.dense(jnp.float32)
        found = lengths(dense.astype(jnp.float32), _axes(array))
        path = [shapes.PREFIX, *array.name.split("/"), "magnitude"]
        parameters = _replaced(parameters, path, found)
    return parameters


def _axes(array: shapes.Array) -> tuple[int, ...]:
    return tuple(array.dims.index(dim) for dim in array.inputs)


def _leaves(tree: Any) -> list[shapes.Array]:
    return jax.tree.leaves(tree)


def _at(tree: Any, name: str) -> Any:
    for word in name.split("/"):
        tree = tree[word]
    return tree


def _place(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split("/")
    for word in path:
        tree = tree.setdefault(word, {})
    tree[last] = value


def _replaced(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The tree with another value there; no dict is changed."""
    word, *rest = path
    return {**tree, word: _replaced(tree[word], rest, value) if rest else value}
