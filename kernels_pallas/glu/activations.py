"""The activations and their slopes, in operations that XLA, Mosaic TPU and Mosaic GPU all lower."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def activate(act: str, a: jax.Array, beta: float | jax.Array = 1.0) -> jax.Array:
    """act(a): any shape, float32 or wider; `act` is one of `ACTIVATIONS`, `beta` the number of "swish"."""
    return activate_with_slope(act, a, beta)[0]  # compilers drop the slope that nobody reads


def activate_with_slope(act: str, a: jax.Array, beta: float | jax.Array = 1.0) -> tuple[jax.Array, jax.Array]:
    """(act(a), act'(a)): any shape, float32 or wider; arguments as of `activate`."""
    return _swish(a, beta) if act == "swish" else _FORMULAS[act](a)


def _swish(a: jax.Array, beta: float | jax.Array = 1.0) -> tuple[jax.Array, jax.Array]:
    """a sigmoid(beta a) (Ramachandran et al. 2017, arXiv:1710.05941); 1: SiLU (Elfwing et al. 2017, arXiv:1702.03118);
    1.702: nearly GELU (arXiv:1606.08415, section 2)."""
    scaled = beta * a
    s = lax.logistic(scaled)
    return a * s, s * (1 + scaled * (1 - s))


def _gelu(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a times the normal distribution function at a (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Mosaic GPU has no erf. The function below -|a| is exp(-a^2 / 2) times a polynomial in 1 / (1 + 0.3 |a|), a form of
    Hastings 1955, "Approximations for Digital Computers" (formula 7.1.26 of Abramowitz and Stegun is its best known
    instance). Our coefficients minimise the largest relative error over |a| < 13: 1.3e-7, and 8e-7 with the rounding
    of float32 up to |a| = 5. So the tail keeps its digits, where 1 + erf(a / sqrt(2)) loses them.
    """
    bell = jnp.exp(-0.5 * a * a)
    t = 1 / (1 + 0.3 * jnp.abs(a))
    series = jnp.full_like(t, _TAIL[-1])
    for coefficient in _TAIL[-2::-1]:
        series = series * t + coefficient
    tail = bell * series * t
    below = jnp.where(a < 0, tail, 1 - tail)
    return a * below, below + a * bell * (1 / math.sqrt(2 * math.pi))


_TAIL = (
    0.119626389,
    0.120798369,
    0.0996374205,
    0.129469468,
    -0.0553944117,
    0.208207287,
    -0.158276438,
    0.0359318506,
)


def _gelu_tanh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tanh approximation of the same paper; (1 + tanh z) / 2 is logistic(2 z), which keeps the tail's digits."""
    k, c = 2 * math.sqrt(2 / math.pi), 0.044715
    s = lax.logistic(k * a * (1 + c * a * a))
    return a * s, s + a * s * (1 - s) * k * (1 + 3 * c * a * a)


def _relu(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(a, 0.0), jnp.where(a > 0, jnp.ones_like(a), jnp.zeros_like(a))


def _relu2(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """So et al. 2021, arXiv:2109.08668, section 4.2."""
    positive = jnp.maximum(a, 0.0)
    return positive * positive, 2 * positive


def _sigmoid(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    s = lax.logistic(a)
    return s, s * (1 - s)


def _identity(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return a, jnp.ones_like(a)


_FORMULAS: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {
    "silu": _swish,
    "swish": _swish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": _sigmoid,
    "identity": _identity,
}

ACTIVATIONS: tuple[str, ...] = tuple(_FORMULAS)
