"""How a trained model runs to make text: the format of its weights, and how the next token is drawn."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from maxlm.config.errors import UserError


class WeightFormat(enum.Enum):
    """How decoding holds weights. What the result of a product is in, is `execution.dtype` always."""

    DTYPE = "dtype"
    """In `execution.dtype`."""
    INT8 = "int8"
    """Products in 8 bits, with a float32 scale for each output (arXiv:2208.07339, section 2.1): a quarter of float32's
    memory, half of bfloat16's, at the price of a little quality."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Applied in this order: temperature, then top_k, then top_p on what top_k left."""

    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: int = 0
    """Draw from this many likeliest tokens (Fan et al. 2018, arXiv:1805.04833); 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this much probability (nucleus, arXiv:1904.09751); 1: all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature = {self.temperature} must be a number >= 0; 0 takes the likeliest token")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k} must be >= 0; 0 draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must lie in (0, 1]; 1 draws from all tokens")
