"""Policy gradients as functions of arrays: no model is in here.

B texts, T tokens, P prompts, S samples of each prompt. A *counted* token is one that the policy drew; the mask has it,
and what a text holds beside (its prompt, what a tool said in the midst of it) counts nowhere. Log-probabilities are of
one token each, in nats. Advantages are better when larger; losses are what is minimised.

The first part is jax, float32 and element by element: what a step computes. The second is numpy on the host, float64:
what is made of a rollout once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.config.kl import AdaptiveKl, FixedKl, KlController, KlEstimator
from maxlm.config.policy import Aggregation

_Numbers = npt.NDArray[np.float64]
_Mask = npt.NDArray[Any]
"""Of any dtype: True or 1 where it counts."""

_MOST_LOG_RATIO = 60.0
"""Of a ratio that is computed: from 88 on exp is infinite in float32, and infinite times an advantage of 0 is NaN."""


class Clipped(NamedTuple):
    """Of each token, in the shape of what was asked."""

    loss: jax.Array
    """float32."""
    clipped: jax.Array
    """bool: the loss is a constant here, from which nothing is learned."""


def clipped_surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    low: float,
    high: float,
) -> Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_probs - old_log_probs) (PPO, Schulman et al. 2017,
    arXiv:1707.06347, equation 7; high above low is "clip-higher" of DAPO, arXiv:2503.14476, equation 10).

    Args:
        log_probs: of the policy as it is, the one that is differentiated.
        old_log_probs: of the policy that drew the tokens.
        advantages: A. Nothing is learned through them.
        low: epsilon, how much less likely a token becomes before nothing is learned any more.
        high: the same of how much more likely.
    """
    ratio = jnp.exp(jnp.minimum(log_probs - old_log_probs, _MOST_LOG_RATIO))
    free, bounded = ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return Clipped(-jnp.minimum(free, bounded), bounded < free)


def clipped_value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float) -> Clipped:
    """0.5 max((v - R)^2, (v' - R)^2), v' = v held within `clip` of the old value (the code of PPO, as Engstrom et al.
    2020, arXiv:2005.12729, write it down).

    Args:
        values: v of the critic as it is, the one that is differentiated.
        old_values: of the critic as it was when the advantages were made.
        returns: R, what a value should have been.
        clip: distance, in units of the value.
    """
    held = old_values + jnp.clip(values - old_values, -clip, clip)
    free, bounded = jnp.square(values - returns), jnp.square(held - returns)
    return Clipped(0.5 * jnp.maximum(free, bounded), bounded > free)


def kl_estimate(log_probs: jax.Array, reference: jax.Array, estimator: KlEstimator) -> jax.Array:
    """KL(policy || reference) estimated at each token that the policy drew, by x = log_probs - reference (Schulman
    2020, "Approximating KL Divergence"): K1 is x, K2 is x^2 / 2, K3 is exp(-x) - 1 + x.

    As a number: the mean of K1 and of K3 over the policy's own tokens is the divergence, that of K2 is near it where
    the two models are near each other. K2 and K3 are never negative.

    As a LOSS, differentiated at tokens that the policy itself drew, each is another thing, as no gradient goes through
    the drawing (Tang and Munos 2025, arXiv:2506.09477):

    - K1: gradient of log policy, whose mean is 0. It teaches nothing but noise.
    - K2: x times that, whose mean is the gradient of KL(policy || reference), the divergence that is estimated.
    - K3: (1 - exp(-x)) times that, whose mean is the gradient of KL(reference || policy), the other divergence.

    All that is of the divergence at one token, given those before it. That later tokens follow from this one only a
    reward sees: K1, taken from the reward of each token and not discounted, has the gradient of the whole text's
    divergence.

    Args:
        log_probs: of the policy.
        reference: of the reference, for the same tokens.
        estimator: which of the three.
    """
    x = log_probs - reference
    match estimator:
        case KlEstimator.K1:
            return x
        case KlEstimator.K2:
            return 0.5 * jnp.square(x)
        case KlEstimator.K3:
            return jnp.expm1(-x) + x
        case _:
            assert_never(estimator)


# On the host


class Gae(NamedTuple):
    """Of each token, float64 [B, T]; 0 where nothing is counted."""

    advantages: _Numbers
    returns: _Numbers
    """Advantages plus values: what a critic should have said."""


