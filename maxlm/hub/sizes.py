"""What every family says of a model, under one key or another: sizes, activation, initial values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maxlm.config import (
    BlockConfig,
    Experts,
    GatedMlp,
    GroupedQuery,
    LmHead,
    Mlp,
    ModelConfig,
    Nonlinearity,
    Norm,
    UserError,
)
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.published import ACTIVATIONS, Published, read_activation, write_activation


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model, as its config.json says; what is left is added by name."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    activation: Nonlinearity
    max_seq_len: int
    eps: float
    init_std: float
    tied: bool

    def attention(self, **more: Any) -> GroupedQuery:
        return GroupedQuery(n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim, **more)

    def gated(self, bias: bool = False) -> GatedMlp:
        return GatedMlp(d_ff=self.d_ff, activation=self.activation, bias=bias)

    def plain(self, bias: bool = True) -> Mlp:
        return Mlp(d_ff=self.d_ff, activation=self.activation, bias=bias)

    def model(
        self, blocks: tuple[BlockConfig, ...], norm: Norm, head: Mapping[str, Any] | None = None, **more: Any
    ) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            blocks=blocks,
            max_seq_len=self.max_seq_len,
            norm=norm,
            head=LmHead(tied=self.tied, **(head or {})),
            init_std=self.init_std,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Where a family's config.json has these, and what is meant where it has not."""

    vocab_size: str = "vocab_size"
    d_model: str = "hidden_size"
    n_layers: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    n_kv_heads: str | None = "num_key_value_heads"
    """None: as many as heads."""
    head_dim: str | None = "head_dim"
    """None: d_model over n_heads."""
    d_ff: str | None = "intermediate_size"
    """None, or not there: four times d_model."""
    activation: str = "hidden_act"
    max_seq_len: str = "max_position_embeddings"
    eps: str = "rms_norm_eps"
    init_std: str = "initializer_range"
    act: str = "silu"
    """Word of the activation that is meant."""
    longest: int | None = None
    """Value of max_seq_len that is meant."""
    least: float = 1e-5
    """Value of eps that is meant."""
    tied: bool = False
    words: Mapping[str, Nonlinearity] = field(default_factory=lambda: ACTIVATIONS)

    def read(self, config: Published) -> Sizes:
        D, N = config.get(self.d_model, Positive[int]), config.count(self.n_heads)
        longest = {} if self.longest is None else {"default": self.longest}
        return Sizes(
            vocab_size=config.get(self.vocab_size, Positive[int]),
            d_model=D,
            n_layers=config.count(self.n_layers),
            n_heads=N,
            n_kv_heads=N if self.n_kv_heads is None else config.get(self.n_kv_heads, Positive[int], N),
            head_dim=D // N if self.head_dim is None else config.get(self.head_dim, Positive[int], D // N),
            d_ff=4 * D if self.d_ff is None else config.get(self.d_ff, Positive[int], 4 * D),
            activation=read_activation(config, self.activation, self.act, self.words),
            max_seq_len=config.get(self.max_seq_len, Positive[int], **longest),
            eps=config.get(self.eps, NotNegative[float], self.least),
            init_std=config.get(self.init_std, NotNegative[float], 0.02),
            tied=config.get("tie_word_embeddings", bool, self.tied),
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Of a model whose layers differ in their kinds alone, not in their sizes."""
        attention = model.layers[-1].attention
        mlp = next((block.mlp for block in model.layers if not isinstance(block.mlp, Experts)), model.layers[-1].mlp)
        values = {
            self.vocab_size: model.vocab_size,
            self.d_model: model.d_model,
            self.n_layers: model.n_layers,
            self.n_heads: attention.n_heads,
            self.n_kv_heads: attention.n_kv_heads,
            self.head_dim: attention.value_head_dim,
            self.d_ff: mlp.d_ff,
            self.activation: write_activation(mlp.activation, self.words),
            self.max_seq_len: model.max_seq_len,
            self.eps: model.norm.eps,
            self.init_std: model.init_std,
            "tie_word_embeddings": model.tied,
        }
        return {key: value for key, value in values.items() if key is not None}


def grouped_query(model: ModelConfig) -> GroupedQuery:
    """The attention of the last layer; no family but its own says of another kind what it has.

    Raises:
        UserError: it is of another kind.
    """
    attention = model.layers[-1].attention
    if not isinstance(attention, GroupedQuery):
        raise UserError(f"model.blocks[].attention = {type(attention).__name__} is not of this family")
    return attention


def only_block(model: ModelConfig) -> BlockConfig:
    """What every layer is.

    Raises:
        UserError: they are of several kinds.
    """
    if len(set(model.layers)) > 1:
        raise UserError(f"model.blocks has {len(model.layers)} layers of several kinds; this family has one")
    return model.layers[0]
