"""How far a policy may go from its reference: estimates of the KL divergence, and what it costs."""

from __future__ import annotations

import enum

from maxlm.config.fields import Changes, NotNegative, Positive, config


class KlEstimator(enum.Enum):
    """An estimate of KL(policy || reference) from a token that the policy drew; x is its log-ratio, log policy(token) -
    log reference(token). Names are those of Schulman 2020, "Approximating KL Divergence"
    (http://joschu.net/blog/kl-approx.html)."""

    K1 = "k1"
    """x: right in the mean, of either sign. As a loss it teaches nothing; it belongs into the reward."""
    K2 = "k2"
    """x^2 / 2: wrong in the mean and never negative. As a loss its gradient is that of KL(policy || reference)."""
    K3 = "k3"
    """exp(-x) - 1 + x: right in the mean and never negative (GRPO, arXiv:2402.03300, equation 4). As a loss its
    gradient is that of KL(reference || policy)."""


@config("task.kl.", changes=Changes.IDENTITY)
class FixedKl:
    """The same factor from the first step to the last."""

    beta: NotNegative[float] = 0.05
    """Of the KL divergence, in units of the reward a nat; 0: the policy goes where the reward leads it."""


@config("task.kl.", changes=Changes.IDENTITY)
class AdaptiveKl:
    """A factor that follows the KL divergence, so that it stays near a target (Ziegler et al. 2019, arXiv:1909.08593,
    section 2.2)."""

    beta: Positive[float] = 0.2
    """At first, in units of the reward a nat."""
    target: Positive[float] = 6.0
    """KL divergence of a whole text, in nats."""
    horizon: Positive[float] = 10000.0
    """Texts in which the factor becomes at most e^0.2 times what it was. More than a rollout has."""


KlController = FixedKl | AdaptiveKl
