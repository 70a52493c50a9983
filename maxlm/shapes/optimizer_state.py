"""What an optimizer keeps for the arrays that are trained, in bytes, and which of these are matrices to it."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from maxlm.config import ModelConfig, OptimizerConfig, StatePart, Zero
from maxlm.config.optimizer import Parameter, StateArray
from maxlm.shapes.array import Array, Role
from maxlm.shapes.arrays import arrays
from maxlm.shapes.device import device_cuts

STACKING_DIMS = ("layers", "experts")
"""Each index of these is a matrix of its own."""


class MatrixDims(NamedTuple):
    """Which dims of an array, by number, are the two of a matrix."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    """Those that a product with activations sums over."""
    outputs: tuple[int, ...]


def matrix_dims(array: Array) -> MatrixDims | None:
    """How Muon sees a parameter: a matrix of a hidden layer, or a stack of such; None: something else.

    q_proj [L, D, N, H] is L matrices of D inputs and N * H outputs, an expert's down_proj [L, E, F, D] L * E of F and
    D. Tables of embeddings, heads, routers and what adapters add are not matrices in this sense, nor are vectors.
    """
    stack = tuple(i for i, dim in enumerate(array.dims) if dim in STACKING_DIMS)
    inputs = tuple(i for i, dim in enumerate(array.dims) if dim in array.inputs)
    outputs = tuple(i for i in range(len(array.dims)) if i not in (*stack, *inputs))
    if array.role is not Role.PRODUCT or "vocab" in array.dims or not inputs or not outputs:
        return None
    return MatrixDims(stack, inputs, outputs)


def seen_by_optimizer(array: Array) -> Parameter:
    """The array as an optimizer's config sees it."""
    product, matrix = array.role is Role.PRODUCT, matrix_dims(array) is not None
    return Parameter(array.shape, array.stacked, product, matrix)


@functools.cache  # a search asks for it with all remat policies and micro-batches
def optimizer_bytes(model: ModelConfig, config: OptimizerConfig, sizes: tuple[tuple[str, int], ...], zero: Zero) -> int:
    """Of a device: moments and the average of what is trained, without counters, which are a few bytes.

    Args:
        model: whose parameters are trained.
        config: the optimizer.
        sizes: mesh axis and size, as `ShardingConfig.sizes`.
        zero: what the fsdp axis cuts.
    """
    total = 0
    for array in arrays(model):
        if array.trained:
            cuts = device_cuts(array.dims, dict(sizes), zero, StatePart.OPTIMIZER)
            average = () if config.average is None else (StateArray(array.shape),)
            for shape, itemsize in (*config.state(seen_by_optimizer(array), model.repeats), *average):
                factors = cuts if len(shape) == len(cuts) else [1] * len(shape)
                pairs = zip(shape, factors, strict=True)
                total += itemsize * math.prod(size if size % cut else size // cut for size, cut in pairs)
    return total
