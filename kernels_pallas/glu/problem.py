"""One call of a gated linear unit, as every body receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

Save = Literal["ag", "none"]


@dataclass(frozen=True, kw_only=True)
class GluBlocks:
    """A tile of the output, m rows and f columns, and the depth d of one step of the sum; then the backward's."""

    m: int
    f: int
    d: int
    m_backward: int
    f_backward: int
    d_backward: int
    stages: int = 3
    """Steps in flight (GPU)."""
    stages_backward: int = 3


@dataclass(frozen=True, kw_only=True)
class GluProblem:
    """Static description of a call: x [M, D] and weights [D, F] give [M, F]."""

    M: int
    D: int
    F: int
    dtype: jnp.dtype
    act: str
    save: Save
    biases: bool = False
    down: int | None = None
    """Columns of the down projection when it belongs to the call (`fused_glu_mlp`)."""
    beta: float = 1.0
    """Of act = "swish"."""
