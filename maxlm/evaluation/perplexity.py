"""Held-out loss, and the two figures that people compare: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from maxlm.config import UserError
from maxlm.observe.held_out import bits_per_byte, perplexity


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The mean over the tokens measured, every token with the same weight."""

    loss: float
    """Cross-entropy, nats a token."""
    perplexity: float
    """It depends on the tokenizer."""
    bits_per_byte: float | None
    """It does not depend on the tokenizer; None: not every token of the text was predicted."""
    tokens: int
    """Tokens predicted."""


def held_out(
    evaluate: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
    parameters: Any,
    batches: Iterable[dict[str, jax.Array]],
    *,
    bytes_per_token: float | None,
) -> HeldOut:
    """Measure `parameters` on every batch.

    Args:
        evaluate: parameters and batch -> sum of the cross-entropy in nats, number of tokens; `Trainer.evaluate` is one.
        parameters: what `evaluate` takes.
        batches: as `maxlm.data.loader.global_batches` yields them.
        bytes_per_token: UTF-8 bytes of held-out text for each predicted token, as `Batches.bytes_per_token`.

    Raises:
        UserError: the batches have no token to predict.
    """
    # On the device until the end, so that the next batch starts before this one is done.
    sums = [evaluate(parameters, batch) for batch in batches]
    return summary(
        nats=math.fsum(float(nats) for nats, _ in sums),
        tokens=int(math.fsum(float(tokens) for _, tokens in sums)),
        bytes_per_token=bytes_per_token,
    )


def summary(*, nats: float, tokens: int, bytes_per_token: float | None) -> HeldOut:
    """The figures from sums over all tokens.

    Raises:
        UserError: there are no tokens.
    """
    if not tokens:
        raise UserError("no held-out token to predict; prepare the data with a larger prepare.validation_fraction")
    loss = nats / tokens
    return HeldOut(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=None if bytes_per_token is None else bits_per_byte(loss, bytes_per_token),
        tokens=tokens,
    )
