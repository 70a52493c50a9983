"""LLaMA and those built like it: RMSNorm, RoPE, grouped heads, gated MLPs; dense or with experts."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from maxlm.config import (
    BlockConfig,
    Experts,
    GatedMlp,
    LayerNorm,
    LmHead,
    LongRopeScaling,
    MlpConfig,
    ModelConfig,
    OutputNorm,
    Parallel,
    PreNorm,
    QkNorm,
    RmsNorm,
    Rope,
    Sandwich,
    TopKRouter,
)
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Arrangement, Names, linear, norm
from maxlm.hub.published import Published, pattern, read_rope, write_rope
from maxlm.hub.sizes import Keys, Sizes, grouped_query

TOP: dict[str, Arrangement] = {
    "model.embed_tokens.weight": "embed",
    **norm("model.norm", "final_norm"),
    "lm_head.weight": "unembed",
}
QKV: dict[str, Arrangement] = {
    **linear("self_attn.q_proj", "attention/q"),
    **linear("self_attn.k_proj", "attention/k"),
    **linear("self_attn.v_proj", "attention/v"),
}
ATTENTION: dict[str, Arrangement] = {
    **QKV,
    **linear("self_attn.o_proj", "attention/o"),
    **norm("self_attn.q_norm", "attention/q_norm"),
    **norm("self_attn.k_norm", "attention/k_norm"),
}
NORMS: dict[str, Arrangement] = {
    **norm("input_layernorm", "attention_norm"),
    **norm("post_attention_layernorm", "mlp_norm"),
}
MLP: dict[str, Arrangement] = {
    **linear("mlp.gate_proj", "mlp/gate"),
    **linear("mlp.up_proj", "mlp/up"),
    **linear("mlp.down_proj", "mlp/down"),
}
IGNORED = ("*rotary_emb.inv_freq",)
"""Old exports have the frequencies of RoPE among their tensors."""

_KEYS = Keys(least=1e-6)


def _read(
    config: Published,
    *,
    biases: str = "",
    qk_norm: QkNorm | None = None,
    window: bool = False,
    theta: float = 10_000.0,
    share: float | None = None,
) -> ModelConfig:
    """A dense or mixed model of this build.

    Args:
        config: its config.json.
        biases: of which projections, where `attention_bias` does not say: some of "qkvo".
        qk_norm: of queries and keys.
        window: whether `sliding_window` counts.
        theta, share: as `read_rope`.
    """
    sizes = _KEYS.read(config)
    biases = "qkvo" if config.get("attention_bias", bool, False) else biases
    reach = config.get("sliding_window", Positive[int], None) if window else None
    attention = sizes.attention(
        position=read_rope(config, sizes.head_dim, theta=theta, share=share),
        qkv_bias="q" in biases,
        out_bias="o" in biases,
        qk_norm=qk_norm,
    )
    layers = [
        BlockConfig(
            attention=dataclasses.replace(attention, window=reach if slides(config, number) else None),
            mlp=_read_mlp(config, sizes, number),
        )
        for number in range(sizes.n_layers)
    ]
    return sizes.model(pattern(layers), RmsNorm(eps=sizes.eps))


def slides(config: Published, number: int) -> bool:
    """Whether a layer sees no further than the window."""
    if kinds := config.get("layer_types", list, []):
        return number < len(kinds) and bool(kinds[number] == "sliding_attention")
    if config.values.get("use_sliding_window") is False:
        return False
    return bool(number >= config.get("max_window_layers", NotNegative[int], 0))


def layer_types(model: ModelConfig) -> dict[str, Any]:
    """As `slides` reads them."""
    windows = [block.attention.window for block in model.layers]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"layer_types": kinds, "sliding_window": next(filter(None, windows), None)}


def _read_mlp(config: Published, sizes: Sizes, number: int) -> MlpConfig:
    n_experts = config.count("num_local_experts", None)
    if n_experts is None and config.get("num_experts", NotNegative[int], 0):
        n_experts = config.count("num_experts")
    every, dense = config.get("decoder_sparse_step", Positive[int], 1), config.get("mlp_only_layers", list, [])
    if not n_experts or number in dense or (number + 1) % every:
        return sizes.gated(bias=config.get("mlp_bias", bool, False))
    router = TopKRouter(
        top_k=config.get("num_experts_per_tok", Positive[int]),
        normalize=config.get("norm_topk_prob", bool, config.values.get("model_type") == "mixtral"),
    )
    balance = config.get("router_aux_loss_coef", NotNegative[float], 0.001) * router.top_k / sizes.n_layers
    return Experts(
        n_experts=n_experts,
        d_ff=config.get("moe_intermediate_size", Positive[int], sizes.d_ff),
        # transformers balances all layers together, with a loss of top_k where experts are used evenly; ours is the sum
        # over layers of losses of 1.
        router=dataclasses.replace(router, load_balance=balance),
        activation=sizes.activation,
    )


def _write(model: ModelConfig, *, window: bool = False) -> dict[str, Any]:
    """As `_read` reads it."""
    block = model.layers[-1]
    attention = grouped_query(model)
    assert isinstance(attention.position, Rope)
    values = _KEYS.write(model) | write_rope(attention.position, attention.head_dim)
    values["attention_bias"] = attention.qkv_bias and attention.out_bias
    if window:
        values["sliding_window"] = attention.window
    match block.mlp:
        case GatedMlp() as mlp:
            values["mlp_bias"] = mlp.bias
        case Experts(router=TopKRouter() as router):
            values["num_experts_per_tok"] = router.top_k
            values["router_aux_loss_coef"] = round(router.load_balance * model.n_layers / router.top_k, 12)
    return values


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    values = _write(model) | layer_types(model)
    values["use_sliding_window"] = values["sliding_window"] is not None
    experts = model.layers[-1].mlp
    if isinstance(experts, Experts) and isinstance(experts.router, TopKRouter):
        values |= {
            "num_experts": experts.n_experts,
            "moe_intermediate_size": experts.d_ff,
            "norm_topk_prob": experts.router.normalize,
            "mlp_only_layers": [i for i, block in enumerate(model.layers) if not isinstance(block.mlp, Experts)],
            "decoder_sparse_step": 1,
        }
    return values


def _write_mixtral(model: ModelConfig) -> dict[str, Any]:
    experts = model.layers[-1].mlp
    assert isinstance(experts, Experts)
    return _write(model, window=True) | {"num_local_experts": experts.n_experts}


def _experts(router: str, expert: str, gate: str, up: str, down: str) -> dict[str, Arrangement]:
    """Names of a router and of each expert's matrices."""
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    each: dict[str, Arrangement] = {f"{expert}.{{}}.{theirs}.weight": f"mlp/{ours}" for ours, theirs in names.items()}
    return {f"{router}.weight": "mlp/router"} | each


