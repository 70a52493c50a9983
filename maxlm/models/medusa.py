"""Heads that guess at later tokens."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from maxlm import shapes
from maxlm.config import ModelConfig
from maxlm.models import ops
from maxlm.models.execution import Execution
from maxlm.models.parameters import Initializer
from maxlm.models.unembedding import Unembedding


class MedusaHead(nnx.Module):
    """One head of `MedusaHeads`."""

    proj: nnx.Param
    unembed: nnx.Param

    def __init__(self, model: ModelConfig, init: Initializer):
        init.declare(self, shapes.medusa_head(model))

    def __call__(
        self, hidden: jax.Array, unembedding: Unembedding, how: Execution, *, normalized: bool
    ) -> tuple[jax.Array, Unembedding]:
        """What takes the place of both for its logits.

        Args:
            hidden: [B, T, D] in the compute dtype, after the final norm.
            unembedding: of the model.
            how: mesh and number format.
            normalized: rows of the table are divided by their lengths, as `LmHead.normalized` says.
        """
        hidden += jax.nn.silu(ops.project(how.layout, "btd,de->bte", hidden, self.proj[...]))
        table = ops.unit_rows(self.unembed[...]) if normalized else self.unembed[...]
        return hidden, dataclasses.replace(unembedding, table=table)
