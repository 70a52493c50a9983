"""Self-attention."""

from __future__ import annotations

from dataclasses import field

from maxlm.config.earlier import renamed
from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Positive, config
from maxlm.config.position import Position, Rope


@renamed(rope="position")
@config("model.blocks[].attention.", changes=Changes.IDENTITY)
class GroupedQuery:
    """Causal self-attention: MHA (n_kv_heads = n_heads), GQA (fewer) or MQA (1)."""

    n_heads: Positive[int]
    """Query heads."""
    n_kv_heads: Positive[int]
    """Key and value heads, each for n_heads / n_kv_heads query heads."""
    head_dim: Positive[int]
    """Numbers in a head's query or key."""
    position: Position | None = field(default_factory=Rope)
    """How scores know positions; None: from the causal mask alone (NoPE)."""
    window: Positive[int] | None = None
    """Keys a query may see, itself included; None: all earlier ones."""
    soft_cap: Positive[float] | None = None
    """Scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv:2408.00118)."""
    qkv_bias: bool = False
    """The projections to queries, keys and values add a learned vector."""
    out_bias: bool = False
    """The projection back to the residual stream adds a learned vector."""
    qk_norm: bool = False
    """`model.norm` over each query and key head before RoPE (as in Qwen 3)."""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            allowed = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise UserError(
                f"model.blocks[].attention.n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}; "
                f"use one of {allowed}"
            )
        if isinstance(self.position, Rope) and self.head_dim % 2:
            raise UserError(
                f"model.blocks[].attention.head_dim = {self.head_dim} is odd, but RoPE rotates pairs; "
                f"use {self.head_dim + 1}"
            )


Attention = GroupedQuery
"""Every kind of attention."""
