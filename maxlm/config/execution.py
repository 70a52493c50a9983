"""How a model runs, whatever it is: number format, what the backward pass finds saved, kernels."""

from __future__ import annotations

import enum
from dataclasses import field
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, NotNegative, Positive, Range, config
from maxlm.config.stability import LossScale


class Dtype(enum.Enum):
    """Floating-point formats by their usual names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self is Dtype.FLOAT32 else 2


class WeightFormat(enum.Enum):
    """How weights of products are held. What the result of a product is in, is `execution.dtype` always; tables of
    tokens have 8 bits at least. docs/quantize.md has sizes and measurements."""

    DTYPE = "dtype"
    """In `execution.dtype`."""
    INT8 = "int8"
    """8 bits, with a float32 scale for each output (arXiv:2208.07339, section 2.1): a quarter of float32's memory, half
    of bfloat16's, at the price of a little quality."""
    W8A8 = "w8a8"
    """The same, and activations in 8 bits too, with a scale for each token: integer products."""
    LLM_INT8 = "llm_int8"
    """The same, but activations beyond 6 in `execution.dtype` (LLM.int8(), arXiv:2208.07339, section 3)."""
    FP8 = "fp8"
    """8-bit floats (e4m3, arXiv:2209.05433), with a float32 scale for each output."""
    INT4 = "int4"
    """4 bits, symmetric around 0, with a bfloat16 scale for each group of inputs."""
    INT4_AFFINE = "int4_affine"
    """The same, with an offset for each group, too."""
    NF4 = "nf4"
    """4 bits, quantiles of a normal distribution, with a scale in 8 bits for 64 inputs (QLoRA, arXiv:2305.14314)."""


class Remat(enum.Enum):
    """What the backward pass finds saved, and what it computes again (activation checkpointing, arXiv:1604.06174)."""

    NONE = "none"
    """Save every intermediate: most memory, no recomputation."""
    DOTS = "dots"
    """Save the outputs of the weight multiplications, recompute the rest."""
    GLU = "glu"
    """As NAMES, and save both inputs of a gated MLP's product too; recompute attention's output projection, and what
    is in no product. Experts are recomputed."""
    NAMES = "names"
    """Save the attention output and the inputs of the attention kernel; recompute the MLP."""
    QKV = "qkv"
    """Save the inputs of the attention kernel; recompute attention and MLP."""
    FULL = "full"
    """Save only each block's input: least memory, about a third more FLOPs."""
    OFFLOAD = "offload"
    """As NAMES, but the saved arrays wait in the host's memory."""


class Backend(enum.Enum):
    """What an operation runs as; docs/kernels.md tells what each can do."""

    AUTO = "auto"
    """The first that can, in the order recorded for the chip."""
    XLA = "xla"
    """XLA operations in blocks; every device."""
    TPU = "tpu"
    """Our Pallas kernel for TPUs."""
    GPU = "gpu"
    """Our Pallas kernel for NVIDIA Hopper."""
    CUDNN = "cudnn"
    """cuDNN's attention, on NVIDIA GPUs; not for packed documents."""


class GluSave(enum.Enum):
    """What a gated MLP keeps for its backward pass, as far as `remat` does not decide that already."""

    AG = "ag"
    """Both pre-activations, 2 x d_ff numbers a token."""
    NONE = "none"
    """Its input alone; the backward pass computes them again."""


@config("execution.kernels.", changes=Changes.TRAINING)
class KernelConfig:
    """How the heavy operations of whole sequences run; a named backend that cannot do what the model needs is an error.

    Decoding with a cache, and a finished run that is opened elsewhere, take AUTO.
    """

    attention: Backend = Backend.AUTO
    """What attention runs as."""
    glu: Backend = Backend.AUTO
    """What gated MLPs run as; cudnn has none."""
    glu_save: GluSave = GluSave.AG
    """What a gated MLP keeps for its backward pass: both pre-activations ("ag") or its input alone ("none")."""

    def __post_init__(self) -> None:
        if self.glu is Backend.CUDNN:
            raise UserError("execution.kernels.glu = cudnn does not exist; use auto, xla, tpu or gpu")


@config("execution.products.", changes=Changes.TRAINING)
class PlainProducts:
    """In `execution.dtype`."""


@config("execution.products.", changes=Changes.TRAINING)
class Int8Products:
    """Integers of 8 bits, in the forward pass and for the gradient of activations, each token and each output with a
    scale of its own, made anew for each product; the gradient of weights in `execution.dtype`, as it sums over all
    tokens (SwitchBack, arXiv:2304.13013, section 2.2, with vector-wise scales)."""

    experts: bool = False
    """Those of routed experts too, as XLA products of blocks of rows, without our kernel."""


@config("execution.products.scaling.", changes=Changes.TRAINING)
class CurrentScaling:
    """Of the array's own largest number, before it is rounded: exact, at the price of reading it twice and, on a mesh,
    of asking all devices before each product."""


@config("execution.products.scaling.", changes=Changes.TRAINING)
class DelayedScaling:
    """Of the largest numbers of earlier steps, which the state keeps for each product (the recipe of NVIDIA's
    Transformer Engine): nothing is waited for, and what is larger than any of them becomes the largest that
    there is. In the first step scales are 1."""

    history: Positive[int] = 16
    """Steps of which the largest number counts."""
    margin: NotNegative[int] = 0
    """Powers of 2 that are left above it."""


@config("execution.products.", changes=Changes.TRAINING)
class Float8Products:
    """8-bit floats: activations and weights in e4m3, gradients in e5m2 (arXiv:2209.05433, section 3.2), all three
    products. Each array has one scale, by which its largest number becomes the largest that there is."""

    scaling: CurrentScaling | DelayedScaling = field(default_factory=CurrentScaling)
    """What scales are made of."""
    experts: bool = False
    """Those of routed experts too, as XLA products of blocks of rows, without our kernel; their scales are current
    ones, of each device's own numbers."""


@config("execution.products.", changes=Changes.TRAINING)
class RoundedWeights:
    """In `execution.dtype`, by weights rounded to what they are to be held in later (quantisation-aware training). The
    gradient passes the rounding as if it were not there (straight-through, arXiv:1308.3432, section 4)."""

    format: WeightFormat = WeightFormat.INT8
    """What `maxlm.quantize` is to make of them by the nearest numbers."""
    group_size: Annotated[int, Range(ge=8)] = 128
    """Numbers of 4 bits that share a scale."""

    def __post_init__(self) -> None:
        if self.format in (WeightFormat.DTYPE, WeightFormat.W8A8, WeightFormat.LLM_INT8):
            raise UserError(
                f"execution.products.format = {self.format.value} rounds no weight, or activations too; use int8, "
                "fp8, int4, int4_affine or nf4"
            )


Products = PlainProducts | Int8Products | Float8Products | RoundedWeights


@config("execution.", changes=Changes.TRAINING)
class ExecutionConfig:
    """How the model runs. Nothing here changes what it is: parameters and checkpoints are the same for every value."""

    dtype: Dtype = Dtype.BFLOAT16
    """Format of activations and matrix multiplications; that of parameters is `optimizer.parameter_format`. float16 is
    for GPUs without bfloat16 (V100, T4), and trains with a scaled loss."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """What the loss is multiplied by in float16."""
    remat: Remat = Remat.FULL
    """What the backward pass computes again: nothing ("none") up to all but each block's input ("full")."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """Which kernels compute it."""
    products: Products = field(default_factory=PlainProducts)
    """In which numbers training multiplies by the weights of layers."""
    scan_layers: bool = True
    """Compile one pattern and loop over it (fast to compile), or unroll every layer."""
