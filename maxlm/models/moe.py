"""Mixture of experts: a router, and many MLPs of which each token uses a few.

Routing is float32 and plain code that the compiler spreads over the devices, so that its statistics are those of all
tokens of a micro-batch, wherever they lie. How tokens reach their experts is in `ops/experts.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.stats import norm

from maxlm import shapes
from maxlm.config import (
    BlockConfig,
    Capacity,
    Context,
    Dispatch,
    Dropless,
    ExpertChoiceRouter,
    ExpertGroups,
    Experts,
    ModelConfig,
    NoisyTopKRouter,
    SigmoidRouter,
    Swish,
    TopKRouter,
    UserError,
)
from maxlm.models import ops
from maxlm.models.execution import Execution
from maxlm.models.mlp import MlpLayer
from maxlm.models.ops.ring import in_ring_order
from maxlm.models.parameters import Initializer
from maxlm.models.weights.kinds import Weight
from maxlm.shapes import MTP
from maxlm.sharding import Layout

T = TypeVar("T")

_LEAST_NOISE = 1e-4
"""Floor of the noise's standard deviation: the load loss divides by it, and its gradient by its square."""


class RouterStats(NamedTuple):
    """What a router did with the tokens of a micro-batch, float32 sums over all of them, on all devices.

    Sums of several micro-batches add up to those of the batch.
    """

    load: jax.Array
    """[E]: choices of each expert, dropped ones included."""
    dropped: jax.Array
    """[]: choices that were not computed."""
    auxiliary: jax.Array
    """[]: the weighted auxiliary losses (load balance, z-loss, ...) times the number of tokens."""


class _Choices(NamedTuple):
    """Experts that tokens chose, all of a token's different and best first."""

    experts: jax.Array
    """int32 [B, T, k]."""
    gates: jax.Array
    """float32 [B, T, k]."""
    load: jax.Array
    """float32 [E]."""
    loss: jax.Array
    """[]: weighted, a mean over tokens."""


class _Picks(NamedTuple):
    """Tokens that experts picked in each of a sequence's G groups."""

    tokens: jax.Array
    """int32 [B, G, E, C], places in the group."""
    gates: jax.Array
    """float32 [B, G, E, C]."""


