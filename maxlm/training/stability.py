"""What a step remembers to keep steady: float16's loss scale, the window of spikes, the gradient's noise, the largest
numbers that products in 8-bit floats had.

Each part is None in a run that does not ask for it, and its step is then the program that it would be without.
Everything is a function of sums over all devices, inside the step: every rank takes the same decision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import (
    DelayedScaling,
    Dtype,
    Float8Products,
    LossScale,
    ModelConfig,
    Products,
    RunConfig,
    SpikeRule,
)
from maxlm.config.stability import LEAST_SCALE, MOST_SCALE
from maxlm.models.weights.narrow import scales_of


class ScaleState(NamedTuple):
    """Of dynamic loss scaling."""

    scale: jax.Array
    """float32: of the next step's mean loss, as if every token of a batch counted."""
    good_steps: jax.Array
    """int32: finite steps since it changed."""
    overflows: jax.Array
    """int32: steps skipped since the start because something was not finite, with more than the least scale."""


class SpikeState(NamedTuple):
    """The latest accepted steps, in a ring."""

    losses: jax.Array
    """float32 [window]."""
    grad_norms: jax.Array
    """float32 [window]."""
    accepted: jax.Array
    """int32: steps that are in it or were, since it was last emptied."""
    in_row: jax.Array
    """int32: spikes since the last accepted step."""
    skipped: jax.Array
    """int32: spikes since the start."""


class NoiseState(NamedTuple):
    """Running averages, float32, each begun at 0."""

    gradient_squared: jax.Array
    """Of |G|^2, the true gradient's squared length."""
    noise_trace: jax.Array
    """Of tr(Sigma), the variance of one token's gradient."""
    weight: jax.Array
    """Of 1, by which the others are divided to be averages."""


class Stability(NamedTuple):
    """Beside parameters and optimizer in a `TrainState`."""

    loss_scale: ScaleState | None = None
    spikes: SpikeState | None = None
    noise: NoiseState | None = None
    largest: dict[str, jax.Array] | None = None
    """Of each product in delayed scaling, by its weight: of activations, weight and gradient, float32 [3, history] or
    [layers, 3, history], the newest first."""


class PartNorms(NamedTuple):
    """Of the micro-batches, float32 [parts]."""

    norms: jax.Array
    """Of the gradient of each one's mean loss."""
    weights: jax.Array
    """`Sums.weight` of each."""


class StepFacts(NamedTuple):
    """What a step has come to, scalars."""

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    """Whether all of it is."""
    spike: jax.Array | None
    """None: nobody asks."""
    done: jax.Array
    """Whether it changed the parameters."""
    weight: jax.Array
    """`Sums.weight` of the batch."""
    mean_norm: jax.Array | None
    """Of the gradient of the mean loss, before anything is added to it, where there are `parts`."""
    parts: PartNorms | None
    largest: dict[str, jax.Array]
    """Of each product in delayed scaling: [3] or [layers, 3]."""


def without_window(state: Stability) -> Stability:
    """Where another phase begins: another mixture, length or batch has other losses and gradients."""
    if state.spikes is None:
        return state
    emptied = state.spikes._replace(accepted=0 * state.spikes.accepted, in_row=0 * state.spikes.in_row)
    return state._replace(spikes=emptied)


def begin(config: RunConfig) -> Stability:
    """At the first step, or in a run that has done some without."""
    zero, none = jnp.float32(0), jnp.int32(0)
    window = jnp.zeros(config.train.spikes.window, jnp.float32)
    scaled = config.execution.dtype is Dtype.FLOAT16
    return Stability(
        loss_scale=ScaleState(jnp.float32(config.execution.loss_scale.initial), none, none) if scaled else None,
        spikes=SpikeState(window, window, none, none, none) if config.train.spikes.sigmas else None,
        noise=NoiseState(zero, zero, zero) if config.train.noise_scale.measure else None,
        largest=_no_products(config.model, config.execution.products),
    )


def _no_products(model: ModelConfig, products: Products) -> dict[str, jax.Array] | None:
    match products:
        case Float8Products(scaling=DelayedScaling(history=history)):
            linear = (array for array in shapes.arrays(model) if shapes.is_linear(array))
            layers = lambda array: array.shape[:1] if array.dims[0] == "layers" else ()
            return {array.name: jnp.zeros((*layers(array), 3, history), jnp.float32) for array in linear}
        case _:
            return None


def product_scales(products: Products, state: Stability) -> dict[str, jax.Array]:
    """Of the next step, as `narrow_einsum` takes them, by weight; none where no scale is delayed."""
    match products:
        case Float8Products(scaling=DelayedScaling(margin=margin)) if state.largest is not None:
            return {name: scales_of(history, margin) for name, history in state.largest.items()}
        case _:
            return {}


