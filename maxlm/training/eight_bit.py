"""Adam with moments of 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from maxlm.config import AdamW


def _levels(fraction_bits: int) -> npt.NDArray[np.float64]:
    """Dynamic tree quantisation (section 1.3): numbers below 1, with `fraction_bits` less one for each power of 10."""
    steps = [np.linspace(0.1, 1, 2 ** (fraction_bits - e) + 1) for e in range(7)]
    return np.sort(np.concatenate([0.1**e * (ends[1:] + ends[:-1]) / 2 for e, ends in enumerate(steps)]))


SIGNED = np.concatenate([-_levels(6)[::-1], [0.0], _levels(6), [1.0]]).astype(np.float32)
"""256 numbers for a first moment."""
UNSIGNED = np.concatenate([_levels(7), [1.0]]).astype(np.float32)
"""255 for a second one, whose sign is a bit of the fraction (section 2.2). 0 is none of them: a moment that has become
small beside its block would be one that a step is divided by."""


def quantised(x: jax.Array, table: npt.NDArray[np.float32], block: int) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 [..., n] of the nearest numbers in a table, and scales float32 [..., n / block]: the largest of each
    block of the last dim. A device needs nothing of another one where its part of the last dim is whole blocks."""
    blocks = _in_blocks(x, block)
    scales = jnp.abs(blocks).max(-1)
    shares = blocks / jnp.where(scales == 0, 1, scales)[..., None]
    codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, shares, method="scan_unrolled").astype(jnp.uint8)
    return _whole(codes, x.shape[-1]), scales


def dequantised(codes: jax.Array, scales: jax.Array, table: npt.NDArray[np.float32], block: int) -> jax.Array:
    """float32 [..., n]: what `quantised` gave these for, nearly."""
    return _whole(jnp.asarray(table)[_in_blocks(codes, block)] * scales[..., None], codes.shape[-1])


def _in_blocks(x: jax.Array, block: int) -> jax.Array:
    """[..., n] -> [..., blocks, block], filled up with zeros."""
    n = x.shape[-1]
    block = min(block, n)
    count = -(-n // block)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - n)])
    return padded.reshape(*x.shape[:-1], count, block)


def _whole(blocks: jax.Array, n: int) -> jax.Array:
    """The inverse."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :n]


class EightBitState(NamedTuple):
    """How many updates there were, int32; and trees like the parameters': codes and scales of both moments."""

    updates: jax.Array
    mu: Any
    mu_scales: Any
    nu: Any
    nu_scales: Any


def scale_by_eight_bit_adam(config: AdamW, block: int) -> optax.GradientTransformation:
    """As optax.scale_by_adam; each step is made with moments of float32, which are rounded to be kept."""

    def init(parameters: Any) -> EightBitState:
        codes = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint8), parameters)
        scales = lambda: jax.tree.map(lambda x: jnp.zeros(_in_blocks(x, block).shape[:-1], jnp.float32), parameters)
        return EightBitState(jnp.zeros((), jnp.int32), codes(), scales(), codes(), scales())

    def update(gradients: Any, state: EightBitState, parameters: Any = None) -> tuple[Any, EightBitState]:
        count = optax.safe_increment(state.updates)
        corrections = 1 - config.b1**count, 1 - config.b2**count

        def one(g: jax.Array, mu: jax.Array, mu_scales: jax.Array, nu: jax.Array, nu_scales: jax.Array) -> Any:
            m = config.b1 * dequantised(mu, mu_scales, SIGNED, block) + (1 - config.b1) * g
            v = config.b2 * dequantised(nu, nu_scales, UNSIGNED, block) + (1 - config.b2) * g * g
            step = m / corrections[0] / (jnp.sqrt(v / corrections[1]) + config.eps)
            return step, *quantised(m, SIGNED, block), *quantised(v, UNSIGNED, block)

        tree: Any = jax.tree.structure(gradients)
        parts = (tree.flatten_up_to(part) for part in (gradients, *state[1:]))
        found = [one(*of_array) for of_array in zip(*parts, strict=True)]
        updates, *new = (tree.unflatten(part) for part in list(zip(*found, strict=True)) or 5 * [()])
        return updates, EightBitState(count, *new)

    return optax.GradientTransformation(init, update)
