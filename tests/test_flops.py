"""FLOPs and parameters against published sizes, against arithmetic, and against a decoder that jax itself counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import (
    BlockConfig,
    Capacity,
    Dropless,
    Dtype,
    ExpertChoiceRouter,
    Experts,
    GatedMlp,
    GroupedQuery,
    ModelConfig,
    NoisyTopKRouter,
    QkNorm,
    Remat,
    SigmoidRouter,
    TopKRouter,
    llama,
    with_experts,
)
from maxlm.models import init_parameters
from maxlm.observe.devices import memory_in_use, peak_flops
from maxlm.shapes import flops_per_token, mfu, parameter_count

PUBLISHED = {
    # name: (vocab, d_model, layers, heads, kv heads, d_ff, parameters of the released weights)
    "LLaMA 7B": (32000, 4096, 32, 32, 32, 11008, 6_738_415_616),
    "LLaMA 13B": (32000, 5120, 40, 40, 40, 13824, 13_015_864_320),
    "LLaMA 33B": (32000, 6656, 60, 52, 52, 17920, 32_528_943_616),
    "LLaMA 65B": (32000, 8192, 80, 64, 64, 22016, 65_285_660_672),
    "Llama 2 70B": (32000, 8192, 80, 64, 8, 28672, 68_976_648_192),
    "Llama 3 8B": (128256, 4096, 32, 32, 8, 14336, 8_030_261_248),
    "Llama 3 70B": (128256, 8192, 80, 64, 8, 28672, 70_553_706_496),
}


def family(vocab: int, d_model: int, layers: int, heads: int, kv: int, d_ff: int, **more) -> ModelConfig:
    return llama(
        vocab_size=vocab, d_model=d_model, n_layers=layers, n_heads=heads, n_kv_heads=kv, d_ff=d_ff,
        max_seq_len=8192, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_released_models(name):
    *sizes, published = PUBLISHED[name]
    count = parameter_count(family(*sizes))
    assert count.total == published
    assert count.matmul == published - sizes[0] * sizes[1]


def test_tied_table_counts_once_and_multiplies():
    sizes = PUBLISHED["Llama 3 8B"][:-1]
    tied = parameter_count(family(*sizes, tie_embeddings=True))
    assert tied.unembedding == 0
    assert tied.matmul == tied.total == parameter_count(family(*sizes)).matmul


def test_biases_and_head_norms_against_a_tree_of_shapes():
    d, n, k, h, f, v = 24, 6, 2, 4, 40, 50
    blocks = tuple(
        BlockConfig(
            attention=GroupedQuery(
                n_heads=n,
                n_kv_heads=k,
                head_dim=h,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=QkNorm.HEADS if bias else None,
                window=window,
            ),
            mlp=GatedMlp(d_ff=f, bias=bias),
        )
        for bias, window in ((True, 8), (False, None))
    )
    model = ModelConfig(vocab_size=v, d_model=d, n_layers=4, blocks=blocks, max_seq_len=64)
    plain = [(d, n, h), (d, k, h), (d, k, h), (n, h, d), (d,), (d, f), (d, f), (f, d), (d,)]
    extra = [(n, h), (k, h), (k, h), (d,), (h,), (h,), (f,), (f,), (d,)]
    shapes = [(v, d), (d,), (v, d)] + 2 * (plain + extra) + 2 * plain
    assert parameter_count(model).total == sum(math.prod(shape) for shape in shapes)


def test_palm_rule_by_hand():
    """LLaMA 7B at 2048: 6 * 6,607,343,616 + 12 * 32 * 32 * 128 * 2048."""
    flops = flops_per_token(family(*PUBLISHED["LLaMA 7B"][:-1]), 2048, Remat.FULL)
    assert flops.parameters_term == 39_644_061_696
    assert flops.attention_term == 3_221_225_472
    assert flops.total == 42_865_287_168
    assert mfu(flops_per_token=flops.total, tokens_per_s=1000, n_devices=2, peak_flops=1e14) == pytest.approx(
        42_865_287_168 * 1000 / 2e14
    )


@pytest.mark.parametrize("window", [None, 1, 5, 16, 99])
def test_attention_reach_against_a_counted_mask(window):
    seq_len, base = 16, family(64, 32, 3, 4, 2, 48)
    attention = dataclasses.replace(base.blocks[0].attention, window=window)
    model = dataclasses.replace(base, blocks=(BlockConfig(attention=attention, mlp=base.blocks[0].mlp),))
    flops = flops_per_token(model, seq_len, Remat.NONE)
    visible = sum(1 for q in range(seq_len) for k in range(seq_len) if k <= q and (window is None or q - k < window))
    assert flops.causal_attention_term == pytest.approx(12 * 3 * 4 * 8 * visible / seq_len)
    assert flops.attention_term == 12 * 3 * 4 * 8 * min(seq_len, window or seq_len)


@jax.custom_vjp
def softmax(scores):
    return jax.nn.softmax(scores)


def _softmax_forward(scores):
    # Stands for what an attention kernel keeps for its own backward pass.
    weights = checkpoint_name(jax.nn.softmax(scores), "residual")
    return weights, weights


def _softmax_backward(weights, gradient):
    return (weights * (gradient - (weights * gradient).sum(-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def _decoder_loss(model: ModelConfig, policy):
    """A decoder in plain jax, full (unmasked) attention; its multiplications are what the formulas claim to count."""
    block = model.blocks[0]
    moe = block.mlp if isinstance(block.mlp, Experts) else None
    n, k, h = block.attention.n_heads, block.attention.n_kv_heads, block.attention.head_dim
    d, f, v = model.d_model, block.mlp.d_ff, model.vocab_size
    weights = {
        "q": (d, n, h), "k": (d, k, h), "v": (d, k, h), "o": (n, h, d), "gate": (d, f), "up": (d, f), "down": (f, d),
    }  # fmt: skip
    if moe:
        e, s = moe.n_experts, moe.n_shared_experts * f
        weights |= {"gate": (e, d, f), "up": (e, d, f), "down": (e, f, d), "router": (d, e)}
        weights |= {"shared_gate": (d, s), "shared_up": (d, s), "shared_down": (s, d)}
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in weights.items()}
    params = {
        "embed": jax.ShapeDtypeStruct((v, d), jnp.float32),
        "unembed": jax.ShapeDtypeStruct((d, v), jnp.float32),
        "layers": [layer] * model.n_layers,
    }

    def one_block(x, w):
        q, key, value = (checkpoint_name(jnp.einsum("btd,dnh->btnh", jnp.sin(x), w[c]), "qkv") for c in "qkv")
        key, value = (jnp.repeat(y, n // k, axis=2) for y in (key, value))
        scores = softmax(jnp.einsum("btnh,bsnh->bnts", q, key))
        attended = checkpoint_name(jnp.einsum("bnts,bsnh->btnh", scores, value), "attended")
        x = x + jnp.einsum("btnh,nhd->btd", attended, w["o"])
        y = jnp.sin(x)
        return x + (experts(y, w) if moe else mlp(y, w["gate"], w["up"], w["down"]))

    def experts(y, w):
        """Every token goes to the first top_k experts: the choice does not matter to a count."""
        gates = jax.nn.softmax(y @ w["router"])[..., :top_k]
        of_expert = lambda x, name: checkpoint_name(jnp.einsum("ktx,kxy->kty", x, w[name][:top_k]), "experts")
        rows = jnp.broadcast_to(y.reshape(-1, d), (top_k, y.shape[0] * y.shape[1], d))
        out = of_expert(jax.nn.silu(of_expert(rows, "gate")) * of_expert(rows, "up"), "down")
        routed = (out.reshape(top_k, *y.shape) * jnp.moveaxis(gates, -1, 0)[..., None]).sum(0)
        return routed + mlp(y, w["shared_gate"], w["shared_up"], w["shared_down"])

    def mlp(y, gate, up, down):
        gated, raised = (checkpoint_name(y @ weight, "gate_and_up") for weight in (gate, up))
        return (jax.nn.silu(gated) * raised) @ down

    top_k = moe.router.top_k if moe else 0

    run = one_block if policy is None else jax.checkpoint(one_block, policy=policy)

    def loss(params, tokens):
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x = run(x, layer)
        return jax.nn.logsumexp(jnp.sin(x) @ params["unembed"])

    return loss, params


POLICIES = {
    Remat.NONE: None,
    Remat.DOTS: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attended", "residual", "experts"),
    ),
    Remat.GLU: jax.checkpoint_policies.save_only_these_names("qkv", "attended", "residual", "gate_and_up"),
    Remat.NAMES: jax.checkpoint_policies.save_only_these_names("qkv", "attended", "residual"),
    Remat.QKV: jax.checkpoint_policies.save_only_these_names("qkv"),
    Remat.FULL: jax.checkpoint_policies.nothing_saveable,
}


def _dots(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                total += _dots(value)
            elif hasattr(value, "jaxpr"):
                total += _dots(value.jaxpr)
    return total


@pytest.mark.parametrize("remat", POLICIES)
def test_formulas_against_the_jaxpr(remat):
    batch, seq_len = 2, 16
    model = family(96, 32, 2, 4, 2, 48)
    loss, params = _decoder_loss(model, POLICIES[remat])
    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    counted = _dots(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr) / (batch * seq_len)
    flops = flops_per_token(model, seq_len, remat)
    norms = 6 * parameter_count(model).norms  # scales multiply elementwise, and the decoder here has none
    assert counted == flops.total - norms + flops.recompute


MIXTURE = Experts(n_experts=4, d_ff=16, n_shared_experts=2, router=TopKRouter(top_k=3))


@pytest.mark.parametrize("remat", POLICIES)
def test_formulas_of_experts_against_the_jaxpr(remat):
    batch, seq_len = 2, 16
    model = with_experts(family(96, 32, 2, 4, 2, 48), MIXTURE)
    loss, params = _decoder_loss(model, POLICIES[remat])
    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    counted = _dots(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr) / (batch * seq_len)
    flops = flops_per_token(model, seq_len, remat)
    assert counted == flops.total - 6 * parameter_count(model).norms + flops.recompute


@pytest.mark.parametrize(
    ("router", "dispatch", "per_token", "router_parameters"),
    [
        (TopKRouter(top_k=3), Dropless(), 3, 32 * 8),
        (NoisyTopKRouter(top_k=2), Capacity(factor=1.25), 2, 2 * 32 * 8),
        (SigmoidRouter(top_k=4), Dropless(), 4, 32 * 8 + 8),
        (ExpertChoiceRouter(), Capacity(factor=1.5), 1.5, 32 * 8),
    ],
)
def test_active_parameters_of_each_router(router, dispatch, per_token, router_parameters):
    """Layers: dense, experts, dense, experts; with those that the model itself makes."""
    experts = Experts(n_experts=8, d_ff=24, n_shared_experts=1, router=router, dispatch=dispatch)
    model = with_experts(family(64, 32, 4, 4, 2, 48), experts, every=2)
    count, one = parameter_count(model), 3 * 32 * 24
    assert count.mlp == 2 * (3 * 32 * 48) + 2 * (router_parameters + 9 * one)
    assert count.mlp_active == 2 * (3 * 32 * 48) + 2 * (router_parameters + one + per_token * one)
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    assert count.total == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count.active == count.total - count.mlp + count.mlp_active
    assert flops_per_token(model, 16, Remat.NONE).parameters_term == 6 * (count.active - 64 * 32)


def test_a_pipeline_that_computes_its_stages_again_does_a_forward_pass_more():
    model = with_experts(family(96, 32, 2, 4, 2, 48), MIXTURE)
    once, again = (flops_per_token(model, 16, Remat.FULL, remat_stages=stages) for stages in (False, True))
    count = parameter_count(model)
    layers = count.attention + count.mlp_active
    assert again.recompute - once.recompute == 2 * layers + once.attention_term // 3
    assert again.total == once.total


def test_offload_recomputes_what_names_recomputes():
    model = family(96, 32, 2, 4, 2, 48)
    names, offload = (flops_per_token(model, 16, r).recompute for r in (Remat.NAMES, Remat.OFFLOAD))
    assert names == offload > 0


def test_peaks_are_found_by_exact_name_only():
    assert peak_flops("NVIDIA H100 80GB HBM3", Dtype.BFLOAT16) == 989.4e12
    assert peak_flops("nvidia  h100 80gb hbm3", Dtype.FLOAT32) == 494.7e12
    assert peak_flops("TPU v5 lite", Dtype.BFLOAT16) == 197e12
    for unknown in ("cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100", "TPU v9"):
        assert peak_flops(unknown, Dtype.BFLOAT16) is None
    assert peak_flops("Tesla T4", Dtype.BFLOAT16) is None  # no such unit
    assert peak_flops("Tesla T4", Dtype.FLOAT32) == 8.1e12


@pytest.mark.parametrize(
    ("chip", "cores_a_device"),
    [("TPU_V2", 1), ("TPU_V4", 2), ("TPU_V5E", 1), ("TPU_V5P", 2), ("TPU_V6E", 1), ("TPU_7X", 1)],
)
def test_tpu_peaks_against_pallas(chip, cores_a_device):
    """Pallas counts for one TensorCore. It has 140 for a v3 chip, where Google's documentation has 123."""
    from jax.experimental.pallas import tpu as pltpu

    kind = {
        "TPU_V2": "TPU v2", "TPU_V4": "TPU v4", "TPU_V5E": "TPU v5 lite", "TPU_V5P": "TPU v5", "TPU_V6E": "TPU v6 lite",
        "TPU_7X": "TPU7x",
    }[chip]  # fmt: skip
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[chip], cores_a_device)
    assert peak_flops(kind, Dtype.BFLOAT16) == pytest.approx(cores_a_device * info.bf16_ops_per_second, rel=0.03)


def test_memory_of_devices_and_of_the_process():
    class Fake:
        device_kind, process_index = "x", 0

        def __init__(self, used: int, peak: int) -> None:
            self.stats = {"bytes_in_use": used, "peak_bytes_in_use": peak, "bytes_limit": 100}

        def memory_stats(self):
            return self.stats

    use = memory_in_use([Fake(5, 9), Fake(7, 8)])
    assert (use.in_use, use.peak, use.limit) == (7, 9, 100)
    before = memory_in_use(jax.devices("cpu"))
    block = bytearray(b"x" * (64 << 20))
    after = memory_in_use(jax.devices("cpu"))
    assert after.limit is None and after.in_use - before.in_use > 50 << 20 and after.peak >= after.in_use
    assert len(block) == 64 << 20
