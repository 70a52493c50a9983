"""Policy gradients against formulas of their papers in float64 numpy, by hand, and by enumerating a small policy."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import AdaptiveKl, Aggregation, FixedKl, KlEstimator
from maxlm.training import policy_losses as losses

RNG = np.random.default_rng(0)
MASK = np.array([[0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 9, [0, 0, 0, 0, 1, 0, 0, 0, 0]])
"""Two turns with a tool's between them, a whole row, an empty one, one token."""


def garbage(values, mask=MASK):
    """What must not be looked at."""
    return np.where(mask, values, RNG.choice([np.nan, np.inf, -np.inf, 1e30], np.shape(values)))


# Surrogates


LOG_PROBS, OLD, ADVANTAGES = RNG.normal(-1, 0.5, (2, 400)), RNG.normal(-1, 0.5, (2, 400)), RNG.normal(size=(2, 400))


def surrogate(log_probs, old, advantages, low, high):
    """Case by case."""
    found = np.zeros_like(log_probs)
    for place in np.ndindex(found.shape):
        ratio, a = math.exp(log_probs[place] - old[place]), advantages[place]
        found[place] = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    return found


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28)])
def test_surrogate_is_that_of_the_paper_and_tells_where_nothing_is_learned(low, high):
    ours = lambda x: losses.clipped_surrogate(x, jnp.float32(OLD), jnp.float32(ADVANTAGES), low, high)
    found = ours(jnp.float32(LOG_PROBS))
    np.testing.assert_allclose(found.loss, surrogate(LOG_PROBS, OLD, ADVANTAGES, low, high), rtol=1e-5)
    gradient = np.asarray(jax.grad(lambda x: ours(x).loss.sum())(jnp.float32(LOG_PROBS)))
    np.testing.assert_array_equal(found.clipped, gradient == 0)
    assert 0.1 < np.mean(found.clipped) < 0.9
    kept = ~np.asarray(found.clipped)
    np.testing.assert_allclose(gradient[kept], (-np.exp(LOG_PROBS - OLD) * ADVANTAGES)[kept], rtol=1e-4)


def test_surrogate_by_hand():
    two = math.log(2)
    ask = lambda ratio, a: losses.clipped_surrogate(jnp.float32(ratio), jnp.float32(0), jnp.float32(a), 0.2, 0.5)
    assert float(ask(0, 3).loss) == -3  # the first step after a rollout
    assert float(ask(two, 1).loss) == -1.5 and bool(ask(two, 1).clipped)
    assert float(ask(two, -1).loss) == 2 and not bool(ask(two, -1).clipped)
    assert float(ask(-two, 1).loss) == -0.5 and not bool(ask(-two, 1).clipped)
    assert float(ask(-two, -1).loss) == pytest.approx(0.8) and bool(ask(-two, -1).clipped)


def test_a_ratio_too_large_for_float32_is_no_nan():
    """As of tokens that a later weight of 0 leaves out."""
    far, advantages = jnp.float32([1e4, 1e4, 1e4, -1e4]), jnp.float32([0, 1, -1, -1])
    loss, gradient = jax.value_and_grad(
        lambda x: (
            losses.clipped_surrogate(x, jnp.zeros(4), advantages, 0.2, 0.2).loss * jnp.float32([0, 1, 1, 1])
        ).sum()
    )(far)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_value_loss_is_that_of_the_code_of_ppo():
    values, old, returns = RNG.normal(size=(3, 300))
    held = np.clip(values, old - 0.3, old + 0.3)
    want = 0.5 * np.maximum((values - returns) ** 2, (held - returns) ** 2)
    ours = lambda v: losses.clipped_value_loss(v, jnp.float32(old), jnp.float32(returns), 0.3)
    found = ours(jnp.float32(values))
    np.testing.assert_allclose(found.loss, want, rtol=2e-4, atol=1e-6)
    gradient = jax.grad(lambda v: ours(v).loss.sum())(jnp.float32(values))
    np.testing.assert_array_equal(found.clipped, np.asarray(gradient) == 0)
    assert 0.1 < np.mean(found.clipped) < 0.9
    by_hand = losses.clipped_value_loss(jnp.float32([2, 2]), jnp.float32([0, 0]), jnp.float32([3, -3]), 1.0)
    np.testing.assert_array_equal(by_hand.loss, [2, 12.5])  # held at 1, which is further from 3 than 2 is
    np.testing.assert_array_equal(by_hand.clipped, [True, False])


