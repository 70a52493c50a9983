"""Gated linear units in XLA operations (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from kernels_pallas.mixed import mixed_einsum

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


def fused_glu(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None = None,
    b_up: jax.Array | None = None,
    *,
    act: str = "silu",
) -> jax.Array:
    """act(x @ w_gate + b_gate) * (x @ w_up + b_up).

    Args:
        x: [..., D].
        w_gate, w_up: [D, F]; cast to x's dtype for the product, their gradients come in their own dtype.
        b_gate, b_up: [F], or None.
        act: a key of ACTIVATIONS.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: unknown activation.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act = {act!r} is unknown; use one of {sorted(ACTIVATIONS)}")
    letters = "abcdefghijk"[: x.ndim - 1]
    equation = f"{letters}y,yz->{letters}z"
    gate, up = mixed_einsum(equation, x, w_gate), mixed_einsum(equation, x, w_up)
    if b_gate is not None:
        gate += b_gate.astype(x.dtype)
    if b_up is not None:
        up += b_up.astype(x.dtype)
    return ACTIVATIONS[act](gate) * up
