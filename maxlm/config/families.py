"""Model families as functions from sizes to a ModelConfig."""

from __future__ import annotations

import dataclasses

from maxlm.config.attention import GroupedQuery
from maxlm.config.errors import UserError
from maxlm.config.fields import Positive, require
from maxlm.config.mixture import Experts
from maxlm.config.mlp import Activation, GatedMlp, Mlp
from maxlm.config.model import BlockConfig, LmHead, ModelConfig, Parallel
from maxlm.config.norm import LayerNorm, RmsNorm
from maxlm.config.position import Learned, Rope


def llama(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    max_seq_len: int,
    n_kv_heads: int | None = None,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
) -> ModelConfig:
    """LLaMA 1, 2 and 3 (arXiv:2302.13971, 2307.09288, 2407.21783): RMSNorm, RoPE, SwiGLU, no biases.

    `n_kv_heads` defaults to `n_heads`, `rope` to theta 10,000 without stretching.

    Raises:
        UserError: d_model is not n_heads times an even head_dim, as RoPE rotates pairs; or a value out of its range.
    """
    for key, size in (("d_model", d_model), ("n_heads", n_heads)):
        require(f"llama(): {key}", size, Positive[int])
    if d_model % (2 * n_heads):
        heads = [n for n in range(1, d_model + 1) if d_model % (2 * n) == 0]
        near = sorted(sorted(heads, key=lambda n: abs(n - n_heads))[:2])
        above = d_model - d_model % (2 * n_heads) + 2 * n_heads
        raise UserError(
            f"llama(): d_model = {d_model} is not n_heads = {n_heads} times an even head_dim, as RoPE rotates pairs; "
            f"use {' or '.join([*(f'n_heads = {n}' for n in near), f'd_model = {above}'])}"
        )
    attention = GroupedQuery(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=d_model // n_heads,
        position=rope or Rope(),
    )
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        blocks=(BlockConfig(attention=attention, mlp=GatedMlp(d_ff=d_ff)),),
        max_seq_len=max_seq_len,
        norm=RmsNorm(eps=norm_eps),
        head=LmHead(tied=tie_embeddings),
        init_std=init_std,
    )


def gpt(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    max_seq_len: int,
    activation: Activation = Activation.GELU_TANH,
    band: int | None = None,
    init_std: float = 0.02,
) -> ModelConfig:
    """GPT-2, GPT-3 and OPT (Radford et al. 2019, section 2.3; arXiv:2005.14165, 2205.01068): LayerNorm before attention
    and a plain MLP of 4 d_model, learned positions, biases everywhere, one table for input and output.

    `band`: keys that a query sees in every other layer, as in GPT-3; None: all earlier ones.

    Raises:
        UserError: d_model is not a multiple of n_heads; or a value out of its range.
    """
    for key, size in (("d_model", d_model), ("n_heads", n_heads)):
        require(f"gpt(): {key}", size, Positive[int])
    if d_model % n_heads:
        near = sorted((n for n in range(1, d_model + 1) if d_model % n == 0), key=lambda n: abs(n - n_heads))[0]
        raise UserError(f"gpt(): d_model = {d_model} is not a multiple of n_heads = {n_heads}; use n_heads = {near}")
    attention = GroupedQuery(
        n_heads=n_heads, n_kv_heads=n_heads, head_dim=d_model // n_heads, position=None, qkv_bias=True, out_bias=True
    )
    layers = [attention] if band is None else [attention, dataclasses.replace(attention, window=band)]
    mlp = Mlp(d_ff=4 * d_model, activation=activation, bias=True)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        blocks=tuple(BlockConfig(attention=one, mlp=mlp) for one in layers),
        max_seq_len=max_seq_len,
        norm=LayerNorm(),
        embedded_position=Learned(),
        head=LmHead(tied=True),
        init_std=init_std,
    )


def palm(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    head_dim: int,
    max_seq_len: int,
    d_ff: int | None = None,
    init_std: float = 0.02,
) -> ModelConfig:
    """PaLM (arXiv:2204.02311, section 2): attention and a SwiGLU MLP side by side behind one LayerNorm, one key and
    value head for all queries, RoPE over all dims, one table for input and output, no biases.

    Logits are divided by sqrt(d_model) (section 5), `d_ff` defaults to 4 d_model. In the paper embeddings begin with a
    standard deviation of 1 and matrices with that of 1 / sqrt(inputs); here all have `init_std`.

    Raises:
        UserError: head_dim is odd, as RoPE rotates pairs; or a value out of its range.
    """
    require("palm(): d_model", d_model, Positive[int])
    attention = GroupedQuery(n_heads=n_heads, n_kv_heads=1, head_dim=head_dim)
    mlp = GatedMlp(d_ff=4 * d_model if d_ff is None else d_ff)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        blocks=(BlockConfig(attention=attention, mlp=mlp, residual=Parallel()),),
        max_seq_len=max_seq_len,
        norm=LayerNorm(bias=False),
        head=LmHead(tied=True, scale=d_model**-0.5),
        init_std=init_std,
    )


def with_experts(model: ModelConfig, experts: Experts, *, every: int = 1, first_dense: int = 0) -> ModelConfig:
    """A model of one kind of layer with experts in place of some MLPs: those of every `every`-th layer.

    The first `first_dense` layers stay as they are, and so do the first `every` - 1 of each `every` after them.
    """
    (dense,) = model.blocks
    return dataclasses.replace(
        model,
        first_blocks=(dense,) * first_dense,
        blocks=(dense,) * (every - 1) + (dataclasses.replace(dense, mlp=experts),),
    )