_NAMES = Names(top=TOP, block=NORMS | ATTENTION | MLP, ignored=IGNORED)

LLAMA = ModelFamily(model_type="llama", architecture="LlamaForCausalLM", read=_read, write=_write, names=_NAMES)
MISTRAL = ModelFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=partial(_read, window=True),
    write=partial(_write, window=True),
    names=_NAMES,
)
QWEN2 = ModelFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=partial(_read, biases="qkv", window=True),
    write=_write_qwen,
    names=_NAMES,
)
QWEN3 = ModelFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=partial(_read, qk_norm=QkNorm.HEADS, window=True),
    write=_write_qwen,
    names=_NAMES,
)
QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=partial(_read, qk_norm=QkNorm.HEADS, window=True),
    write=_write_qwen,
    names=Names(
        top=TOP,
        block=NORMS | ATTENTION | MLP | _experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        ignored=IGNORED,
    ),
)
MIXTRAL = ModelFamily(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=partial(_read, window=True, theta=1e6),
    write=_write_mixtral,
    names=Names(
        top=TOP,
        block=NORMS | ATTENTION | _experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
        ignored=IGNORED,
    ),
)


# ---- Others, of the same parts ----

_FUSED: dict[str, Arrangement] = {
    **linear("self_attn.qkv_proj", "attention/q", "attention/k", "attention/v"),
    **linear("self_attn.o_proj", "attention/o"),
    **linear("mlp.gate_up_proj", "mlp/gate", "mlp/up"),
    **linear("mlp.down_proj", "mlp/down"),
}

PHI3 = ModelFamily(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=partial(_read, window=True, share=1.0),
    write=lambda model: _write(model, window=True) | _original_length(model),
    names=Names(top=TOP, block=NORMS | _FUSED),
)


