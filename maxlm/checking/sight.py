"""What a token sees: nothing after it, and nothing of other documents, by gradients and by changed tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.checking.small_batches import in_haste
from maxlm.checking.verdicts import CheckRow, rounding
from maxlm.config import Backend, Capacity, Experts, ModelConfig, RunConfig, UserError
from maxlm.models import Execution, Tokens, bind, ops
from maxlm.sharding import Layout


class Sight(NamedTuple):
    """What was found of T rows, of which row t asks what the logits at t depend on."""

    forbidden: float
    """The largest gradient for an input that must not count."""
    own: float
    """The smallest gradient, over rows, for the token itself: not 0, or nothing was asked."""
    moved: float
    """How far logits went when tokens that must not count became others, as a part of the largest logit."""


def sight(config: RunConfig, layout: Layout, parameters: Any) -> Iterator[CheckRow]:
    """With each kernel of attention that there is, of which "auto" is one; on one device.

    Raises:
        UserError: the config names a kernel that cannot do this here.
    """
    for backend in Backend:
        if backend is Backend.AUTO:
            continue
        execution = replace(config.execution, kernels=replace(config.execution.kernels, attention=backend))
        try:
            yield from _rows(config, Execution(layout, execution), parameters)
        except UserError as error:  # how a kernel says that it cannot do this
            if config.execution.kernels.attention is backend:
                raise
            reason = str(error).partition(": ")[2].partition("; use")[0]
            yield CheckRow.not_here(f"what a token sees, {backend.value}", reason)


def _rows(config: RunConfig, how: Execution, parameters: Any) -> Iterator[CheckRow]:
    model, T = config.model, config.train.seq_len
    ask = jax.jit(functools.partial(_ask, model, how), compiler_options=in_haste(how.layout))
    name = how.kernels.attention.value
    three = np.searchsorted([T // 4 + 1, T // 2 + 3], np.arange(T), side="right")
    documents = {f"causality, {name}": np.zeros(T, np.int64), f"packed documents, {name}": three}
    for name, segments in documents.items():
        if name.startswith("causality") and model.looks_ahead is not None:
            yield CheckRow.not_here(name, f"this model is not causal: {model.looks_ahead}")
            continue
        found = look(model, ask, parameters, segments)
        yield CheckRow.at_most(
            f"{name}: gradients",
            found.forbidden if found.own > 0 else float("nan"),
            0.0,
            f"largest of an input that must not count; the least of a token for itself is {found.own:.1e}",
        )
        if competes(model):
            yield CheckRow.not_here(f"{name}: tokens", "tokens of a group compete for the room that experts have")
            continue
        bound = rounding(how.config.dtype, jax.default_backend())
        yield CheckRow.at_most(f"{name}: tokens", found.moved, bound, "how far logits moved when hidden tokens changed")


def competes(model: ModelConfig) -> bool:
    """Whether a token that has no part in another may still take its place with an expert."""
    return any(isinstance(block.mlp, Experts) and isinstance(block.mlp.dispatch, Capacity) for block in model.blocks)


def look(model: ModelConfig, ask: Callable[..., Any], parameters: Any, segments: np.ndarray) -> Sight:
    """Ask for every position at once.

    Args:
        model: on one device.
        ask: `_ask` of this model.
        parameters: of this model.
        segments: integers [T], the document of each token of a row.
    """
    T = len(segments)
    generator = np.random.default_rng(5)
    places = np.arange(T)
    sees = segments[:, None] == segments
    if model.looks_ahead is None:
        sees &= places <= places[:, None]
    same = np.broadcast_to(generator.integers(0, model.vocab_size, T), (T, T)).astype(np.int32)
    changed = np.where(sees, same, (same + generator.integers(1, model.vocab_size, (T, T))) % model.vocab_size)
    starts = np.searchsorted(segments, segments)
    rows = lambda x: jnp.asarray(np.broadcast_to(x, (T, T)), jnp.int32)
    tokens = Tokens(rows(places - starts), rows(segments) + 1)
    gradients, logits = ask(parameters, jnp.asarray(same), tokens)
    _, others = ask(parameters, jnp.asarray(changed, jnp.int32), tokens)
    gradients, logits, others = np.asarray(gradients), np.asarray(logits), np.asarray(others)
    return Sight(
        forbidden=float(gradients[~sees].max()),
        own=float(gradients[places, places].min()),
        moved=float(np.abs(others - logits).max() / np.abs(logits).max()),
    )


def _ask(
    model: ModelConfig, how: Execution, parameters: Any, ids: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """For int32 [T, T] ids: of row t the largest part of the gradient, for the input of each place, of a random sum of
    the logits at t, float32 [T, T]; and these logits, float32 [T, V]."""
    weights = jax.random.normal(jax.random.key(2), (model.vocab_size,))

    def asked(more: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder = bind(model, parameters)
        inputs = decoder.embeddings(ids, tokens, how) + more
        hidden = decoder(inputs, tokens, how).hidden
        at = jnp.arange(len(ids))
        logits = ops.logits(hidden[at, at], decoder.unembedding)
        return (logits @ weights).sum(), logits

    zeros = jnp.zeros((*ids.shape, model.d_model), how.dtype)
    gradient, logits = jax.grad(asked, has_aux=True)(zeros)
    return jnp.abs(gradient).max(-1).astype(jnp.float32), logits
