"""Families that transformers has no class for: Qwen 1, Baichuan 1 and 2, ChatGLM 1 to 3.

Their models come with code of their own, named by `auto_map` in config.json. It is never run; what it computes is said
here in the parts that all families share.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from maxlm.config import (
    Activation,
    Alibi,
    BlockConfig,
    DeepNorm,
    DynamicNtkScaling,
    GlmRope,
    LayerNorm,
    LmHead,
    ModelConfig,
    RmsNorm,
    Rope,
    UserError,
)
from maxlm.config.fields import Positive
from maxlm.hub.families.llama import IGNORED, MLP, NORMS, TOP
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Heads, Names, linear, norm
from maxlm.hub.published import Published
from maxlm.hub.sizes import Keys, grouped_query

_WORDS = {"silu": Activation.SILU}
"""Their code has no other."""

# ---- Qwen 1 ----

_QWEN_KEYS = Keys(
    n_kv_heads=None, head_dim="kv_channels", eps="layer_norm_epsilon", longest=8192, least=1e-6, words=_WORDS
)


def _read_qwen(config: Published) -> ModelConfig:
    """`use_dynamic_ntk` and `use_logn_attn` begin at `seq_length`, the length of training. Their code stretches by the
    whole of a prompt, and leaves the stretching as it is while it decodes; ours decodes up to seq_length alone."""
    config.refuse("scale_attn_weights", True, why="scores are divided by sqrt(kv_channels)")
    config.refuse("visual", why="images are not read")
    sizes = _QWEN_KEYS.read(config)
    length = config.get("seq_length", Positive[int])
    stretches = config.get("use_dynamic_ntk", bool, True)
    dims = int(sizes.head_dim * config.get("rotary_pct", Positive[float], 1.0))
    rope = Rope(
        theta=config.get("rotary_emb_base", Positive[float], 10_000.0),
        dims=None if dims == sizes.head_dim else dims,
        scaling=DynamicNtkScaling(factor=2.0, original_max_len=length, doubling=True) if stretches else None,
    )
    bias = not config.get("no_bias", bool, True)
    attention = sizes.attention(
        position=rope,
        qkv_bias=True,
        out_bias=bias,
        log_length=length if config.get("use_logn_attn", bool, True) else None,
    )
    sizes = dataclasses.replace(
        sizes,
        d_ff=config.get("intermediate_size", Positive[int]) // 2,  # they count both halves
        max_seq_len=length if stretches else sizes.max_seq_len,
    )
    return sizes.model((BlockConfig(attention=attention, mlp=sizes.gated(bias)),), RmsNorm(eps=sizes.eps))


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    attention = grouped_query(model)
    rope = attention.position
    assert isinstance(rope, Rope)
    scaling = rope.scaling
    stretched = scaling.original_max_len if isinstance(scaling, DynamicNtkScaling) else None
    return _QWEN_KEYS.write(model) | {
        "intermediate_size": 2 * model.layers[-1].mlp.d_ff,
        "seq_length": stretched or attention.log_length or model.max_seq_len,
        "use_dynamic_ntk": stretched is not None,
        "use_logn_attn": attention.log_length is not None,
        "rotary_emb_base": rope.theta,
        "rotary_pct": (rope.dims or attention.head_dim) / attention.head_dim,
        "scale_attn_weights": True,
        "no_bias": not attention.out_bias,
    }


QWEN = ModelFamily(
    model_type="qwen",
    architecture="QWenLMHeadModel",
    read=_read_qwen,
    write=_write_qwen,
    names=Names(
        top={
            "transformer.wte.weight": "embed",
            **norm("transformer.ln_f", "final_norm"),
            "lm_head.weight": "unembed",
        },
        block={
            **norm("ln_1", "attention_norm"),
            **linear("attn.c_attn", "attention/q", "attention/k", "attention/v"),
            **linear("attn.c_proj", "attention/o"),
            **norm("ln_2", "mlp_norm"),
            **linear("mlp.w2", "mlp/gate"),
            **linear("mlp.w1", "mlp/up"),
            **linear("mlp.c_proj", "mlp/down"),
        },
        layers="transformer.h.{}.",
        ignored=IGNORED,
    ),
    needs_code=True,
)
"""Those of 2023; from 1.5 on they are qwen2."""

# ---- Baichuan ----

_ROTARY_KEYS = Keys(n_kv_heads=None, head_dim=None, least=1e-6, words=_WORDS)
_ALIBI_KEYS = dataclasses.replace(_ROTARY_KEYS, max_seq_len="model_max_length", longest=4096)
_BAICHUAN_2 = 125_696
"""Ids of the second's vocabulary."""


