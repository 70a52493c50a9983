"""The two figures that people compare, from a loss on held-out text."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss) of a cross-entropy in nats a token; it depends on the tokenizer. inf beyond the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A cross-entropy in nats a token as bits for each UTF-8 byte of the text; it does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token
