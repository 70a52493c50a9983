"""Learning rates against closed formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maxlm.config import ConstantSchedule, CosineSchedule, InverseSqrtSchedule, LinearSchedule, WsdSchedule
from maxlm.training.schedules import learning_rate_schedule

PEAK, STEPS, WARMUP = 0.4, 100, 10


def rates(config, steps=STEPS, count=None):
    schedule = learning_rate_schedule(config, PEAK, steps)
    return np.array([float(schedule(i)) for i in range(count or steps)])


def cosine(i, final):
    return PEAK * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (i - WARMUP) / (STEPS - WARMUP))))


def linear(i, final):
    return PEAK * (1 - (1 - final) * (i - WARMUP) / (STEPS - WARMUP))


AFTER_WARMUP = {
    "cosine": (CosineSchedule(warmup_steps=WARMUP, final_fraction=0.1), lambda i: cosine(i, 0.1)),
    "cosine_to_zero": (CosineSchedule(warmup_steps=WARMUP, final_fraction=0.0), lambda i: cosine(i, 0.0)),
    "linear": (LinearSchedule(warmup_steps=WARMUP, final_fraction=0.25), lambda i: linear(i, 0.25)),
    "linear_to_zero": (LinearSchedule(warmup_steps=WARMUP), lambda i: linear(i, 0.0)),
    "inverse_sqrt": (InverseSqrtSchedule(warmup_steps=WARMUP), lambda i: PEAK * math.sqrt(WARMUP / i)),
    "constant": (ConstantSchedule(warmup_steps=WARMUP), lambda i: PEAK),
    "wsd": (
        WsdSchedule(warmup_steps=WARMUP, decay_steps=20, final_fraction=0.1),
        lambda i: PEAK if i < 80 else PEAK * (1 - 0.9 * (i - 80) / 20),
    ),
    "wsd_without_decay": (WsdSchedule(warmup_steps=WARMUP), lambda i: PEAK),
}


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_schedule_equals_its_formula(name):
    config, formula = AFTER_WARMUP[name]
    warmup = [PEAK * (i + 1) / WARMUP for i in range(WARMUP)]
    np.testing.assert_allclose(rates(config), warmup + [formula(i) for i in range(WARMUP, STEPS)], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("config", [CosineSchedule, LinearSchedule, WsdSchedule, ConstantSchedule, InverseSqrtSchedule])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_first_step_learns(config, warmup):
    got = rates(config(warmup_steps=warmup), count=3)
    np.testing.assert_allclose(got[0], PEAK / max(1, warmup), rtol=1e-6)
    assert got[:3].max() == pytest.approx(PEAK, rel=1e-6)


def test_the_last_step_still_learns():
    """The final fraction is reached at step `steps`, one after the last: no step is made with a rate of 0."""
    for config in (CosineSchedule(final_fraction=0.0), LinearSchedule(), WsdSchedule(decay_steps=20)):
        schedule = learning_rate_schedule(config, PEAK, STEPS)
        assert 0 < float(schedule(STEPS - 1)) < 0.06 * PEAK
        assert float(schedule(STEPS)) == pytest.approx(0, abs=1e-7)


def test_wsd_is_flat_up_to_its_decay():
    got = rates(WsdSchedule(warmup_steps=WARMUP, decay_steps=30))
    np.testing.assert_allclose(got[WARMUP : STEPS - 30 + 1], PEAK, rtol=1e-6)
    assert (np.diff(got[STEPS - 30 :]) < 0).all()


def test_wsd_with_more_decay_than_steps_still_ends_at_its_final_fraction():
    schedule = learning_rate_schedule(WsdSchedule(warmup_steps=10, decay_steps=500, final_fraction=0.1), PEAK, STEPS)
    assert float(schedule(10)) == pytest.approx(PEAK, rel=1e-6)
    assert float(schedule(STEPS)) == pytest.approx(0.1 * PEAK, rel=1e-5)


def test_after_the_end_the_rate_stays():
    for config in (
        CosineSchedule(),
        LinearSchedule(final_fraction=0.1),
        WsdSchedule(decay_steps=9, final_fraction=0.1),
    ):
        np.testing.assert_allclose(rates(config, count=150)[STEPS:], 0.1 * PEAK, rtol=1e-5)
