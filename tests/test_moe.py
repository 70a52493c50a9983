"""The mixture of experts against loops over tokens in float64, and its gradients against all experts on all tokens."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    FLOAT32,
    gradient_function,
    initial_parameters,
    one_device,
    packed_batch,
    plainly,
    small_model,
    small_run,
    through_cache,
    whole_logits,
)
from jax.scipy.stats import norm

from maxlm.config import (
    Activation,
    Capacity,
    Dropless,
    ExpertChoiceRouter,
    ExpertGroups,
    Experts,
    NoisyTopKRouter,
    Nonlinearity,
    Remat,
    Router,
    ShardingConfig,
    SigmoidRouter,
    Swish,
    TopKRouter,
    UserError,
    WeightFormat,
)
from maxlm.inference.held import held
from maxlm.models import Execution, init_parameters
from maxlm.models.moe import ExpertsLayer, RouterStats, balance_biases, sigmoid_routing, top_k_routing
from maxlm.models.parameters import Initializer
from maxlm.sharding import make_layout

B, T, D, E, F = 4, 12, 16, 6, 10

ROUTERS = {
    "top2": TopKRouter(top_k=2, load_balance=0.3),
    "switch": TopKRouter(top_k=1, normalize=False, load_balance=0.3),
    "top3_shares": TopKRouter(top_k=3, normalize=False),
    "noisy": NoisyTopKRouter(top_k=2, importance_loss=0.3, load_loss=0.2),
    "sigmoid": SigmoidRouter(top_k=2),
    "sigmoid_raw": SigmoidRouter(top_k=3, normalize=False),
    "grouped": TopKRouter(top_k=2, normalize=False, load_balance=0.3, groups=ExpertGroups(n_groups=3, top_groups=1)),
    "sigmoid_grouped": SigmoidRouter(top_k=3, groups=ExpertGroups(n_groups=3, top_groups=2)),
}
DISPATCHES = {"dropless": Dropless(), "capacity": Capacity(factor=1.0, group_size=4)}
CASES = {
    **{f"{r}-{d}": moe for r, router in ROUTERS.items() for d, dispatch in DISPATCHES.items()
       for moe in [Experts(n_experts=E, d_ff=F, router=router, dispatch=dispatch, router_z_loss=0.1)]},
    "switch-sequence": Experts(n_experts=E, d_ff=F, router=ROUTERS["switch"], dispatch=Capacity(factor=0.7)),
    "expert_choice": Experts(
        n_experts=E, d_ff=F, router=ExpertChoiceRouter(), dispatch=Capacity(factor=2.0, group_size=6), router_z_loss=0.1
    ),
    "shared_scaled": Experts(
        n_experts=E, d_ff=F, router=ROUTERS["sigmoid"], n_shared_experts=2, routed_scaling=2.5,
        activation=Activation.GELU_TANH,
    ),
    "gpt_oss": Experts(
        n_experts=E, d_ff=F, router=TopKRouter(top_k=2, bias=True), activation=Swish(beta=1.702), bias=True, clamp=0.8,
        up_offset=1.0,
    ),
    "learned_swish-capacity": Experts(
        n_experts=E, d_ff=F, router=ROUTERS["top2"], activation=Swish(), bias=True, n_shared_experts=1,
        dispatch=DISPATCHES["capacity"],
    ),
    "expert_choice_biased": Experts(
        n_experts=E, d_ff=F, router=ExpertChoiceRouter(), dispatch=Capacity(), activation=Swish(), bias=True, clamp=1.0
    ),
    "expert_choice_scaled": Experts(
        n_experts=E, d_ff=F, router=ExpertChoiceRouter(), dispatch=Capacity(), n_shared_experts=1, routed_scaling=0.5
    ),
}  # fmt: skip


def make(config: Experts) -> ExpertsLayer:
    """The layer with parameters large enough that experts differ, and biases that matter."""
    moe = ExpertsLayer(config, small_model(d_model=D, init_std=0.4), Initializer(jax.random.key(3)))
    if isinstance(config.router, SigmoidRouter):
        moe.router_bias[...] = jnp.linspace(-0.3, 0.3, E)
    for layer in (moe, moe.shared_experts) if config.n_shared_experts else (moe,):
        for name in ("gate_bias", "up_bias", "down_bias", "score_bias", "swish_beta"):
            if hasattr(layer, name):  # as they begin they are 0, and 1
                value = getattr(layer, name)
                value[...] += jax.random.normal(jax.random.key(len(name)), value.shape) * 0.3
    return moe


@jax.jit
def apply(moe: ExpertsLayer, x: jax.Array, keys: jax.Array | None = None) -> tuple[jax.Array, RouterStats]:
    return moe(x, plainly(), keys)


def inputs() -> tuple[jax.Array, jax.Array]:
    """x and keys of the rows."""
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    return jnp.asarray(x), jax.random.split(jax.random.key(5), B)


def noise_of(keys: jax.Array | None) -> np.ndarray:
    if keys is None:
        return np.zeros((B, T, E))
    return np.stack([np.asarray(jax.random.normal(key, (T, E)), np.float64) for key in keys])


# ---- The oracle: loops, float64, nothing shared with the layer. ------------------------------------------------------


def softmax(a: np.ndarray) -> np.ndarray:
    e = np.exp(a - a.max())
    return e / e.sum()


def activation(kind: Nonlinearity, a: np.ndarray, p: Any) -> np.ndarray:
    match kind:
        case Swish(beta=beta):
            return a / (1 + np.exp(-(p["swish_beta"] if beta is None else beta) * a))
        case Activation.SILU:
            return a / (1 + np.exp(-a))
        case Activation.GELU_TANH:
            return 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    raise NotImplementedError


def mlp(config: Experts, p: Any, x: np.ndarray, expert: int | None) -> np.ndarray:
    """Of one token and one expert; None: of the shared ones, which are neither clamped nor offset."""
    of = (lambda name: p[name]) if expert is None else (lambda name: p[name][expert])
    bias = (lambda name: of(f"{name}_bias")) if config.bias else (lambda name: 0)
    gate, up = x @ of("gate_proj") + bias("gate"), x @ of("up_proj") + bias("up")
    if expert is not None:
        if config.clamp is not None:  # modeling_gpt_oss.py: gate.clamp(min=None, max=limit), up on both sides
            gate, up = np.minimum(gate, config.clamp), np.maximum(np.minimum(up, config.clamp), -config.clamp)
        up = up + config.up_offset
    return (activation(config.activation, gate, p) * up) @ of("down_proj") + bias("down")


def normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def squared_cv(values: np.ndarray) -> float:
    return float(((values - values.mean()) ** 2).mean() / values.mean() ** 2)


@dataclasses.dataclass
class Truth:
    y: np.ndarray
    gate: np.ndarray  # [B, T, E], 0 where the expert did not compute the token
    chosen: np.ndarray  # bool [B, T, E]
    load: np.ndarray
    dropped: int
    auxiliary: float


def allowed(groups: ExpertGroups | None, scores: np.ndarray, best_of: int) -> list[int]:
    """Experts of the groups with the largest sums of their best scores, the first of equal groups before the others
    (arXiv:2405.04434, section 2.2.2, with the best one; arXiv:2412.19437, section 2.1.2, where for K / M experts of M
    nodes it takes the best K / M: two in the released model)."""
    if groups is None:
        return list(range(len(scores)))
    size = len(scores) // groups.n_groups
    members = [range(g * size, (g + 1) * size) for g in range(groups.n_groups)]
    worth = [sum(sorted((scores[e] for e in group), reverse=True)[:best_of]) for group in members]
    best = sorted(range(groups.n_groups), key=lambda g: -worth[g])[: groups.top_groups]
    return [e for g in sorted(best) for e in members[g]]


def token_choices(config: Experts, p: Any, x: np.ndarray, noise: np.ndarray) -> list[tuple[int, float]]:
    """(expert, gate) of one token, best first."""
    logits = x @ p["router"] + p.get("score_bias", 0)
    match config.router:
        case TopKRouter(top_k=k, normalize=normalize, groups=groups):
            best = sorted(allowed(groups, softmax(logits), 1), key=lambda e: -logits[e])[:k]
            shares = softmax(logits)
            total = sum(shares[e] for e in best) if normalize else 1.0
            return [(e, shares[e] / total) for e in best]
        case NoisyTopKRouter(top_k=k):
            H = logits + noise * np.log1p(np.exp(x @ p["router_noise"]))
            best = sorted(range(E), key=lambda e: -H[e])[:k]
            return list(zip(best, softmax(H[best]), strict=True))
        case SigmoidRouter(top_k=k, normalize=normalize, groups=groups):
            scores = 1 / (1 + np.exp(-logits))
            biased = scores + p["router_bias"]
            best = sorted(allowed(groups, biased, 2), key=lambda e: -biased[e])[:k]
            total = sum(scores[e] for e in best) if normalize else 1.0
            return [(e, scores[e] / total) for e in best]
    raise NotImplementedError


def losses(config: Experts, p: Any, x: np.ndarray, noise: np.ndarray, gate: np.ndarray, load: np.ndarray) -> float:
    """Mean over tokens, weighted; gate [tokens, E] as chosen, whether computed or not."""
    logits = x @ p["router"] + p.get("score_bias", 0)
    total = config.router_z_loss * np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits])
    match config.router:
        case TopKRouter(top_k=k, load_balance=weight):
            f, P = load / (len(x) * k), np.mean([softmax(row) for row in logits], axis=0)
            total += weight * E * sum(f[e] * P[e] for e in range(E))
        case NoisyTopKRouter(top_k=k, importance_loss=w_importance, load_loss=w_load):
            smooth = np.zeros(E)
            for row, row_x, row_noise in zip(logits, x, noise, strict=True):
                deviation = np.log1p(np.exp(row_x @ p["router_noise"]))
                H = row + row_noise * deviation
                for e in range(E):
                    kth_excluding = sorted(np.delete(H, e))[-k]
                    smooth[e] += normal_cdf((row[e] - kth_excluding) / deviation[e])
            total += w_importance * squared_cv(gate.sum(0)) + w_load * squared_cv(smooth)
    return float(total)


def oracle(config: Experts, parameters: Any, x: jax.Array, keys: jax.Array | None) -> Truth:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters)
    x, noise = np.asarray(x, np.float64), noise_of(keys)
    gate, chosen = np.zeros((B, T, E)), np.zeros((B, T, E), bool)
    dispatch = config.dispatch
    group = (dispatch.group_size or T) if isinstance(dispatch, Capacity) else T
    if isinstance(config.router, ExpertChoiceRouter):
        room = math.ceil(dispatch.factor * group / E)
        for b in range(B):
            for start in range(0, T, group):
                tokens = range(start, start + group)
                scores = {t: softmax(x[b, t] @ p["router"]) for t in tokens}
                for e in range(E):
                    for t in sorted(tokens, key=lambda t: -scores[t][e])[:room]:
                        gate[b, t, e], chosen[b, t, e] = scores[t][e], True
        computed, as_chosen = chosen, gate
    else:
        choices = {(b, t): token_choices(config, p, x[b, t], noise[b, t]) for b in range(B) for t in range(T)}
        for (b, t), of_token in choices.items():
            for e, g in of_token:
                gate[b, t, e], chosen[b, t, e] = g, True
        computed, as_chosen = chosen.copy(), gate.copy()
        if isinstance(dispatch, Capacity):
            room = min(group, math.ceil(dispatch.factor * config.router.top_k * group / E))
            for b in range(B):
                for start in range(0, T, group):
                    used = [0] * E
                    for j in range(config.router.top_k):
                        for t in range(start, start + group):
                            e = choices[b, t][j][0]
                            used[e] += 1
                            computed[b, t, e] = used[e] <= room
        gate = gate * computed
    load = chosen.sum((0, 1)).astype(float)
    y = np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            for e in range(E):
                if gate[b, t, e]:
                    y[b, t] += config.routed_scaling * gate[b, t, e] * mlp(config, p, x[b, t], e)
            if config.n_shared_experts:
                y[b, t] += mlp(config, p["shared_experts"], x[b, t], None)
    flat = lambda a: a.reshape(B * T, -1)
    loss = losses(config, p, flat(x), flat(noise), flat(as_chosen), load)
    return Truth(y, gate, chosen, load, int((chosen & ~computed).sum()), loss * B * T)


def truth_of(config: Experts, noisy: bool) -> tuple[ExpertsLayer, Any, jax.Array, jax.Array | None, Truth]:
    moe = make(config)
    x, keys = inputs()
    rows_keys = keys if noisy else None
    parameters = nnx.to_pure_dict(nnx.split(moe)[1])
    return moe, parameters, x, rows_keys, oracle(config, parameters, x, rows_keys)


def test_a_dropped_token_gets_exactly_nothing() -> None:
    moe, _, x, _, truth = truth_of(CASES["switch-sequence"], False)
    y, _ = apply(moe, x)
    nothing = ~truth.gate.any(-1)
    assert 0 < nothing.sum() < nothing.size
    assert not np.asarray(y)[nothing].any()
    assert np.asarray(y)[~nothing].any(-1).all()


def dense(config: Experts, truth: Truth, noise: np.ndarray, p: Any, x: jax.Array) -> jax.Array:
    """The same layer as all experts on all tokens, with who is chosen and computed given; and its losses."""
    logits = x @ p["router"] + p.get("score_bias", 0)
    chosen, computed = jnp.asarray(truth.chosen), jnp.asarray(truth.gate != 0)
    loss = config.router_z_loss * (jax.nn.logsumexp(logits, -1) ** 2).mean()
    share = lambda a: jax.nn.softmax(jnp.where(chosen, a, -jnp.inf))
    match config.router:
        case TopKRouter(top_k=k, normalize=normalize, load_balance=weight):
            gate = share(logits) if normalize else jax.nn.softmax(logits)
            loss += weight * E * (truth.load / (B * T * k) * jax.nn.softmax(logits).mean((0, 1))).sum()
        case NoisyTopKRouter(top_k=k):
            deviation = jax.nn.softplus(x @ p["router_noise"])
            H = logits + noise * deviation
            gate = share(H)
            others = jnp.where(jnp.eye(E, dtype=bool), -jnp.inf, H[..., None, :])
            bar = jnp.sort(others, -1)[..., -k]
            smooth = norm.cdf((logits - bar) / deviation).sum((0, 1))
            for weight, sums in ((config.router.importance_loss, gate.sum((0, 1))), (config.router.load_loss, smooth)):
                loss += weight * sums.var() / sums.mean() ** 2
        case SigmoidRouter(normalize=normalize):
            gate = jax.nn.sigmoid(logits) * chosen
            gate = gate / gate.sum(-1, keepdims=True) if normalize else gate
        case ExpertChoiceRouter():
            gate = jax.nn.softmax(logits)

    def act(a: jax.Array, p: Any) -> jax.Array:
        if isinstance(config.activation, Swish):
            return a * jax.nn.sigmoid(
                (p["swish_beta"] if config.activation.beta is None else config.activation.beta) * a
            )
        return jax.nn.silu(a) if config.activation is Activation.SILU else jax.nn.gelu(a)

    bias = lambda p, name: p[f"{name}_bias"] if config.bias else 0
    pre, up = (jnp.einsum("btd,edf->btef", x, p[f"{one}_proj"]) + bias(p, one) for one in ("gate", "up"))
    if config.clamp is not None:
        pre, up = jnp.where(pre < config.clamp, pre, config.clamp), jnp.clip(up, -config.clamp, config.clamp)
    hidden = act(pre, p) * (up + config.up_offset)
    each = jnp.einsum("btef,efd->bted", hidden, p["down_proj"]) + bias(p, "down")
    y = config.routed_scaling * jnp.einsum("bted,bte->btd", each, gate * computed)
    if config.n_shared_experts:
        shared = p["shared_experts"]
        pre, up = (x @ shared[f"{one}_proj"] + bias(shared, one) for one in ("gate", "up"))
        y += (act(pre, shared) * up) @ shared["down_proj"] + bias(shared, "down")
    return (y * pattern()).sum() + loss * (B * T)


def pattern() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32) / 10


@pytest.mark.parametrize(
    ("name", "noisy"), [*((name, False) for name in CASES), *((name, True) for name in CASES if "noisy" in name)]
)
def test_layer_equals_the_loops_and_its_gradients_all_experts_on_all_tokens(name: str, noisy: bool) -> None:
    config = CASES[name]
    moe, parameters, x, keys, truth = truth_of(config, noisy)
    graph = nnx.split(moe)[0]

    def objective(parameters: Any, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, RouterStats]]:
        y, stats = nnx.merge(graph, parameters)(x, plainly(), keys)
        return (y * pattern()).sum() + stats.auxiliary, (y, stats)

    got, (y, stats) = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(parameters, x)
    assert np.abs(truth.y).max() > 0.3
    np.testing.assert_allclose(y, truth.y, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(stats.load, truth.load)
    assert stats.dropped == truth.dropped
    np.testing.assert_allclose(stats.auxiliary, truth.auxiliary, rtol=1e-5)
    if isinstance(config.dispatch, Capacity) and not isinstance(config.router, ExpertChoiceRouter):
        assert truth.dropped > 0, "nothing was dropped, so the test shows nothing about it"

    noise = noise_of(keys).astype(np.float32)
    want = jax.jit(jax.grad(lambda p, x: dense(config, truth, noise, p, x), (0, 1)))(parameters, x)
    for (path, g), (_, w) in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert "router_bias" in name or np.abs(w).max() > 1e-2, name
        np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("make", [TopKRouter, SigmoidRouter])
def test_groups_of_experts_are_chosen_one_by_one_where_scores_are_equal(make: Callable[..., Router]) -> None:
    """Of numbers that are few, so that experts and groups often score the same."""
    n_experts, groups = 12, ExpertGroups(n_groups=4, top_groups=2)
    logits = np.random.default_rng(0).integers(0, 2, (4, 64, n_experts)).astype(np.float32)
    bias = np.float32([0.5, 0, 0] * 4)
    match make(top_k=4, normalize=False, groups=groups):
        case TopKRouter() as router:
            found = jax.jit(lambda x: top_k_routing(one_device(), router, x))(logits)
            scores, best_of = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), 1
            by = logits
        case SigmoidRouter() as router:
            found = jax.jit(lambda x: sigmoid_routing(one_device(), router, x, jnp.asarray(bias)))(logits)
            scores = 1 / (1 + np.exp(-logits))
            by, best_of = scores + bias, 2
    np.testing.assert_allclose(found.gates, np.take_along_axis(scores, np.asarray(found.experts), -1), rtol=1e-5)
    tied = 0
    for row, choices in zip(by.reshape(-1, n_experts), np.asarray(found.experts).reshape(-1, 4), strict=True):
        among = allowed(groups, row, best_of)
        assert choices.tolist() == sorted(among, key=lambda e: -row[e])[:4]
        tied += allowed(groups, row[::-1], best_of) != sorted(n_experts - 1 - e for e in among)
    assert tied > 50, "few of them had equal groups"


@pytest.mark.parametrize("router", [TopKRouter(top_k=2), SigmoidRouter(top_k=3)])
def test_capacity_for_all_is_dropless(router: TopKRouter | SigmoidRouter) -> None:
    x, _ = inputs()
    config = Experts(n_experts=E, d_ff=F, router=router)
    roomy = dataclasses.replace(config, dispatch=Capacity(factor=E / router.top_k, group_size=4))
    (want, _), (got, stats) = apply(make(config), x), apply(make(roomy), x)
    assert stats.dropped == 0
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)


def test_one_token_has_room_for_every_choice() -> None:
    x, _ = inputs()
    moe = make(dataclasses.replace(CASES["top2-dropless"], dispatch=Capacity()))
    y, stats = apply(moe, x[:, :1])
    whole = apply(make(CASES["top2-dropless"]), x[:, :1])[0]
    assert stats.dropped == 0
    np.testing.assert_allclose(y, whole, atol=1e-6, rtol=0)


def test_noise_is_a_rows_own() -> None:
    """The key of one row changes that row alone, and without keys there is no noise."""
    moe = make(Experts(n_experts=E, d_ff=F, router=NoisyTopKRouter(top_k=2)))
    x, keys = inputs()
    first, second = apply(moe, x, keys)[0], apply(moe, x, keys.at[1].set(keys[0]))[0]
    changed = np.abs(np.asarray(first - second)).max((1, 2))
    assert changed[1] > 1e-2 and not changed[[0, 2, 3]].any()
    assert np.abs(np.asarray(first - apply(moe, x)[0])).max() > 1e-2


def test_all_experts_chosen_has_no_load_to_balance() -> None:
    moe = make(Experts(n_experts=E, d_ff=F, router=NoisyTopKRouter(top_k=E, importance_loss=0.0)))
    x, keys = inputs()
    _, stats = apply(moe, x, keys)
    assert stats.auxiliary == 0
    np.testing.assert_array_equal(stats.load, np.full(E, B * T))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
@pytest.mark.parametrize("name", ["noisy-dropless", "sigmoid-dropless", "top2-dropless"])
def test_extreme_scores_stay_finite(name: str, scale: float) -> None:
    """Softplus and sigmoid underflow for large negative scores, and both are divided by."""
    moe, parameters, x, _, _ = truth_of(CASES[name], False)
    graph, keys = nnx.split(moe)[0], inputs()[1]

    def objective(parameters: Any) -> jax.Array:
        y, stats = nnx.merge(graph, parameters)(x * scale, plainly(), keys)
        return y.sum() / scale + stats.auxiliary

    value, gradient = jax.jit(jax.value_and_grad(objective))(parameters)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_groups_that_do_not_fit_are_named() -> None:
    layout = make_layout(ShardingConfig(data=1, seq=2), jax.devices()[:2])
    moe = make(Experts(n_experts=E, d_ff=F, router=TopKRouter(top_k=2), dispatch=Capacity()))
    with pytest.raises(UserError, match=r"group_size = None makes groups of 12 .* the 6 that a device has .* use 6"):
        jax.eval_shape(lambda x: moe(x, plainly(layout), None), inputs()[0])
    moe = make(Experts(n_experts=E, d_ff=F, router=TopKRouter(top_k=2), dispatch=Capacity(group_size=5)))
    with pytest.raises(UserError, match=r"group_size = 5 .* use 3"):
        jax.eval_shape(lambda x: moe(x, plainly(layout), None), inputs()[0])


@pytest.mark.parametrize(
    "mlp",
    [
        dataclasses.replace(CASES["shared_scaled"], router=NoisyTopKRouter(top_k=2)),
        dataclasses.replace(CASES["sigmoid-capacity"], dispatch=Capacity(factor=E / 2, group_size=4)),
    ],
    ids=["dropless", "capacity"],
)
def test_decoding_equals_reading_the_whole(mlp: Experts) -> None:
    config = small_model(blocks=(dataclasses.replace(small_model().blocks[0], mlp=mlp),))
    parameters, texts = initial_parameters(config), np.random.default_rng(1).integers(0, 64, (2, 12)).tolist()
    got, want = through_cache(config, parameters, plainly(), texts), whole_logits(config, parameters, texts)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dispatch", [Dropless(), Capacity(group_size=8)])
def test_remat_keeps_the_experts_products_or_not(dispatch: Dropless | Capacity) -> None:
    """How often the gradient's program has them."""

    def products(remat: Remat) -> int:
        mlp = Experts(n_experts=E, d_ff=F, router=TopKRouter(top_k=2), dispatch=dispatch)
        block = dataclasses.replace(small_model().blocks[0], mlp=mlp)
        layout = one_device()
        config = small_run(small_model(blocks=(block,)))
        config = dataclasses.replace(config, execution=dataclasses.replace(FLOAT32, remat=remat))
        gradient = gradient_function(config, layout)
        parameters = jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0)))
        return str(jax.make_jaxpr(gradient)(parameters, packed_batch(config))).count("name=grouped_out")

    assert products(Remat.NONE) == products(Remat.DOTS) == 3
    assert products(Remat.NAMES) == products(Remat.FULL) == 6