def is_spike(rule: SpikeRule, state: SpikeState, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """bool: x - mean > sigmas * std of loss or gradient norm, over the n steps in the window, with the std of a sample
    (n - 1), once n is `min_steps`."""
    n = jnp.minimum(state.accepted, rule.window)
    there = jnp.arange(rule.window) < n

    def is_far(x: jax.Array, before: jax.Array) -> jax.Array:
        mean = jnp.where(there, before, 0).sum() / n
        variance = jnp.where(there, jnp.square(before - mean), 0).sum() / (n - 1)
        return x - mean > rule.sigmas * jnp.sqrt(variance)

    return (n >= rule.min_steps) & (is_far(loss, state.losses) | is_far(grad_norm, state.grad_norms))


def settle(config: RunConfig, state: Stability, facts: StepFacts) -> tuple[Stability, dict[str, jax.Array]]:
    """The state after a step, and the figures of what is on."""
    figures: dict[str, jax.Array] = {}
    scale, spikes, noise, largest = state
    if scale is not None:
        scale = _next_scale(config.execution.loss_scale, scale, facts.finite)
        figures |= {"loss_scale": scale.scale, "overflows": scale.overflows}
    if spikes is not None:
        spikes = _next_window(config.train.spikes, spikes, facts)
        figures["skipped_spikes"] = spikes.skipped
    if noise is not None:
        noise = _next_noise(config.train.noise_scale.decay, noise, facts)
        squared, trace = noise.gradient_squared / noise.weight, noise.noise_trace / noise.weight
        in_tokens = trace / squared
        figures |= {
            "gradient_squared": squared,
            "noise_trace": trace,
            "noise_scale": in_tokens,
            "noise_scale_sequences": in_tokens / (facts.weight / config.train.batch_size),
        }
    if largest is not None:
        push = lambda name, before: jnp.roll(before, 1, -1).at[..., 0].set(facts.largest[name])
        largest = {name: jnp.where(facts.done, push(name, before), before) for name, before in largest.items()}
    return Stability(scale, spikes, noise, largest), figures


def counts_as_bad(state: ScaleState | None) -> Any:
    """Whether a step that is not finite is the run's fault: a smaller scale may mend it, where there is one."""
    return 1 if state is None else (state.scale <= LEAST_SCALE).astype(jnp.int32)


def _next_scale(rule: LossScale, state: ScaleState, finite: jax.Array) -> ScaleState:
    doubled = finite & (state.good_steps + 1 >= rule.double_every)
    grown = jnp.where(doubled, jnp.minimum(2 * state.scale, MOST_SCALE), state.scale)
    return ScaleState(
        scale=jnp.where(finite, grown, jnp.maximum(state.scale / 2, LEAST_SCALE)),
        good_steps=jnp.where(finite & ~doubled, state.good_steps + 1, 0),
        overflows=state.overflows + (~finite & (state.scale > LEAST_SCALE)),
    )


def _next_window(rule: SpikeRule, state: SpikeState, facts: StepFacts) -> SpikeState:
    at = state.accepted % rule.window
    put = lambda before, x: jnp.where(facts.done, before.at[at].set(x), before)
    assert facts.spike is not None
    in_row = jnp.where(facts.done, 0, state.in_row + facts.spike)
    emptied = in_row >= rule.max_in_row
    return SpikeState(
        losses=put(state.losses, facts.loss),
        grad_norms=put(state.grad_norms, facts.grad_norm),
        accepted=jnp.where(emptied, 0, state.accepted + facts.done),
        in_row=jnp.where(emptied, 0, in_row),
        skipped=state.skipped + facts.spike,
    )


def noise_estimates(parts: PartNorms, norm: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unbiased estimates of |G|^2 and tr(Sigma), for tokens (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    A mean over b tokens has E |G_b|^2 = |G|^2 + tr(Sigma) / b. The paper's two equations have one small batch of
    B_small; of all micro-batches here, whose tokens may differ in number, 1 / B_small is the mean of 1 / weight.

    Args:
        parts: the micro-batches; those of no weight are left out.
        norm: of the gradient of the whole batch's mean loss.
        weight: tokens of the whole batch.

    Returns:
        Both NaN, or infinite, where fewer than two parts have weight.
    """
    there = parts.weights > 0
    mean = lambda x: jnp.where(there, x, 0).sum() / there.sum()
    small, big = mean(jnp.square(parts.norms)), jnp.square(norm)
    trace = (small - big) / (mean(1 / jnp.where(there, parts.weights, 1)) - 1 / weight)
    return big - trace / weight, trace


def _next_noise(decay: float, state: NoiseState, facts: StepFacts) -> NoiseState:
    assert facts.parts is not None and facts.mean_norm is not None, "train.noise_scale.measure has micro-batches"
    squared, trace = noise_estimates(facts.parts, facts.mean_norm, facts.weight)
    told = facts.done & jnp.isfinite(squared) & jnp.isfinite(trace)
    mixed = lambda before, x: jnp.where(told, decay * before + (1 - decay) * x, before)
    return NoiseState(mixed(state.gradient_squared, squared), mixed(state.noise_trace, trace), mixed(state.weight, 1.0))
