"""Losses of preferences, rewards and embeddings against formulas of their papers in float64 numpy, and by hand."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.training import preference_losses as losses
from maxlm.training.text_sums import text_sums

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(0, 3, (2, 7))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(log_p):
    return np.exp(log_p) / (1 - np.exp(log_p))


def nce(queries, passages, log_scale):
    queries, passages = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (queries, passages))
    similarity = np.exp(np.exp(log_scale) * queries @ passages.T)
    own = np.diag(similarity)
    return -(np.log(own / similarity.sum(1)) + np.log(own / similarity.sum(0))) / 2


def kto(ratio, desired, z0, beta, of_desired, of_undesired):
    value = np.where(desired, of_desired * sigmoid(beta * (ratio - z0)), of_undesired * sigmoid(beta * (z0 - ratio)))
    return np.where(desired, of_desired, of_undesired) - value


DESIRED = np.array([1, 0, 1, 1, 0, 0, 1], bool)
LOSSES = {
    "dpo": (
        lambda c, r: losses.dpo(c, r, beta=0.3),
        lambda c, r: -np.log(sigmoid(0.3 * c - 0.3 * r)),
        (CHOSEN, REJECTED),
    ),
    "dpo, smoothed": (
        lambda c, r: losses.dpo(c, r, beta=0.3, label_smoothing=0.1),
        lambda c, r: -0.9 * np.log(sigmoid(0.3 * (c - r))) - 0.1 * np.log(sigmoid(0.3 * (r - c))),
        (CHOSEN, REJECTED),
    ),
    "ipo": (lambda c, r: losses.ipo(c, r, tau=0.2), lambda c, r: (c - r - 2.5) ** 2, (CHOSEN, REJECTED)),
    "kto": (
        lambda c: losses.kto(c, DESIRED, 0.4, beta=0.3, desired_weight=1.2, undesired_weight=0.7),
        lambda c: kto(c, DESIRED, 0.4, 0.3, 1.2, 0.7),
        (CHOSEN,),
    ),
    "orpo": (
        losses.orpo,
        lambda c, r: -np.log(sigmoid(np.log(odds(c) / odds(r)))),
        (-np.abs(CHOSEN), -np.abs(REJECTED)),
    ),
    "simpo": (
        lambda c, r: losses.simpo(c, r, beta=2.0, gamma=0.5),
        lambda c, r: -np.log(sigmoid(2 * c - 2 * r - 0.5)),
        (CHOSEN, REJECTED),
    ),
    "bradley_terry": (
        lambda c, r: losses.bradley_terry(c, r, jnp.arange(7.0)),
        lambda c, r: -np.log(sigmoid(c - r - np.arange(7))),
        (CHOSEN, REJECTED),
    ),
    "binary": (
        lambda c: losses.binary(c, jnp.asarray(DESIRED, jnp.float32)),
        lambda c: -np.log(np.where(DESIRED, sigmoid(c), 1 - sigmoid(c))),
        (CHOSEN,),
    ),
    "info_nce": (
        lambda q, p, t: losses.info_nce(q, p, t, jnp.ones(5, bool)).loss,
        nce,
        (RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3)), np.array(0.7)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_those_of_the_papers(name):
    ours, formula, arguments = LOSSES[name]
    weights = RNG.normal(size=len(arguments[0]))  # of each element, so that none hides behind another
    asked = [jnp.asarray(x, jnp.float32) for x in arguments]
    weighted = lambda *x: ((weights * (found := ours(*x))).sum(), found)
    which = tuple(range(len(arguments)))
    gradients, found = jax.jit(jax.grad(weighted, which, has_aux=True))(*asked)
    np.testing.assert_allclose(found, formula(*arguments), rtol=2e-5, atol=1e-6)
    for i, gradient in enumerate(gradients):
        by_difference = np.zeros(arguments[i].shape)
        for place in np.ndindex(arguments[i].shape):
            step = np.zeros(arguments[i].shape)
            step[place] = 1e-5
            up, down = ([*arguments[:i], arguments[i] + s * step, *arguments[i + 1 :]] for s in (1, -1))
            by_difference[place] = (weights * (formula(*up) - formula(*down))).sum() / 2e-5
        np.testing.assert_allclose(gradient, by_difference, rtol=1e-4, atol=1e-5)


def test_losses_by_hand():
    three = math.log(3)  # sigmoid(log 3) = 3/4
    assert float(losses.dpo(2 * three, three, beta=1.0)) == pytest.approx(math.log(4 / 3))
    smoothed = losses.dpo(2 * three, three, beta=1.0, label_smoothing=0.25)
    assert float(smoothed) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert float(losses.ipo(6.0, 1.0, tau=0.1)) == 0  # the margin that it wants is 1 / (2 * 0.1)
    assert float(losses.ipo(5.0, 1.0, tau=0.5)) == 9
    assert float(losses.kto(three, True, 0.0, beta=1.0)) == pytest.approx(1 / 4)
    assert float(losses.kto(three, False, 0.0, beta=1.0)) == pytest.approx(3 / 4)
    # Odds of 1/2 and 1/4 are 1 and 1/3.
    assert float(losses.orpo(math.log(1 / 2), math.log(1 / 4))) == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert float(losses.simpo(three, 0.0, beta=2.0, gamma=three)) == pytest.approx(math.log(4 / 3))
    assert float(losses.bradley_terry(three, 0.0)) == pytest.approx(math.log(4 / 3))
    assert float(losses.bradley_terry(2 * three, 0.0, three)) == pytest.approx(math.log(4 / 3))
    # Two pairs at right angles: each finds its own with odds e^scale = 3 against 1.
    found = losses.info_nce(jnp.eye(2), jnp.eye(2), math.log(three), jnp.ones(2, bool))
    np.testing.assert_allclose(found.loss, math.log(4 / 3), rtol=1e-5)
    np.testing.assert_array_equal(found.right, 1)


def test_dpo_begins_at_log_2():
    """The model is its reference: whatever the texts are, neither is ahead."""
    same = np.float32(RNG.normal(size=9) * 100)
    assert np.all(np.asarray(losses.dpo(same - same, same - same, beta=0.1)) == np.float32(math.log(2)))


def test_no_loss_is_lost_far_from_zero():
    far = jnp.float32([1e4, -1e4])
    for loss in (
        lambda x: losses.dpo(x, -x, beta=1.0),
        lambda x: losses.bradley_terry(x, -x),
        lambda x: losses.binary(x, jnp.float32(0.5)),
        lambda x: losses.kto(x, jnp.array([True, False]), jnp.float32(0), beta=1.0),
        lambda x: losses.orpo(-jnp.abs(x), jnp.zeros(2)),
        lambda x: losses.orpo(jnp.zeros(2), -jnp.abs(x)),
    ):
        assert np.isfinite(loss(far)).all()
        assert np.isfinite(jax.grad(lambda x, loss=loss: loss(x).sum())(far)).all()


def test_an_estimate_of_a_divergence_is_right_to_second_order() -> None:
    """Of tokens of either model: half as far apart, it is off by an eighth."""

    def off(scale: float) -> np.ndarray:
        q, step = np.random.default_rng(4).random((2, 50))
        log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (q + scale * step**4, q))
        p, q = np.exp(log_p), np.exp(log_q)
        estimate = np.float64(losses.divergence_estimate(jnp.float32(log_p - log_q)))
        divergences = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()
        return np.array([(by * estimate).sum() - exact for by in (p, q) for exact in divergences]) / divergences[0]

    far, near = off(0.2), off(0.1)
    assert (np.abs(far) < 0.1).all()
    np.testing.assert_allclose(far / near, 2, rtol=0.2)  # relative to a divergence that is a fourth


def test_kto_reference():
    """The mean of those that count, never below 0, and nothing to learn."""
    ratios, counts = jnp.float32([[1, -9], [4, -9]]), jnp.array([[True, False], [True, False]])
    assert float(losses.kto_reference(ratios, counts)) == 2.5
    assert float(losses.kto_reference(-ratios, counts)) == 0
    assert float(losses.kto_reference(ratios, ~counts & False)) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: losses.kto_reference(x, counts))(ratios), 0)


def test_pairs_of_a_row():
    """Three records of a row: a ranking of three, one text, a tie with a third below; then nothing."""
    records = jnp.int32([[0, 0, 0, 1, 2, 2, 2, -1, -1]])
    values = jnp.float32([[2, 3, 1, 5, 1, 1, 0, 9, 0]])
    weights = np.asarray(losses.pair_weights(records, values))[0]
    wanted = dict.fromkeys([(0, 2), (1, 0), (1, 2)], 1 / 3) | dict.fromkeys([(4, 6), (5, 6)], 1 / 2)
    for place in itertools.product(range(9), repeat=2):
        assert weights[place] == pytest.approx(wanted.get(place, 0)), place
    assert weights.sum() == pytest.approx(2)


def test_a_ranking_weighs_what_a_pair_does():
    """InstructGPT's 1 / (K choose 2), written out for K = 4."""
    rewards = RNG.normal(size=4)  # best first
    pairs = [-np.log(sigmoid(rewards[i] - rewards[j])) for i, j in itertools.combinations(range(4), 2)]
    weights = losses.pair_weights(jnp.zeros((1, 4), jnp.int32), jnp.float32([[4, 3, 2, 1]]))
    rewards = jnp.asarray(rewards, jnp.float32)
    found = (weights[0] * losses.bradley_terry(rewards[:, None], rewards[None, :])).sum()
    assert float(found) == pytest.approx(sum(pairs) / 6, rel=1e-5)


