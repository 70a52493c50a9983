"""What a model knows of its input tokens, beside their ids."""

from __future__ import annotations

from typing import NamedTuple

import jax

from maxlm.models.ops import TokenTree


class Pages(NamedTuple):
    """Where the keys of each token's text are. A row of a batch is one token; its slot is its text's number.

    Layers that look back equally far share a table: the key is their window, 0 for those that see everything. The
    position p of the text in slot s is in block tables[window][s, p // C], at p % C. Block 0 holds nothing: entries
    beyond a text, and those that a window has left behind, name it.
    """

    slots: jax.Array
    """int32 [T]."""
    tables: dict[int, jax.Array]
    """window -> int32 [S, M]. On a mesh that cuts the batch each shard counts its own blocks, and has its own slots."""
    tree: TokenTree | None = None
    """Where rows are nodes of trees of tokens: their places, [T] each, which are then not their positions."""


class Tokens(NamedTuple):
    """Where each token stands, and what it sees."""

    positions: jax.Array
    """int32 [B, T], where each token stands in its document."""
    segment_ids: jax.Array | None = None
    """int32 [B, T], the document of each token; tokens of different documents never meet. None: one document."""
    visible_to: jax.Array | None = None
    """int32 [B, T]: the end of the columns that a token may see, in place of itself; None: itself. Tokens of a prefix
    that sees itself whole (prefix LM, images) have the prefix's end here."""
    places: jax.Array | None = None
    """int32 [B, T, 2], for `GlmRope`: the position in the context, and the place in the block. None: 0, and one more
    than `positions`."""
    seeds: jax.Array | None = None
    """uint32 [B], of the noise of each row's routers; None: no noise."""
    pages: Pages | None = None
    """With a cache: where it holds the keys of each row's text."""
