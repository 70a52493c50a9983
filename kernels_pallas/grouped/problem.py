"""One call of a grouped matrix product, as every body receives it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class GroupedBlocks:
    """What each kernel takes at once: m of the rows, f of F and d of D. First forward, then the gradients."""

    m: int
    f: int
    d: int
    m_rows: int
    """The gradient of the rows, x."""
    f_rows: int
    d_rows: int
    m_weights: int
    """The gradient of the weights."""
    f_weights: int
    d_weights: int


@dataclass(frozen=True, kw_only=True)
class GroupedProblem:
    """Static description of a call: x [M, D] in E groups of rows and weights [E, D, F] give [M, F]."""

    M: int
    D: int
    F: int
    E: int
    dtype: jnp.dtype
    """Of x, of the result, and of the weights in the products."""
    weight_dtype: jnp.dtype
    """Of the weights as given, and of their gradient."""
