"""Self-attention: keys and values for groups of queries, or made from one latent vector a token."""

from __future__ import annotations

import enum
from dataclasses import field
from typing import Annotated, ClassVar

from maxlm.config.earlier import renamed, revalued
from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Positive, Range, config
from maxlm.config.position import (
    DynamicNtkScaling,
    GlmRope,
    LongRopeScaling,
    NtkScaling,
    Position,
    RelativeSinusoids,
    Rope,
)


class QkNorm(enum.Enum):
    """Over what `model.norm` goes of queries, and of keys."""

    HEADS = "heads"
    """Over each head by itself, with one scale for all of them (Qwen 3, arXiv:2505.09388)."""
    WHOLE = "whole"
    """Over all heads together, with a scale for each of their dims (OLMo 2, arXiv:2501.00656)."""


@config("model.blocks[].attention.pattern.", changes=Changes.IDENTITY)
class StridedPattern:
    """A query sees the last `stride` keys, and of those before every `stride`-th, counted from itself (Child et al.
    2019, arXiv:1904.10509, section 4.2, both heads in one)."""

    stride: Annotated[int, Range(ge=2)]
    """The square root of the sequence's length makes least work."""


@config("model.blocks[].attention.pattern.", changes=Changes.IDENTITY)
class FixedPattern:
    """Sequences are cut into chunks; a query sees those before it in its own, and the last few keys of each earlier one
    ("fixed" attention, arXiv:1904.10509, section 4.2, both heads in one).

    Chunks are counted in a row of the batch: documents that share a row are cut elsewhere than alone.
    """

    chunk: Annotated[int, Range(ge=2)]
    """Positions of a chunk."""
    summary: Positive[int]
    """Keys of a chunk, the last ones, that all later queries see."""

    def __post_init__(self) -> None:
        if self.summary > self.chunk:
            raise UserError(
                f"model.blocks[].attention.pattern.summary = {self.summary} is more than chunk = {self.chunk}; use at "
                f"most {self.chunk}"
            )


@revalued(qk_norm={True: QkNorm.HEADS, False: None})
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
    """Keys a query may see, itself included; None: all earlier ones. GPT-3 has it in every other layer."""
    pattern: StridedPattern | FixedPattern | None = None
    """Of all earlier keys a query sees some alone, near and far; None: all. Fewer scores count, but our kernels compute
    all of them."""
    soft_cap: Positive[float] | None = None
    """Scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv:2408.00118)."""
    qkv_bias: bool = False
    """The projections to queries, keys and values add a learned vector."""
    out_bias: bool = False
    """The projection back to the residual stream adds a learned vector."""
    qk_norm: QkNorm | None = None
    """`model.norm` over queries and over keys, before RoPE; None: no such norm."""
    scale: Positive[float] | None = None
    """Products of queries and keys are multiplied by it (1 in GPT-Neo; in Gemma 2, arXiv:2408.00118, a number of its
    own); None: by head_dim^-0.5."""
    sinks: bool = False
    """Each query head has a learned score that takes part in the softmax and has no value (gpt-oss, arXiv:2508.10925;
    arXiv:2309.17453)."""
    log_length: Annotated[int, Range(ge=2)] | None = None
    """The query at position p is multiplied by log(p + 1) / log(log_length) where that is more than 1 (Su 2021; Qwen,
    arXiv:2309.16609, section 2.3); None: by nothing."""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            allowed = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise UserError(
                f"model.blocks[].attention.n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}; "
                f"use one of {allowed}"
            )
        match self.position:
            case Rope() as rope:
                _require_pairs(rope, "head_dim", self.head_dim)
            case GlmRope() if self.head_dim % 4:
                raise UserError(
                    f"model.blocks[].attention.head_dim = {self.head_dim} has no two halves of pairs, which GlmRope "
                    f"rotates; use {-(-self.head_dim // 4) * 4}"
                )
            case _:
                pass
        if self.pattern is not None and self.window is not None:
            raise UserError(
                f"model.blocks[].attention.window = {self.window} and pattern = {type(self.pattern).__name__} both say "
                "which keys are near; use one of the two"
            )

    @property
    def key_head_dim(self) -> int:
        """Numbers in a head's query or key as scores see it."""
        return self.head_dim + (self.position.dims if isinstance(self.position, RelativeSinusoids) else 0)

    @property
    def value_head_dim(self) -> int:
        """Numbers in a head's value."""
        return self.head_dim


@config("model.blocks[].attention.", changes=Changes.IDENTITY)
class LatentAttention:
    """Causal self-attention whose keys and values are made from one vector a token, its latent, shared by all heads
    (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437, section 2.1.1).

    RoPE has dims of its own: of each query, and of one key that all heads share. Decoding keeps kv_rank +
    rope_head_dim numbers of a token.
    """

    n_heads: Positive[int]
    """Heads, of queries as of keys and values."""
    kv_rank: Positive[int]
    """Numbers in the latent of keys and values, which `model.norm` normalises."""
    query_rank: Positive[int] | None = None
    """Numbers in a latent of the queries, normalised as well; None: queries are made from the hidden state itself."""
    content_head_dim: Positive[int]
    """Numbers in a head's query and key that know no position."""
    rope_head_dim: Positive[int]
    """Numbers in a head's query, and in the key of all heads, that RoPE rotates."""
    value_head_dim: Positive[int]
    """Numbers in a head's value."""
    position: Rope = field(default_factory=Rope)
    """How these are rotated."""
    scale: Positive[float] | None = None
    """Products of queries and keys are multiplied by it; None: by (content_head_dim + rope_head_dim)^-0.5."""
    window: ClassVar[None] = None

    def __post_init__(self) -> None:
        _require_pairs(self.position, "rope_head_dim", self.rope_head_dim)

    @property
    def key_head_dim(self) -> int:
        """Numbers in a head's query or key."""
        return self.content_head_dim + self.rope_head_dim

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads, where they are made from the latents."""
        return self.n_heads


Attention = GroupedQuery | LatentAttention
"""Every kind of attention."""


def _require_pairs(rope: Rope, name: str, width: int) -> None:
    """RoPE can rotate heads of this width, which is called so.

    Raises:
        UserError: it cannot.
    """
    key = "model.blocks[].attention."
    if rope.dims is None and width % 2:
        raise UserError(f"{key}{name} = {width} is odd, but RoPE rotates pairs; use {width + 1}")
    rotated = width if rope.dims is None else rope.dims
    if rotated > width:
        raise UserError(f"{key}position.dims = {rotated} is more than {name} = {width}; use an even number up to that")
    match rope.scaling:
        case NtkScaling() | DynamicNtkScaling() if rotated < 4:
            raise UserError(
                f"{key}position.scaling = {type(rope.scaling).__name__} stretches the slower of several pairs, but "
                f"{rotated} dims are rotated; use at least 4, or LinearScaling"
            )
        case LongRopeScaling(short_factors=factors) if len(factors) != rotated // 2:
            raise UserError(
                f"{key}position.scaling.short_factors has {len(factors)} numbers, but the {rotated} rotated dims "
                f"are {rotated // 2} pairs; give one for each pair"
            )
        case _:
            pass
