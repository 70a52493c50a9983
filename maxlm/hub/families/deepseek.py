"""DeepSeek-V2 and V3: latent attention, and experts of which some are shared."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

from maxlm.config import (
    BlockConfig,
    ExpertGroups,
    Experts,
    LatentAttention,
    ModelConfig,
    RmsNorm,
    Router,
    SigmoidRouter,
    TopKRouter,
    UserError,
    YarnScaling,
)
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.families.llama import IGNORED, MLP, NORMS, TOP
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Arrangement, Heads, Names, Rows, norm
from maxlm.hub.published import Published, read_rope, write_rope
from maxlm.hub.sizes import Keys

_KEYS = Keys(n_kv_heads=None, head_dim=None, least=1e-6)

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_EXPERTS: dict[str, Arrangement] = {
    "mlp.gate.weight": "mlp/router",
    "mlp.gate.e_score_correction_bias": "mlp/router_bias",
    **{f"mlp.experts.{{}}.{one}.weight": f"mlp/{one}" for one in ("gate_proj", "up_proj", "down_proj")},
    **{
        f"mlp.shared_experts.{one}.weight": f"mlp/shared_experts/{one}" for one in ("gate_proj", "up_proj", "down_proj")
    },
}
_ATTENTION: dict[str, Arrangement] = {
    "self_attn.q_a_proj.weight": "attention/q_down_proj",
    **norm("self_attn.q_a_layernorm", "attention/q_norm"),
    "self_attn.kv_a_proj_with_mqa.weight": Rows("attention/kv_down_proj", "attention/k_rope_proj"),
    **norm("self_attn.kv_a_layernorm", "attention/kv_norm"),
    "self_attn.kv_b_proj.weight": Heads("attention/k_proj", "attention/v_proj"),
    "self_attn.o_proj.weight": "attention/o_proj",
}


def _names(model: ModelConfig) -> Names:
    attention = model.layers[-1].attention
    compressed = isinstance(attention, LatentAttention) and attention.query_rank is not None
    query: dict[str, Arrangement] = {f"self_attn.{'q_b_proj' if compressed else 'q_proj'}.weight": "attention/q_proj"}
    # The layers that predict further tokens come after the model's own, and are no part of it.
    predicting = f"model.layers.{model.n_layers}.*"
    return Names(top=TOP, block=NORMS | MLP | _EXPERTS | _ATTENTION | query, ignored=(*IGNORED, predicting))


def _read(config: Published, *, version: int) -> ModelConfig:
    sizes = _KEYS.read(config)
    config.refuse("attention_bias", False, why="projections to latents have no biases")
    if sizes.eps != 1e-6:
        raise UserError(
            f"{config.place}: rms_norm_eps = {sizes.eps} is not that of the norms of the latents, which is 1e-06 "
            "whatever config.json says; must be 1e-06"
        )
    rope = read_rope(
        config,
        config.get("qk_rope_head_dim", Positive[int]),
        interleaved=config.get("rope_interleave", bool, True),
    )
    attention = LatentAttention(
        n_heads=sizes.n_heads,
        kv_rank=config.get("kv_lora_rank", Positive[int]),
        query_rank=config.get("q_lora_rank", Positive[int], None),
        content_head_dim=config.get("qk_nope_head_dim", Positive[int]),
        rope_head_dim=config.get("qk_rope_head_dim", Positive[int]),
        value_head_dim=config.get("v_head_dim", Positive[int]),
        position=rope,
    )
    attention = dataclasses.replace(attention, scale=_scale(attention))
    n_dense = config.get("first_k_dense_replace", NotNegative[int], 0)
    n_experts = config.count("n_routed_experts", None)
    dense = BlockConfig(attention=attention, mlp=sizes.gated(bias=config.get("mlp_bias", bool, False)))
    if n_experts is None or n_dense >= sizes.n_layers:
        return sizes.model((dense,), RmsNorm(eps=sizes.eps))
    config.refuse("moe_layer_freq", 1, why="every layer after the first ones has experts")
    experts = Experts(
        n_experts=n_experts,
        d_ff=config.get("moe_intermediate_size", Positive[int]),
        router=_read_router(config, version),
        n_shared_experts=config.get("n_shared_experts", NotNegative[int], 0),
        routed_scaling=config.get("routed_scaling_factor", Positive[float], 1.0),
        activation=sizes.activation,
    )
    block = BlockConfig(attention=attention, mlp=experts)
    return sizes.model((block,), RmsNorm(eps=sizes.eps), first_blocks=(dense,) * n_dense)


def _scale(attention: LatentAttention) -> float | None:
    """YaRN's sharper attention is in the scale of all scores, not of the rotated dims alone (their released code)."""
    scaling = attention.position.scaling
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim:
        return None
    sharper = 0.1 * scaling.mscale_all_dim * max(0.0, math.log(scaling.factor)) + 1
    return float(attention.key_head_dim**-0.5 * sharper**2)


