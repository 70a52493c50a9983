"""Learning-rate schedules: a factor of the optimizer's learning rate as a function of the step."""

from __future__ import annotations

import enum
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Filled, Fraction, NotNegative, config


@config("optimizer.schedule.", changes=Changes.TRAINING)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to final_fraction of the peak at the end (LLaMA: 0.1)."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    anneal_steps: NotNegative[int] = 0
    """The last steps, after the cosine, which fall in a straight line to 0 (Llama 3, arXiv:2407.21783, section
    3.4.3)."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class LinearSchedule:
    """Linear warm-up, then a straight line down to final_fraction of the peak at the end."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class InverseSqrtSchedule:
    """Linear warm-up, the peak for constant_steps, then peak * sqrt((warmup_steps + constant_steps) / step) (Vaswani et
    al. 2017).

    With a learning rate of 1e-2, min(1e-6 t, 1 / sqrt(t)) of Adafactor (arXiv:1804.04235) is 10,000 steps of
    warm-up; its min(1e-2, 1 / sqrt(t)), which is PaLM's (arXiv:2204.02311, section 5), is 10,000 constant ones without.
    """

    warmup_steps: NotNegative[int] = 1000
    """Steps that rise in a straight line to the peak."""
    constant_steps: NotNegative[int] = 0
    """Steps after them that stay there."""


class Decay(enum.Enum):
    """How the end of a `WsdSchedule` falls; x goes from 0 to 1 in it, and what remains above final_fraction is:"""

    LINEAR = "linear"
    """1 - x."""
    SQRT = "sqrt"
    """1 - sqrt(x) (Hägele et al. 2024, arXiv:2405.18392)."""
    COSINE = "cosine"
    """(1 + cos(pi x)) / 2 (DeepSeek-V3, arXiv:2412.19437, section 4.2)."""
    EXPONENTIAL = "exponential"
    """The learning rate itself is final_fraction^x of the peak (MiniCPM, arXiv:2404.06395, section 4)."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class WsdSchedule:
    """Warm-up, stable, decay: constant at the peak, then down over the last decay_steps (arXiv:2404.06395)."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    decay_steps: NotNegative[int] = 0
    """Steps at the end that fall."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    decay: Decay = Decay.LINEAR
    """In which shape they fall."""

    def __post_init__(self) -> None:
        if self.decay is Decay.EXPONENTIAL and self.final_fraction == 0:
            raise UserError(
                "optimizer.schedule.final_fraction = 0 is not reached by decay = exponential; use for example 0.1"
            )


@config("optimizer.schedule.drops[].", changes=Changes.TRAINING)
class Drop:
    """A step of a `MultiStepSchedule`."""

    at: Fraction
    """Where, as a fraction of train.steps."""
    fraction: Fraction
    """Learning rate from there on, as a fraction of the peak."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class MultiStepSchedule:
    """Linear warm-up, the peak, and a lower level after each drop (DeepSeek LLM, arXiv:2401.02954, section 2.3)."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    drops: Annotated[tuple[Drop, ...], Filled(note="or use ConstantSchedule")] = (
        Drop(at=0.8, fraction=0.316),
        Drop(at=0.9, fraction=0.1),
    )
    """Where the level changes, and to what."""

    def __post_init__(self) -> None:
        places = [drop.at for drop in self.drops]
        if places != sorted(set(places)):
            raise UserError(f"optimizer.schedule.drops are at {places}, and each must come after the one before it")


@config("optimizer.schedule.", changes=Changes.TRAINING)
class ConstantSchedule:
    """Linear warm-up, then the peak for ever."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""


Schedule = CosineSchedule | LinearSchedule | InverseSqrtSchedule | WsdSchedule | MultiStepSchedule | ConstantSchedule


def schedule_remark(schedule: Schedule, steps: int) -> str | None:
    """What to say of a schedule whose parts are longer than a run of so many steps; None: they are not."""
    names = ("warmup_steps", "constant_steps", "decay_steps", "anneal_steps")
    parts = {f"optimizer.schedule.{name}": value for name in names if (value := getattr(schedule, name, 0))}
    warmup, needed = schedule.warmup_steps, sum(parts.values())
    if warmup >= steps:
        return (
            f"optimizer.schedule.warmup_steps = {warmup} leaves nothing of train.steps = {steps}: the learning rate "
            f"rises to the end; use less than {steps}, or more train.steps"
        )
    if isinstance(schedule, MultiStepSchedule) and warmup > (first := round(schedule.drops[0].at * steps)):
        return (
            f"optimizer.schedule.warmup_steps = {warmup} goes beyond optimizer.schedule.drops.0.at = "
            f"{schedule.drops[0].at}, which is step {first} of train.steps = {steps}: the peak is never kept; use at "
            f"most {first}, or more train.steps"
        )
    if needed <= steps:
        return None
    words = " and ".join(f"{key} = {value}" for key, value in parts.items())
    return (
        f"{words} are more than train.steps = {steps}: what comes last has {steps - warmup} steps after the warm-up; "
        f"make them {needed - steps} less, or use train.steps = {needed}"
    )
