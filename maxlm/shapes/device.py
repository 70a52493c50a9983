"""What one device holds of a model's arrays, by the table of layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from maxlm.config import CUT_BY_FSDP, PARAMETER_DIMS, Dtype, StatePart, Zero
from maxlm.shapes.arrays import Array

FLOAT32 = Dtype.FLOAT32.itemsize
"""Bytes of a number of a parameter."""


def device_shape(
    array: Array, sizes: Mapping[str, int], zero: Zero, part: StatePart = StatePart.PARAMETERS
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
    cuts = _cuts(dims, dict(sizes), by_fsdp)
    return tuple(-(-size // cut) for size, cut in zip(shape, cuts, strict=True))


def device_cuts(
    dims: tuple[str | None, ...], sizes: Mapping[str, int], zero: Zero, part: StatePart = StatePart.PARAMETERS
) -> list[int]:
    """Into how many parts each dim of an array is cut; None: it stays whole. Arguments as `device_shape`."""
    return _cuts(dims, sizes, part in CUT_BY_FSDP[zero])


def _cuts(dims: tuple[str | None, ...], sizes: Mapping[str, int], by_fsdp: bool) -> list[int]:
    parts = {axis: size for axis, size in sizes.items() if axis != "fsdp" or by_fsdp}
    return [math.prod(parts.get(axis, 1) for axis in PARAMETER_DIMS[dim]) if dim else 1 for dim in dims]


def device_bytes(array: Array, sizes: Mapping[str, int], zero: Zero, part: StatePart, itemsize: float = 4) -> int:
    """Bytes of a device's shard, with `itemsize` bytes a number; arguments as `device_shape`.

    With Adam in mixed precision these are the formulas of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1).
    """
    return round(math.prod(device_shape(array, sizes, zero, part)) * itemsize)
