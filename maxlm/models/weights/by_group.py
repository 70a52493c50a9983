"""Weights in 4 or 8 bits with a scale for every few numbers of what a product sums over.

Two numbers of 4 bits share a byte: of a group the first half lies in the low bits, the second half in the high bits, as
in Q4_0 of GGUF. jax has an int4, but XLA gives each a byte in a CPU's memory (jax 0.10.2), some backends refuse
it, and files of checkpoints have a byte for it, too; a byte with two in it is the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp

from maxlm.models.weights.by_channel import DimNames

LEAST_GROUP = 8
"""Below it the scales weigh as much as the numbers."""


def group_of(size: int, wanted: int) -> int | None:
    """Numbers in a group: the largest common divisor of both; None if that is too small, or odd."""
    found = math.gcd(size, wanted)
    return found if found >= LEAST_GROUP and found % 2 == 0 else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByGroup:
    """code * scale with codes -8 .. 7, or code * scale + offset with codes 0 .. 15; or either with 8-bit codes."""

    values: jax.Array
    """uint8, two codes of 4 bits in each; or int8, codes of 8 bits. Of the weight's shape, but for `axis`, which has
    half as many where two share a byte."""
    scales: jax.Array
    """Of the weight's shape, but for `axis`, along which it has one for each group. bfloat16, which keeps the range of
    any weight; float16 of GGUF's blocks."""
    offsets: jax.Array | None
    """Of the shape of `scales`; None: codes are symmetric around 0. float32, in which minus zero point times scale is
    exact; float16 of GGUF's blocks."""
    axis: int = field(metadata={"static": True})
    """The innermost dim that a product sums over, counted from the end, which stays right in a loop over layers."""

    @staticmethod
    def of(w: jax.Array, axis: int, group: int, *, symmetric: bool = True) -> ByGroup:
        """The nearest codes of 4 bits.

        symmetric: scale = max |w| / 7.5, rounded to bfloat16, and codes -8 .. 7: a number is off by 0.54 of a scale
        (half of one, and what the rounding of the scale does to the largest).
        affine: scale = (max(w, 0) - min(w, 0)) / 15 and a zero point that is a code, so that 0 stays 0: a number is off
        by a whole scale at most (half of one for it, half for the zero point, and the scale's rounding), mostly half.
        """
        scales, offsets = grids(w, axis, group, symmetric=symmetric)
        return packed(nearest(w, scales, offsets, axis), scales, offsets, axis)

    @staticmethod
    def of_bytes(w: jax.Array, axis: int, group: int) -> ByGroup:
        """The nearest codes of 8 bits, as `nearest_bytes` has them."""
        codes, scales = nearest_bytes(_split(w, axis, w.shape[axis] // group), axis)
        return ByGroup(codes.reshape(w.shape), scales, None, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.values.shape)
        shape[self.axis] *= self._in_a_byte
        return tuple(shape)

    @property
    def group(self) -> int:
        """Numbers that share a scale."""
        return self.shape[self.axis] // self.scales.shape[self.axis]

    def __getitem__(self, index: Any) -> Self:
        """As of `ByChannel`; of dims that lie before the grouped one."""
        offsets = None if self.offsets is None else self.offsets[index]
        return type(self)(self.values[index], self.scales[index], offsets, self.axis)

    def codes(self) -> jax.Array:
        """int8, of the weight's shape."""
        if self._in_a_byte == 1:
            return self.values
        halves = _split(self.values, self.axis, self.scales.shape[self.axis])
        both = jnp.concatenate([halves & 15, halves >> 4], self.axis).astype(jnp.int8)
        return (both if self.offsets is not None else both - 8).reshape(self.shape)

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array, computed in float32."""
        wide = lambda x: jnp.expand_dims(x.astype(jnp.float32), self.axis)
        w = _split(self.codes(), self.axis, self.scales.shape[self.axis]).astype(jnp.float32) * wide(self.scales)
        if self.offsets is not None:
            w += wide(self.offsets)
        return w.reshape(self.shape).astype(dtype)

    def dims(self, names: DimNames, inputs: tuple[str, ...]) -> Self:
        """As of `ByChannel`."""
        same: Any = names
        return type(self)(same, same, None if self.offsets is None else same, self.axis)

    @property
    def _in_a_byte(self) -> int:
        return 2 if self.values.dtype == jnp.uint8 else 1


def grids(w: jax.Array, axis: int, group: int, *, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """Scales and offsets of `ByGroup.of`."""
    grouped = _split(w.astype(jnp.float32), axis, w.shape[axis] // group)
    if symmetric:
        return (jnp.abs(grouped).max(axis) / 7.5).astype(jnp.bfloat16), None
    low, high = jnp.minimum(grouped.min(axis), 0), jnp.maximum(grouped.max(axis), 0)
    scales = ((high - low) / 15).astype(jnp.bfloat16)
    wide = scales.astype(jnp.float32)
    zero = jnp.clip(jnp.round(-low / jnp.where(wide == 0, 1, wide)), 0, 15)
    return scales, -zero * wide


def nearest(w: jax.Array, scales: jax.Array, offsets: jax.Array | None, axis: int) -> jax.Array:
    """The codes of 4 bits, as `packed` takes them, int32 of w's shape."""
    wide = lambda x: jnp.expand_dims(x.astype(jnp.float32), axis)
    grouped, step = _split(w.astype(jnp.float32), axis, scales.shape[axis]), wide(scales)
    from_low = 8 if offsets is None else 0
    grouped = grouped if offsets is None else grouped - wide(offsets)
    codes = jnp.round(grouped / jnp.where(step == 0, 1, step)) + from_low
    return jnp.clip(codes, 0, 15).astype(jnp.int32).reshape(w.shape)


def nearest_bytes(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes -127 .. 127 in int8, and bfloat16 scales without that axis, max |x| / 127 along it: a number is off by half
    a scale."""
    x = x.astype(jnp.float32)
    scales = (jnp.abs(x).max(axis) / 127).astype(jnp.bfloat16)
    wide = jnp.expand_dims(scales.astype(jnp.float32), axis)
    return jnp.round(x / jnp.where(wide == 0, 1, wide)).astype(jnp.int8), scales


def packed(codes: jax.Array, scales: jax.Array, offsets: jax.Array | None, axis: int) -> ByGroup:
    """Of codes 0 .. 15, which mean -8 .. 7 where there are no offsets."""
    grouped = _split(codes.astype(jnp.uint8), axis, scales.shape[axis])
    low, high = jnp.split(grouped, 2, axis)
    shape = list(codes.shape)
    shape[axis] //= 2
    return ByGroup((low | (high << 4)).reshape(shape), scales, offsets, axis)


def _split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """`axis`, counted from the end, as two dims: groups, and the numbers in each, which are at `axis` then."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :])