@pytest.mark.parametrize("dispatch", [Capacity(factor=1.0), Capacity(factor=1.0, group_size=12), Dropless(buffer=1.0)])
def test_rows_without_a_token_take_nothing_from_others(dispatch: Capacity | Dropless) -> None:
    """They take no room, and rows need not fill groups; on a mesh that cuts experts."""
    mlp = Experts(n_experts=E, d_ff=F, router=TopKRouter(top_k=2), dispatch=dispatch)
    config = small_model(blocks=(dataclasses.replace(small_model().blocks[0], mlp=mlp),))
    how = plainly(make_layout(ShardingConfig(data=1, expert=2), jax.devices()[:2]))
    parameters, texts = initial_parameters(config), np.random.default_rng(1).integers(0, 64, (2, 12)).tolist()
    full, padded = (through_cache(config, parameters, how, texts, widths=[width]) for width in (6, 20))
    np.testing.assert_allclose(padded, full, atol=1e-5, rtol=0)


def test_generation_keeps_routers_in_float32() -> None:
    """In bfloat16 they would choose other experts than in training."""
    block = dataclasses.replace(small_model().blocks[0], mlp=CASES["noisy-dropless"])
    model = small_model(blocks=(block,))
    parameters = initial_parameters(model)
    mlp = held(parameters, model, Execution(one_device()), WeightFormat.DTYPE)["blocks"]["0"]["mlp"]
    assert mlp["router"].dtype == mlp["router_noise"].dtype == jnp.float32
    assert mlp["gate_proj"].dtype == jnp.bfloat16