def _read_baichuan(config: Published) -> ModelConfig:
    """Of both generations the 7B have RoPE and `max_position_embeddings`, the 13B ALiBi and `model_max_length` alone.
    The second has rows of length 1 in its head, of which config.json says nothing; it is known by its vocabulary, or by
    the weight of a loss that the first has not."""
    rotary = config.values.get("max_position_embeddings") is not None
    sizes = (_ROTARY_KEYS if rotary else _ALIBI_KEYS).read(config)
    attention = sizes.attention(position=Rope() if rotary else Alibi())
    second = sizes.vocab_size == _BAICHUAN_2 or "z_loss_weight" in config.values
    block = BlockConfig(attention=attention, mlp=sizes.gated())
    return sizes.model((block,), RmsNorm(eps=sizes.eps), {"normalized": second})


def _write_baichuan(model: ModelConfig) -> dict[str, Any]:
    assert isinstance(model.head, LmHead)
    rotary, second = isinstance(grouped_query(model).position, Rope), model.head.normalized
    values = (_ROTARY_KEYS if rotary else _ALIBI_KEYS).write(model)
    if second:
        values["z_loss_weight"] = 0
    elif rotary:
        values["architectures"] = ["BaiChuanForCausalLM"]  # the first model spells its class so
    return values


BAICHUAN = ModelFamily(
    model_type="baichuan",
    architecture="BaichuanForCausalLM",
    read=_read_baichuan,
    write=_write_baichuan,
    names=Names(
        top=TOP,
        block={
            **NORMS,
            **linear("self_attn.W_pack", "attention/q", "attention/k", "attention/v"),
            **linear("self_attn.o_proj", "attention/o"),
            **MLP,
        },
        ignored=IGNORED,
    ),
    needs_code=True,
)

# ---- ChatGLM 2 and 3 ----

_CHATGLM_KEYS = Keys(
    vocab_size="padded_vocab_size",
    n_layers="num_layers",
    n_kv_heads="multi_query_group_num",
    head_dim="kv_channels",
    d_ff="ffn_hidden_size",
    max_seq_len="seq_length",
    eps="layernorm_epsilon",
    words=_WORDS,
)
_THETA = 10_000.0
"""Base of RoPE at a `rope_ratio` of 1."""


