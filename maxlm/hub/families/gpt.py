"""The first GPT, GPT-2, and StarCoder 2: LayerNorm and plain MLPs with biases everywhere."""

from __future__ import annotations

from typing import Any

from maxlm.config import (
    Activation,
    BlockConfig,
    GroupedQuery,
    LayerNorm,
    Learned,
    LmHead,
    Mlp,
    ModelConfig,
    PostNorm,
    PreNorm,
    Residual,
    Rope,
)
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.families.llama import ATTENTION, NORMS, TOP
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Arrangement, Names, Transposed, linear, norm
from maxlm.hub.published import Published, read_activation, read_rope, write_activation, write_rope

_WORDS_OF_GPT = {"gelu": Activation.GELU_TANH, "relu": Activation.RELU, "silu": Activation.SILU}
"""Its "gelu" is the approximation by tanh."""


def _read(config: Published, residual: Residual, activation: Activation) -> ModelConfig:
    """GPT and GPT-2."""
    D, N = config.get("n_embd", Positive[int]), config.get("n_head", Positive[int])
    config.refuse("scale_attn_weights", True, why="scores are divided by sqrt(head_dim)")
    config.refuse("scale_attn_by_inverse_layer_idx", False, why="scores do not depend on the layer")
    attention = GroupedQuery(n_heads=N, n_kv_heads=N, head_dim=D // N, position=None, qkv_bias=True, out_bias=True)
    mlp = Mlp(
        d_ff=config.get("n_inner", Positive[int], 4 * D),
        activation=activation,
        bias=True,
    )
    return ModelConfig(
        vocab_size=config.get("vocab_size", Positive[int]),
        d_model=D,
        n_layers=config.get("n_layer", Positive[int]),
        blocks=(BlockConfig(attention=attention, mlp=mlp, residual=residual),),
        max_seq_len=config.get("n_positions", Positive[int]),
        norm=LayerNorm(eps=config.get("layer_norm_epsilon", NotNegative[float], 1e-5)),
        final_norm=not isinstance(residual, PostNorm),
        embedded_position=Learned(),
        head=LmHead(tied=config.get("tie_word_embeddings", bool, True)),
        init_std=config.get("initializer_range", NotNegative[float], 0.02),
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    (block,) = model.blocks
    assert isinstance(block.mlp, Mlp) and isinstance(block.attention, GroupedQuery)
    return {
        "n_embd": model.d_model,
        "n_head": block.attention.n_heads,
        "n_layer": model.n_layers,
        "n_inner": block.mlp.d_ff,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "layer_norm_epsilon": model.norm.eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
    }


_BLOCK: dict[str, Arrangement] = {
    **linear("attn.c_attn", "attention/q", "attention/k", "attention/v", layout=Transposed),
    **linear("attn.c_proj", "attention/o", layout=Transposed),
    **linear("mlp.c_fc", "mlp/up", layout=Transposed),
    **linear("mlp.c_proj", "mlp/down", layout=Transposed),
    **norm("ln_1", "attention_norm"),
    **norm("ln_2", "mlp_norm"),
}

GPT2 = ModelFamily(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=lambda config: _read(config, PreNorm(), read_activation(config, "activation_function", "gelu_new")),
    write=lambda model: _write(model) | {"activation_function": write_activation(model.blocks[0].mlp.activation)},
    names=Names(
        top={
            "transformer.wte.weight": "embed",
            "transformer.wpe.weight": "embedded_position",
            **norm("transformer.ln_f", "final_norm"),
            "lm_head.weight": "unembed",
        },
        block=_BLOCK,
        layers="transformer.h.{}.",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
)
"""Radford et al. 2019. Old exports have the causal mask among their tensors."""

GPT = ModelFamily(
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    read=lambda config: _read(config, PostNorm(), read_activation(config, "afn", "gelu", _WORDS_OF_GPT)),
    write=lambda model: _write(model) | {"afn": write_activation(model.blocks[0].mlp.activation, _WORDS_OF_GPT)},
    names=Names(
        top={
            "transformer.tokens_embed.weight": "embed",
            "transformer.positions_embed.weight": "embedded_position",
            "lm_head.weight": "unembed",
        },
        block=_BLOCK,
        layers="transformer.h.{}.",
        ignored=(".attn.bias",),
    ),
)
"""Radford et al. 2018: norms after the sums."""


def _read_starcoder2(config: Published) -> ModelConfig:
    D, N = config.get("hidden_size", Positive[int]), config.get("num_attention_heads", Positive[int])
    bias = config.get("use_bias", bool, True)
    attention = GroupedQuery(
        n_heads=N,
        n_kv_heads=config.get("num_key_value_heads", Positive[int], N),
        head_dim=D // N,
        position=read_rope(config, D // N),
        window=config.get("sliding_window", Positive[int], None),
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = Mlp(
        d_ff=config.get("intermediate_size", Positive[int]),
        activation=read_activation(config, "hidden_act", "gelu_pytorch_tanh"),
        bias=bias,
    )
    return ModelConfig(
        vocab_size=config.get("vocab_size", Positive[int]),
        d_model=D,
        n_layers=config.get("num_hidden_layers", Positive[int]),
        blocks=(BlockConfig(attention=attention, mlp=mlp),),
        max_seq_len=config.get("max_position_embeddings", Positive[int]),
        norm=LayerNorm(eps=config.get("norm_epsilon", NotNegative[float], 1e-5)),
        head=LmHead(tied=config.get("tie_word_embeddings", bool, True)),
        init_std=config.get("initializer_range", NotNegative[float], 0.02),
    )


def _write_starcoder2(model: ModelConfig) -> dict[str, Any]:
    (block,) = model.blocks
    attention, mlp = block.attention, block.mlp
    assert isinstance(mlp, Mlp) and isinstance(attention.position, Rope)
    return write_rope(attention.position, attention.head_dim) | {
        "hidden_size": model.d_model,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "num_hidden_layers": model.n_layers,
        "intermediate_size": mlp.d_ff,
        "hidden_act": write_activation(mlp.activation),
        "sliding_window": attention.window,
        "use_bias": mlp.bias,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "norm_epsilon": model.norm.eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
    }


STARCODER2 = ModelFamily(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read=_read_starcoder2,
    write=_write_starcoder2,
    names=Names(
        top=TOP,
        block={
            **ATTENTION,
            **linear("mlp.c_fc", "mlp/up"),
            **linear("mlp.c_proj", "mlp/down"),
            **NORMS,
        },
    ),
)
