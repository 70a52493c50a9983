"""gpt-oss: sinks, windows in every other layer, experts with biases and a clamped gate (arXiv:2508.10925)."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxlm.config import BlockConfig, Experts, ModelConfig, RmsNorm, Rope, Swish, TopKRouter, UserError
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.families.llama import ATTENTION, NORMS, TOP, layer_types
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Interleaved, Names, Stacked, Transposed
from maxlm.hub.published import Published, pattern, read_rope, write_rope
from maxlm.hub.sizes import Keys, grouped_query

_KEYS = Keys()
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What is meant where nothing is said of RoPE."""
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _read(config: Published) -> ModelConfig:
    sizes = _KEYS.read(config)
    config.refuse("hidden_act", "silu", why="the gate's activation is swiglu_alpha's, whatever hidden_act says")
    if not any(config.values.get(key) for key in ("rope_parameters", "rope_scaling")):
        config = Published({**config.values, "rope_scaling": _YARN}, config.place)
    biases = config.get("attention_bias", bool, True)
    attention = sizes.attention(
        position=read_rope(config, sizes.head_dim, theta=150_000.0), qkv_bias=biases, out_bias=biases, sinks=True
    )
    top_k = config.get("num_experts_per_tok", Positive[int], config.get("experts_per_token", Positive[int], 4))
    experts = Experts(
        n_experts=config.count("num_local_experts", 128),
        d_ff=sizes.d_ff,
        # As of `llama.py`, transformers' loss is over all layers together.
        router=TopKRouter(
            top_k=top_k,
            bias=True,
            load_balance=config.get("router_aux_loss_coef", NotNegative[float], 0.001) * top_k / sizes.n_layers,
        ),
        activation=Swish(beta=config.get("swiglu_alpha", Positive[float], 1.702)),
        bias=True,
        clamp=config.get("swiglu_limit", Positive[float], 7.0),
        up_offset=1.0,
    )
    kinds = config.get("layer_types", list, [(_SLIDING, _FULL)[i % 2] for i in range(sizes.n_layers)])
    if len(kinds) != sizes.n_layers or set(kinds) - {_SLIDING, _FULL}:
        raise UserError(
            f"{config.place}: layer_types must have {_SLIDING!r} or {_FULL!r} for each of the {sizes.n_layers} layers"
        )
    window = config.get("sliding_window", Positive[int], 128)
    layers = [
        BlockConfig(attention=dataclasses.replace(attention, window=window if kind == _SLIDING else None), mlp=experts)
        for kind in kinds
    ]
    return sizes.model(pattern(layers), RmsNorm(eps=sizes.eps))


def _write(model: ModelConfig) -> dict[str, Any]:
    attention, experts = grouped_query(model), model.layers[-1].mlp
    assert isinstance(attention.position, Rope) and isinstance(experts, Experts)
    assert isinstance(experts.router, TopKRouter) and isinstance(experts.activation, Swish)
    values = {"rope_scaling": {"rope_type": "default"}} | write_rope(attention.position, attention.head_dim)
    return (
        _KEYS.write(model)
        | values
        | layer_types(model)
        | {
            "hidden_act": "silu",
            "attention_bias": attention.qkv_bias,
            "num_local_experts": experts.n_experts,
            "num_experts_per_tok": experts.router.top_k,
            "router_aux_loss_coef": round(experts.router.load_balance * model.n_layers / experts.router.top_k, 12),
            "swiglu_alpha": experts.activation.beta,
            "swiglu_limit": experts.clamp,
        }
    )


GPT_OSS = ModelFamily(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    names=Names(
        top=TOP,
        block=NORMS
        | ATTENTION
        | {
            "self_attn.sinks": "attention/sinks",
            "mlp.router.weight": "mlp/router",
            "mlp.router.bias": "mlp/score_bias",
            "mlp.experts.gate_up_proj": Stacked(Transposed(Interleaved("mlp/gate_proj", "mlp/up_proj"))),
            "mlp.experts.gate_up_proj_bias": Stacked(Interleaved("mlp/gate_bias", "mlp/up_bias")),
            "mlp.experts.down_proj": Stacked(Transposed("mlp/down_proj")),
            "mlp.experts.down_proj_bias": Stacked("mlp/down_bias"),
        },
    ),
)