# The KL divergence


POLICY, REFERENCE = RNG.normal(0, 1.5, (2, 6))


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


def divergence(p_logits, q_logits):
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum()


def by_difference(function, x):
    steps = np.eye(len(x)) * 1e-5
    return np.array([(function(x + step) - function(x - step)) / 2e-5 for step in steps])


def expected(estimator, logits):
    """The mean over all tokens of the policy, which nothing is differentiated through."""
    p = jnp.float32(np.exp(log_softmax(POLICY)))
    reference = jnp.float32(log_softmax(REFERENCE))
    return (p * losses.kl_estimate(jax.nn.log_softmax(logits), reference, estimator)).sum()


def test_estimates_of_the_divergence_in_the_mean():
    true, logits = divergence(POLICY, REFERENCE), jnp.float32(POLICY)
    assert true > 0.5
    assert float(expected(KlEstimator.K1, logits)) == pytest.approx(true, rel=1e-5)
    assert float(expected(KlEstimator.K3, logits)) == pytest.approx(true, rel=1e-5)
    x = log_softmax(POLICY) - log_softmax(REFERENCE)
    k2 = losses.kl_estimate(jnp.float32(log_softmax(POLICY)), jnp.float32(log_softmax(REFERENCE)), KlEstimator.K2)
    np.testing.assert_allclose(k2, x**2 / 2, rtol=1e-4)
    # Near each other K2 is right too.
    near = POLICY + 0.01 * REFERENCE
    k2 = losses.kl_estimate(jnp.float32(log_softmax(POLICY)), jnp.float32(log_softmax(near)), KlEstimator.K2)
    assert float((np.exp(log_softmax(POLICY)) * k2).sum()) == pytest.approx(divergence(POLICY, near), rel=0.03)


def test_gradients_of_the_estimates_as_losses():
    """What `kl_estimate` says of each, by enumeration of the policy's tokens."""
    reverse = by_difference(lambda x: divergence(x, REFERENCE), POLICY)
    forward = by_difference(lambda x: divergence(REFERENCE, x), POLICY)
    assert np.abs(reverse - forward).max() > 0.1
    for estimator, want in [(KlEstimator.K1, 0 * reverse), (KlEstimator.K2, reverse), (KlEstimator.K3, forward)]:
        found = jax.grad(lambda x, estimator=estimator: expected(estimator, x))(jnp.float32(POLICY))
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-6)


def test_k1_in_the_reward_has_the_gradient_of_the_divergence_of_whole_texts():
    """Of a policy of three tokens whose second depends on the first: all nine texts."""
    first, second, other_first, other_second = (RNG.normal(size=s) for s in ((3,), (3, 3), (3,), (3, 3)))

    def whole(x):
        p_first, q_first = log_softmax(x[:3]), log_softmax(other_first)
        of_texts = 0.0
        for a, b in itertools.product(range(3), repeat=2):
            p = p_first[a] + log_softmax(x[3:].reshape(3, 3)[a])[b]
            of_texts += np.exp(p) * (p - q_first[a] - log_softmax(other_second[a])[b])
        return of_texts

    found = np.zeros(12)
    for a, b in itertools.product(range(3), repeat=2):
        p = np.array([log_softmax(first)[a], log_softmax(second[a])[b]])
        q = np.array([log_softmax(other_first)[a], log_softmax(other_second[a])[b]])
        kl = losses.kl_estimate(jnp.asarray(p), jnp.asarray(q), KlEstimator.K1)
        rewards = losses.per_token_rewards([0.0], kl[None], np.ones((1, 2)), beta=1.0)
        advantages = losses.gae(rewards, np.zeros((1, 2)), np.ones((1, 2)), 1.0, 1.0).advantages[0]
        for row, logits, chosen, advantage in [(0, first, a, advantages[0]), (1 + a, second[a], b, advantages[1])]:
            of_log_p = (np.arange(3) == chosen) - np.exp(log_softmax(logits))
            found[3 * row : 3 * row + 3] -= np.exp(p.sum()) * advantage * of_log_p
    want = by_difference(whole, np.concatenate([first, second.ravel()]))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_controllers():
    adaptive = AdaptiveKl(beta=0.2, target=6, horizon=10000)
    assert losses.next_beta(0.3, 99.0, FixedKl(beta=0.1), 64) == 0.3
    for kl, error in [(6, 0), (6.6, 0.1), (5.4, -0.1), (60, 0.2), (0, -0.2), (-3, -0.2)]:
        assert losses.next_beta(0.3, kl, adaptive, 500) == pytest.approx(0.3 * (1 + error * 500 / 10000), rel=1e-12)
    for kl in (math.nan, math.inf):
        assert losses.next_beta(0.3, kl, adaptive, 500) == 0.3
    beta = 0.2  # a divergence that falls as its price rises
    for _ in range(4000):
        beta = losses.next_beta(beta, 3.0 / beta, adaptive, 64)
    assert beta == pytest.approx(0.5, rel=1e-6)


