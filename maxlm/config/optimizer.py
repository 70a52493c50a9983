"""Optimizers, what they do to some parameters otherwise, and the average of parameters."""

from __future__ import annotations

import difflib
import enum
import math
import re
from dataclasses import field
from typing import Annotated, NamedTuple

from maxlm.config.dims import PARAMETER_DIMS
from maxlm.config.errors import UserError
from maxlm.config.execution import Dtype
from maxlm.config.fields import BelowOne, Changes, NotEmpty, NotNegative, Positive, config, shown
from maxlm.config.schedule import CosineSchedule, InverseSqrtSchedule, Schedule


@config("optimizer.groups[].match.", changes=Changes.TRAINING)
class NameMatches:
    """Parameters with a part of the name that fits a regular expression."""

    pattern: NotEmpty[str]
    """Looked for anywhere in names like blocks/0/attention/q_proj, as Python's re.search; `^embed$` is one alone."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"optimizer.groups[].match.pattern = {shown(self.pattern)} is no regular expression ({error}); write "
                "for example attention/._proj"
            ) from error


@config("optimizer.groups[].match.", changes=Changes.TRAINING)
class HasDim:
    """Parameters with a dim of a name."""

    dim: NotEmpty[str]
    """Such as vocab, heads, experts or vector: a key of the table in `config/dims.py`."""

    def __post_init__(self) -> None:
        if self.dim not in PARAMETER_DIMS:
            near = difflib.get_close_matches(self.dim, PARAMETER_DIMS, n=3, cutoff=0.0)
            raise UserError(
                f"optimizer.groups[].match.dim = {shown(self.dim)} is the name of no dim; use {' or '.join(near)}"
            )


@config("optimizer.groups[].", changes=Changes.TRAINING)
class ParameterGroup:
    """Some parameters that learn otherwise than the rest. Of several groups that fit one, the first counts."""

    match: NameMatches | HasDim
    """Which."""
    learning_rate: NotNegative[float] = 1.0
    """Factor of their learning rate, also of what weight decay is multiplied by; 0: they stay as they are."""
    weight_decay: NotNegative[float] | None = None
    """In place of the optimizer's, for all of them, norms and biases too; None: as the others."""


@config("optimizer.average.", changes=Changes.TRAINING)
class Ema:
    """average = d * average + (1 - d) * parameters after each step: 4 bytes a parameter, kept with the optimizer."""

    decay: BelowOne = 0.999
    """The d of later steps; about 1 / (1 - d) steps are in it."""
    warm_up: bool = True
    """Step t, counted from 0, has d = min(decay, (1 + t) / (10 + t)), so that the first parameters are soon
    forgotten."""


class ParameterFormat(enum.Enum):
    """How a run holds the matrices that it trains; tables that are looked up, routers, norms and biases are float32."""

    FLOAT32 = "float32"
    """In the numbers that a step computes them in."""
    BFLOAT16 = "bfloat16"
    """In half of the memory, without a float32 copy: a step computes the new ones in float32 and rounds them up or down
    by chance, so that they are right in the mean (stochastic rounding; Gupta et al. 2015, arXiv:1502.02551, section 3;
    Zamirai et al. 2020, arXiv:2010.06192)."""
    BFLOAT16_NEAREST = "bfloat16_nearest"
    """The same, to the nearest: updates below half the distance of two neighbours, 1/512 to 1/256 of a number, are
    lost. For comparison."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self is ParameterFormat.FLOAT32 else 2


class Parameter(NamedTuple):
    """What an optimizer's memory for an array depends on."""

    shape: tuple[int, ...]
    stacked: int
    """Layers in it."""
    product: bool
    """Whether it multiplies activations: no table that is looked up, router, norm or bias."""
    matrix: bool
    """Whether Muon makes its updates orthogonal."""


class StateArray(NamedTuple):
    """An array that is kept for a parameter. With as many dims it is cut over devices as the parameter's gradient is,
    along the dims that divide; with fewer it is small, and on every device."""

    shape: tuple[int, ...]
    itemsize: int = Dtype.FLOAT32.itemsize
    """Bytes of a number."""