def gae(rewards: npt.ArrayLike, values: npt.ArrayLike, mask: _Mask, gamma: float, lambda_: float) -> Gae:
    """Generalised advantages: the sum over l of (gamma lambda)^l d_{t+l}, d_t = r_t + gamma v_{t+1} - v_t (Schulman et
    al. 2016, arXiv:1506.02438, equation 16). lambda 0 is d_t alone, lambda 1 the discounted rewards less the
    value.

    After the last counted token nothing comes: the value there is 0, whether the model ended the text or it became too
    long. From a counted token the next counted one follows, however many others lie between.

    Args:
        rewards: [B, T], for drawing each token.
        values: [B, T], of what is known before it is drawn.
        mask: [B, T], which tokens count. What stands at others is not looked at.
        gamma: discount from a token to the next.
        lambda_: how far one looks before the critic is believed.
    """
    counts = np.asarray(mask, bool)
    rewards, values = (np.where(counts, np.asarray(x, np.float64), 0) for x in (rewards, values))
    advantages = np.zeros(rewards.shape)
    following, next_value = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + gamma * next_value - values[:, t]
        following = np.where(counts[:, t], error + gamma * lambda_ * following, following)
        next_value = np.where(counts[:, t], values[:, t], next_value)
        advantages[:, t] = np.where(counts[:, t], following, 0)
    return Gae(advantages, np.where(counts, advantages + values, 0))


def whitened(values: npt.ArrayLike, mask: _Mask) -> _Numbers:
    """(x - mean) / sqrt(variance + 1e-8) over all counted values; 0 elsewhere.

    The variance is that of the population, divided by their number, as in the code of Ziegler et al. 2019
    (arXiv:1909.08593). Values that are all equal, or one alone, become 0.

    Args:
        values: of any shape.
        mask: of the same, which of them count. What stands elsewhere is not looked at.
    """
    counts = np.asarray(mask, bool)
    x = np.where(counts, np.asarray(values, np.float64), 0)
    n = max(counts.sum(), 1)
    mean = x.sum() / n
    variance = (np.square(x - mean) * counts).sum() / n
    return np.where(counts, (x - mean) / np.sqrt(variance + 1e-8), 0)


def per_token_rewards(scores: npt.ArrayLike, kl: npt.ArrayLike, mask: _Mask, beta: float) -> _Numbers:
    """-beta kl at each counted token, and the text's score beside it at the last one (Ziegler et al. 2019,
    arXiv:1909.08593, equation 2; InstructGPT, arXiv:2203.02155, equation 2). Float64 [B, T]; 0 elsewhere.

    Args:
        scores: [B], of whole texts. That of a text without counted tokens is nowhere.
        kl: [B, T], an estimate of each token's KL divergence from the reference: as a rule K1.
        mask: [B, T], which tokens count. What stands at others is not looked at.
        beta: the price of a nat.
    """
    counts = np.asarray(mask, bool)
    rewards = np.where(counts, -beta * np.asarray(kl, np.float64), 0)
    last = counts.shape[1] - 1 - counts[:, ::-1].argmax(1)
    rows = np.flatnonzero(counts.any(1))
    rewards[rows, last[rows]] += np.asarray(scores, np.float64)[rows]
    return rewards


def group_mean(rewards: npt.ArrayLike, divide_by_std: bool, eps: float, usable: _Mask | None = None) -> _Numbers:
    """(r - mean) / (std + eps) over the samples of each prompt, or r - mean: float64 [P, S] (GRPO, Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2; without the division Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    The standard deviation is that of a sample, divided by their number less one. A prompt with equal rewards, or one
    sample alone, has 0: exactly, so that rounding is not divided by `eps`.

    Args:
        rewards: [P, S].
        divide_by_std: see above.
        eps: added to the standard deviation.
        usable: [P, S], which samples there are; others have 0, and nobody is held against them. None: all.
    """
    r, counts, n = _samples(rewards, usable)
    away = _away_from(r, counts, r.sum(1, keepdims=True) / np.maximum(n, 1))
    if not divide_by_std:
        return away
    return away / (np.sqrt(np.square(away).sum(1, keepdims=True) / np.maximum(n - 1, 1)) + eps)


def leave_one_out(rewards: npt.ArrayLike, usable: _Mask | None = None) -> _Numbers:
    """r - mean of the other samples of its prompt: float64 [P, S] (RLOO, Ahmadian et al. 2024,
    arXiv:2402.14740). A sample without others has 0.

    Arguments as of `group_mean`.
    """
    r, counts, n = _samples(rewards, usable)
    return _away_from(r, counts & (n > 1), (r.sum(1, keepdims=True) - r) / np.maximum(n - 1, 1))