# Advantages of tokens


REWARDS, VALUES = RNG.normal(size=(2, *MASK.shape))


def double_sum(rewards, values, mask, gamma, lambda_):
    """Equation 16, with the counted tokens of each row written one after the other."""
    found = np.zeros(mask.shape)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        r, v = rewards[row, places], np.append(values[row, places], 0)
        errors = r + gamma * v[1:] - v[:-1]
        for t, place in enumerate(places):
            found[row, place] = sum((gamma * lambda_) ** later * error for later, error in enumerate(errors[t:]))
    return found


@pytest.mark.parametrize("gamma, lambda_", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_the_double_sum(gamma, lambda_):
    found = losses.gae(garbage(REWARDS), garbage(VALUES), MASK, gamma, lambda_)
    want = double_sum(REWARDS, VALUES, MASK, gamma, lambda_)
    np.testing.assert_allclose(found.advantages, want, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.returns, np.where(MASK, want + VALUES, 0), rtol=1e-12, atol=1e-14)


def test_gae_at_its_ends():
    """lambda 1: what came, less what was expected; lambda 0: the error of one step."""
    found = losses.gae([[1, 2, 4]], [[8, 16, 32]], [[1, 1, 1]], 0.5, 1.0)
    np.testing.assert_array_equal(found.returns, [[1 + 1 + 1, 2 + 2, 4]])
    np.testing.assert_array_equal(found.advantages, [[3 - 8, 4 - 16, 4 - 32]])
    found = losses.gae([[1, 2, 4]], [[8, 16, 32]], [[1, 1, 1]], 0.5, 0.0)
    np.testing.assert_array_equal(found.advantages, [[1 + 8 - 8, 2 + 16 - 16, 4 - 32]])


def test_a_critic_that_is_right_leaves_no_advantage():
    rewards = np.where(MASK, REWARDS, 0)
    right = losses.gae(rewards, np.zeros(MASK.shape), MASK, 0.9, 1.0).returns
    np.testing.assert_allclose(losses.gae(rewards, right, MASK, 0.9, 0.3).advantages, 0, atol=1e-12)


def test_whitening():
    values = RNG.normal(3, 2, MASK.shape)
    chosen = values[MASK.astype(bool)]
    want = (values - chosen.mean()) / chosen.std()
    np.testing.assert_allclose(losses.whitened(garbage(values), MASK), np.where(MASK, want, 0), rtol=1e-6)
    for alone in (MASK[3:], np.zeros((2, 3))):
        np.testing.assert_array_equal(losses.whitened(np.full(alone.shape, 7.0), alone), 0)
    np.testing.assert_allclose(losses.whitened(np.full((2, 9), 0.1), np.ones((2, 9))), 0, atol=1e-9)


def test_rewards_of_tokens():
    kl = np.abs(REWARDS)
    scores = np.array([10.0, 20.0, 30.0, 40.0])
    want = np.where(MASK, -0.5 * kl, 0)
    want[0, 7] += 10
    want[1, 8] += 20
    want[3, 4] += 40
    np.testing.assert_allclose(losses.per_token_rewards(scores, garbage(kl), MASK, beta=0.5), want, rtol=1e-12)


# Advantages of texts


GROUPS = RNG.normal(2, 3, (4, 5))
EQUAL = np.array([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]])
SINGLE = np.array([[3.0], [4.0]])


