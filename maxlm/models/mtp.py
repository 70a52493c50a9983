"""Modules that predict further tokens while a model is trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm import shapes
from maxlm.config import ModelConfig
from maxlm.models import ops
from maxlm.models.block import Block
from maxlm.models.execution import Execution
from maxlm.models.moe import RouterStats
from maxlm.models.norms import NormLayer
from maxlm.models.parameters import Initializer
from maxlm.models.tokens import Tokens


class MtpModule(nnx.Module):
    """One of `MtpModules` (arXiv:2412.19437, equations 21 to 23)."""

    hidden_norm: NormLayer
    embedding_norm: NormLayer
    final_norm: NormLayer
    hidden_proj: nnx.Param
    embedding_proj: nnx.Param

    def __init__(self, model: ModelConfig, init: Initializer):
        init.declare(self, shapes.mtp_module(model))
        for name in shapes.mtp_norms(model):
            setattr(self, name, NormLayer(model.norm, "vector", model.d_model, init))
        self.block = Block(model.blocks[-1], model, init)
        self.normed = model.final_norm

    def __call__(
        self,
        hidden: jax.Array,
        embedded: jax.Array,
        same: jax.Array,
        tokens: Tokens,
        how: Execution,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """States [B, T, D], after a norm as the model's last one, and what the router of the layer did if it has one.

        Args:
            hidden: [B, T, D], of the module before it, or of the model.
            embedded: [B, T, D], of the token that is added to each.
            same: bool [B, T], whether that is of the same document; the others' embeddings are not seen.
            tokens: the places of `hidden`, where the layer's attention takes place.
            how: mesh, number format, kernels.
            keys: as of `Block`.
        """

        def product(x: jax.Array, w: Any) -> jax.Array:
            return ops.project(how.layout, "btd,de->bte", how.layout.constrain(x, "batch", "seq", "embed"), w)

        of_states = product(self.hidden_norm(hidden), self.hidden_proj[...])
        of_tokens = product(self.embedding_norm(embedded), self.embedding_proj[...])
        x = of_states + jnp.where(same[..., None], of_tokens, 0)
        x = how.layout.constrain(x, "batch", "residual_seq", "embed")
        x, _, stats = self.block(x, tokens, how, None, jnp.int32(0), keys)
        x = self.final_norm(x) if self.normed else x
        return how.layout.constrain(x, "batch", "seq", "embed"), stats


def without_mtp(model: ModelConfig, parameters: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The model as it is used when training is over, and its parameters, in nested dicts."""
    return model.main, {name: tree for name, tree in parameters.items() if name != shapes.MTP}
