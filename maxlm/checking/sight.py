"""What a token sees: nothing after it, and nothing of other documents, by gradients and by changed tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.checking.verdicts import CheckRow, rounding
from maxlm.config import Backend, Capacity, ExecutionConfig, Experts, ModelConfig, RunConfig, UserError
from maxlm.models import Execution, Tokens, bind, init_parameters, ops
from maxlm.sharding import Layout


class Sight(NamedTuple):
    """What was found of T rows, of which row t asks what the logits at t depend on."""

    forbidden: float
    """The largest gradient for an input that must not count."""
    own: float
    """The smallest gradient, over rows, for the token itself: not 0, or nothing was asked."""
    moved: float
    """How far logits went when tokens that must not count became others, as a part of the largest logit."""


def causality(config: RunConfig, layout: Layout) -> Iterator[CheckRow]:
    """Of one document, with the config's kernels; on one device."""
    if (reason := config.model.looks_ahead) is not None:
        yield CheckRow.not_here("causality", f"this model is not causal: {reason}")
        return
    segments = np.zeros(config.train.seq_len, np.int32)
    yield from _rows("causality", config, layout, config.execution, segments)


def isolation(config: RunConfig, layout: Layout) -> Iterator[CheckRow]:
    """Of three documents in a row, with each kernel of attention that there is; on one device."""
    T = config.train.seq_len
    segments = np.searchsorted([T // 4 + 1, T // 2 + 3], np.arange(T), side="right").astype(np.int32)
    for backend in Backend:
        if backend is Backend.AUTO:
            continue
        name = f"packed documents, {backend.value}"
        how = replace(config.execution, kernels=replace(config.execution.kernels, attention=backend))
        try:
            yield from _rows(name, config, layout, how, segments)
        except UserError as error:  # how a kernel says that it cannot do this
            if config.execution.kernels.attention is backend:
                raise
            yield CheckRow.not_here(name, str(error))


def _rows(
    name: str, config: RunConfig, layout: Layout, execution: ExecutionConfig, segments: np.ndarray
) -> Iterator[CheckRow]:
    model = config.model
    found = look(model, layout, execution, segments)
    yield CheckRow.at_most(
        f"{name}: gradients",
        found.forbidden if found.own > 0 else float("nan"),
        0.0,
        f"largest of an input that must not count; the least of a token for itself is {found.own:.1e}",
    )
    if competes(model):
        yield CheckRow.not_here(f"{name}: tokens", "tokens of a group compete for the room that experts have")
        return
    bound = rounding(execution.dtype, jax.default_backend())
    yield CheckRow.at_most(f"{name}: tokens", found.moved, bound, "how far logits moved when hidden tokens changed")


def competes(model: ModelConfig) -> bool:
    """Whether a token that has no part in another may still take its place with an expert."""
    return any(isinstance(block.mlp, Experts) and isinstance(block.mlp.dispatch, Capacity) for block in model.blocks)


def look(model: ModelConfig, layout: Layout, execution: ExecutionConfig, segments: np.ndarray) -> Sight:
    """Ask for every position at once.

    Args:
        model: on one device.
        layout: of that device.
        execution: number format and kernels.
        segments: int32 [T], the document of each token of a row.
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
    parameters = jax.jit(lambda: init_parameters(model, jax.random.key(1)))()
    ask = jax.jit(functools.partial(_ask, model, Execution(layout, execution)))
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
