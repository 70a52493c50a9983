"""Muon's update: momentum made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import functools
import math
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax

from maxlm.config import Muon, MuonScale
from maxlm.shapes import MatrixDims

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of a x + b x^3 + c x^5, which five times over takes singular values from 0.002 to 1 to about 1 (Jordan et al.)."""
_EPS = 1e-7
"""Added to the norm that a matrix is divided by."""


def orthogonalised(config: Muon, dims: Any) -> optax.GradientTransformation:
    """Each matrix of an update made orthogonal and scaled, those of stacked layers and experts each by itself.

    Args:
        config: steps and number format of the iteration, and the scale.
        dims: `MatrixDims` of every array, in the updates' tree.
    """

    def one(update: jax.Array, dims: MatrixDims) -> jax.Array:
        shape = update.shape
        inputs, outputs = (math.prod(shape[i] for i in part) for part in (dims.inputs, dims.outputs))
        order = (*dims.stack, *dims.inputs, *dims.outputs)
        turned = update.transpose(order)
        matrices = turned.reshape(*turned.shape[: len(dims.stack)], inputs, outputs)
        result = orthogonal(matrices, config.newton_schulz_steps, config.newton_schulz_dtype.value)
        match config.scale:
            case MuonScale.JORDAN:
                scale = max(1.0, outputs / inputs) ** 0.5
            case MuonScale.MOONLIGHT:
                scale = 0.2 * max(inputs, outputs) ** 0.5
            case _:
                assert_never(config.scale)
        back = tuple(order.index(i) for i in range(len(shape)))
        return (scale * result).reshape(turned.shape).transpose(back)

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates, dims))


def orthogonal(matrices: jax.Array, steps: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """About U V^T of each U S V^T, by Newton-Schulz's iteration: matrix products alone, which shard as others do.

    Args:
        matrices: float32 [..., rows, columns].
        steps: of the iteration.
        dtype: of its products.

    Returns:
        float32, with singular values between 0.65 and 1.2 where those of a matrix are at least 0.002 of its norm.
    """
    a, b, c = _COEFFICIENTS
    norms = jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(-2, -1), keepdims=True))
    x = (matrices / (norms + _EPS)).astype(dtype)
    if tall := matrices.shape[-2] > matrices.shape[-1]:
        x = x.mT
    product = functools.partial(jnp.matmul, precision="highest" if x.dtype == jnp.float32 else None)
    for _ in range(steps):
        square = product(x, x.mT)
        x = a * x + product(b * square + c * product(square, square), x)
    return (x.mT if tall else x).astype(jnp.float32)
