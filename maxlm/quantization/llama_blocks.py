"""Blocks of 32 numbers as llama.cpp's Q8_0, Q4_0 and Q4_1 have them, found again in the numbers that they stand for.

Of a model from a GGUF file, those blocks are what it was rounded to: found again, they hold it in as few bits without
another rounding.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.models.weights.by_group import ByGroup, packed

BLOCK = 32
_Floats = npt.NDArray[np.float32]


def found_blocks(w: _Floats, axis: int) -> ByGroup | None:
    """The blocks along `axis`, counted from the end, with which every number is right to the last bit; None: there are
    none.

    A block's scale follows from its numbers, as its largest has the code 127 (Q8_0: code * d) or -8 (Q4_0: code * d),
    or its least and largest the codes 0 and 15 (Q4_1: code * d + m); d and m are float16.
    """
    at = w.ndim + axis
    if w.shape[at] % BLOCK:
        return None
    blocks = np.moveaxis(w, at, -1).reshape(*w.shape[:at], *w.shape[at + 1 :], w.shape[at] // BLOCK, BLOCK)
    for found in (_q8_0(blocks), _q4_0(blocks), _q4_1(blocks)):
        if found is not None:
            codes, scales, offsets = found
            as_before = lambda x: np.moveaxis(x, -1, at)
            whole = as_before(codes.reshape(*codes.shape[:-2], -1))
            d = jnp.asarray(as_before(scales[..., 0]))
            m = None if offsets is None else jnp.asarray(as_before(offsets[..., 0]))
            return ByGroup(jnp.asarray(whole), d, m, axis) if codes.dtype == np.int8 else packed(whole, d, m, axis)
    return None


_Found = tuple[npt.NDArray[Any], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]


def _q8_0(blocks: _Floats) -> _Found | None:
    d = (np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    codes = np.round(_divided(blocks, d))
    exact = np.array_equal(codes * d.astype(np.float32), blocks) and np.abs(codes).max() <= 127
    return (codes.astype(np.int8), d, None) if exact else None


def _q4_0(blocks: _Floats) -> _Found | None:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    d = (largest / np.float32(-8)).astype(np.float16)
    codes = np.round(_divided(blocks, d)) + 8
    exact = np.array_equal((codes - 8) * d.astype(np.float32), blocks) and codes.min() >= 0 and codes.max() <= 15
    return (codes.astype(np.uint8), d, None) if exact else None


def _q4_1(blocks: _Floats) -> _Found | None:
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    d, m = ((high - low) / np.float32(15)).astype(np.float16), low.astype(np.float16)
    codes = np.round(_divided(blocks - m.astype(np.float32), d))
    exact = np.array_equal(codes * d.astype(np.float32) + m.astype(np.float32), blocks)
    return (codes.astype(np.uint8), d, m) if exact and codes.min() >= 0 and codes.max() <= 15 else None


def _divided(blocks: _Floats, d: npt.NDArray[np.float16]) -> _Floats:
    wide: _Floats = d.astype(np.float32)
    wide[wide == 0] = 1
    return blocks / wide
