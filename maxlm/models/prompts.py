"""What makes the vectors of virtual tokens while they are learned."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp

from maxlm.config import LstmEncoder, MlpEncoder


def encoded(encoder: MlpEncoder | LstmEncoder | None, own: dict[str, jax.Array]) -> jax.Array:
    """Embeddings [P, D] of virtual tokens, of what is learned for them, in float32."""
    match encoder:
        case None:
            return own["rows"]
        case MlpEncoder():
            return _layers(own["rows"], own)
        case LstmEncoder():
            ways = [
                _lstm(own["rows"], *(own[f"{way}_{name}"] for name in ("inputs", "state", "bias")), reverse=reverse)
                for way, reverse in (("forward", False), ("backward", True))
            ]
            return _layers(jnp.concatenate(ways, -1), own)
        case _:
            assert_never(encoder)


def tanh_rows(shared: dict[str, Any] | None) -> jax.Array | None:
    """tanh(W1 e), [P, hidden]: what the keys and values of a prefix are made of; None: they are learned themselves."""
    if shared is None:
        return None
    return jnp.tanh(shared["rows"] @ shared["inner"] + shared["inner_bias"])


def _layers(x: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
    """Linear layers with relu between them."""
    n = sum(name.startswith("layer_") for name in own) // 2
    for i in range(n):
        x = (jax.nn.relu(x) if i else x) @ own[f"layer_{i}"] + own[f"layer_{i}_bias"]
    return x


def _lstm(x: jax.Array, inputs: jax.Array, state: jax.Array, bias: jax.Array, *, reverse: bool) -> jax.Array:
    """Outputs [P, hidden] of an LSTM over the rows of x [P, D] (Hochreiter & Schmidhuber 1997, with a forget gate);
    gates lie in the order input, forget, cell, output."""

    def turn(carry: tuple[jax.Array, jax.Array], of_x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, c = carry
        i, f, g, o = jnp.split(of_x + h @ state + bias, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(state.shape[0], x.dtype)
    return jax.lax.scan(turn, (zero, zero), x @ inputs, reverse=reverse)[1]
