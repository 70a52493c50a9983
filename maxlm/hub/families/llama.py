"""LLaMA and those built like it: RMSNorm, RoPE, grouped heads, gated MLPs; dense or with experts."""

from __future__ import annotations

from functools import partial
from typing import Any

from maxlm.config import (
    BlockConfig,
    Experts,
    GatedMlp,
    GroupedQuery,
    LmHead,
    MlpConfig,
    ModelConfig,
    QkNorm,
    RmsNorm,
    Rope,
    TopKRouter,
)
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Arrangement, Names, linear, norm
from maxlm.hub.published import Published, pattern, read_activation, read_rope, write_activation, write_rope

TOP: dict[str, Arrangement] = {
    "model.embed_tokens.weight": "embed",
    **norm("model.norm", "final_norm"),
    "lm_head.weight": "unembed",
}
ATTENTION: dict[str, Arrangement] = {
    **linear("self_attn.q_proj", "attention/q"),
    **linear("self_attn.k_proj", "attention/k"),
    **linear("self_attn.v_proj", "attention/v"),
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
IGNORED = ("rotary_emb.inv_freq",)
"""Old exports have the frequencies of RoPE among their tensors."""


def read(
    config: Published, *, biases: str = "", qk_norm: bool = False, window: bool = False, theta: float = 10_000.0
) -> ModelConfig:
    """A dense or mixed model of this build.

    Args:
        config: its config.json.
        biases: of which projections, where `attention_bias` does not say: some of "qkvo".
        qk_norm: whether query and key heads are normalised.
        window: whether `sliding_window` counts.
        theta: of RoPE, where nothing says it.
    """
    D, N = (config.get(key, Positive[int]) for key in ("hidden_size", "num_attention_heads"))
    L = config.get("num_hidden_layers", Positive[int])
    biases = "qkvo" if config.get("attention_bias", bool, False) else biases
    reach = config.get("sliding_window", Positive[int], None) if window else None
    head_dim = config.get("head_dim", Positive[int], D // N)
    layers = []
    for number in range(L):
        attention = GroupedQuery(
            n_heads=N,
            n_kv_heads=config.get("num_key_value_heads", Positive[int], N),
            head_dim=head_dim,
            position=read_rope(config, head_dim, theta=theta),
            window=reach if _slides(config, number) else None,
            qkv_bias="q" in biases,
            out_bias="o" in biases,
            qk_norm=QkNorm.HEADS if qk_norm else None,
        )
        layers.append(BlockConfig(attention=attention, mlp=_read_mlp(config, number)))
    return ModelConfig(
        vocab_size=config.get("vocab_size", Positive[int]),
        d_model=D,
        n_layers=L,
        blocks=pattern(layers),
        max_seq_len=config.get("max_position_embeddings", Positive[int]),
        norm=RmsNorm(eps=config.get("rms_norm_eps", NotNegative[float], 1e-6)),
        head=LmHead(tied=config.get("tie_word_embeddings", bool, False)),
        init_std=config.get("initializer_range", NotNegative[float], 0.02),
    )


def _slides(config: Published, number: int) -> bool:
    """Whether a layer sees no further than the window."""
    if kinds := config.get("layer_types", list, []):
        return bool(kinds[number] == "sliding_attention")
    if config.values.get("use_sliding_window") is False:
        return False
    return bool(number >= config.get("max_window_layers", NotNegative[int], 0))


def _read_mlp(config: Published, number: int) -> MlpConfig:
    activation = read_activation(config, "hidden_act", "silu")
    n_experts = next((config.values[key] for key in ("num_local_experts", "num_experts") if key in config.values), None)
    every, dense = config.get("decoder_sparse_step", Positive[int], 1), config.get("mlp_only_layers", list, [])
    if not n_experts or number in dense or (number + 1) % every:
        d_ff = config.get("intermediate_size", Positive[int])
        return GatedMlp(d_ff=d_ff, activation=activation, bias=config.get("mlp_bias", bool, False))
    top_k = config.get("num_experts_per_tok", Positive[int])
    return Experts(
        n_experts=n_experts,
        d_ff=config.get("moe_intermediate_size", Positive[int], config.values.get("intermediate_size")),
        router=TopKRouter(
            top_k=top_k,
            normalize=config.get("norm_topk_prob", bool, config.values["model_type"] == "mixtral"),
            load_balance=config.get("router_aux_loss_coef", NotNegative[float], 0.001) * _of_coefficient(config),
        ),
        activation=activation,
    )


def _of_coefficient(config: Published) -> float:
    """transformers balances all layers together, with a loss of top_k where they are balanced; ours is the sum over
    layers of losses of 1 (`TopKRouter.load_balance`)."""
    return float(config.get("num_experts_per_tok", Positive[int]) / config.get("num_hidden_layers", Positive[int]))


def write(model: ModelConfig, *, window: bool = False) -> dict[str, Any]:
    """The config.json of a model of this build, as `read` reads it."""
    block = model.layers[-1]
    attention = block.attention
    assert isinstance(attention, GroupedQuery)
    values: dict[str, Any] = {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm.eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "attention_bias": attention.qkv_bias and attention.out_bias,
    }
    if isinstance(attention.position, Rope):
        values |= write_rope(attention.position, attention.head_dim)
    if window:
        values["sliding_window"] = attention.window
    match block.mlp:
        case GatedMlp() as mlp:
            values |= {
                "intermediate_size": mlp.d_ff,
                "hidden_act": write_activation(mlp.activation),
                "mlp_bias": mlp.bias,
            }
        case Experts(router=TopKRouter() as router) as experts:
            balance = round(router.load_balance * model.n_layers / router.top_k, 12)
            values |= {
                "intermediate_size": experts.d_ff,
                "hidden_act": write_activation(experts.activation),
                "num_experts_per_tok": router.top_k,
                "router_aux_loss_coef": balance,
            }
    return values


def _write_layers(model: ModelConfig) -> dict[str, Any]:
    """Of Qwen: which layers slide, and which have no experts."""
    windows = [block.attention.window for block in model.layers]
    dense = [number for number, block in enumerate(model.layers) if not isinstance(block.mlp, Experts)]
    values = write(model) | {"sliding_window": max((w or 0 for w in windows), default=0) or None}
    values["use_sliding_window"] = any(windows)
    values["layer_types"] = ["sliding_attention" if one else "full_attention" for one in windows]
    if len(dense) < model.n_layers:
        experts = model.layers[-1].mlp
        assert isinstance(experts, Experts) and isinstance(experts.router, TopKRouter)
        values |= {
            "num_experts": experts.n_experts,
            "moe_intermediate_size": experts.d_ff,
            "norm_topk_prob": experts.router.normalize,
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
        }
        widths = [block.mlp.d_ff for block in model.layers if isinstance(block.mlp, GatedMlp)]
        values["intermediate_size"] = widths[0] if widths else experts.d_ff
    return values


def _write_mixtral(model: ModelConfig) -> dict[str, Any]:
    experts = model.layers[-1].mlp
    n_experts = experts.n_experts if isinstance(experts, Experts) else None
    return write(model, window=True) | {"num_local_experts": n_experts}


_NAMES = Names(top=TOP, block=NORMS | ATTENTION | MLP, ignored=IGNORED)


def _experts(router: str, expert: str, gate: str, up: str, down: str) -> dict[str, Arrangement]:
    """Names of a router and of each expert's matrices."""
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    each: dict[str, Arrangement] = {f"{expert}.{{}}.{theirs}.weight": f"mlp/{ours}" for ours, theirs in names.items()}
    return {f"{router}.weight": "mlp/router"} | each


LLAMA = ModelFamily(model_type="llama", architecture="LlamaForCausalLM", read=read, write=write, names=_NAMES)
MISTRAL = ModelFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=partial(read, window=True),
    write=partial(write, window=True),
    names=_NAMES,
)
QWEN2 = ModelFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=partial(read, biases="qkv", window=True),
    write=_write_layers,
    names=_NAMES,
)
QWEN3 = ModelFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=partial(read, qk_norm=True, window=True),
    write=_write_layers,
    names=_NAMES,
)
QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=partial(read, qk_norm=True, window=True),
    write=_write_layers,
    names=Names(
        top=TOP,
        block=NORMS | ATTENTION | MLP | _experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        ignored=IGNORED,
    ),
)
MIXTRAL = ModelFamily(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=partial(read, window=True, theta=1e6),
    write=_write_mixtral,
    names=Names(
        top=TOP,
        block=NORMS | ATTENTION | _experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
        ignored=IGNORED,
    ),
)
