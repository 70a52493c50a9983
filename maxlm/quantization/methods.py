"""Each method, from parameters to `Weight`s of fewer bits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import shapes
from maxlm.config import BlockConfig, ModelConfig, QuantMethod, UserError, WeightFormat
from maxlm.data.packing import Batch
from maxlm.models import Execution, declared
from maxlm.models.weights.by_group import ByGroup, grids, group_of, packed
from maxlm.models.weights.holding import axis_of, quantised
from maxlm.models.weights.kinds import Weight
from maxlm.models.weights.watched import SeenInputs
from maxlm.quantization.calibration import layer_by_layer
from maxlm.quantization.folding import LayerArrays, folded, folds, shared_by_heads
from maxlm.quantization.gptq import gptq
from maxlm.quantization.llama_blocks import found_blocks
from maxlm.quantization.scale_search import awq_scales, clipped, smoothing_scales, squared_error
from maxlm.shapes import Array

_FLOAT32 = jnp.dtype(jnp.float32)
_NOT_CLIPPED = ("attention/q_", "attention/k_")
"""What queries and keys are made by, whose errors multiply, as in AWQ's code."""


class Quantisation(NamedTuple):
    """What a method made."""

    parameters: Any
    """Nested dicts of arrays and `Weight`s."""
    errors: dict[str, list[float]]
    """Relative errors of each array that is quantised, layer by layer. Of products, |x w - x w'| / |x w| (Frobenius)
    over the calibration tokens, activations not rounded, where a method sees such; else of the weight, |w - w'| / |w|.
    """


def quantise(
    model: ModelConfig,
    how: Execution,
    parameters: Any,
    method: QuantMethod,
    *,
    group: int,
    batches: Sequence[Batch] = (),
) -> Quantisation:
    """The model by one method.

    Args:
        model: what the parameters are of.
        how: it runs for calibration.
        parameters: nested dicts of plain arrays.
        method: one of them, not ALL.
        group: numbers of 4 bits with one scale, at most.
        batches: windows of text for the methods that are calibrated.

    Raises:
        UserError: blocks of a GGUF file are asked for, and there are none.
    """
    errors: dict[str, list[float]] = {}
    if method is QuantMethod.GGUF:
        return Quantisation(_in_blocks(model, parameters, errors), errors)
    if not method.calibrated:
        return Quantisation(_rounded(declared(model), parameters, method.format, group, errors), errors)
    change = functools.partial(_changed, model, method, group, errors)
    parameters = layer_by_layer(model, how, parameters, batches, change)
    outside = {name: array for name, array in declared(model).items() if name not in ("blocks", "first_blocks")}
    tables = _rounded(outside, {name: parameters[name] for name in outside}, method.format, group, errors)
    return Quantisation(parameters | tables, errors)


def _rounded(arrays: Any, parameters: Any, wanted: WeightFormat, group: int, errors: dict[str, list[float]]) -> Any:
    """To the nearest."""

    def one(array: Array, w: jax.Array) -> Weight:
        weight, error = _nearest(w, array, wanted, group)
        if not isinstance(weight, jax.Array):
            errors[array.name] = np.ravel(error).tolist()
        return weight

    return jax.tree.map(one, arrays, parameters)


def _in_blocks(model: ModelConfig, parameters: Any, errors: dict[str, list[float]]) -> Any:
    """With the blocks that there are; other weights stay plain."""

    def one(array: Array, w: jax.Array) -> Weight:
        found = found_blocks(np.asarray(w, np.float32), axis_of(array)) if array.inputs else None
        if found is None:
            return w
        errors[array.name] = [0.0] * array.stacked
        return found

    made = jax.tree.map(one, declared(model), parameters)
    if not errors:
        raise UserError(
            "method gguf finds no blocks of 32 numbers as those of Q8_0, Q4_0 or Q4_1; give it a model from such a "
            "file, with --gguf FILE, or take another method"
        )
    return made


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _nearest(w: jax.Array, array: Array, wanted: WeightFormat, group: int) -> tuple[Weight, jax.Array]:
    """The weight, and its relative error in each layer."""
    weight = quantised(w, array, wanted, group)
    if isinstance(weight, jax.Array):
        return weight, jnp.zeros(())
    axes = tuple(range(array.dims[0] == "layers", w.ndim))
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axes))
    return weight, norm(w - weight.dense(_FLOAT32)) / jnp.maximum(norm(w), jnp.finfo(_FLOAT32).tiny)


