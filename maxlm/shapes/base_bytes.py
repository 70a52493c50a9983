"""Bytes of parameters while they are trained, a base's under an adapter as `BaseFormat` says, without making them.

A test compares them with the arrays that a run holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, assert_never

from maxlm.config import BaseFormat, Dtype, ModelConfig, ParameterFormat, StatePart, Zero
from maxlm.shapes.array import Array, Role
from maxlm.shapes.device import FLOAT32, device_bytes, device_cuts

_TABLE_GROUP, _LEAST_GROUP = 32, 8
"""Numbers of a table's row that share a scale, and the fewest that may."""
_BLOCK, _BLOCK_OF_SCALES = 64, 256
"""Of NF4."""


class _Part(NamedTuple):
    """One of the arrays that a quantised weight is."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    itemsize: int


def is_rounded(array: Array) -> bool:
    """Whether a run holds it as its `optimizer.parameter_format` says. The gradient of a table that is looked up sums
    as many rows as a token is frequent, and is not for few bits."""
    return array.trained and array.role is Role.PRODUCT


def held_bytes(
    model: ModelConfig,
    array: Array,
    sizes: Mapping[str, int],
    zero: Zero,
    trained: ParameterFormat = ParameterFormat.FLOAT32,
) -> int:
    """Bytes of a device's part of a parameter while a model is trained: float32, but for a base that is held in less,
    and what a run trains in less.

    Args:
        model: that is trained.
        array: of `arrays(model)`.
        sizes: mesh axis -> size.
        zero: what the fsdp axis cuts.
        trained: how a run holds what it trains.
    """
    plain = lambda itemsize: device_bytes(array, sizes, zero, StatePart.PARAMETERS, itemsize)
    if model.adapter is None or array.trained:
        return plain(trained.itemsize if is_rounded(array) else FLOAT32)
    match model.adapter.base:
        case BaseFormat.FLOAT32:
            return plain(FLOAT32)
        case BaseFormat.BFLOAT16:
            return plain(2 if array.role.casts else FLOAT32)
        case BaseFormat.INT8 | BaseFormat.NF4 as wanted:
            if not array.inputs:
                return plain(FLOAT32)
            parts = _int8(array) if wanted is BaseFormat.INT8 or "vocab" in array.dims else _nf4(array)
            return sum(_device_bytes(part, sizes, zero) for part in parts)
        case _:
            assert_never(model.adapter.base)


def decoding_bytes(model: ModelConfig, array: Array, sizes: Mapping[str, int], zero: Zero, dtype: Dtype) -> int:
    """Bytes of a device's part of a parameter while the model that is trained writes: what every use casts in the
    compute dtype, all else as it is held. Arguments as of `held_bytes`, of the layout for decoding."""
    if array.role.casts and not _is_quantised(model, array):
        return device_bytes(array, sizes, zero, StatePart.PARAMETERS, dtype.itemsize)
    return held_bytes(model, array, sizes, zero)


def _is_quantised(model: ModelConfig, array: Array) -> bool:
    if model.adapter is None or array.trained or not array.inputs:
        return False
    return model.adapter.base in (BaseFormat.INT8, BaseFormat.NF4)


def _device_bytes(part: _Part, sizes: Mapping[str, int], zero: Zero) -> int:
    """What does not divide a dim leaves it whole, as in `models.weights.holding`."""
    cuts = device_cuts(part.dims, sizes, zero)
    return part.itemsize * math.prod(n if n % cut else n // cut for n, cut in zip(part.shape, cuts, strict=True))


def _int8(array: Array) -> Iterator[_Part]:
    """`Int8`, or of tables, where a row can be parted, `ByGroup` of bytes with scales in bfloat16."""
    yield _Part(array.shape, array.dims, 1)
    group = math.gcd(array.shape[_innermost(array)], _TABLE_GROUP)
    if "vocab" in array.dims and group >= _LEAST_GROUP and group % 2 == 0:
        yield _Part(_shrunk(array, group), array.dims, 2)
        return
    pairs = zip(array.dims, array.shape, strict=True)
    names = tuple(None if name in array.inputs else name for name in array.dims)
    yield _Part(tuple(1 if name in array.inputs else n for name, n in pairs), names, FLOAT32)


def _nf4(array: Array) -> Iterator[_Part]:
    """`NormalFloat4`; 8 bits where blocks do not fit."""
    if array.shape[_innermost(array)] % _BLOCK:
        yield from _int8(array)
        return
    first = array.dims.index(array.inputs[0])  # what lies before counts matrices
    names: tuple[str | None, ...] = array.dims[:first]
    matrices, blocks = array.shape[:first], math.prod(array.shape[first:]) // _BLOCK
    yield _Part(_shrunk(array, 2), array.dims, 1)
    yield _Part((*matrices, blocks), (*names, None), 1)
    yield _Part((*matrices, -(-blocks // _BLOCK_OF_SCALES)), (*names, None), FLOAT32)
    yield _Part(matrices, names, FLOAT32)


def _innermost(array: Array) -> int:
    """Place of the last dim that a product sums over."""
    return array.dims.index(array.inputs[-1])


def _shrunk(array: Array, by: int) -> tuple[int, ...]:
    """The shape with the innermost input dim so many times smaller."""
    place = _innermost(array)
    return (*array.shape[:place], array.shape[place] // by, *array.shape[place + 1 :])
