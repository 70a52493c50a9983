"""What a batch has some tokens further on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ahead(NamedTuple):
    """Arrays [B, T], whose last k columns are those of no token."""

    inputs: jax.Array
    """int32: `inputs` k places further on."""
    same: jax.Array
    """bool: whether that is a token of the same document."""
    targets: jax.Array
    """int32: `targets` k places further on."""
    mask: jax.Array
    """float32: what the loss of those counts; 0 where the window ends before, or the document."""


def ahead(batch: dict[str, jax.Array], k: int) -> Ahead:
    """k places on, in a batch whose columns are in their order: before `Execution.arrange`."""
    shifted = lambda x, end=0: jnp.pad(x[:, k:], ((0, 0), (0, k)), constant_values=end)
    same = shifted(batch["segment_ids"], -1) == batch["segment_ids"]
    return Ahead(shifted(batch["inputs"]), same, shifted(batch["targets"]), shifted(batch["loss_mask"]) * same)