def test_pairs_that_are_not_there_are_nobodys_negatives():
    queries, passages = (jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    counts = jnp.array([True, False, True, True])
    some = jnp.array([0, 2, 3])
    found, pull = jax.vjp(jax.jit(losses.info_nce), queries, passages, jnp.float32(1), counts)
    alone = jax.jit(losses.info_nce)(queries[some], passages[some], jnp.float32(1), jnp.ones(3, bool))
    np.testing.assert_allclose(found.loss[some], alone.loss, rtol=1e-6)
    assert float(found.loss[1]) == float(found.right[1]) == 0
    gradient = pull(losses.InfoNce(jnp.ones(4), jnp.zeros(4)))[0]
    assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


def test_sums_of_texts():
    """In any order of the columns; what is in no text counts nowhere, be it infinite."""
    values = RNG.normal(size=(2, 6))
    segments = np.array([[1, 1, 2, 2, 2, 4], [1, 2, 2, 3, 3, 4]])
    values[0, 5] = np.inf
    wanted = [[row[of == s].sum() for s in (1, 2, 3)] for row, of in zip(values, segments, strict=True)]
    order = RNG.permutation(6)
    for columns in (slice(None), order):
        found = text_sums(jnp.asarray(values[:, columns], jnp.float32), jnp.asarray(segments[:, columns]), 3)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    wide = text_sums(jnp.asarray(np.nan_to_num(values, posinf=1)[..., None] * [1, 2]), jnp.asarray(segments), 3)
    np.testing.assert_allclose(wide, np.asarray(wanted)[..., None] * [1, 2], rtol=1e-5)
