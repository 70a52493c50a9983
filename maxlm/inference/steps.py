"""Prefill and decode as pure functions of a decoder and its cache.

A key's slot in the cache is its position. Prompts are padded on the right: a padded slot lies after every real
position, where the causal mask hides it until a new token overwrites it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import SamplingConfig
from maxlm.inference.sampling import sample
from maxlm.models import Decoder, Execution, Tokens, ops
from maxlm.models.decoder import Cache


class DecodeState(NamedTuple):
    """A batch in the middle of its texts."""

    cache: Cache
    """Everything before `token`."""
    token: jax.Array
    """int32 [B]: the newest token of each row."""
    position: jax.Array
    """int32 [B]: where that token stands."""
    done: jax.Array
    """bool [B]: the row has ended its text."""


class Choice(NamedTuple):
    """How tokens are chosen; static under jit."""

    sampling: SamplingConfig
    vocab_size: int
    """Ids from here on are padding of the model's table: never chosen."""
    ends: tuple[int, ...]
    """Each ends a text."""

    def __call__(self, logits: jax.Array, position: jax.Array, row_keys: jax.Array) -> jax.Array:
        """The token at `position` int32 [B], from float32 [B, V]. Its randomness depends on row and position alone."""
        keys = jax.vmap(jax.random.fold_in)(row_keys, position)
        return sample(logits[:, : self.vocab_size], keys, self.sampling)

    def ended(self, token: jax.Array) -> jax.Array:
        """Whether each int32 [B] ends its text."""
        return jnp.isin(token, jnp.array(self.ends))


def row_keys(seed: jax.Array, rows: int) -> jax.Array:
    """One random key [rows] for each row of a batch."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


def prefill_logits(
    model: Decoder, how: Execution, tokens: jax.Array, lengths: jax.Array, cache_length: int
) -> tuple[jax.Array, Cache]:
    """Read the prompts into a new cache.

    Args:
        model: the decoder.
        how: it runs.
        tokens: int32 [B, T], prompts padded on the right with any id.
        lengths: int32 [B], each prompt's tokens, 1 .. T.
        cache_length: positions that the cache has room for, at least T.

    Returns:
        float32 [B, V] logits of what follows each prompt, and the cache.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    empty = model.empty_cache(B, cache_length, how)
    hidden, cache, _ = model(model.embeddings(tokens, Tokens(positions), how), Tokens(positions), how, empty)
    assert cache is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]
    return _logits(model, how, last), cache


def decode_logits(
    model: Decoder, how: Execution, token: jax.Array, position: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Read one more token of each row: `token` and `position` int32 [B] -> float32 [B, V] logits of the next, cache."""
    tokens = Tokens(position[:, None])
    hidden, new_cache, _ = model(model.embeddings(token[:, None], tokens, how), tokens, how, cache)
    assert new_cache is not None
    return _logits(model, how, hidden[:, 0]), new_cache


def decode_chunk(
    model: Decoder,
    how: Execution,
    state: DecodeState,
    keys: jax.Array,
    limit: jax.Array,
    *,
    chunk: int,
    choose: Choice,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Up to `min(limit, chunk)` new tokens in each row; stops when every row is done.

    Returns:
        The state after them; int32 [B, chunk] tokens, of which the first n are set, and an end in rows that were done
        before; int32 n.
    """

    def unfinished(carry: tuple[DecodeState, jax.Array, jax.Array]) -> jax.Array:
        state, _, n = carry
        return (n < jnp.minimum(limit, chunk)) & ~state.done.all()

    def step(carry: tuple[DecodeState, jax.Array, jax.Array]) -> tuple[DecodeState, jax.Array, jax.Array]:
        state, tokens, n = carry
        logits, cache = decode_logits(model, how, state.token, state.position, state.cache)
        position = jnp.where(state.done, state.position, state.position + 1)
        token = jnp.where(state.done, choose.ends[0], choose(logits, position, keys))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], n, 1)
        return DecodeState(cache, token, position, state.done | choose.ended(token)), tokens, n + 1

    tokens = jnp.full((state.token.shape[0], chunk), choose.ends[0], jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, tokens, jnp.int32(0)))


def _logits(model: Decoder, how: Execution, hidden: jax.Array) -> jax.Array:
    """[B, D] -> float32 [B, V], whole on every device that has the row: choosing needs the row's whole vocabulary."""
    return how.layout.constrain(ops.logits(hidden, model.unembedding), "batch", None)
