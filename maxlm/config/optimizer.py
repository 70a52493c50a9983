"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, NamedTuple

from maxlm.config.errors import UserError
from maxlm.config.execution import Dtype
from maxlm.config.fields import BelowOne, Changes, Fraction, NotNegative, Positive, config


@config("optimizer.schedule.", changes=Changes.TRAINING)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to final_fraction of the peak at the end (LLaMA: 0.1)."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a fraction of the peak."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class LinearSchedule:
    """Linear warm-up, then a straight line down to final_fraction of the peak at the end."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class InverseSqrtSchedule:
    """Linear warm-up, then peak * sqrt(warmup_steps / step) (Vaswani et al. 2017)."""

    warmup_steps: NotNegative[int] = 1000
    """Steps that rise in a straight line to the peak."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class WsdSchedule:
    """Warm-up, stable, decay: constant at the peak, then linear over the last decay_steps (arXiv:2404.06395)."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""
    decay_steps: NotNegative[int] = 0
    """Steps at the end that fall in a straight line."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@config("optimizer.schedule.", changes=Changes.TRAINING)
class ConstantSchedule:
    """Linear warm-up, then the peak for ever."""

    warmup_steps: NotNegative[int] = 0
    """Steps that rise in a straight line to the peak."""


Schedule = CosineSchedule | LinearSchedule | InverseSqrtSchedule | WsdSchedule | ConstantSchedule


class OptimizerState(NamedTuple):
    """What an optimizer keeps for one array of parameters."""

    like_parameter: tuple[int, ...]
    """Bytes of a number of each array that has the parameter's shape, and lies as its gradient does."""
    everywhere: int = 0
    """Bytes of the rest, which is small, so that every device has it whole."""


@config("optimizer.", changes=Changes.TRAINING)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    learning_rate: Positive[float] = 3e-4
    """Peak learning rate."""
    schedule: Schedule = field(default_factory=CosineSchedule)
    """Learning rate as a function of the step."""
    weight_decay: NotNegative[float] = 0.1
    """Applied to weight matrices; never to norms or biases."""
    clip_norm: Positive[float] | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    b1: BelowOne = 0.9
    """Share of the first moment that a step keeps."""
    b2: BelowOne = 0.95
    """Share of the second moment that a step keeps."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment, by which an update is divided."""
    moment_dtype: Annotated[Dtype, Changes.IDENTITY] = Dtype.FLOAT32
    """Format in which the first moment is kept; bfloat16 saves 2 bytes a parameter. The second is float32 always: with
    b2 near 1 its steps are smaller than bfloat16 can tell apart."""

    def __post_init__(self) -> None:
        if self.moment_dtype is Dtype.FLOAT16:
            raise UserError(
                "optimizer.moment_dtype = float16 loses the moments of small gradients, whose scale no step knows; use "
                "float32 or bfloat16"
            )

    def state(self, shape: tuple[int, ...], layers: int) -> OptimizerState:
        """What it keeps for an array, of a model whose pattern occurs `layers` times."""
        return OptimizerState((self.moment_dtype.itemsize, Dtype.FLOAT32.itemsize))


@config("optimizer.", changes=Changes.TRAINING)
class Adafactor:
    """Adam with a factored second moment and no first one (Shazeer & Stern 2018, arXiv:1804.04235)."""

    learning_rate: Positive[float] = 1e-2
    """Peak learning rate; multiplied by the parameter's RMS when scale_by_parameter is set."""
    schedule: Schedule = field(default_factory=InverseSqrtSchedule)
    """Learning rate as a function of the step."""
    weight_decay: NotNegative[float] = 0.0
    """Applied to weight matrices; never to norms or biases."""
    clip_norm: Positive[float] | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    decay_rate: Positive[float] = 0.8
    """The second moment's decay at step t is 1 - t^(-decay_rate)."""
    update_clip: Positive[float] | None = 1.0
    """Largest RMS of one parameter's update before the learning rate."""
    scale_by_parameter: bool = True
    """Multiply an update by the RMS of the parameter that it changes."""
    min_factored_dim: Annotated[NotNegative[int], Changes.IDENTITY] = 128
    """Parameters whose second largest dim is smaller keep a full second moment."""

    def smallest_factored(self, layers: int) -> int:
        """Least size of the second largest dim of an array that is factored.

        optax factors the two largest dims. Above `layers` in size, neither is the dim of stacked layers.
        """
        return max(self.min_factored_dim, layers + 1)

    def state(self, shape: tuple[int, ...], layers: int) -> OptimizerState:
        """What it keeps for an array, of a model whose pattern occurs `layers` times."""
        *_, second, largest = sorted((1, *shape))
        if len(shape) < 2 or second < self.smallest_factored(layers):
            return OptimizerState((Dtype.FLOAT32.itemsize,))
        size = math.prod(shape)
        return OptimizerState((), Dtype.FLOAT32.itemsize * (size // largest + size // second))


OptimizerConfig = AdamW | Adafactor
