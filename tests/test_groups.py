"""Groups of parameters: which ones a group has, and what it changes; the average of parameters against its sum."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers import small_model
from test_optimizers import (
    DIMS,
    LAYERS,
    STEPS,
    decays,
    declared_as,
    narrow,
    parameters_and_gradients,
    rate,
    run,
    sgd,
)

from maxlm.config import AdamW, Ema, HasDim, NameMatches, ParameterGroup, Sgd, UserError
from maxlm.models import declared
from maxlm.training.ema import averaged
from maxlm.training.optimizers import make_optimizer

PLAIN = Sgd(momentum=0.0, clip_norm=None, weight_decay=0.3)


def test_groups_change_the_learning_rate_and_the_decay_of_theirs():
    """The first that fits counts, also where a later one fits too; a decay of its own is also for what has none."""
    groups = (
        ParameterGroup(match=NameMatches(pattern="^stack"), learning_rate=0.5),
        ParameterGroup(match=HasDim(dim="mlp"), learning_rate=0.1, weight_decay=0.0),
        ParameterGroup(match=HasDim(dim="vector"), weight_decay=0.7),
        ParameterGroup(match=NameMatches(pattern="bias|heads"), learning_rate=0.0),
    )
    said = {  # factor and decay
        "matrix": (0.1, 0.0),
        "stacked": (0.5, 0.3),
        "heads": (0.0, 0.3),
        "experts": (0.1, 0.0),
        "table": (1.0, 0.3),
        "norm": (1.0, 0.7),
        "bias": (0.0, 0.0),
        "final_norm": (1.0, 0.7),
    }
    parameters, gradients = parameters_and_gradients()
    got = run(dataclasses.replace(PLAIN, groups=groups), parameters, gradients)
    for name, (factor, decay) in said.items():
        x = parameters[name]
        for t, gradient in enumerate(gradients):
            x = x - factor * rate(t) * (gradient[name] + decay * x)
        np.testing.assert_allclose(got[name], x, rtol=2e-5, atol=2e-6 * np.abs(x).max(), err_msg=name)
    assert set(said) == set(parameters)


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (NameMatches(pattern="atention/q_proj"), ("groups.1.match.pattern = 'atention/q_proj'", "attention/q_proj")),
        (NameMatches(pattern="^q_proj"), ("fits no parameter", "blocks/0/attention/q_proj")),
        (HasDim(dim="experts"), ("groups.1.match.dim = experts", "embed", "heads")),
    ],
)
def test_a_group_without_parameters_is_refused_by_name(match, words):
    groups = (ParameterGroup(match=HasDim(dim="vocab")), ParameterGroup(match=match))
    with pytest.raises(UserError) as told:
        make_optimizer(AdamW(groups=groups), rate, declared(small_model()), layers=2)
    assert all(word in str(told.value) for word in words) and "\n" not in str(told.value)


def test_a_match_that_can_fit_nothing_is_refused_at_once():
    with pytest.raises(UserError, match="'head' is the name of no dim; use heads or"):
        HasDim(dim="head")
    with pytest.raises(UserError, match="is no regular expression"):
        NameMatches(pattern="q_proj(")


@pytest.mark.parametrize("average", [Ema(decay=0.7, warm_up=False), Ema(decay=0.4), Ema()], ids=str)
def test_the_average_is_the_sum_over_all_steps(average):
    """Each step's parameters times its share and what later steps left of it; the parameters go as without."""
    parameters, gradients = parameters_and_gradients()
    plain = Sgd(weight_decay=0.3)
    states = [{name: np.asarray(x) for name, x in parameters.items()}]
    states += [sgd(plain, parameters, gradients[: n + 1]) for n in range(STEPS)]
    kept = [min(average.decay, (1 + t) / (10 + t)) if average.warm_up else average.decay for t in range(STEPS)]
    shares = [np.prod(kept)] + [(1 - kept[t]) * np.prod(kept[t + 1 :]) for t in range(STEPS)]
    assert sum(shares) == pytest.approx(1)

    optimizer = make_optimizer(dataclasses.replace(plain, average=average), rate, declared_as(DIMS), layers=LAYERS)
    x = narrow(parameters)
    state = optimizer.init(x)
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(narrow(gradient), state, x)
        x = jax.tree.map(lambda old, update: old + update, x, updates)
    found = averaged(state)
    assert decays("matrix") and averaged(make_optimizer(plain, rate, declared_as(DIMS), layers=3).init(x)) is None
    for name in parameters:
        want = sum(share * one[name] for share, one in zip(shares, states, strict=True))
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=name)
        np.testing.assert_allclose(x[name], states[-1][name], rtol=1e-4, atol=1e-5 * np.abs(want).max())
