"""Scales for the inputs of products, to be folded into what makes them; and ranges of 4-bit numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from maxlm.config import WeightFormat
from maxlm.models.weights.by_group import ByGroup, grids, nearest, packed
from maxlm.models.weights.holding import axis_of, quantised
from maxlm.models.weights.watched import SeenInputs
from maxlm.quantization.folding import by_inputs
from maxlm.shapes import Array

_STEPS = 20
_CLIPPED = 10
"""Ranges that are tried: 1, 0.95, ..., 0.55 of a group's own."""
_SMOOTHING = 0.5
_LEAST = 1e-4


def awq_scales(
    weights: Mapping[str, jax.Array], seen: SeenInputs, size: jax.Array, declared: Sequence[Array], group: int
) -> jax.Array:
    """[I]: size^a for the a of 0, 1/20, ..., 19/20 with the smallest error of the products of all these weights, in 4
    bits, with the same inputs (AWQ, arXiv:2306.00978, section 3.2, equations 4 and 5). a = 0 is plain rounding, so the
    result is never worse than that.

    Args:
        weights: by name, plain.
        seen: of their inputs; the error is computed from its Gram matrix.
        size: [I], the sum of |x|, averaged where inputs must have one scale.
        declared: what the weights are.
        group: numbers with one scale.
    """

    def scales(a: jax.Array) -> jax.Array:
        s = jnp.maximum(size / size.mean(), _LEAST) ** a
        return s / jnp.sqrt(s.max() * s.min())

    def error(a: jax.Array) -> jax.Array:
        s, total = scales(a), jnp.float32(0)
        for array in declared:
            w, factor = weights[array.name], by_inputs(s, array)
            rounded = quantised(w * factor, array, WeightFormat.INT4, group)
            plain = rounded if isinstance(rounded, jax.Array) else rounded.dense(jnp.dtype(jnp.float32))
            total += squared_error(w - plain / factor, seen.gram)
        return total

    steps = jnp.arange(_STEPS) / _STEPS
    return scales(steps[jnp.argmin(jax.lax.map(error, steps))])


def clipped(w: jax.Array, gram: jax.Array, array: Array, group: int) -> ByGroup:
    """The weight in 4 bits, symmetric, where each group of each output has that range, of 1, 0.95, ..., 0.55 of its
    largest number, with which its own part of the product has the smallest squared error over the calibration tokens.
    What is beyond gets the outermost code. So AWQ's code does (arXiv:2306.00978, section 3.2; `auto_clip_layer` of
    github.com/mit-han-lab/llm-awq). Range 1 is plain rounding, so that no group's error is larger than that one's;
    parts of different groups may still add up to more.

    Args:
        w: plain.
        gram: [I, I], of its inputs.
        array: what it is.
        group: numbers with one scale, which divides the innermost dim of its inputs.
    """
    inputs = len(gram)
    matrix = w.astype(jnp.float32).reshape(inputs, -1)
    groups = inputs // group
    within = gram.reshape(groups, group, groups, group)[jnp.arange(groups), :, jnp.arange(groups)]  # [groups, g, g]
    whole, _ = grids(matrix, -2, group, symmetric=True)

    def attempt(range_: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The scales, and each group's error, [groups, O]."""
        scales = (whole.astype(jnp.float32) * range_).astype(jnp.bfloat16)
        codes = nearest(matrix, scales, None, -2) - 8
        off = matrix.reshape(groups, group, -1) - codes.reshape(groups, group, -1) * scales[:, None].astype(jnp.float32)
        return scales, jnp.sum(off * jnp.matmul(within, off, precision=jax.lax.Precision.HIGHEST), 1)

    def better(best: tuple[jax.Array, jax.Array], range_: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scales, error = attempt(range_)
        return (jnp.where(error < best[1], scales, best[0]), jnp.minimum(error, best[1])), None

    ranges = 1 - jnp.arange(1, _CLIPPED) / _STEPS
    (scales, _), _ = jax.lax.scan(better, attempt(jnp.float32(1)), ranges)
    axis, n = axis_of(array), len(array.inputs)
    shape = list(w.shape)
    shape[n - 1] //= group
    scales = scales.reshape(shape)
    return packed(nearest(w, scales, None, axis), scales, None, axis)


def smoothing_scales(
    weights: Mapping[str, jax.Array], seen: SeenInputs, declared: Sequence[Array], strength: float = _SMOOTHING
) -> jax.Array:
    """[I]: max |x|^strength / max |w|^(1 - strength), over tokens and over all outputs of these weights (SmoothQuant,
    arXiv:2211.10438, equation 4)."""
    largest = [jnp.abs(weights[array.name]).reshape(seen.largest.size, -1).max(1) for array in declared]
    of_weights = jnp.stack(largest).max(0)
    s = jnp.maximum(seen.largest, _LEAST) ** strength / jnp.maximum(of_weights, _LEAST) ** (1 - strength)
    return jnp.maximum(s, _LEAST)


def squared_error(difference: jax.Array, gram: jax.Array) -> jax.Array:
    """tr(D^T G D) of [inputs..., outputs...]: the squared error of products, summed over tokens and outputs."""
    flat = difference.reshape(gram.shape[0], -1)
    return jnp.sum(flat * jnp.matmul(gram, flat, precision=jax.lax.Precision.HIGHEST))
