"""Losses of preferences, rewards and embeddings as functions of a text's sums: no model is in here.

A *log-probability* of a text is the sum of those of its counted tokens, in nats; its *log-ratio* is that less the
reference's. "Chosen" is the better text of a pair. All is float32 and element by element, unless said otherwise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

MOST_SCALE = math.log(100)
"""Above which `info_nce` is not to be scaled (arXiv:2103.00020, section 2.5)."""


def pair_weights(text_record: jax.Array, text_value: jax.Array) -> jax.Array:
    """What each pair of a batch's texts weighs, float32 [B, S, S]: entry [b, i, j] is for i better than j.

    A record of K texts with different values has K (K - 1) / 2 pairs, which weigh 1 together (InstructGPT,
    arXiv:2203.02155, equation 1). Texts of equal value make no pair, and weigh nothing in their record.

    Args:
        text_record: int32 [B, S], the record of its row that each text is of; -1 where there is no text.
        text_value: float32 [B, S], larger is better.
    """
    same = (text_record[:, :, None] == text_record[:, None, :]) & (text_record[:, :, None] >= 0)
    better = (same & (text_value[:, :, None] > text_value[:, None, :])).astype(jnp.float32)
    # Of the record that a text is of: its pairs.
    of_record = jnp.einsum("bik,bkl->bi", same.astype(jnp.float32), better)
    return better / jnp.maximum(of_record, 1)[:, :, None]


def dpo(chosen: jax.Array, rejected: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """-(1 - e) log sigmoid(beta (chosen - rejected)) - e log sigmoid(-beta (chosen - rejected)), of log-ratios.

    DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7); e > 0 takes a pair to be in the wrong order with that
    probability ("conservative DPO", Eric Mitchell's note of 2023, https://ericmitchell.ai/cdpo.pdf).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def ipo(chosen: jax.Array, rejected: jax.Array, *, tau: float) -> jax.Array:
    """(chosen - rejected - 1 / (2 tau))^2, of log-ratios (Azar et al. 2023, arXiv:2310.12036, equation 17).

    The paper's log-ratios are of whole texts, sums over tokens, and so are these. Some code divides them by the numbers
    of tokens, which is another loss.
    """
    return jnp.square(chosen - rejected - 1 / (2 * tau))


def divergence_estimate(log_ratio: jax.Array) -> jax.Array:
    """log_ratio^2 / 2 of a token, of log p(token) - log q(token): what stands for the KL divergence of p and q in nats,
    where only the tokens of a text are known. Nothing is learned through it.

    It is never negative, and of tokens drawn from p or from q its mean is KL(p || q), and KL(q || p), up to terms of
    third order in the log-ratios (Schulman, "Approximating KL divergence", 2020,
    http://joschu.net/blog/kl-approx.html, k2). Of texts that neither wrote it says how far the two are apart on them.
    """
    return jax.lax.stop_gradient(jnp.square(log_ratio) / 2)


def kto_reference(ratios: jax.Array, counts: jax.Array) -> jax.Array:
    """z0, a scalar: what KTO takes for the KL divergence of the model from its reference.

    max(0, mean of the log-ratios of completions that belong to other prompts) (Ethayarajh et al. 2024,
    arXiv:2402.01306, section 4). Nothing is learned through it.

    Args:
        ratios: log-ratios of any shape.
        counts: bool, which of them are of such completions.
    """
    mean = jnp.where(counts, ratios, 0).sum() / jnp.maximum(counts.sum(), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def kto(
    ratio: jax.Array,
    desired: jax.Array,
    reference: jax.Array,
    *,
    beta: float,
    desired_weight: float = 1.0,
    undesired_weight: float = 1.0,
) -> jax.Array:
    """w_d (1 - sigmoid(beta (ratio - z0))) of desired texts, w_u (1 - sigmoid(beta (z0 - ratio))) of the others
    (arXiv:2402.01306, equation 8).

    Args:
        ratio: log-ratios.
        desired: bool.
        reference: z0, from `kto_reference`.
        beta: how soon losses and gains stop to count.
        desired_weight: lambda_D.
        undesired_weight: lambda_U.
    """
    gain = beta * (ratio - reference)
    weight = jnp.where(desired, desired_weight, undesired_weight)
    return weight * jax.nn.sigmoid(jnp.where(desired, -gain, gain))


def orpo(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), of log-probabilities divided by the number of tokens
    (Hong et al. 2024, arXiv:2403.07691, equations 4 and 7). odds(p) = p / (1 - p).

    The whole loss adds the chosen text's own, -`chosen`, and weighs this with lambda (equation 6).
    """
    return -jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_p: jax.Array) -> jax.Array:
    """log(p / (1 - p)); a text of probability 1 in float32 has the largest odds that float32 tells from it."""
    return log_p - jnp.log(-jnp.expm1(jnp.minimum(log_p, -jnp.finfo(jnp.float32).eps)))


def simpo(chosen: jax.Array, rejected: jax.Array, *, beta: float, gamma: float) -> jax.Array:
    """-log sigmoid(beta (chosen - rejected) - gamma), of log-probabilities divided by the number of tokens, without a
    reference (Meng et al. 2024, arXiv:2405.14734, equation 6)."""
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def bradley_terry(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """-log sigmoid(chosen - rejected - margin), of rewards (InstructGPT, arXiv:2203.02155, equation 1; the margin is
    that of Llama 2, arXiv:2307.09288, equation 2)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def binary(reward: jax.Array, good: jax.Array) -> jax.Array:
    """-log sigmoid(reward) of good texts, -log sigmoid(-reward) of the others: each text is judged by itself, as
    preference models are pre-trained with labels instead of pairs (Anthropic, arXiv:2112.00861, section 4).

    Args:
        reward: of each text.
        good: 1 or 0, or what lies between.
    """
    return -good * jax.nn.log_sigmoid(reward) - (1 - good) * jax.nn.log_sigmoid(-reward)


class InfoNce(NamedTuple):
    """Of each pair of texts, float32 [N]."""

    loss: jax.Array
    right: jax.Array
    """1 where the query's own passage is nearer than all others."""


def info_nce(
    queries: jax.Array,
    passages: jax.Array,
    log_scale: jax.Array,
    counts: jax.Array,
    negatives: jax.Array | None = None,
    negative_counts: jax.Array | None = None,
) -> InfoNce:
    """Half the cross-entropy of each query's own passage among all passages, and half that of each passage's own query
    among all queries, by cosines times exp(log_scale) (CLIP, arXiv:2103.00020, figure 3). Passages that are nobody's
    own are among all passages too (DPR, arXiv:2004.04906, section 3.2).

    Args:
        queries: float32 [N, D], of any length.
        passages: [N, D]; passage i belongs to query i.
        log_scale: a scalar, learned.
        counts: bool [N], which pairs there are; the others are nobody's negatives and have no loss.
        negatives: [M, D], passages that are no query's own; None: there are none.
        negative_counts: bool [M], which of them there are.
    """
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
    cosines = lambda x, y: jnp.exp(log_scale) * jnp.einsum("id,jd->ij", unit(x), unit(y), precision="highest")
    # A pair that is not there has itself alone, so that its row has a finite logsumexp.
    itself = jnp.eye(len(queries), dtype=bool)
    logits = jnp.where(counts[:, None] & counts | itself, cosines(queries, passages), -jnp.inf)
    of_queries = logits
    if negatives is not None and negative_counts is not None:
        others = jnp.where(counts[:, None] & negative_counts, cosines(queries, negatives), -jnp.inf)
        of_queries = jnp.concatenate([logits, others], 1)
    loss = (jax.nn.logsumexp(of_queries, 1) + jax.nn.logsumexp(logits, 0)) / 2 - jnp.diagonal(logits)
    right = (of_queries.argmax(1) == jnp.arange(len(logits))) & counts
    return InfoNce(jnp.where(counts, loss, 0), right.astype(jnp.float32))