def _read_chatglm(config: Published) -> ModelConfig:
    if config.get("position_encoding_2d", bool, False):
        return _read_first_chatglm(config)
    config.refuse("vision_config", why="images are not read")
    config.refuse("pre_seq_len", why="there is no trained prefix")
    config.refuse("quantization_bit", 0, why="its numbers are packed")
    if not config.get("multi_query_attention", bool, False):
        raise UserError(
            f"{config.place}: multi_query_attention = False is not supported (queries, keys and values then lie head "
            "by head); must be True"
        )
    config.refuse("apply_residual_connection_post_layernorm", False, why="what is added is not normalised")
    sizes = _CHATGLM_KEYS.read(config)
    ratio = config.get("rope_ratio", Positive[float], 1.0)
    origin = config.get("_name_or_path", str, "")
    if ratio != 1 and "chatglm2" in origin.lower():
        raise UserError(
            f"{config.place}: rope_ratio = {ratio} of {origin} is not supported, as the code of ChatGLM2 divides "
            "positions by it, and later code multiplies RoPE's base; must be 1"
        )
    everywhere = config.get("add_bias_linear", bool, False)
    attention = sizes.attention(
        position=Rope(theta=_THETA * ratio, dims=sizes.head_dim // 2, interleaved=True),
        qkv_bias=everywhere or config.get("add_qkv_bias", bool, False),
        out_bias=everywhere,
    )
    block = BlockConfig(attention=attention, mlp=sizes.gated(everywhere))
    norms = RmsNorm(eps=sizes.eps) if config.get("rmsnorm", bool, True) else LayerNorm(eps=sizes.eps)
    return sizes.model((block,), norms, final_norm=config.get("post_layer_norm", bool, True))


def _write_chatglm(model: ModelConfig) -> dict[str, Any]:
    attention = grouped_query(model)
    if isinstance(attention.position, GlmRope):
        return _FIRST_KEYS.write(model) | {"position_encoding_2d": True, "architectures": ["ChatGLMModel"]}
    assert isinstance(attention.position, Rope)
    return _CHATGLM_KEYS.write(model) | {
        "multi_query_attention": True,
        "rope_ratio": attention.position.theta / _THETA,
        "add_qkv_bias": attention.qkv_bias,
        "add_bias_linear": attention.out_bias,
        "rmsnorm": isinstance(model.norm, RmsNorm),
        "post_layer_norm": model.final_norm,
        "apply_residual_connection_post_layernorm": False,
    }


_CHATGLM_NAMES = Names(
    top={
        "transformer.embedding.word_embeddings.weight": "embed",
        **norm("transformer.encoder.final_layernorm", "final_norm"),
        "transformer.output_layer.weight": "unembed",
    },
    block={
        **NORMS,
        **linear("self_attention.query_key_value", "attention/q", "attention/k", "attention/v"),
        **linear("self_attention.dense", "attention/o"),
        **linear("mlp.dense_h_to_4h", "mlp/gate", "mlp/up"),
        **linear("mlp.dense_4h_to_h", "mlp/down"),
    },
    layers="transformer.encoder.layers.{}.",
    ignored=("transformer.rotary_pos_emb.inv_freq",),
)

# ---- ChatGLM-6B ----

_FIRST_KEYS = Keys(
    n_layers="num_layers",
    n_kv_heads=None,
    head_dim=None,
    d_ff="inner_hidden_size",
    max_seq_len="max_sequence_length",
    longest=2048,
    eps="layernorm_epsilon",
    words={"gelu": Activation.GELU_TANH},  # its code has no other
    act="gelu",
)


def _read_first_chatglm(config: Published) -> ModelConfig:
    """Its layers add to sqrt(2L) times their normalised input. A norm before a layer is thus the norm after what the
    layer before it added: a post-norm model with DeepNorm's factor, and with a norm of the embeddings."""
    config.refuse("pre_seq_len", why="there is no trained prefix")
    config.refuse("quantization_bit", 0, why="its numbers are packed")
    sizes = _FIRST_KEYS.read(config)
    attention = sizes.attention(position=GlmRope(), qkv_bias=True, out_bias=True)
    residual = DeepNorm(alpha=math.sqrt(2 * sizes.n_layers))
    block = BlockConfig(attention=attention, mlp=sizes.plain(bias=True), residual=residual)
    return sizes.model((block,), LayerNorm(eps=sizes.eps), embedding_norm=True, final_norm=False)


_FIRST_NAMES = Names(
    top={
        "transformer.word_embeddings.weight": "embed",
        **norm("transformer.layers.0.input_layernorm", "embedding_norm"),
        "lm_head.weight": "unembed",
    },
    block={
        **linear("attention.query_key_value", "attention/q", "attention/k", "attention/v", arrange=Heads),
        **linear("attention.dense", "attention/o"),
        **norm("post_attention_layernorm", "attention_norm"),
        **linear("mlp.dense_h_to_4h", "mlp/up"),
        **linear("mlp.dense_4h_to_h", "mlp/down"),
    },
    after=norm("input_layernorm", "mlp_norm"),
    last=norm("transformer.final_layernorm", "mlp_norm"),
    layers="transformer.layers.{}.",
    ignored=("*.rotary_emb.inv_freq",),
)


def _chatglm_names(model: ModelConfig) -> Names:
    return _FIRST_NAMES if isinstance(grouped_query(model).position, GlmRope) else _CHATGLM_NAMES


CHATGLM = ModelFamily(
    model_type="chatglm",
    architecture="ChatGLMModel",
    read=_read_chatglm,
    write=_write_chatglm,
    names=_chatglm_names,
    needs_code=True,
)
"""ChatGLM-6B, ChatGLM 2 and 3, and GLM-4-9B as it was published first."""