def test_group_mean():
    centred = GROUPS - GROUPS.mean(1, keepdims=True)
    std = np.array([[np.sqrt(((row - row.mean()) ** 2).sum() / 4)] for row in GROUPS])
    np.testing.assert_allclose(losses.group_mean(GROUPS, True, 0.5), centred / (std + 0.5), rtol=1e-12)
    np.testing.assert_allclose(losses.group_mean(GROUPS, False, 0.5), centred, rtol=1e-12)
    half = losses.group_mean([[1, 0, 1, 0]], True, 1e-12)  # mean 1/2, variance 1/3
    np.testing.assert_allclose(half, [[math.sqrt(3) / 2, -math.sqrt(3) / 2] * 2], rtol=1e-9)


def test_leave_one_out():
    others = [[np.delete(row, i).mean() for i in range(5)] for row in GROUPS]
    np.testing.assert_allclose(losses.leave_one_out(GROUPS), GROUPS - others, rtol=1e-12)
    # The same as n / (n - 1) of what the whole group's mean leaves.
    np.testing.assert_allclose(losses.leave_one_out(GROUPS), losses.group_mean(GROUPS, False, 1) * 5 / 4, rtol=1e-9)


def test_batch_mean():
    np.testing.assert_allclose(losses.batch_mean(GROUPS), GROUPS - GROUPS.mean(), rtol=1e-12)
    np.testing.assert_array_equal(losses.batch_mean(np.full((3, 7), 0.1)), 0)


ADVANTAGE = {
    "group": lambda r, usable=None: losses.group_mean(r, True, 1e-6, usable),
    "group without std": lambda r, usable=None: losses.group_mean(r, False, 1e-6, usable),
    "leave one out": losses.leave_one_out,
    "batch": losses.batch_mean,
}


@pytest.mark.parametrize("name", ADVANTAGE)
def test_advantages_of_texts(name):
    """Equal rewards teach nothing, exactly; what is not usable is as if it were not there; a constant is nothing."""
    ours = ADVANTAGE[name]
    if name != "batch":
        np.testing.assert_array_equal(ours(EQUAL), 0)
        np.testing.assert_array_equal(ours(SINGLE), 0)
    np.testing.assert_allclose(ours(GROUPS + 100), ours(GROUPS), rtol=1e-9, atol=1e-12)
    usable = np.ones(GROUPS.shape, bool)
    usable[:, 2] = False
    found = ours(garbage(GROUPS, usable), usable)
    np.testing.assert_array_equal(found[:, 2], 0)
    np.testing.assert_allclose(np.delete(found, 2, 1), ours(np.delete(GROUPS, 2, 1)), rtol=1e-12)
    none = ours(garbage(GROUPS, 0 * usable), 0 * usable)
    np.testing.assert_array_equal(none, 0)


# Weights


def direct(token_losses, mask, aggregation, max_tokens):
    """Each paper's formula, text by text."""
    rows = [row[counts.astype(bool)] for row, counts in zip(token_losses, mask, strict=True) if counts.any()]
    match aggregation:
        case Aggregation.TOKEN_MEAN:
            return np.concatenate(rows).mean()
        case Aggregation.SEQUENCE_MEAN:
            return np.mean([row.mean() for row in rows])
        case Aggregation.CONSTANT:
            return np.mean([row.sum() / max_tokens for row in rows])


@pytest.mark.parametrize("aggregation", Aggregation)
def test_weights_are_the_papers_means_however_the_rows_are_cut(aggregation):
    token_losses = RNG.normal(size=MASK.shape)
    want = direct(token_losses, MASK, aggregation, 16)
    for parts in ([[0, 1, 2, 3]], [[0, 2], [1, 3]], [[3], [2], [1], [0]]):
        found = [losses.token_weights(MASK[rows], aggregation, 16) for rows in parts]
        top = sum((w.of_tokens * token_losses[rows]).sum() for w, rows in zip(found, parts, strict=True))
        assert top / sum(w.of_rows.sum() for w in found) == pytest.approx(want, rel=1e-12)
        assert not any(w.of_tokens[~MASK[rows].astype(bool)].any() for w, rows in zip(found, parts, strict=True))


def test_truncated_weights():
    trainer, sampler = RNG.normal(size=(2, *MASK.shape))
    want = np.where(MASK, np.minimum(np.exp(trainer - sampler), 2), 0)
    assert {0, 2} < set(want.ravel())
    np.testing.assert_allclose(
        losses.truncated_weights(garbage(trainer), garbage(sampler), MASK, 2.0), want, rtol=1e-12
    )
    np.testing.assert_allclose(losses.truncated_weights([[0.0, 0.0]], [[-1e6, 1e6]], [[1, 1]], 2.0), [[2, 0]])
