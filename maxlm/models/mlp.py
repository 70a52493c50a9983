"""The MLP of a block."""

from __future__ import annotations

from typing import assert_never

import jax
from flax import nnx

from maxlm import shapes
from maxlm.config import GatedMlp, Mlp, ModelConfig, Swish
from maxlm.models import ops
from maxlm.models.execution import Execution
from maxlm.models.parameters import Initializer


class MlpLayer(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

    gate_proj: nnx.Param
    up_proj: nnx.Param
    down_proj: nnx.Param
    gate_bias: nnx.Param
    up_bias: nnx.Param
    down_bias: nnx.Param
    swish_beta: nnx.Param

    def __init__(self, config: Mlp | GatedMlp, model: ModelConfig, init: Initializer):
        self.config = config
        init.declare(self, shapes.mlp(config, model))

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        config, layout = self.config, how.layout
        up_bias = self.up_bias[...] if config.bias else None
        beta = self.swish_beta[...] if config.activation == Swish(beta=None) else None
        match config:
            case GatedMlp():
                gate_bias = self.gate_bias[...] if config.bias else None
                weights = self.gate_proj[...], self.up_proj[...]
                h = ops.glu(
                    layout, how.kernels, x, *weights, gate_bias, up_bias, activation=config.activation, swish_beta=beta
                )
            case Mlp():
                h = ops.project(layout, "btd,df->btf", x, self.up_proj[...], up_bias)
                h = ops.activate(h, config.activation, beta)
            case _:
                assert_never(config)
        h = layout.constrain(h, "batch", "seq", "mlp")
        return ops.project(layout, "btf,fd->btd", h, self.down_proj[...], self.down_bias[...] if config.bias else None)
