"""GPT and those built like it: LayerNorm, plain MLPs, biases; positions learned, rotary or by ALiBi."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from maxlm.config import (
    Activation,
    Alibi,
    BlockConfig,
    LayerNorm,
    Learned,
    ModelConfig,
    Parallel,
    PostNorm,
    PreNorm,
    Residual,
    Rope,
)
from maxlm.config.fields import Positive
from maxlm.hub.families.llama import ATTENTION, NORMS, QKV, TOP
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Arrangement, Heads, Names, Transposed, linear, norm
from maxlm.hub.published import Published, read_rope, write_rope
from maxlm.hub.sizes import Keys, grouped_query, only_block

# ---- GPT, GPT-2 ----

_GPT2_KEYS = Keys(
    d_model="n_embd",
    n_layers="n_layer",
    n_heads="n_head",
    n_kv_heads=None,
    head_dim=None,
    d_ff="n_inner",
    activation="activation_function",
    max_seq_len="n_positions",
    eps="layer_norm_epsilon",
    act="gelu_new",
    longest=1024,
    tied=True,
)
# Its "gelu" is the approximation by tanh.
_GPT_WORDS = {"gelu": Activation.GELU_TANH, "relu": Activation.RELU, "silu": Activation.SILU}
_GPT_KEYS = dataclasses.replace(_GPT2_KEYS, activation="afn", act="gelu", longest=512, words=_GPT_WORDS)


def _read_gpt(config: Published, keys: Keys, residual: Residual) -> ModelConfig:
    config.refuse("scale_attn_weights", True, why="scores are divided by sqrt(head_dim)")
    config.refuse("scale_attn_by_inverse_layer_idx", False, why="scores do not depend on the layer")
    sizes = keys.read(config)
    attention = sizes.attention(position=None, qkv_bias=True, out_bias=True)
    block = BlockConfig(attention=attention, mlp=sizes.plain(), residual=residual)
    final_norm = not isinstance(residual, PostNorm)
    return sizes.model((block,), LayerNorm(eps=sizes.eps), embedded_position=Learned(), final_norm=final_norm)


_GPT_BLOCK: dict[str, Arrangement] = {
    **linear("attn.c_attn", "attention/q", "attention/k", "attention/v", arrange=Transposed),
    **linear("attn.c_proj", "attention/o", arrange=Transposed),
    **linear("mlp.c_fc", "mlp/up", arrange=Transposed),
    **linear("mlp.c_proj", "mlp/down", arrange=Transposed),
    **norm("ln_1", "attention_norm"),
    **norm("ln_2", "mlp_norm"),
}

GPT2 = ModelFamily(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=partial(_read_gpt, keys=_GPT2_KEYS, residual=PreNorm()),
    write=_GPT2_KEYS.write,
    names=Names(
        top={
            "transformer.wte.weight": "embed",
            "transformer.wpe.weight": "embedded_position",
            **norm("transformer.ln_f", "final_norm"),
            "lm_head.weight": "unembed",
        },
        block=_GPT_BLOCK,
        layers="transformer.h.{}.",
        ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
)
"""Radford et al. 2019. Old exports have the causal mask among their tensors."""

GPT = ModelFamily(
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    read=partial(_read_gpt, keys=_GPT_KEYS, residual=PostNorm()),
    write=_GPT_KEYS.write,
    names=Names(
        top={
            "transformer.tokens_embed.weight": "embed",
            "transformer.positions_embed.weight": "embedded_position",
            "lm_head.weight": "unembed",
        },
        block=_GPT_BLOCK,
        layers="transformer.h.{}.",
        ignored=("*.attn.bias",),
    ),
)
"""Radford et al. 2018: norms after the sums."""


# ---- Rotary: GPT-J, GPT-NeoX, Phi, Falcon, StarCoder 2 ----

_GPTJ_KEYS = dataclasses.replace(_GPT2_KEYS, longest=2048, tied=False)


def _read_gptj(config: Published) -> ModelConfig:
    sizes = _GPTJ_KEYS.read(config)
    rope = Rope(dims=config.get("rotary_dim", Positive[int], sizes.head_dim), interleaved=True)
    block = BlockConfig(attention=sizes.attention(position=rope), mlp=sizes.plain(), residual=Parallel())
    return sizes.model((block,), LayerNorm(eps=sizes.eps), {"bias": True})


def _write_gptj(model: ModelConfig) -> dict[str, Any]:
    return _GPTJ_KEYS.write(model) | {"rotary_dim": _rope(model).dims}


GPTJ = ModelFamily(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    read=_read_gptj,
    write=_write_gptj,
    names=Names(
        top={
            "transformer.wte.weight": "embed",
            **norm("transformer.ln_f", "final_norm"),
            "lm_head.weight": "unembed",
            "lm_head.bias": "unembed_bias",
        },
        block={
            **linear("attn.q_proj", "attention/q"),
            **linear("attn.k_proj", "attention/k"),
            **linear("attn.v_proj", "attention/v"),
            **linear("attn.out_proj", "attention/o"),
            **linear("mlp.fc_in", "mlp/up"),
            **linear("mlp.fc_out", "mlp/down"),
            **norm("ln_1", "attention_norm"),
        },
        layers="transformer.h.{}.",
        ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
)

_NEOX_KEYS = Keys(n_kv_heads=None, head_dim=None, eps="layer_norm_eps", act="gelu", longest=2048)


def _read_neox(config: Published) -> ModelConfig:
    sizes = _NEOX_KEYS.read(config)
    older = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    said = Published({new: config.values.get(old) for new, old in older.items()} | dict(config.values), config.place)
    bias = config.get("attention_bias", bool, True)
    attention = sizes.attention(position=read_rope(said, sizes.head_dim, share=0.25), qkv_bias=bias, out_bias=bias)
    residual = Parallel(two_norms=True) if config.get("use_parallel_residual", bool, True) else PreNorm()
    return sizes.model(
        (BlockConfig(attention=attention, mlp=sizes.plain(), residual=residual),), LayerNorm(eps=sizes.eps)
    )


def _write_neox(model: ModelConfig) -> dict[str, Any]:
    block = only_block(model)
    attention, rope = grouped_query(model), _rope(model)
    head_dim = attention.head_dim
    return (
        _NEOX_KEYS.write(model)
        | write_rope(rope, head_dim)
        | {
            "rotary_emb_base": rope.theta,
            "rotary_pct": (rope.dims or head_dim) / head_dim,
            "attention_bias": attention.qkv_bias,
            "use_parallel_residual": isinstance(block.residual, Parallel),
        }
    )


GPT_NEOX = ModelFamily(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read=_read_neox,
    write=_write_neox,
    names=Names(
        top={
            "gpt_neox.embed_in.weight": "embed",
            **norm("gpt_neox.final_layer_norm", "final_norm"),
            "embed_out.weight": "unembed",
        },
        block={
            **linear("attention.query_key_value", "attention/q", "attention/k", "attention/v", arrange=Heads),
            **linear("attention.dense", "attention/o"),
            **linear("mlp.dense_h_to_4h", "mlp/up"),
            **linear("mlp.dense_4h_to_h", "mlp/down"),
            **NORMS,
        },
        layers="gpt_neox.layers.{}.",
        ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    ),
)
"""Also Pythia."""

_PHI_KEYS = Keys(head_dim=None, eps="layer_norm_eps", act="gelu_new", longest=2048)


def _read_phi(config: Published) -> ModelConfig:
    config.refuse("qk_layernorm", False, why="queries and keys are not normalised")
    sizes = _PHI_KEYS.read(config)
    rope = read_rope(config, sizes.head_dim, share=0.5)
    attention = sizes.attention(position=rope, qkv_bias=True, out_bias=True)
    block = BlockConfig(attention=attention, mlp=sizes.plain(), residual=Parallel())
    return sizes.model((block,), LayerNorm(eps=sizes.eps), {"bias": True})


PHI = ModelFamily(
    model_type="phi",
    architecture="PhiForCausalLM",
    read=_read_phi,
    write=lambda model: _PHI_KEYS.write(model) | write_rope(_rope(model), grouped_query(model).head_dim),
    names=Names(
        top={
            "model.embed_tokens.weight": "embed",
            **norm("model.final_layernorm", "final_norm"),
            "lm_head.weight": "unembed",
            "lm_head.bias": "unembed_bias",
        },
        block={
            **QKV,
            **linear("self_attn.dense", "attention/o"),
            **linear("mlp.fc1", "mlp/up"),
            **linear("mlp.fc2", "mlp/down"),
            **norm("input_layernorm", "attention_norm"),
        },
    ),
)
"""Phi 1, 1.5 and 2."""

_FALCON_KEYS = Keys(
    n_kv_heads=None,
    head_dim=None,
    d_ff="ffn_hidden_size",
    activation="activation",
    eps="layer_norm_epsilon",
    act="gelu",
    longest=2048,
    tied=True,
)


def _read_falcon(config: Published) -> ModelConfig:
    config.refuse("alibi", False, why="its ALiBi is divided by sqrt(head_dim)")
    sizes = _FALCON_KEYS.read(config)
    newer, parallel = config.get("new_decoder_architecture", bool, False), config.get("parallel_attn", bool, True)
    if newer:
        kv_heads = config.get("num_kv_heads", Positive[int], sizes.n_heads)
    else:
        kv_heads = 1 if config.get("multi_query", bool, True) else sizes.n_heads
    sizes = dataclasses.replace(sizes, n_kv_heads=kv_heads)
    bias = config.get("bias", bool, False)
    two = newer and config.get("num_ln_in_parallel_attn", Positive[int], 2) == 2
    residual = Parallel(two_norms=two) if newer or parallel else PreNorm()
    rope = read_rope(config, sizes.head_dim)
    attention = sizes.attention(position=rope, qkv_bias=bias, out_bias=bias)
    block = BlockConfig(attention=attention, mlp=sizes.plain(bias), residual=residual)
    return sizes.model((block,), LayerNorm(eps=sizes.eps))


def _write_falcon(model: ModelConfig) -> dict[str, Any]:
    block = only_block(model)
    attention, residual = grouped_query(model), block.residual
    newer = isinstance(residual, Parallel) and (residual.two_norms or 1 < attention.n_kv_heads < attention.n_heads)
    return (
        _FALCON_KEYS.write(model)
        | write_rope(_rope(model), attention.head_dim)
        | {
            "new_decoder_architecture": newer,
            "parallel_attn": isinstance(residual, Parallel),
            "num_ln_in_parallel_attn": (2 if residual.two_norms else 1) if isinstance(residual, Parallel) else None,
            "num_kv_heads": attention.n_kv_heads,
            "multi_query": attention.n_kv_heads == 1,
            "bias": attention.qkv_bias,
            "alibi": False,
        }
    )


def _names_of_falcon(model: ModelConfig) -> Names:
    two = model.blocks[0].residual == Parallel(two_norms=True)
    return Names(
        top={
            "transformer.word_embeddings.weight": "embed",
            **norm("transformer.ln_f", "final_norm"),
            "lm_head.weight": "unembed",
        },
        block={
            **linear("self_attention.query_key_value", "attention/q", "attention/k", "attention/v", arrange=Heads),
            **linear("self_attention.dense", "attention/o"),
            **linear("mlp.dense_h_to_4h", "mlp/up"),
            **linear("mlp.dense_4h_to_h", "mlp/down"),
            **(norm("ln_attn", "attention_norm") | norm("ln_mlp", "mlp_norm") if two else NORMS),
        },
        layers="transformer.h.{}.",
    )


FALCON = ModelFamily(
    model_type="falcon",
    architecture="FalconForCausalLM",
    read=_read_falcon,
    write=_write_falcon,
    names=_names_of_falcon,
)

_STARCODER2_KEYS = Keys(head_dim=None, eps="norm_epsilon", act="gelu_pytorch_tanh", longest=4096, tied=True)


def _read_starcoder2(config: Published) -> ModelConfig:
    sizes, bias = _STARCODER2_KEYS.read(config), config.get("use_bias", bool, True)
    window = config.get("sliding_window", Positive[int], None)
    rope = read_rope(config, sizes.head_dim)
    attention = sizes.attention(position=rope, window=window, qkv_bias=bias, out_bias=bias)
    return sizes.model((BlockConfig(attention=attention, mlp=sizes.plain(bias)),), LayerNorm(eps=sizes.eps))


def _write_starcoder2(model: ModelConfig) -> dict[str, Any]:
    attention = grouped_query(model)
    more = {"sliding_window": attention.window, "use_bias": attention.qkv_bias}
    return _STARCODER2_KEYS.write(model) | write_rope(_rope(model), attention.head_dim) | more


STARCODER2 = ModelFamily(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read=_read_starcoder2,
    write=_write_starcoder2,
    names=Names(
        top=TOP,
        block={**ATTENTION, **linear("mlp.c_fc", "mlp/up"), **linear("mlp.c_proj", "mlp/down"), **NORMS},
    ),
)


# ---- OPT, BLOOM ----

_OPT_KEYS = Keys(
    n_kv_heads=None,
    head_dim=None,
    d_ff="ffn_dim",
    activation="activation_function",
    eps="layer_norm_eps",
    init_std="init_std",
    act="relu",
    longest=2048,
    tied=True,
)


def _read_opt(config: Published) -> ModelConfig:
    sizes, bias = _OPT_KEYS.read(config), config.get("enable_bias", bool, True)
    config.refuse("word_embed_proj_dim", sizes.d_model, why="embeddings are as wide as the layers")
    config.refuse("layer_norm_elementwise_affine", True, why="norms are learned")
    config.refuse("_remove_final_layer_norm", False, why="there is a last norm")
    before = config.get("do_layer_norm_before", bool, True)
    attention = sizes.attention(position=None, qkv_bias=bias, out_bias=bias)
    block = BlockConfig(attention=attention, mlp=sizes.plain(bias), residual=PreNorm() if before else PostNorm())
    norms = LayerNorm(eps=sizes.eps)
    return sizes.model((block,), norms, embedded_position=Learned(offset=2), final_norm=before)


def _write_opt(model: ModelConfig) -> dict[str, Any]:
    block = only_block(model)
    return _OPT_KEYS.write(model) | {
        "word_embed_proj_dim": model.d_model,
        "do_layer_norm_before": isinstance(block.residual, PreNorm),
        "enable_bias": grouped_query(model).qkv_bias,
    }


OPT = ModelFamily(
    model_type="opt",
    architecture="OPTForCausalLM",
    read=_read_opt,
    write=_write_opt,
    names=Names(
        top={
            "model.decoder.embed_tokens.weight": "embed",
            "model.decoder.embed_positions.weight": "embedded_position",
            **norm("model.decoder.final_layer_norm", "final_norm"),
            "lm_head.weight": "unembed",
        },
        block={
            **QKV,
            **linear("self_attn.out_proj", "attention/o"),
            **linear("fc1", "mlp/up"),
            **linear("fc2", "mlp/down"),
            **norm("self_attn_layer_norm", "attention_norm"),
            **norm("final_layer_norm", "mlp_norm"),
        },
        layers="model.decoder.layers.{}.",
    ),
)

_BLOOM_KEYS = Keys(
    n_layers="n_layer",
    n_heads="n_head",
    n_kv_heads=None,
    head_dim=None,
    d_ff=None,
    activation="hidden_act",
    max_seq_len="seq_length",
    eps="layer_norm_epsilon",
    act="gelu_new",
    longest=2048,
    tied=True,
)


def _read_bloom(config: Published) -> ModelConfig:
    config.refuse("apply_residual_connection_post_layernorm", False, why="what is added is not normalised")
    older = {"hidden_size": "n_embed", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    also = {new: config.values[old] for new, old in older.items() if old in config.values}
    sizes = _BLOOM_KEYS.read(Published(also | dict(config.values), config.place))
    attention = sizes.attention(position=Alibi(), qkv_bias=True, out_bias=True)
    block = BlockConfig(attention=attention, mlp=sizes.plain())
    return sizes.model((block,), LayerNorm(eps=sizes.eps), embedding_norm=True)


BLOOM = ModelFamily(
    model_type="bloom",
    architecture="BloomForCausalLM",
    read=_read_bloom,
    write=_BLOOM_KEYS.write,
    names=Names(
        top={
            "transformer.word_embeddings.weight": "embed",
            **norm("transformer.word_embeddings_layernorm", "embedding_norm"),
            **norm("transformer.ln_f", "final_norm"),
            "lm_head.weight": "unembed",
        },
        block={
            **linear("self_attention.query_key_value", "attention/q", "attention/k", "attention/v", arrange=Heads),
            **linear("self_attention.dense", "attention/o"),
            **linear("mlp.dense_h_to_4h", "mlp/up"),
            **linear("mlp.dense_4h_to_h", "mlp/down"),
            **NORMS,
        },
        layers="transformer.h.{}.",
    ),
)


def _rope(model: ModelConfig) -> Rope:
    """Of the model's only kind of layer."""
    position = only_block(model).attention.position
    assert isinstance(position, Rope)
    return position
