"""One token for each row of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.config import SamplingConfig

_COLDEST = 1e-6  # float32 cannot divide by much less; logits that differ at all are then already decided


def sample(logits: jax.Array, keys: jax.Array, config: SamplingConfig) -> jax.Array:
    """Draw one id for each row, in the order temperature, top_k, top_p.

    Of equally likely ids, greedy and the edges of top_k and top_p prefer the lower one.

    Args:
        logits: float32 [B, V].
        keys: random keys [B], one for each row, so that a row does not depend on the others.
        config: static under jit.

    Returns:
        int32 [B].
    """
    if config.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = (logits - logits.max(-1, keepdims=True)) / max(config.temperature, _COLDEST)
    vocab = logits.shape[-1]
    if config.top_k in (0, vocab) and config.top_p == 1:
        return _categorical(keys, logits)
    # From here on in falling order: column r is the id of rank r.
    logits, ids = jax.lax.top_k(logits, min(config.top_k or vocab, vocab))
    if config.top_p < 1:
        probabilities = jax.nn.softmax(logits, -1)
        before = jnp.cumsum(probabilities, -1) - probabilities
        nucleus = (before < config.top_p).at[:, 0].set(True)  # rounding must never leave a row empty
        logits = jnp.where(nucleus, logits, -jnp.inf)
    return jnp.take_along_axis(ids, _categorical(keys, logits)[:, None], -1)[:, 0]


def _categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
