"""The feed-forward part of a block."""

from __future__ import annotations

import jax
from flax import nnx

from maxlm.config import GluConfig, ModelConfig
from maxlm.models import ops
from maxlm.models.parameters import Initializer
from maxlm.sharding import Layout


class GluMlp(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202); SwiGLU with silu."""

    def __init__(self, config: GluConfig, model: ModelConfig, layout: Layout, init: Initializer):
        self.config, self.kernels, self.layout = config, model.kernels, layout
        D, F = model.d_model, config.d_ff
        self.gate_proj = init.weight((D, F), ("embed", "mlp"))
        self.up_proj = init.weight((D, F), ("embed", "mlp"))
        self.down_proj = init.weight((F, D), ("mlp", "embed"), scale=(2 * model.n_layers) ** -0.5)
        if config.bias:
            self.gate_bias = init.zeros((F,), ("mlp",))
            self.up_bias = init.zeros((F,), ("mlp",))
            self.down_bias = init.zeros((D,), ("vector",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        config, layout = self.config, self.layout
        biases = (self.gate_bias[...], self.up_bias[...]) if config.bias else (None, None)
        weights = self.gate_proj[...], self.up_proj[...]
        h = ops.glu(layout, self.kernels, x, *weights, *biases, activation=config.activation)
        h = layout.constrain(h, "batch", "seq", "mlp")
        y = ops.project(layout, "btf,fd->btd", h, self.down_proj[...])
        return y + self.down_bias[...].astype(y.dtype) if config.bias else y