def _read_router(config: Published, version: int) -> Router:
    top_k = config.get("num_experts_per_tok", Positive[int])
    n_groups = config.get("n_group", Positive[int], 1)
    groups = None
    if n_groups > 1:
        groups = ExpertGroups(n_groups=n_groups, top_groups=config.get("topk_group", Positive[int]))
    if version == 3:
        config.refuse("scoring_func", "sigmoid", why="as of DeepSeek-V3")
        config.refuse("topk_method", "noaux_tc", why="as of DeepSeek-V3")
        return SigmoidRouter(top_k=top_k, normalize=config.get("norm_topk_prob", bool, True), groups=groups)
    config.refuse("scoring_func", "softmax", why="as of DeepSeek-V2")
    config.refuse("norm_topk_prob", False, why="as of DeepSeek-V2")
    config.refuse("topk_method", "greedy", "group_limited_greedy", why="as of DeepSeek-V2")
    return TopKRouter(
        top_k=top_k,
        normalize=False,
        load_balance=config.get("aux_loss_alpha", NotNegative[float], 0.001),
        groups=groups if config.values.get("topk_method") == "group_limited_greedy" else None,
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    attention = model.layers[-1].attention
    if not isinstance(attention, LatentAttention):
        raise UserError(f"model.blocks[].attention = {type(attention).__name__} is not of this family")
    values = _KEYS.write(model) | write_rope(attention.position, attention.rope_head_dim)
    values |= {
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.content_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "rope_interleave": attention.position.interleaved,
        "first_k_dense_replace": sum(not isinstance(block.mlp, Experts) for block in model.layers),
        "num_nextn_predict_layers": 0,
    }
    experts = model.layers[-1].mlp
    if isinstance(experts, Experts):
        values |= {
            "n_routed_experts": experts.n_experts,
            "moe_intermediate_size": experts.d_ff,
            "n_shared_experts": experts.n_shared_experts,
            "routed_scaling_factor": experts.routed_scaling,
            "moe_layer_freq": 1,
        } | _write_router(experts)
    return values


def _write_router(experts: Experts) -> dict[str, Any]:
    match experts.router:
        case TopKRouter() as router:
            method = "greedy" if router.groups is None else "group_limited_greedy"
            own = {"scoring_func": "softmax", "topk_method": method, "aux_loss_alpha": router.load_balance}
        case SigmoidRouter() as router:
            own = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        case _:
            raise UserError(f"model.blocks[].mlp.router = {type(experts.router).__name__} is not of this family")
    groups = router.groups
    return own | {
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.normalize,
        "n_group": 1 if groups is None else groups.n_groups,
        "topk_group": 1 if groups is None else groups.top_groups,
    }


DEEPSEEK_V2 = ModelFamily(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=partial(_read, version=2),
    write=_write,
    names=_names,
)
DEEPSEEK_V3 = ModelFamily(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=partial(_read, version=3),
    write=_write,
    names=_names,
)
"""Also R1."""