class ExpertsLayer(nnx.Module):
    """shared(x) + routed_scaling * sum over chosen e of gate_e * expert_e(x), each expert a gated MLP."""

    router: nnx.Param
    router_noise: nnx.Param
    router_bias: nnx.Param
    gate_proj: nnx.Param
    up_proj: nnx.Param
    down_proj: nnx.Param
    gate_bias: nnx.Param
    up_bias: nnx.Param
    down_bias: nnx.Param
    score_bias: nnx.Param
    swish_beta: nnx.Param

    def __init__(self, config: Experts, model: ModelConfig, init: Initializer):
        self.config = config
        init.declare(self, shapes.mlp(config, model))
        if shared := shapes.shared_experts(config):
            self.shared_experts = MlpLayer(shared, model, init)

    def __call__(
        self, x: jax.Array, how: Execution, keys: jax.Array | None, *, decoding: bool = False
    ) -> tuple[jax.Array, RouterStats]:
        """The layer's output, and what its router did.

        Args:
            x: [B, T, D].
            how: mesh and number format.
            keys: a random key [B] for each row; None: no noise.
            decoding: compute every choice, whatever the dispatch has room for: what a token becomes then depends
                neither on padding, nor on later tokens, nor on other rows.

        Returns:
            [B, T, D] in x's dtype. A token that no expert computed gets the shared experts' output, or exactly 0.

        Raises:
            UserError: the groups of `Capacity` do not fit the tokens that a device has of a sequence.
        """
        config, layout, (B, T, _) = self.config, how.layout, x.shape
        with jax.named_scope("router"):
            logits = _scores(layout, x, self.router[...])
            if isinstance(config.router, TopKRouter) and config.router.bias:
                logits += self.score_bias[...]
            z_loss = config.router_z_loss * jnp.square(jax.nn.logsumexp(logits, -1)).mean()
            routing = self._route(layout, x, logits, keys)
        with jax.named_scope("experts"):
            match routing:
                case _Choices(load=load, loss=loss):
                    y, computed = self._chosen(layout, x, routing, Dropless() if decoding else config.dispatch)
                    dropped = jnp.sum(~computed, dtype=jnp.float32)
                case _Picks(tokens=tokens, gates=gates):
                    gates *= config.routed_scaling
                    run = functools.partial(ops.picked_experts, unit=self._unit)
                    y = self._with_experts(layout, run, x, tokens, gates)
                    load = jnp.full(config.n_experts, tokens.size // config.n_experts, jnp.float32)
                    loss = dropped = jnp.zeros((), jnp.float32)
                case _:
                    assert_never(routing)
        if config.n_shared_experts:
            with jax.named_scope("shared_experts"):
                y += self.shared_experts(x, how)
        return y, RouterStats(load, dropped, (loss + z_loss) * (B * T))

    def _route(self, layout: Layout, x: jax.Array, logits: jax.Array, keys: jax.Array | None) -> _Choices | _Picks:
        router, T = self.config.router, x.shape[1]
        match router:
            case TopKRouter():
                return top_k_routing(layout, router, logits)
            case NoisyTopKRouter():
                noise = None if keys is None else self._noise(layout, keys, T)
                return noisy_top_k_routing(layout, router, logits, _scores(layout, x, self.router_noise[...]), noise)
            case SigmoidRouter():
                return sigmoid_routing(layout, router, logits, self.router_bias[...])
            case ExpertChoiceRouter():
                return expert_choice_routing(layout, logits, *self._groups(layout, T, choices=1))
            case _:
                assert_never(router)

    def _chosen(
        self, layout: Layout, x: jax.Array, routing: _Choices, dispatch: Dispatch
    ) -> tuple[jax.Array, jax.Array]:
        """[B, T, D], and bool [B, T, k]: which choices were computed."""
        gates = routing.gates * self.config.routed_scaling
        match dispatch:
            case Dropless() as dropless:
                run: Any = functools.partial(ops.dropless_experts, unit=self._unit, config=dropless)
            case Capacity():
                group, room = self._groups(layout, x.shape[1], choices=gates.shape[-1])
                run = functools.partial(ops.capacity_experts, unit=self._unit, group=group, room=room)
            case _:
                assert_never(dispatch)
        return self._with_experts(layout, run, x, routing.experts, gates)

    def _with_experts(self, layout: Layout, run: Callable[..., T], x: jax.Array, *chosen: jax.Array) -> T:
        """run(layout, x, *chosen, the weights of all experts)."""
        more: dict[str, jax.Array] = {}
        if self.config.bias:
            more = {"gate_bias": self.gate_bias[...], "up_bias": self.up_bias[...], "down_bias": self.down_bias[...]}
        if self.config.activation == Swish(beta=None):
            more["swish_beta"] = self.swish_beta[...]

        def of_layer(weights: tuple[Weight, ...], x: jax.Array, *chosen: jax.Array) -> T:
            gate, up, down = (ops.of_experts(layout, w, x.dtype) for w in weights)
            return run(layout, x, *chosen, ops.ExpertWeights(gate, up, down, **more))

        return ops.in_layer(of_layer, (self.gate_proj[...], self.up_proj[...], self.down_proj[...]), x, *chosen)

    @property
    def _unit(self) -> ops.GatedUnit:
        return ops.GatedUnit(self.config.activation, self.config.clamp, self.config.up_offset)

    def _noise(self, layout: Layout, keys: jax.Array, T: int) -> jax.Array:
        """Standard normal [B, T, E]; a row's depends on its key alone, a token's on its place in the row."""
        noise = jax.vmap(lambda key: jax.random.normal(key, (T, self.config.n_experts)))(keys)
        noise = in_ring_order(layout, {"noise": noise})["noise"]
        return layout.constrain(noise, "batch", "seq", None)

    def _groups(self, layout: Layout, T: int, *, choices: int) -> tuple[int, int]:
        """Tokens of a group, in sequences of T, and how many of them an expert takes, of so many choices of each."""
        config, seq = self.config, layout.mesh.shape["seq"]
        assert isinstance(config.dispatch, Capacity)
        group = config.dispatch.group(T)
        pieces = 2 * seq if seq > 1 and layout.config.context is Context.RING else seq
        here = T // pieces
        if here % group:
            nearest = max(size for size in range(1, here + 1) if here % size == 0 and size <= group)
            raise UserError(
                f"model.blocks[].mlp.dispatch.group_size = {config.dispatch.group_size} makes groups of {group} tokens,"
                f" which do not divide the {here} that a device has of a sequence in one piece (of {T} tokens); use "
                f"{nearest}"
            )
        return group, config.dispatch.room(group, top_k=choices, n_experts=config.n_experts)


def _scores(layout: Layout, x: jax.Array, w: jax.Array) -> jax.Array:
    """float32 [B, T, E], also where devices multiply float32 in bfloat16 by default: it decides between experts."""
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btd,de->bte", x.astype(jnp.float32), w.astype(jnp.float32), precision=highest)
    return layout.constrain(scores, "batch", "seq", None)


def top_k_routing(layout: Layout, router: TopKRouter, logits: jax.Array) -> _Choices:
    """The experts of the largest logits [B, T, E], and the load-balancing loss E sum_e f_e P_e.

    f_e is the share of choices that fell on expert e, without a gradient, and P_e the mean of its softmax over tokens
    (arXiv:2006.16668, algorithm 1; arXiv:2101.03961, eq. 4 to 6, where k = 1).
    """
    among = logits if router.groups is None else _of_best_groups(layout, logits, router.groups, best_of=1)
    best, choices = ops.top_k(layout, among, logits, router.top_k)
    log_sum = jax.nn.logsumexp(best if router.normalize else logits, -1, keepdims=True)
    gates = jnp.exp(best - log_sum)
    load = _load(choices, logits.shape[-1])
    balance = logits.shape[-1] * (load / choices.size) @ jax.nn.softmax(logits).mean((0, 1))
    return _Choices(choices, gates, load, router.load_balance * balance)


def noisy_top_k_routing(
    layout: Layout, router: NoisyTopKRouter, logits: jax.Array, raw: jax.Array, noise: jax.Array | None
) -> _Choices:
    """Top-k of H = logits + noise * softplus(raw), gates softmax of the chosen H (arXiv:1701.06538, eq. 3 to 5).

    The losses are CV(importance)^2, of the sums of gates (eq. 6, 7), and CV(load)^2, of the smooth load (eq. 8 to 11 in
    appendix A): the sum over tokens of Phi((logits_i - what H_i must exceed) / softplus(raw_i)). Without noise H is the
    logits, in the losses too, so that the load then is that of one more draw of noise against noiseless rivals.

    Args:
        layout: the mesh.
        router: the choice and its numbers.
        logits: float32 [B, T, E], x router.
        raw: float32 [B, T, E], x router_noise.
        noise: standard normal [B, T, E], or None.
    """
    E, k = logits.shape[-1], router.top_k
    deviation = jnp.maximum(jax.nn.softplus(raw), _LEAST_NOISE)
    H = logits if noise is None else logits + noise * deviation
    best, choices = ops.top_k(layout, H, H, min(k + 1, E))
    choices, gates = choices[..., :k], jax.nn.softmax(best[..., :k])
    chosen = jax.nn.one_hot(choices, E, dtype=bool).any(-2)  # so that nothing of size B T k E waits for the gradient
    importance = jax.nn.softmax(jnp.where(chosen, H, -jnp.inf)).sum((0, 1))
    loss = router.importance_loss * _squared_variation(importance)
    if k < E:  # else every expert is always chosen
        kth, next_best = best[..., k - 1, None], best[..., k, None]
        bar = jnp.where(next_best < H, next_best, kth)  # the k-th largest of the others
        smooth_load = norm.cdf((logits - bar) / deviation).sum((0, 1))
        loss += router.load_loss * _squared_variation(smooth_load)
    return _Choices(choices, gates, _load(choices, E), loss)


def sigmoid_routing(layout: Layout, router: SigmoidRouter, logits: jax.Array, bias: jax.Array) -> _Choices:
    """Top-k of sigmoid(logits) + bias, gates the sigmoids alone (arXiv:2412.19437, eq. 13 to 16); no loss."""
    biased = jax.nn.sigmoid(logits) + bias
    if router.groups is not None:
        biased = _of_best_groups(layout, biased, router.groups, best_of=2)
    log_scores, choices = ops.top_k(layout, biased, jax.nn.log_sigmoid(logits), router.top_k)
    # softmax(log s) is s / sum s, also where all of them underflow.
    gates = jax.nn.softmax(log_scores) if router.normalize else jnp.exp(log_scores)
    return _Choices(choices, gates, _load(choices, logits.shape[-1]), jnp.zeros((), jnp.float32))


def expert_choice_routing(layout: Layout, logits: jax.Array, group: int, room: int) -> _Picks:
    """Each expert picks the `room` tokens of each group with the largest softmax over experts (arXiv:2202.09368, 3.2).

    Such a score is the gate, too. No loss: every expert has the same load.
    """
    B, T, E = logits.shape
    scores = jax.nn.softmax(logits).reshape(B, T // group, group, E).swapaxes(2, 3)
    gates, tokens = ops.top_k(layout, scores, scores, room)
    return _Picks(tokens, gates)


def balance_biases(
    config: ModelConfig, parameters: dict[str, Any], router: tuple[RouterStats | None, ...]
) -> dict[str, Any]:
    """The parameters with the bias of each expert up if it had less than the mean load of its layer, down if more.

    The step is the router's `bias_rate` (arXiv:2408.15664, algorithm 1). Other arrays are passed on as they are.

    Args:
        config: the model.
        parameters: nested dicts, as of `init_parameters`.
        router: as in DecoderOutput, summed over the batch; with `config.mtp` one more, stacked over its modules.
    """

    def balanced(block: BlockConfig, arrays: dict[str, Any], stats: RouterStats | None, number: Any = ...) -> Any:
        if not isinstance(block.mlp, Experts) or not isinstance(block.mlp.router, SigmoidRouter):
            return arrays
        assert stats is not None
        mlp, load = arrays["mlp"], stats.load[number]
        error = load.mean(-1, keepdims=True) - load
        bias = mlp["router_bias"] + block.mlp.router.bias_rate * jnp.sign(error)
        return {**arrays, "mlp": {**mlp, "router_bias": bias}}

    pattern, further = router[: len(config.blocks)], router[len(config.blocks) :]
    pairs = enumerate(zip(config.blocks, pattern, strict=True))
    blocks = {str(i): balanced(block, parameters["blocks"][str(i)], stats) for i, (block, stats) in pairs}
    found = {**parameters, "blocks": blocks}
    for stats in further:
        modules = parameters[MTP].items()
        found[MTP] = {
            k: {**module, "block": balanced(config.blocks[-1], module["block"], stats, int(k))} for k, module in modules
        }
    return found


def _of_best_groups(layout: Layout, scores: jax.Array, groups: ExpertGroups, *, best_of: int) -> jax.Array:
    """The scores [B, T, E] of the experts of a token's best groups, and minus infinity for the others. A group is as
    good as its `best_of` best experts together."""
    by_group = scores.reshape(*scores.shape[:2], groups.n_groups, -1)
    of_group = ops.top_k(layout, by_group, by_group, best_of)[0].sum(-1)
    _, best = ops.top_k(layout, of_group, of_group, groups.top_groups)
    chosen = jax.nn.one_hot(best, groups.n_groups, dtype=bool).any(-2)
    return jnp.where(chosen[..., None], by_group, -jnp.inf).reshape(scores.shape)


def _load(choices: jax.Array, E: int) -> jax.Array:
    return jax.nn.one_hot(choices, E).sum((0, 1, 2))


def _squared_variation(x: jax.Array) -> jax.Array:
    """The square of the coefficient of variation: variance / mean^2."""
    return x.var() / jnp.square(x.mean())
