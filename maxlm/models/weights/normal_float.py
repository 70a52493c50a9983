"""Weights in NF4, whose 16 values are quantiles of a normal distribution, with scales in 8 bits (QLoRA,
arXiv:2305.14314, section 3)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.models.weights.by_channel import DimNames

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Numbers that share a scale, and scales that share one."""

LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32
)  # fmt: skip
"""Of appendix E."""


@functools.cache
def dynamic_map() -> npt.NDArray[np.float32]:
    """The 256 values of "dynamic tree quantisation" (arXiv:1511.04561; signed, with up to 7 bits of exponent, as in
    arXiv:2110.02861): for e = 0 .. 6, with both signs, the middles of 2^e equal parts of [0.1, 1], times 10^(e - 6);
    and 0 and 1. The last bits are those of torch's float32, which everybody else's are made with."""
    tenth, one = np.float32(0.1), np.float32(1)
    found = [np.float32(0), one]
    for exponent in range(7):
        number = np.arange(2**exponent + 1)
        step = float((one - tenth) / np.float32(2**exponent))
        from_below, from_above = float(tenth) + step * number, 1 - step * number[::-1]
        edges = np.where(number <= number[-1] // 2, from_below, from_above).astype(np.float32)
        middles = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormalFloat4:
    """LEVELS[code] * scale, with scale = dynamic_map[absmax] * scales + mean.

    A number is off by 0.152 of the largest in its block (half the widest gap between levels) and by what the rounding
    of that largest number to 8 bits does. 4.127 bits a number.
    """

    values: jax.Array
    """uint8, two codes in each; of the weight's shape, but for half as many along the innermost dim of the inputs. In a
    block of 64 the first half lies in the low bits, the second half in the high ones."""
    absmax: jax.Array
    """uint8 [..., n]: the codes of the largest number of each block; all blocks of a matrix, inputs innermost, as
    the paper's own code goes through a matrix [outputs, inputs]."""
    scales: jax.Array
    """float32 [..., n / 256], rounded up."""
    mean: jax.Array
    """float32 [...]: of all largest numbers of a matrix."""
    n_inputs: int = field(metadata={"static": True})
    """Dims of the weight that a product sums over, which come before those of its outputs. What lies before both
    counts matrices: layers, experts."""
    n_outputs: int = field(metadata={"static": True})

    @staticmethod
    def of(w: jax.Array, n_inputs: int, n_outputs: int) -> NormalFloat4:
        """The nearest levels of w [..., inputs, outputs], whose innermost dim of inputs is a multiple of 64."""
        before = w.ndim - n_inputs - n_outputs
        matrices = w.astype(jnp.float32).reshape(-1, *w.shape[before:])
        one = functools.partial(_of_matrix, n_inputs=n_inputs)
        values, absmax, scales, mean = jax.lax.map(one, matrices)
        stacked = lambda x: x.reshape(*w.shape[:before], *x.shape[1:])
        return NormalFloat4(stacked(values), stacked(absmax), stacked(scales), stacked(mean), n_inputs, n_outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.values.shape)
        shape[self._axis] *= 2
        return tuple(shape)

    def __getitem__(self, index: Any) -> Self:
        """Some of its matrices; [...]: all of it."""
        values, absmax, scales, mean = (x[index] for x in (self.values, self.absmax, self.scales, self.mean))
        return type(self)(values, absmax, scales, mean, self.n_inputs, self.n_outputs)

    def codes(self) -> jax.Array:
        """uint8, of the weight's shape."""
        halves = _split(self.values, self._axis, BLOCK // 2)
        return jnp.concatenate([halves & 15, halves >> 4], self._axis).reshape(self.shape)

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array, computed in float32."""
        of_blocks = jnp.repeat(self.scales, BLOCK_OF_SCALES, -1)[..., : self.absmax.shape[-1]]
        largest = jnp.asarray(dynamic_map())[self.absmax] * of_blocks + self.mean[..., None]
        before = len(self.shape) - self.n_inputs - self.n_outputs
        inputs, outputs = list(self.shape[before:][: self.n_inputs]), self.shape[before + self.n_inputs :]
        inputs[-1] //= BLOCK
        largest = largest.reshape(*self.shape[:before], *outputs, *inputs)
        last = range(-self.n_inputs, 0)
        largest = jnp.moveaxis(largest, tuple(last), tuple(before + i for i in range(self.n_inputs)))
        codes = _split(self.codes(), self._axis, BLOCK)
        w = jnp.asarray(LEVELS)[codes] * jnp.expand_dims(largest, self._axis)
        return w.reshape(self.shape).astype(dtype)

    def dims(self, names: DimNames, inputs: tuple[str, ...]) -> Self:
        """As of `ByChannel`. The scales, 1 byte for 64 numbers, are not cut along a matrix: their blocks run across
        it."""
        of_values: Any = names
        of_absmax: Any = (*names[: -self.n_inputs - self.n_outputs], None)
        of_mean: Any = of_absmax[:-1]
        return type(self)(of_values, of_absmax, of_absmax, of_mean, self.n_inputs, self.n_outputs)

    @property
    def _axis(self) -> int:
        """The innermost dim of the inputs, from the end."""
        return -self.n_outputs - 1


def _of_matrix(w: jax.Array, n_inputs: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """values, absmax, scales and mean of one matrix [inputs, outputs]."""
    axis = n_inputs - 1 - w.ndim
    blocks = _split(w, axis, BLOCK)
    largest = jnp.abs(blocks).max(axis)
    inverse = 1 / jnp.where(largest == 0, 1, largest)
    codes = _nearest(LEVELS, blocks * jnp.expand_dims(inverse, axis)).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis)
    shape = list(w.shape)
    shape[axis] //= 2
    values = (low | (high << 4)).reshape(shape)

    by_output = jnp.moveaxis(largest, range(n_inputs), range(-n_inputs, 0)).reshape(-1)
    mean = by_output.mean()
    padded = jnp.pad(by_output - mean, (0, -by_output.size % BLOCK_OF_SCALES)).reshape(-1, BLOCK_OF_SCALES)
    scales = jnp.abs(padded).max(-1)
    scaled = padded * (1 / jnp.where(scales == 0, 1, scales))[:, None]
    absmax = _nearest(dynamic_map(), scaled).reshape(-1)[: by_output.size].astype(jnp.uint8)
    return values, absmax, scales, mean


def _nearest(levels: npt.NDArray[np.float32], x: jax.Array) -> jax.Array:
    """Which of the rising levels; of two that are as near the lower one."""
    middles = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    return jnp.searchsorted(jnp.asarray(middles.astype(np.float32)), x, side="left")


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`axis`, counted from the end, as two dims, the second of this size."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])
