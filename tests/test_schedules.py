"""Learning rates against closed formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maxlm.config import (
    ConstantSchedule,
    CosineSchedule,
    Decay,
    Drop,
    InverseSqrtSchedule,
    LinearSchedule,
    MultiStepSchedule,
    UserError,
    WsdSchedule,
)
from maxlm.config.schedule import schedule_remark
from maxlm.training.schedules import learning_rate_schedule

PEAK, STEPS, WARMUP = 0.4, 100, 10


def rates(config, steps=STEPS, count=None):
    schedule = learning_rate_schedule(config, PEAK, steps)
    return np.array([float(schedule(i)) for i in range(count or steps)])


def cosine(i, final):
    return PEAK * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (i - WARMUP) / (STEPS - WARMUP))))


def linear(i, final):
    return PEAK * (1 - (1 - final) * (i - WARMUP) / (STEPS - WARMUP))


def wsd(decay):
    return WsdSchedule(warmup_steps=WARMUP, decay_steps=20, final_fraction=0.1, decay=decay)


def fallen(i):
    """Of the last 20 steps, how much is over."""
    return max(0, i - 80) / 20


def falling(i, above):
    return PEAK * (0.1 + 0.9 * above)


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
    "wsd_sqrt": (wsd(Decay.SQRT), lambda i: falling(i, 1 - math.sqrt(fallen(i)))),
    "wsd_cosine": (wsd(Decay.COSINE), lambda i: falling(i, (1 + math.cos(math.pi * fallen(i))) / 2)),
    "wsd_exponential": (wsd(Decay.EXPONENTIAL), lambda i: PEAK * 0.1 ** fallen(i)),
    "cosine_then_anneal": (
        CosineSchedule(warmup_steps=WARMUP, final_fraction=0.2, anneal_steps=30),
        lambda i: (
            PEAK * (0.2 + 0.8 * (1 + math.cos(math.pi * (i - WARMUP) / 60)) / 2)
            if i < 70
            else PEAK * 0.2 * (100 - i) / 30
        ),
    ),
    "inverse_sqrt_after_a_plateau": (
        InverseSqrtSchedule(warmup_steps=WARMUP, constant_steps=30),
        lambda i: PEAK * math.sqrt(40 / max(40, i)),
    ),
    "deepseek": (
        MultiStepSchedule(warmup_steps=WARMUP),
        lambda i: PEAK * (1 if i < 80 else 0.316 if i < 90 else 0.1),
    ),
    "one_drop": (
        MultiStepSchedule(warmup_steps=WARMUP, drops=(Drop(at=0.5, fraction=0.3),)),
        lambda i: PEAK * (1 if i < 50 else 0.3),
    ),
}


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_schedule_equals_its_formula(name):
    config, formula = AFTER_WARMUP[name]
    warmup = [PEAK * (i + 1) / WARMUP for i in range(WARMUP)]
    np.testing.assert_allclose(rates(config), warmup + [formula(i) for i in range(WARMUP, STEPS)], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "config",
    [CosineSchedule, LinearSchedule, WsdSchedule, MultiStepSchedule, ConstantSchedule, InverseSqrtSchedule],
)
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_first_step_learns(config, warmup):
    got = rates(config(warmup_steps=warmup), count=3)
    np.testing.assert_allclose(got[0], PEAK / max(1, warmup), rtol=1e-6)
    assert got[:3].max() == pytest.approx(PEAK, rel=1e-6)


def test_the_last_step_still_learns():
    """The final fraction is reached at step `steps`, one after the last: no step is made with a rate of 0."""
    annealed = CosineSchedule(anneal_steps=20)
    for config in (CosineSchedule(final_fraction=0.0), annealed, LinearSchedule(), WsdSchedule(decay_steps=20)):
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


def test_steps_of_the_papers_own():
    """Adafactor's relative step sizes (arXiv:1804.04235), the second of them PaLM's (arXiv:2204.02311,
    section 5), with the number of steps done for t."""
    t = np.arange(0, 40_000, 997)[1:]
    rising = learning_rate_schedule(InverseSqrtSchedule(warmup_steps=10_000), 1e-2, 40_000)
    level = learning_rate_schedule(InverseSqrtSchedule(warmup_steps=0, constant_steps=10_000), 1e-2, 40_000)
    for i in t:
        assert float(rising(i)) == pytest.approx(min(1e-6 * (i + 1), 1 / math.sqrt(i)), rel=1e-4)
        assert float(level(i)) == pytest.approx(min(1e-2, 1 / math.sqrt(i)), rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            ConstantSchedule(warmup_steps=100),
            ["warmup_steps = 100 leaves nothing", "less than 100"],
        ),
        (
            WsdSchedule(warmup_steps=40, decay_steps=70),
            ["warmup_steps = 40", "decay_steps = 70", "more than train.steps = 100", "10 less", "train.steps = 110"],
        ),
        (CosineSchedule(warmup_steps=1, anneal_steps=100), ["anneal_steps = 100", "train.steps = 101"]),
        (InverseSqrtSchedule(warmup_steps=0, constant_steps=101), ["constant_steps = 101", "train.steps = 101"]),
        (MultiStepSchedule(warmup_steps=81), ["warmup_steps = 81", "drops.0.at = 0.8", "step 80", "at most 80"]),
        (WsdSchedule(warmup_steps=40, decay_steps=60), []),
        (MultiStepSchedule(warmup_steps=80), []),
        (LinearSchedule(warmup_steps=99), []),
        (CosineSchedule(warmup_steps=50, anneal_steps=50), []),
    ],
    ids=repr,
)
def test_a_schedule_that_is_longer_than_the_run_is_told(schedule, words):
    said = schedule_remark(schedule, 100)
    assert (said is None) == (not words)
    assert all(word in said for word in words)


def test_what_a_schedule_cannot_do_is_refused():
    with pytest.raises(UserError, match="final_fraction = 0 is not reached by decay = exponential"):
        WsdSchedule(decay=Decay.EXPONENTIAL)
    with pytest.raises(UserError, match="each must come after the one before it"):
        MultiStepSchedule(drops=(Drop(at=0.9, fraction=0.3), Drop(at=0.8, fraction=0.1)))
    with pytest.raises(UserError, match=r"drops.* must not be empty; or use ConstantSchedule"):
        MultiStepSchedule(drops=())