def _routers(top_k: int) -> Iterator[Router | Callable[[], Router]]:
    for normalize in (False, True):
        yield TopKRouter(top_k=top_k, normalize=normalize, load_balance=0.0)
        yield SigmoidRouter(top_k=top_k, normalize=normalize)
    yield lambda: NoisyTopKRouter(top_k=top_k)
    yield ExpertChoiceRouter()


def test_the_loss_reaches_every_router_that_is_accepted() -> None:
    """Through the gates: what they multiply, the loss has. And those that are refused are no more than these."""
    refused = []
    x, _ = inputs()
    for n_experts, top_k in [(1, 1), (2, 1), (3, 2)]:
        for make_router in _routers(top_k):
            try:
                router = make_router() if callable(make_router) else make_router
                dispatch = Capacity(group_size=4) if isinstance(router, ExpertChoiceRouter) else Dropless()
                config = Experts(n_experts=n_experts, d_ff=F, router=router, dispatch=dispatch)
            except UserError:
                refused.append((n_experts, top_k))
                continue
            moe = ExpertsLayer(config, small_model(d_model=D, init_std=0.4), Initializer(jax.random.key(3)))

            def gates(router: jax.Array, moe: ExpertsLayer = moe) -> jax.Array:
                found = moe._route(one_device(), x, x @ router, None).gates
                return (found * np.arange(found.size).reshape(found.shape)).mean()

            assert np.abs(jax.jit(jax.grad(gates))(moe.router[...])).max() > 1e-3, config
    # One expert: all but SigmoidRouter's raw score. One choice: both normalized, and NoisyTopKRouter.
    assert Counter(refused) == {(1, 1): 5, (2, 1): 3}


