"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from maxlm.config.errors import UserError, require_positive
from maxlm.config.execution import Dtype


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to final_fraction of the peak at the end (LLaMA: 0.1)."""

    warmup_steps: int = 0
    final_fraction: float = 0.1


@dataclass(frozen=True, kw_only=True)
class LinearSchedule:
    """Linear warm-up, then a straight line down to final_fraction of the peak at the end."""

    warmup_steps: int = 0
    final_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class InverseSqrtSchedule:
    """Linear warm-up, then peak * sqrt(warmup_steps / step) (Vaswani et al. 2017)."""

    warmup_steps: int = 1000


@dataclass(frozen=True, kw_only=True)
class WsdSchedule:
    """Warm-up, stable, decay: constant at the peak, then linear over the last decay_steps (arXiv:2404.06395)."""

    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """Linear warm-up, then the peak for ever."""

    warmup_steps: int = 0


Schedule = CosineSchedule | LinearSchedule | InverseSqrtSchedule | WsdSchedule | ConstantSchedule


class OptimizerState(NamedTuple):
    """What an optimizer keeps for one array of parameters."""

    like_parameter: tuple[int, ...]
    """Bytes of a number of each array that has the parameter's shape, and lies as its gradient does."""
    everywhere: int = 0
    """Bytes of the rest, which is small, so that every device has it whole."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = field(default_factory=CosineSchedule)
    weight_decay: float = 0.1
    """Applied to weight matrices; never to norms or biases."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moment_dtype: Dtype = Dtype.FLOAT32
    """Format in which the first moment is kept; bfloat16 saves 2 bytes a parameter. The second is float32 always: with
    b2 near 1 its steps are smaller than bfloat16 can tell apart."""

    def __post_init__(self) -> None:
        _check(self)
        for key in ("b1", "b2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"optimizer.{key} = {getattr(self, key)} must lie in [0, 1)")

    def state(self, shape: tuple[int, ...], layers: int) -> OptimizerState:
        """What it keeps for an array, of a model whose pattern occurs `layers` times."""
        return OptimizerState((self.moment_dtype.itemsize, Dtype.FLOAT32.itemsize))


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adam with a factored second moment and no first one (Shazeer & Stern 2018, arXiv:1804.04235)."""

    learning_rate: float = 1e-2
    """Peak learning rate; multiplied by the parameter's RMS when scale_by_parameter is set."""
    schedule: Schedule = field(default_factory=InverseSqrtSchedule)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    decay_rate: float = 0.8
    """The second moment's decay at step t is 1 - t^(-decay_rate)."""
    update_clip: float | None = 1.0
    """Largest RMS of one parameter's update before the learning rate."""
    scale_by_parameter: bool = True
    min_factored_dim: int = 128
    """Parameters whose second largest dim is smaller keep a full second moment."""

    def __post_init__(self) -> None:
        _check(self)

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


def _check(optimizer: OptimizerConfig) -> None:
    require_positive("optimizer.learning_rate", optimizer.learning_rate)
    for key in ("warmup_steps", "decay_steps", "final_fraction"):
        if getattr(optimizer.schedule, key, 0) < 0:
            raise UserError(
                f"optimizer.schedule.{key} = {getattr(optimizer.schedule, key)} must not be negative; use 0"
            )
    if optimizer.weight_decay < 0:
        raise UserError(f"optimizer.weight_decay = {optimizer.weight_decay} must not be negative")
    if optimizer.clip_norm is not None:
        require_positive("optimizer.clip_norm", optimizer.clip_norm)