def batch_mean(rewards: npt.ArrayLike, usable: _Mask | None = None) -> _Numbers:
    """r - mean of all samples of all prompts: float64 [P, S] (REINFORCE with a baseline, Williams 1992). The mean has
    each sample's own reward in it, so that the gradient is (n - 1) / n of what it would be with another's.

    Arguments as of `group_mean`.
    """
    r, counts, _ = _samples(rewards, usable)
    flat = r.reshape(1, -1), counts.reshape(1, -1)
    return _away_from(*flat, flat[0].sum() / max(counts.sum(), 1)).reshape(r.shape)


def _samples(rewards: npt.ArrayLike, usable: _Mask | None) -> tuple[_Numbers, npt.NDArray[np.bool_], npt.NDArray[Any]]:
    """Rewards with 0 where there is none, where there are some, and how many each row has, [P, 1]."""
    r = np.asarray(rewards, np.float64)
    counts = np.ones(r.shape, bool) if usable is None else np.asarray(usable, bool)
    return np.where(counts, r, 0), counts, counts.sum(1, keepdims=True)


def _away_from(r: _Numbers, counts: npt.NDArray[np.bool_], baseline: Any) -> _Numbers:
    """r - baseline; 0 in rows whose rewards are all equal, where the mean of them may be off by a rounding."""
    lowest, highest = np.where(counts, r, np.inf).min(1), np.where(counts, r, -np.inf).max(1)
    return np.where(counts & (lowest < highest)[:, None], r - baseline, 0)


class TokenWeights(NamedTuple):
    """What each token of a batch weighs: (of_tokens * losses).sum() / of_rows.sum() is the objective.

    Both sums may be taken over any cut of the rows, and added."""

    of_tokens: _Numbers
    """[B, T]; 0 where nothing is counted."""
    of_rows: _Numbers
    """[B]; 0 of a text without counted tokens."""


def token_weights(mask: _Mask, aggregation: Aggregation, max_tokens: int) -> TokenWeights:
    """How losses of tokens become one number; `Aggregation` says which papers have it so.

    TOKEN_MEAN: 1 a token, divided by the number of tokens. SEQUENCE_MEAN: 1 / length, divided by the number of texts.
    CONSTANT: 1 / max_tokens, divided by the number of texts.

    Args:
        mask: [B, T], which tokens count.
        aggregation: which of the three.
        max_tokens: the most counted tokens that a text may have.
    """
    counts = np.asarray(mask, bool).astype(np.float64)
    lengths = counts.sum(1)
    texts = (lengths > 0).astype(np.float64)
    match aggregation:
        case Aggregation.TOKEN_MEAN:
            return TokenWeights(counts, lengths)
        case Aggregation.SEQUENCE_MEAN:
            return TokenWeights(counts / np.maximum(lengths, 1)[:, None], texts)
        case Aggregation.CONSTANT:
            return TokenWeights(counts / max_tokens, texts)
        case _:
            assert_never(aggregation)


def truncated_weights(trainer: npt.ArrayLike, sampler: npt.ArrayLike, mask: _Mask, cap: float) -> _Numbers:
    """min(exp(trainer - sampler), cap) at each counted token, 0 elsewhere: what its loss is multiplied with where the
    program that draws texts and the one that trains give a token different probabilities (Yao, Liu et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl;
    truncated as in Ionides 2008, "Truncated Importance Sampling").

    Args:
        trainer: log-probabilities by the training program, of the parameters that drew the tokens.
        sampler: by the program that drew them.
        mask: which tokens count. What stands at others is not looked at.
        cap: the largest weight.
    """
    counts = np.asarray(mask, bool)
    difference = np.subtract(trainer, sampler, dtype=np.float64, where=counts, out=np.zeros(counts.shape))
    return np.where(counts, np.exp(np.minimum(difference, math.log(cap))), 0)


def next_beta(beta: float, kl: float, controller: KlController, n: int) -> float:
    """The factor of the KL divergence after a rollout.

    `FixedKl` leaves it. `AdaptiveKl`: beta (1 + e n / horizon) with e = clip(kl / target - 1, -0.2, 0.2) (Ziegler et
    al. 2019, arXiv:1909.08593, section 2.2, whose K is n / horizon in their code). A divergence that is no finite
    number changes nothing.

    Args:
        beta: the factor until now.
        kl: mean divergence of a text of the rollout, in nats.
        controller: what follows it.
        n: texts of the rollout, at most `horizon`.
    """
    match controller:
        case FixedKl():
            return beta
        case AdaptiveKl():
            if not math.isfinite(kl):
                return beta
            error = min(max(kl / controller.target - 1, -0.2), 0.2)
            return beta * (1 + error * n / controller.horizon)
        case _:
            assert_never(controller)
