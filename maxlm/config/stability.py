"""What keeps a step steady, each off unless it is asked for: float16's loss scale, spikes, the gradient's noise."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import BelowOne, Changes, NotNegative, Positive, Range, config

LEAST_SCALE, MOST_SCALE = 1.0, 2.0**24
"""Of a loss scale. At the least a step that is not finite is the model's fault, not the format's."""


@config("execution.loss_scale.", changes=Changes.TRAINING)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2): the loss is multiplied before its
    gradient is formed, so that float16 can hold what is small, and the gradient divided after it. In use with
    execution.dtype = float16 alone."""

    initial: Annotated[float, Range(ge=LEAST_SCALE, le=MOST_SCALE)] = 2.0**15
    """Scale of the first step, halved whenever something overflows, down to 1."""
    double_every: Positive[int] = 2000
    """Finite steps in a row after which it is doubled, up to 2^24."""


@config("train.spikes.", changes=Changes.TRAINING)
class SpikeRule:
    """Which steps are skipped because loss or gradient norm is far above those of the steps
    before: OLMo-core's rule (its SkipStepOptimizer), over accepted steps alone."""

    sigmas: NotNegative[float] = 0.0
    """Standard deviations above the mean of the window beyond which a step is skipped, for example 6; 0: no step is."""
    window: Annotated[int, Range(ge=2)] = 128
    """Accepted steps, the latest ones, whose losses and gradient norms are looked at."""
    min_steps: Annotated[int, Range(ge=2)] = 64
    """Accepted steps before the rule acts."""
    max_in_row: Positive[int] = 16
    """Spikes one after the other at which the window is emptied, as the loss has then gone to stay."""

    def __post_init__(self) -> None:
        if self.min_steps > self.window:
            raise UserError(
                f"train.spikes.min_steps = {self.min_steps} is more than train.spikes.window = {self.window} holds; "
                f"use at most {self.window}, or a longer window"
            )


@config("train.noise_scale.", changes=Changes.TRAINING)
class NoiseScale:
    """The gradient's noise, from which the batch that is worth its price follows (McCandlish et al. 2018,
    arXiv:1812.06162, appendix A.1)."""

    measure: bool = False
    """Whether it is measured; of micro-batches, so train.micro_batches is at least 2."""
    decay: BelowOne = 0.99
    """Share of the running averages that a step keeps."""
