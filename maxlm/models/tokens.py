"""What a model knows of its input tokens, beside their ids."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Tokens(NamedTuple):
    """Where each token stands, and what it sees."""

    positions: jax.Array
    """int32 [B, T], where each token stands in its document."""
    segment_ids: jax.Array | None = None
    """int32 [B, T], the document of each token; tokens of different documents never meet. None: one document."""
    visible_to: jax.Array | None = None
    """int32 [B, T]: the end of the columns that a token may see, in place of itself; None: itself. Tokens of a prefix
    that sees itself whole (prefix LM, images) have the prefix's end here. With a cache, its slots are the columns."""
    places: jax.Array | None = None
    """int32 [B, T, 2], for `GlmRope`: the position in the context, and the place in the block. None: 0, and one more
    than `positions`."""
    seeds: jax.Array | None = None
    """uint32 [B], of the noise of each row's routers; None: no noise."""
