"""One layer after the other on real text, with what its products see.

In memory are the activations between two layers, of all calibration tokens, on the host, and what the products of one
layer see; the model itself comes on top.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import shapes
from maxlm.config import BlockConfig, ModelConfig
from maxlm.data.packing import Batch
from maxlm.models import Execution, Tokens, bind
from maxlm.models.decoder import run_block
from maxlm.models.weights.watched import SeenInputs, Watched
from maxlm.quantization.folding import LayerArrays

LayerChange = Callable[[int, BlockConfig, LayerArrays, Mapping[str, SeenInputs]], LayerArrays]
"""The layer's number and config, its plain arrays and what its products saw -> its arrays, some of them `Weight`s. The
layers after it see what it gives."""


def layer_by_layer(
    model: ModelConfig, how: Execution, parameters: Any, batches: Sequence[Batch], change: LayerChange
) -> dict[str, Any]:
    """The parameters with every layer changed; what is outside of the layers is left alone.

    Args:
        model: what they are of.
        how: the layers run.
        parameters: nested dicts of plain arrays.
        batches: windows of text, as of `maxlm.data.packing.pack`.
        change: of each layer.
    """
    known = [Tokens(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])) for batch in batches]
    embed = jax.jit(lambda parameters, ids, tokens: bind(model, parameters).embeddings(ids, tokens, how))
    ids = [batch["inputs"] for batch in batches]
    states = [np.asarray(embed(parameters, *one)) for one in zip(ids, known, strict=True)]
    changed: list[Any] = []
    for number, block in enumerate(model.layers):
        layer = flat(_layer(model, parameters, number))
        watched = _none_seen(model, block)
        for x, tokens in zip(states, known, strict=True):
            watched = _see(model, block, how, layer, watched, x, tokens)
        new = nested(change(number, block, layer, watched))
        states = [np.asarray(_run(model, block, how, new, *one)) for one in zip(states, known, strict=True)]
        changed.append(new)
    return _with_layers(model, parameters, changed)


def _none_seen(model: ModelConfig, block: BlockConfig) -> dict[str, SeenInputs]:
    """Of the products whose inputs are the same tokens for all outputs; experts have each their own."""
    return {
        array.name: SeenInputs.none(math.prod(array.shape[array.dims.index(dim)] for dim in array.inputs))
        for array in shapes.block(block, model)
        if array.inputs and "experts" not in array.dims
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _see(
    model: ModelConfig,
    block: BlockConfig,
    how: Execution,
    layer: dict[str, Any],
    before: dict[str, SeenInputs],
    x: jax.Array,
    tokens: Tokens,
) -> dict[str, SeenInputs]:
    """With these tokens added."""

    def run(seen: dict[str, SeenInputs]) -> jax.Array:
        watched = {name: Watched(layer[name], one) for name, one in seen.items()}
        return run_block(model, block, nested({**layer, **watched}), x, tokens, how)

    y, pull = jax.vjp(run, jax.tree.map(jnp.zeros_like, before))
    (seen,) = pull(jnp.ones_like(y))
    return {name: one.add(seen[name]) for name, one in before.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    model: ModelConfig, block: BlockConfig, how: Execution, layer: dict[str, Any], x: jax.Array, tokens: Tokens
) -> jax.Array:
    return run_block(model, block, layer, x, tokens, how)


def _layer(model: ModelConfig, parameters: Any, number: int) -> Any:
    """Of layer `number`, counted from the first of all."""
    number -= len(model.first_blocks)
    if number < 0:
        return parameters["first_blocks"][str(number + len(model.first_blocks))]
    repeat, entry = divmod(number, len(model.blocks))
    return jax.tree.map(lambda leaf: leaf[repeat], parameters["blocks"][str(entry)])


def _with_layers(model: ModelConfig, parameters: Any, layers: Sequence[Any]) -> dict[str, Any]:
    first, entries = len(model.first_blocks), len(model.blocks)
    stacked = lambda entry: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[first + entry :: entries])
    found = {**parameters, "blocks": {str(entry): stacked(entry) for entry in range(entries)}}
    return found | ({"first_blocks": {str(i): layers[i] for i in range(first)}} if first else {})


def flat(layer: Any, before: str = "") -> dict[str, Any]:
    """By name, as `maxlm.shapes.block` has them."""
    found: dict[str, Any] = {}
    for name, value in layer.items():
        found |= flat(value, f"{before}{name}/") if isinstance(value, dict) else {before + name: value}
    return found


def nested(layer: LayerArrays) -> dict[str, Any]:
    """What `flat` was given."""
    tree: dict[str, Any] = {}
    for path, value in layer.items():
        *places, name = path.split("/")
        functools.reduce(lambda place, key: place.setdefault(key, {}), places, tree)[name] = value
    return tree
