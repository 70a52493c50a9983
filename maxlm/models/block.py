"""One layer of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm import shapes
from maxlm.config import (
    BlockConfig,
    DeepNorm,
    Experts,
    GatedMlp,
    GroupedQuery,
    LatentAttention,
    Mlp,
    ModelConfig,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    Sandwich,
)
from maxlm.models import ops
from maxlm.models.attention import GroupedQueryLayer
from maxlm.models.execution import Execution
from maxlm.models.kv_cache import LayerCache
from maxlm.models.latent_attention import LatentAttentionLayer
from maxlm.models.mlp import MlpLayer
from maxlm.models.moe import ExpertsLayer, RouterStats
from maxlm.models.norms import NormLayer
from maxlm.models.parameters import Initializer
from maxlm.models.tokens import Tokens
from maxlm.models.weights.around import SmallMlp


class Block(nnx.Module):
    """Attention and an MLP, or experts, joined to the residual stream as `config.residual` says."""

    attention_norm: NormLayer
    attention_out_norm: NormLayer
    mlp_norm: NormLayer
    mlp_out_norm: NormLayer
    attention_adapter: nnx.Param
    mlp_adapter: nnx.Param

    def __init__(self, config: BlockConfig, model: ModelConfig, init: Initializer):
        self.config, self.n_layers = config, model.n_layers
        for name in shapes.block_norms(config):
            setattr(self, name, NormLayer(model.norm, "vector", model.d_model, init))
        match config.attention:
            case GroupedQuery():
                self.attention: GroupedQueryLayer | LatentAttentionLayer = GroupedQueryLayer(
                    config.attention, model, init
                )
            case LatentAttention():
                self.attention = LatentAttentionLayer(config.attention, model, init)
            case _:
                assert_never(config.attention)
        match config.mlp:
            case Mlp() | GatedMlp():
                self.mlp: MlpLayer | ExpertsLayer = MlpLayer(config.mlp, model, init)
            case Experts():
                self.mlp = ExpertsLayer(config.mlp, model, init)
            case _:
                assert_never(config.mlp)
        if model.adapter is not None:  # one that is not in the weights; `adapted` puts it here
            self.attention_adapter, self.mlp_adapter = nnx.Param(jnp.zeros(())), nnx.Param(jnp.zeros(()))

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        how: Execution,
        cache: LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
        look: Callable[[str, jax.Array], None] = lambda name, x: None,
    ) -> tuple[jax.Array, LayerCache | None, RouterStats | None]:
        """[B, T, D] -> [B, T, D], the cache with this layer's keys, and what its router did if it has one.

        Arguments as in GroupedQueryLayer; keys: a random key [B] for each row, for noise in training, None: no noise;
        and look, which gets what "attention" and "mlp" put out, [B, T, D].
        """
        stats = None

        def beside(update: jax.Array, normed: jax.Array, name: str) -> jax.Array:
            """With what an adapter makes of the same, where there is one."""
            mlp = getattr(self, name)[...] if hasattr(self, name) else None
            return update + ops.small_mlp(how.layout, normed, mlp) if isinstance(mlp, SmallMlp) else update

        # Sequence parallelism: the sum lies sharded over the sequence, what enters a product is whole again.
        def attention(normed: jax.Array) -> jax.Array:
            nonlocal cache
            with jax.named_scope("attention"):
                normed = how.layout.constrain(normed, "batch", "seq", "embed")
                update, cache = self.attention(normed, tokens, how, cache, layer)
                update = beside(update, normed, "attention_adapter")
                look("attention", update)
                return update

        def mlp(normed: jax.Array) -> jax.Array:
            nonlocal stats
            with jax.named_scope("mlp"):
                normed = how.layout.constrain(normed, "batch", "seq", "embed")
                match self.mlp:
                    case ExpertsLayer():
                        update, stats = self.mlp(normed, how, keys, decoding=cache is not None)
                    case MlpLayer():
                        update = self.mlp(normed, how)
                    case _:
                        assert_never(self.mlp)
                update = beside(update, normed, "mlp_adapter")
                look("mlp", update)
                return update

        def add(x: jax.Array, update: jax.Array) -> jax.Array:
            return x + how.layout.constrain(update, "batch", "residual_seq", "embed")

        match self.config.residual:
            case PreNorm():
                x = add(x, attention(self.attention_norm(x)))
                x = add(x, mlp(self.mlp_norm(x)))
            case PostNorm():
                x = self.attention_norm(add(x, attention(x)))
                x = self.mlp_norm(add(x, mlp(x)))
            case OutputNorm():
                x = add(x, self.attention_out_norm(attention(x)))
                x = add(x, self.mlp_out_norm(mlp(x)))
            case DeepNorm() as deep:
                alpha = jnp.float32(deep.alpha_of(self.n_layers))
                x = self.attention_norm(add((alpha * x).astype(x.dtype), attention(x)))
                x = self.mlp_norm(add((alpha * x).astype(x.dtype), mlp(x)))
            case Sandwich():
                x = add(x, self.attention_out_norm(attention(self.attention_norm(x))))
                x = add(x, self.mlp_out_norm(mlp(self.mlp_norm(x))))
            case Parallel(two_norms=two_norms):
                normed = self.attention_norm(x)
                x = add(x, attention(normed) + mlp(self.mlp_norm(x) if two_norms else normed))
            case _:
                assert_never(self.config.residual)
        return x, cache, stats
