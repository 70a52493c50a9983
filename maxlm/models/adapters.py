"""An adapter's arrays beside its base's: how they begin, and the weights that both make."""

from __future__ import annotations

import dataclasses
from typing import Any, assert_never

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import (
    AdaLora,
    Adapter,
    AdapterKind,
    BaseFormat,
    Bottleneck,
    DyLora,
    Ia3,
    LlamaAdapter,
    Lora,
    LstmEncoder,
    MlpEncoder,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    WeightFormat,
)
from maxlm.models.parameters import declared, initial
from maxlm.models.prompts import encoded, tanh_rows
from maxlm.models.weights.around import Begun, MlpAfter, Prompted, Rescaled, SmallMlp, plain
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Quantised, Weight
from maxlm.models.weights.low_rank import LowRank, lengths


def base_of(config: ModelConfig) -> ModelConfig:
    """The model without its adapter."""
    return config if config.adapter is None else dataclasses.replace(config, adapter=None)


def parameters_of_base(parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of `base_of` the model, among the parameters of the model."""
    return {name: tree for name, tree in parameters.items() if name != shapes.PREFIX}


def composed(config: ModelConfig) -> ModelConfig:
    """The model as its decoder is built: without an adapter that is all in the weights."""
    return config if _is_parallel(config) else base_of(config)


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
    parameters = base
    for i, array in enumerate(jax.tree.leaves(whole[shapes.PREFIX])):
        parameters = replaced(parameters, array.name.split("/"), initial(array, jax.random.fold_in(key, i)))
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
    if _is_parallel(config):  # what is not there is a number, for a loop over layers one for each
        nothing = {f"{of}_adapter": jnp.zeros(config.repeats) for of in ("attention", "mlp")}
        for stack in found.keys() & {"blocks", "first_blocks"}:
            found[stack] = {i: {**block, **nothing} for i, block in found[stack].items()}
    made = tanh_rows(parameters[shapes.PREFIX].get("prefix"))
    for array in targets(config):
        weight, own = at(parameters, array.name), at(parameters[shapes.PREFIX], array.name)
        if made is not None:
            own = {**own, "made": made}
        path = array.name.split("/")
        if _is_parallel(config):
            assert isinstance(config.adapter.kind, Bottleneck)
            *path, of, _ = path
            found = replaced(found, [*path, f"{of}_adapter"], small_mlp(config.adapter.kind, own))
        else:
            found = replaced(found, path, changed(config.adapter, weight, own))
    return found


def without_makers(config: ModelConfig) -> ModelConfig:
    """The model of `learned`."""
    adapter = config.adapter
    match None if adapter is None else adapter.kind:
        case PromptTuning(encoder=MlpEncoder() | LstmEncoder()) as kind:
            plain_kind: AdapterKind = dataclasses.replace(kind, encoder=None)
        case PrefixTuning(hidden=int()) as kind:
            plain_kind = dataclasses.replace(kind, hidden=None)
        case _:
            return config
    assert adapter is not None
    return dataclasses.replace(config, adapter=dataclasses.replace(adapter, kind=plain_kind))


def learned(config: ModelConfig, parameters: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The same model without what virtual tokens were made by while they were learned; of other adapters as it is."""
    without = without_makers(config)
    if without == config:
        return config, parameters
    made, found = adapted(config, parameters), {k: tree for k, tree in parameters.items() if k != shapes.PREFIX}
    for array in targets(config):
        found = replaced(found, [shapes.PREFIX, *array.name.split("/"), "rows"], at(made, array.name).rows)
    return without, found


def targets(config: ModelConfig) -> list[shapes.Array]:
    """The arrays of the base that the adapter changes."""
    assert config.adapter is not None
    return shapes.targets(config.adapter.kind, shapes.arrays(base_of(config)))


def changed(adapter: Adapter, weight: Weight, own: dict[str, Any]) -> Weight:
    """One weight of the base with the adapter's arrays for it, `own`."""
    match kind := adapter.kind:
        case Lora():
            return LowRank(weight, own["a"], own["b"], own.get("magnitude"), None, kind.scale, kind.dropout, False)
        case DyLora():
            return LowRank(weight, own["a"], own["b"], None, None, kind.scale, 0.0, True)
        case AdaLora():
            outputs = own["b"].ndim - own["diagonal"].ndim
            diagonal = own["diagonal"].reshape(*own["diagonal"].shape, *[1] * outputs)
            return LowRank(weight, own["a"], own["b"] * diagonal, None, None, kind.scale, 0.0, False)
        case Ia3():
            return Rescaled(weight, own.get("inputs"), own.get("outputs"))
        case Bottleneck():
            assert not kind.parallel
            return MlpAfter(weight, small_mlp(kind, own))
        case PromptTuning():
            return Begun(weight, encoded(kind.encoder, own))
        case PrefixTuning(hidden=None):
            return Begun(weight, own["rows"])
        case PrefixTuning():
            stacked = "lrkh" if own["out"].ndim == 4 else "rkh"
            rows = jnp.einsum(f"pr,{stacked}->{stacked.replace('r', 'p')}", own["made"], own["out"])
            return Begun(weight, rows + jnp.expand_dims(own["out_bias"], -3))
        case LlamaAdapter():
            return Prompted(weight, own["rows"], own["gate"])
        case _:
            assert_never(kind)


def small_mlp(kind: Bottleneck, own: dict[str, Any]) -> SmallMlp:
    """The adapter's arrays at one place as an MLP."""
    return SmallMlp(own["down"], own["down_bias"], own["up"], own["up_bias"], kind.activation, kind.scale)


def _is_parallel(config: ModelConfig) -> bool:
    kind = None if config.adapter is None else config.adapter.kind
    return isinstance(kind, Bottleneck) and kind.parallel


def _has_lengths(adapter: Adapter) -> bool:
    return isinstance(adapter.kind, Lora) and adapter.kind.dora


def _with_lengths(config: ModelConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """Magnitudes as the base's weights have them."""
    for array in targets(config):
        found = lengths(plain(at(parameters, array.name)), tuple(array.dims.index(dim) for dim in array.inputs))
        path = [shapes.PREFIX, *array.name.split("/"), "magnitude"]
        parameters = replaced(parameters, path, found)
    return parameters


def at(tree: Any, name: str) -> Any:
    """What a tree of dicts has there."""
    for word in name.split("/"):
        tree = tree[word]
    return tree


def replaced(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The tree with another value there; no dict is changed."""
    word, *rest = path
    return {**tree, word: replaced(tree.get(word, {}), rest, value) if rest else value}