def _changed(
    model: ModelConfig,
    method: QuantMethod,
    group: int,
    errors: dict[str, list[float]],
    number: int,
    block: BlockConfig,
    layer: LayerArrays,
    seen: Mapping[str, SeenInputs],
) -> LayerArrays:
    """A `calibration.LayerChange`."""
    arrays = {array.name: array for array in shapes.block(block, model)}
    if method is not QuantMethod.GPTQ:
        layer, seen = _scaled(model, block, method, group, layer, seen, arrays)
    found = dict(layer)
    for name, array in arrays.items():
        if not array.inputs:
            continue
        at = group_of(array.shape[axis_of(array)], group)
        if method is QuantMethod.GPTQ and name in seen and at is not None:
            found[name] = _by_gptq(layer[name], array, seen[name], at)
            error = _product_error(layer[name], found[name], seen[name].gram)
        elif method is QuantMethod.AWQ and name in seen and at is not None and not name.startswith(_NOT_CLIPPED):
            found[name] = _clip(layer[name], seen[name].gram, array, at)
            error = _product_error(layer[name], found[name], seen[name].gram)
        elif name in seen:
            found[name] = quantised(layer[name], array, method.format, group)
            error = _product_error(layer[name], found[name], seen[name].gram)
        else:
            found[name], error = _nearest(layer[name], array, method.format, group)
        entry = number - len(model.first_blocks)
        place = f"first_blocks/{number}" if entry < 0 else f"blocks/{entry % len(model.blocks)}"
        errors.setdefault(f"{place}/{name}", []).append(float(error))
    return found


def _scaled(
    model: ModelConfig,
    block: BlockConfig,
    method: QuantMethod,
    group: int,
    layer: LayerArrays,
    seen: Mapping[str, SeenInputs],
    arrays: Mapping[str, Array],
) -> tuple[LayerArrays, Mapping[str, SeenInputs]]:
    """With the scales of AWQ or SmoothQuant; the latter has them where a norm makes the inputs."""
    for fold in folds(block, model):
        targets = tuple(arrays[name] for name in fold.targets)
        weights, of_inputs = {name: layer[name] for name in fold.targets}, seen[fold.targets[0]]
        if method is QuantMethod.AWQ:
            s = _awq(weights, of_inputs, shared_by_heads(fold, of_inputs.size, arrays), targets, group)
        elif fold.source.endswith("norm"):
            s = smoothing_scales(weights, of_inputs, targets)
        else:
            continue
        layer, seen = folded(fold, s, layer, seen, arrays, model.norm)
    return layer, seen


_awq = jax.jit(awq_scales, static_argnums=(3, 4))
_clip = jax.jit(clipped, static_argnums=(2, 3))


def _by_gptq(w: jax.Array, array: Array, seen: SeenInputs, group: int) -> ByGroup:
    inputs, n = seen.gram.shape[0], len(array.inputs)
    scales, _ = grids(w.reshape(inputs, -1), -2, group, symmetric=True)
    wide = np.repeat(np.asarray(scales, np.float64), group, 0)
    matrix = np.asarray(w, np.float64).reshape(inputs, -1)
    codes = gptq(matrix, np.asarray(seen.gram, np.float64), wide)
    of_groups = (*array.shape[: n - 1], array.shape[n - 1] // group, *array.shape[n:])
    return packed(jnp.asarray(codes.reshape(array.shape) + 8), scales.reshape(of_groups), None, axis_of(array))


@jax.jit
def _product_error(w: jax.Array, weight: Weight, gram: jax.Array) -> jax.Array:
    plain = weight if isinstance(weight, jax.Array) else weight.dense(_FLOAT32)
    exact = jnp.maximum(squared_error(w, gram), jnp.finfo(_FLOAT32).tiny)
    return jnp.sqrt(jnp.maximum(squared_error(w - plain, gram), 0) / exact)