def test_biases_go_against_the_load() -> None:
    block = small_model().blocks[0]
    experts = dataclasses.replace(block, mlp=Experts(n_experts=3, d_ff=8, router=SigmoidRouter(top_k=2, bias_rate=0.5)))
    others = dataclasses.replace(block, mlp=Experts(n_experts=3, d_ff=8, router=TopKRouter(top_k=2)))
    model = small_model(blocks=(block, experts, others), n_layers=6)
    parameters = initial_parameters(model)
    load = jnp.array([[6.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    stats = RouterStats(load, jnp.zeros(2), jnp.zeros(2))
    new = balance_biases(model, parameters, (None, stats, stats))
    bias = new["blocks"]["1"]["mlp"]["router_bias"]
    np.testing.assert_array_equal(bias, [[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    # Nothing else is touched, and the old parameters not at all.
    new["blocks"]["1"]["mlp"]["router_bias"] = parameters["blocks"]["1"]["mlp"]["router_bias"]
    jax.tree.map(np.testing.assert_array_equal, new, parameters)
    assert not parameters["blocks"]["1"]["mlp"]["router_bias"].any()


def test_balancing_evens_out_a_skewed_router() -> None:
    """arXiv:2408.15664: the loads converge with no loss that says so."""
    block = dataclasses.replace(
        small_model().blocks[0],
        mlp=Experts(n_experts=E, d_ff=F, router=SigmoidRouter(top_k=1, normalize=False, bias_rate=0.02)),
    )
    model = small_model(blocks=(block,), n_layers=1, d_model=D)
    moe = make(block.mlp)
    x = inputs()[0] + 1.0  # a common direction, which some experts like
    parameters = {"blocks": {"0": {"mlp": {"router_bias": jnp.zeros((1, E))}}}}
    graph, values = nnx.split(moe)
    values = nnx.to_pure_dict(values)

    @jax.jit
    def load_with(bias: jax.Array) -> jax.Array:
        return nnx.merge(graph, {**values, "router_bias": bias[0]})(x, plainly(), None)[1].load

    first = load_with(parameters["blocks"]["0"]["mlp"]["router_bias"])
    for _ in range(60):
        load = load_with(parameters["blocks"]["0"]["mlp"]["router_bias"])
        stats = RouterStats(load[None], jnp.zeros(1), jnp.zeros(1))
        parameters = balance_biases(model, parameters, (stats,))
    assert first.max() > 2 * B * T / E
    assert load.max() < 1.35 * B * T / E