@config("optimizer.", changes=Changes.TRAINING)
class AnyOptimizer:
    """What all of them have."""

    learning_rate: Positive[float] = 3e-4
    """Peak learning rate."""
    schedule: Schedule = field(default_factory=CosineSchedule)
    """Learning rate as a function of the step."""
    weight_decay: NotNegative[float] = 0.1
    """Applied to weight matrices; never to norms or biases."""
    clip_norm: Positive[float] | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters that learn otherwise."""
    average: Annotated[Ema | None, Changes.IDENTITY] = None
    """A mean of the parameters of past steps, kept beside them; None: none."""
    moment_dtype: Annotated[Dtype, Changes.IDENTITY] = Dtype.FLOAT32
    """Format in which the first moment, or the momentum, is kept; bfloat16 saves 2 bytes a parameter. Second moments
    are float32 always: with b2 near 1 their steps are smaller than bfloat16 can tell apart."""
    parameter_format: Annotated[ParameterFormat, Changes.IDENTITY] = ParameterFormat.FLOAT32
    """Format in which the matrices that are trained are kept; bfloat16 saves 2 bytes a parameter, and 2 of its gradient
    where there is one micro-batch."""

    def __post_init__(self) -> None:
        if self.moment_dtype is Dtype.FLOAT16:
            raise UserError(
                "optimizer.moment_dtype = float16 loses the moments of small gradients, whose scale no step knows; use "
                "float32 or bfloat16"
            )


@config("optimizer.eight_bit.", changes=Changes.IDENTITY)
class EightBitMoments:
    """Numbers of 8 bits, each a place in a table that is dense near 0, times the largest of its block (Dettmers et al.
    2022, arXiv:2110.02861, section 2)."""

    block: Positive[int] = 256
    """Neighbours along the last dim that share a scale; all of it, if it is shorter."""
    min_size: NotNegative[int] = 4096
    """Matrices with fewer numbers, in one layer, are kept as without this; so are tables of embeddings, routers, norms
    and biases of any size."""

    def takes(self, of: Parameter) -> bool:
        """Whether this parameter's moments are kept so."""
        return of.product and math.prod(of.shape) // of.stacked >= self.min_size

    def state(self, of: Parameter) -> tuple[StateArray, ...]:
        """Codes and scales of both moments."""
        *others, last = of.shape
        scales = StateArray((*others, -(-last // min(self.block, last))))
        return 2 * (StateArray(of.shape, 1), scales)


@config("optimizer.", changes=Changes.TRAINING)
class AdamW(AnyOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    b1: BelowOne = 0.9
    """Share of the first moment that a step keeps."""
    b2: BelowOne = 0.95
    """Share of the second moment that a step keeps."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment, by which an update is divided."""
    eight_bit: Annotated[EightBitMoments | None, Changes.IDENTITY] = None
    """Both moments of large matrices in 8 bits, which saves 6 bytes a parameter; None: none in 8 bits."""

    def state(self, of: Parameter, layers: int) -> tuple[StateArray, ...]:
        """What it keeps for a parameter, of a model whose pattern occurs `layers` times; no counters, no average."""
        if self.eight_bit is not None and self.eight_bit.takes(of):
            return self.eight_bit.state(of)
        return StateArray(of.shape, self.moment_dtype.itemsize), StateArray(of.shape)


@config("optimizer.", changes=Changes.TRAINING)
class Adafactor(AnyOptimizer):
    """Adam with a factored second moment and, unless it is asked for, no first one (Shazeer & Stern 2018,
    arXiv:1804.04235). The learning rate is the paper's relative step size, see `InverseSqrtSchedule`."""

    learning_rate: Positive[float] = 1e-2
    """Peak learning rate; multiplied by the parameter's RMS when scale_by_parameter is set."""
    schedule: Schedule = field(default_factory=InverseSqrtSchedule)
    """Learning rate as a function of the step."""
    weight_decay: NotNegative[float] = 0.0
    """Applied to weight matrices; never to norms or biases."""
    b1: BelowOne = 0.0
    """Share of the mean of updates that a step keeps, before the learning rate and without correction of its beginning;
    0: there is none, which saves its memory."""
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

    def state(self, of: Parameter, layers: int) -> tuple[StateArray, ...]:
        """What it keeps for a parameter, of a model whose pattern occurs `layers` times; no counters, no average."""
        first = (StateArray(of.shape, self.moment_dtype.itemsize),) if self.b1 else ()
        *_, second, largest = sorted((1, *of.shape))
        if len(of.shape) < 2 or second < self.smallest_factored(layers):
            return *first, StateArray(of.shape)
        size = math.prod(of.shape)
        return *first, StateArray((size // largest,)), StateArray((size // second,))


@config("optimizer.", changes=Changes.TRAINING)
class Lion(AnyOptimizer):
    """The sign of a moving average of gradients (Chen et al. 2023, arXiv:2302.06675): half of AdamW's memory."""

    learning_rate: Positive[float] = 1e-4
    """Peak learning rate; 3 to 10 times smaller than AdamW's, with a weight decay that is so much larger."""
    weight_decay: NotNegative[float] = 0.5
    """Applied to weight matrices; never to norms or biases."""
    b1: BelowOne = 0.9
    """Share of the average in the sum whose sign is the step."""
    b2: BelowOne = 0.99
    """Share of the average that a step keeps."""

    def state(self, of: Parameter, layers: int) -> tuple[StateArray, ...]:
        """What it keeps for a parameter, of a model whose pattern occurs `layers` times; no counters, no average."""
        return (StateArray(of.shape, self.moment_dtype.itemsize),)


class MuonScale(enum.Enum):
    """What an orthogonalised update of a matrix is multiplied by; its RMS is about 1 / sqrt(max(inputs, outputs))."""

    JORDAN = "jordan"
    """sqrt(max(1, outputs / inputs)): a learning rate of its own kind, about 0.02."""
    MOONLIGHT = "moonlight"
    """0.2 * sqrt(max(inputs, outputs)): updates as large as AdamW's, whose learning rate and decay will do
    (arXiv:2502.16982, section 2.2)."""


@config("optimizer.", changes=Changes.TRAINING)
class Muon(AnyOptimizer):
    """Momentum whose singular values are all made about 1, for each matrix of a layer and each expert's; AdamW for
    embeddings, heads, routers, norms, biases and adapters (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982)."""

    momentum: BelowOne = 0.95
    """Share of the momentum that a step keeps."""
    nesterov: bool = True
    """Look ahead: the update is made of gradient + momentum * new momentum."""
    newton_schulz_steps: Positive[int] = 5
    """Steps of the iteration that makes singular values 1; with its coefficients they end between 0.65 and 1.2."""
    newton_schulz_dtype: Dtype = Dtype.BFLOAT16
    """Number format of its products."""
    scale: MuonScale = MuonScale.MOONLIGHT
    """What an update is multiplied by."""
    adam_learning_rate: Positive[float] = 3e-4
    """Peak learning rate of what AdamW trains; the schedule is the same."""
    b1: BelowOne = 0.9
    """Share of AdamW's first moment that a step keeps."""
    b2: BelowOne = 0.95
    """Share of AdamW's second moment that a step keeps."""
    eps: Positive[float] = 1e-8
    """Added to the root of AdamW's second moment."""

    def state(self, of: Parameter, layers: int) -> tuple[StateArray, ...]:
        """What it keeps for a parameter, of a model whose pattern occurs `layers` times; no counters, no average."""
        first = StateArray(of.shape, self.moment_dtype.itemsize)
        return (first,) if of.matrix else (first, StateArray(of.shape))


@config("optimizer.", changes=Changes.TRAINING)
class Sgd(AnyOptimizer):
    """Gradient descent with momentum (Sutskever et al. 2013) and decoupled weight decay (arXiv:1711.05101)."""

    learning_rate: Positive[float] = 0.1
    """Peak learning rate."""
    weight_decay: NotNegative[float] = 0.0
    """Applied to weight matrices; never to norms or biases."""
    momentum: BelowOne = 0.9
    """Share of the sum of past gradients that a step keeps; 0: there is none, which saves its memory."""
    nesterov: bool = False
    """Look ahead: the update is gradient + momentum * new sum."""

    def state(self, of: Parameter, layers: int) -> tuple[StateArray, ...]:
        """What it keeps for a parameter, of a model whose pattern occurs `layers` times; no counters, no average."""
        return (StateArray(of.shape, self.moment_dtype.itemsize),) if self.momentum else ()


OptimizerConfig = AdamW | Adafactor | Lion | Muon | Sgd
