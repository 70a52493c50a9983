"""Self-attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from maxlm.config.earlier import renamed
from maxlm.config.errors import UserError, require_positive
from maxlm.config.position import Position, Rope


@renamed(rope="position")
@dataclass(frozen=True, kw_only=True)
class GroupedQuery:
    """Causal self-attention: MHA (n_kv_heads = n_heads), GQA (fewer) or MQA (1)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    position: Position | None = field(default_factory=Rope)
    """None: nothing here knows positions but the causal mask (NoPE)."""
    window: int | None = None
    """Keys a query may see, itself included; None: all earlier ones."""
    soft_cap: float | None = None
    """Scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv:2408.00118)."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """`model.norm` over each query and key head before RoPE (as in Qwen 3)."""

    def __post_init__(self) -> None:
        for key in ("n_heads", "n_kv_heads", "head_dim"):
            require_positive(f"model.blocks[].attention.{key}", getattr(self, key))
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
        if self.window is not None:
            require_positive("model.blocks[].attention.window", self.window)
        if self.soft_cap is not None:
            require_positive("model.blocks[].attention.soft_cap", self.soft_cap)


Attention = GroupedQuery
"""Every kind of attention."""
