"""Gemma 1 to 3: scales stored as differences from 1, scaled embeddings; from 2 on, windows and norms on both sides."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from maxlm.config import Activation, BlockConfig, LmHead, ModelConfig, PreNorm, QkNorm, RmsNorm, Rope, Sandwich
from maxlm.config.fields import Positive
from maxlm.hub.families.llama import ATTENTION, MLP, NORMS, TOP, layer_types, slides
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Names, norm
from maxlm.hub.published import ACTIVATIONS, Published, pattern, read_rope, write_rope
from maxlm.hub.sizes import Keys, grouped_query

_KEYS = Keys(activation="hidden_activation", act="gelu_pytorch_tanh", least=1e-6, tied=True)
_KEYS_1 = dataclasses.replace(_KEYS, activation="hidden_act", words=ACTIVATIONS | {"gelu": Activation.GELU_TANH})
"""The first one's config.json says "gelu", and means its approximation by tanh."""


def _read(config: Published, *, version: int) -> ModelConfig:
    sizes = (_KEYS_1 if version == 1 else _KEYS).read(config)
    config.refuse("use_bidirectional_attention", False, why="attention is causal")
    bias = config.get("attention_bias", bool, False)
    caps = [config.get(key, Positive[float], None) for key in ("attn_logit_softcapping", "final_logit_softcapping")]
    scale, reach = None, None
    if version > 1:
        scale = config.get("query_pre_attn_scalar", Positive[float], 256.0) ** -0.5
        reach = config.get("sliding_window", Positive[int], 4096)
    layers = []
    for number in range(sizes.n_layers):
        local = version > 1 and _slides(config, number, every=2 if version == 2 else 6)
        rope = read_rope(config, sizes.head_dim) if version < 3 else _read_rope(config, sizes.head_dim, local=local)
        attention = sizes.attention(
            position=rope,
            window=reach if local else None,
            soft_cap=caps[0],
            scale=scale,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QkNorm.HEADS if version == 3 else None,
        )
        residual = Sandwich() if version > 1 else PreNorm()
        layers.append(BlockConfig(attention=attention, mlp=sizes.gated(), residual=residual))
    norms = RmsNorm(eps=sizes.eps, one_plus=True)
    return sizes.model(pattern(layers), norms, {"soft_cap": caps[1]}, embedding_scale=sizes.d_model**0.5)


def _slides(config: Published, number: int, *, every: int) -> bool:
    if "layer_types" in config.values:
        return slides(config, number)
    return bool((number + 1) % config.get("sliding_window_pattern", Positive[int], every))


def _read_rope(config: Published, head_dim: int, *, local: bool) -> Rope:
    """Gemma 3's layers with a window have a base of their own, and no scaling."""
    kind = "sliding_attention" if local else "full_attention"
    both = config.get("rope_parameters", dict, {})
    if kind in both:
        return read_rope(Published({"rope_parameters": both[kind]}, config.place), head_dim)
    if local:
        return Rope(theta=config.get("rope_local_base_freq", Positive[float], 1e4))
    return read_rope(config, head_dim, theta=1e6)


def _write(model: ModelConfig, *, version: int) -> dict[str, Any]:
    attention = grouped_query(model)
    values = (_KEYS_1 if version == 1 else _KEYS).write(model) | {"attention_bias": attention.qkv_bias}
    ropes = {block.attention.window is None: block.attention.position for block in model.layers}
    written = {whole: write_rope(rope, attention.head_dim) for whole, rope in ropes.items() if isinstance(rope, Rope)}
    values |= written.get(True, {})
    if version == 3 and False in written:
        values["rope_local_base_freq"] = written[False]["rope_theta"]
    elif False in written and version == 2:
        values |= written[False]
    if version > 1:
        assert attention.scale is not None and isinstance(model.head, LmHead)
        values |= layer_types(model) | {
            "query_pre_attn_scalar": round(attention.scale**-2),  # transformers takes integers alone
            "attn_logit_softcapping": attention.soft_cap,
            "final_logit_softcapping": model.head.soft_cap,
        }
    return values


_SANDWICH = {
    **norm("input_layernorm", "attention_norm"),
    **norm("post_attention_layernorm", "attention_out_norm"),
    **norm("pre_feedforward_layernorm", "mlp_norm"),
    **norm("post_feedforward_layernorm", "mlp_out_norm"),
}

GEMMA = ModelFamily(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=partial(_read, version=1),
    write=partial(_write, version=1),
    names=Names(top=TOP, block=ATTENTION | MLP | NORMS),
)
GEMMA2 = ModelFamily(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=partial(_read, version=2),
    write=partial(_write, version=2),
    names=Names(top=TOP, block=ATTENTION | MLP | _SANDWICH),
)
GEMMA3 = ModelFamily(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=partial(_read, version=3),
    write=partial(_write, version=3),
    names=Names(top=TOP, block=ATTENTION | MLP | _SANDWICH),
)
"""The text models, and what the larger ones have for text."""
