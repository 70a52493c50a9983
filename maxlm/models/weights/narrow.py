"""A float32 weight whose products are computed in 8 bits while it is trained.

What is multiplied is rounded when the product is made, by scales of its own, and the scales come after the product. The
weight stays float32, and so do the sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import Float8Products, Int8Products

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
"""Of activations and weights; of gradients."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Narrow:
    """A weight, and in which numbers to multiply by it."""

    values: jax.Array
    """float32."""
    products: Int8Products | Float8Products = field(metadata={"static": True})
    scales: jax.Array | None = None
    """float32 [3]: of activations, weight and their gradient, in delayed scaling; None: made with each product."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array; who multiplies by it, does so in that dtype."""
        return self.values.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def narrow_einsum(
    products: Int8Products | Float8Products,
    subscripts: str,
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array | None = None,
) -> jax.Array:
    """einsum(x, w) in x's dtype, summed in float32 or int32; the gradient of w in w's dtype.

    Args:
        products: which numbers are multiplied.
        subscripts: "x,w->out"; the letters of out are those of x alone, then those of w alone.
        x, w: arrays.
        scales: float32 [3], of 8-bit floats: of x, w and the gradient. What stands for their own gradient is no
            derivative but the three largest numbers that there were, for the scales of later steps; those of several
            uses are added. None: scales are made with the product.
    """
    return _fwd(products, subscripts, x, w, scales)[0]


_Kept = tuple[jax.Array, jax.Array, jax.Array | None]


def _fwd(
    products: Int8Products | Float8Products, subscripts: str, x: jax.Array, w: jax.Array, scales: jax.Array | None
) -> tuple[jax.Array, _Kept]:
    match products:
        case Int8Products():
            y = _by_vectors(subscripts, x, w)
        case Float8Products():
            of_x, of_w, _ = _each(scales)
            y = _by_arrays(subscripts, float8(x, E4M3, of_x), float8(w, E4M3, of_w))
        case _:
            assert_never(products)
    return y.astype(x.dtype), (x, w, scales)


def _bwd(
    products: Int8Products | Float8Products, subscripts: str, kept: _Kept, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, w, scales = kept
    of_x, of_w, out = _letters(subscripts)
    to_x, to_w = f"{out},{of_w}->{of_x}", f"{of_x},{out}->{of_w}"
    match products:
        case Int8Products():
            dx = _by_vectors(to_x, g, w)
            dw = jnp.einsum(to_w, x, g, preferred_element_type=w.dtype)
        case Float8Products():
            scale_of_x, scale_of_w, scale_of_g = _each(scales)
            slope = float8(g, E5M2, scale_of_g)
            dx = _by_arrays(to_x, slope, float8(w, E4M3, scale_of_w))
            dw = _by_arrays(to_w, float8(x, E4M3, scale_of_x), slope)
        case _:
            assert_never(products)
    largest = None if scales is None else jnp.stack([_largest(x), _largest(w), _largest(g)])
    return dx.astype(x.dtype), dw.astype(w.dtype), largest


narrow_einsum.defvjp(_fwd, _bwd)


def _letters(subscripts: str) -> tuple[str, str, str]:
    """Of both factors and of the result."""
    factors, out = subscripts.split("->")
    left, right = factors.split(",")
    return left, right, out


def _by_vectors(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32: integers from -127 to 127, summed in int32, with a scale for each vector that is summed over."""
    of_a, of_b, out = _letters(subscripts)

    summed = lambda names: tuple(i for i, name in enumerate(names) if name not in out)
    (left, of_left), (right, of_right) = whole_numbers(a, summed(of_a)), whole_numbers(b, summed(of_b))
    y = jnp.einsum(subscripts, left, right, preferred_element_type=jnp.int32).astype(jnp.float32)
    # A result's dims are those of a alone, then those of b alone, in their order.
    own = math.prod(of_right.shape)
    rest = tuple(size for name, size in zip(of_b, b.shape, strict=True) if name in out)
    first = tuple(size for name, size in zip(of_a, a.shape, strict=True) if name in out)
    assert own == math.prod(rest), "scales have what is not summed over"
    return y * of_left.reshape(*first, *[1] * len(rest)) * of_right.reshape(rest)


def whole_numbers(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """int8 from -127 to 127, and float32 scales, with 1 in place of the axes that a vector is along."""
    wide = x.astype(jnp.float32)
    scales = jnp.abs(wide).max(axes, keepdims=True) / 127
    return jnp.round(wide / jnp.where(scales == 0, 1, scales)).astype(jnp.int8), scales


def scales_of(history: jax.Array, margin: int) -> jax.Array:
    """Of the largest numbers of earlier steps, float32 [..., 3, steps], the `scales` of the next, [..., 3]; 1 where
    there was nothing."""
    largest = history.max(-1) * 2.0**margin
    return jnp.where(largest == 0, 1, largest / np.array([_top(E4M3), _top(E4M3), _top(E5M2)], np.float32))


def _each(scales: jax.Array | None) -> Sequence[jax.Array | None]:
    """Of x, w and the gradient."""
    return (None, None, None) if scales is None else tuple(scales)


def float8(x: jax.Array, dtype: Any, scale: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The nearest numbers, and their scale. Without one the largest becomes the largest that there is; with one larger
    ones do."""
    wide = x.astype(jnp.float32)
    if scale is None:
        scale = _largest(x) / _top(dtype)
        return (wide / jnp.where(scale == 0, 1, scale)).astype(dtype), scale
    return jnp.clip(wide / scale, -_top(dtype), _top(dtype)).astype(dtype), scale


def _largest(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)).max()


def _top(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max)


def _by_arrays(subscripts: str, a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> jax.Array:
    """float32: of numbers with one scale each."""
    return jnp.einsum(subscripts, a[0], b[0], preferred_element_type=jnp.float32) * (a[1] * b[1])
