"""How the next token is drawn from the model's distribution."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.fields import Range, config


@config("")
class SamplingConfig:
    """Applied in this order: temperature, then top_k, then top_p on what top_k left."""

    temperature: Annotated[float, Range(ge=0, note="0 takes the likeliest token")] = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: Annotated[int, Range(ge=0, note="0 draws from all tokens")] = 0
    """Draw from this many likeliest tokens (Fan et al. 2018, arXiv:1805.04833); 0: from all."""
    top_p: Annotated[float, Range(gt=0, le=1, note="1 draws from all tokens")] = 1.0
    """Draw from the fewest likeliest tokens that have this much probability (nucleus, arXiv:1904.09751); 1: all."""