def _original_length(model: ModelConfig) -> dict[str, Any]:
    """Phi-3 says it beside `rope_scaling`."""
    position = model.layers[-1].attention.position
    scaling = position.scaling if isinstance(position, Rope) else None
    length = scaling.original_max_len if isinstance(scaling, LongRopeScaling) else model.max_seq_len
    return {"original_max_position_embeddings": length}


def _read_olmo2(config: Published) -> ModelConfig:
    model = _read(config, qk_norm=QkNorm.WHOLE)
    return dataclasses.replace(model, blocks=tuple(dataclasses.replace(b, residual=OutputNorm()) for b in model.blocks))


OLMO2 = ModelFamily(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read=_read_olmo2,
    write=_write,
    names=Names(
        top=TOP,
        block=ATTENTION
        | MLP
        | norm("post_attention_layernorm", "attention_out_norm")
        | norm("post_feedforward_layernorm", "mlp_out_norm"),
    ),
)


def _read_olmo(config: Published) -> ModelConfig:
    config.refuse("clip_qkv", why="queries, keys and values are not clipped")
    return dataclasses.replace(_read(config), norm=LayerNorm(scale=False, bias=False))


OLMO = ModelFamily(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    read=_read_olmo,
    write=_write,
    names=Names(top=TOP, block=ATTENTION | MLP),
)
"""OLMo 1; its norms have eps = 1e-5 and nothing learned."""


_COHERE_KEYS = Keys(eps="layer_norm_eps", tied=True)


def _read_cohere(config: Published) -> ModelConfig:
    config.refuse("use_qk_norm", False, why="its norms have a scale for each head")
    sizes = _COHERE_KEYS.read(config)
    bias = config.get("attention_bias", bool, False)
    rope = read_rope(config, sizes.head_dim, theta=5e5, interleaved=True)
    attention = sizes.attention(position=rope, qkv_bias=bias, out_bias=bias)
    block = BlockConfig(attention=attention, mlp=sizes.gated(), residual=Parallel())
    scale = config.get("logit_scale", Positive[float], 0.0625)
    return sizes.model((block,), LayerNorm(eps=sizes.eps, bias=False), {"scale": scale})


def _write_cohere(model: ModelConfig) -> dict[str, Any]:
    attention = grouped_query(model)
    assert isinstance(attention.position, Rope) and isinstance(model.head, LmHead)
    more = {"logit_scale": model.head.scale, "attention_bias": attention.qkv_bias}
    return _COHERE_KEYS.write(model) | write_rope(attention.position, attention.head_dim) | more


COHERE = ModelFamily(
    model_type="cohere",
    architecture="CohereForCausalLM",
    read=_read_cohere,
    write=_write_cohere,
    names=Names(top=TOP, block=ATTENTION | MLP | norm("input_layernorm", "attention_norm")),
)
"""Command R."""


def _read_glm(config: Published, *, sandwich: bool) -> ModelConfig:
    sizes = _KEYS.read(config)
    rope = read_rope(config, sizes.head_dim, interleaved=True, share=0.5)
    attention = sizes.attention(position=rope, qkv_bias=config.get("attention_bias", bool, False))
    block = BlockConfig(attention=attention, mlp=sizes.gated(), residual=Sandwich() if sandwich else PreNorm())
    return sizes.model((block,), RmsNorm(eps=sizes.eps))


def _write_glm(model: ModelConfig) -> dict[str, Any]:
    attention = grouped_query(model)
    return _write(model) | {"attention_bias": attention.qkv_bias}


_GLM_BLOCK = ATTENTION | linear("mlp.gate_up_proj", "mlp/gate", "mlp/up") | linear("mlp.down_proj", "mlp/down")

GLM = ModelFamily(
    model_type="glm",
    architecture="GlmForCausalLM",
    read=partial(_read_glm, sandwich=False),
    write=_write_glm,
    names=Names(top=TOP, block=NORMS | _GLM_BLOCK),
)
"""GLM-4-9B."""
GLM4 = ModelFamily(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    read=partial(_read_glm, sandwich=True),
    write=_write_glm,
    names=Names(
        top=TOP,
        block=_GLM_BLOCK
        | NORMS
        | norm("post_self_attn_layernorm", "attention_out_norm")
        | norm("post_mlp_layernorm", "mlp_out_norm"),
    ),
)
"""GLM-4-0414."""
