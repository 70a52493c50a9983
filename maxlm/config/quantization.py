"""Ways to make the weights of a trained model smaller."""

from __future__ import annotations

import enum

from maxlm.config.execution import WeightFormat


class QuantMethod(enum.Enum):
    """What is rounded to what, and by which measure. docs/quantize.md compares them."""

    GGUF = "gguf"
    """The blocks of 32 that a GGUF file has, found again in its numbers: nothing is rounded."""
    INT8 = "int8"
    """Nearest of 8 bits, a scale for each output."""
    FP8 = "fp8"
    """Nearest 8-bit float (e4m3), a scale for each output."""
    W8A8 = "w8a8"
    """Nearest of 8 bits, activations too."""
    LLM_INT8 = "llm_int8"
    """The same, but for activations beyond 6 (LLM.int8(), arXiv:2208.07339)."""
    SMOOTHQUANT = "smoothquant"
    """As w8a8, after a part of the activations' spread has gone into the weights (arXiv:2211.10438)."""
    NF4 = "nf4"
    """Nearest quantile of a normal distribution (QLoRA, arXiv:2305.14314)."""
    INT4 = "int4"
    """Nearest of 4 bits, a scale for each group of inputs."""
    INT4_AFFINE = "int4_affine"
    """The same, with an offset for each group."""
    AWQ = "awq"
    """As int4, after inputs that matter have been scaled up (arXiv:2306.00978)."""
    GPTQ = "gptq"
    """As int4, but each rounding makes up for the errors of those before (arXiv:2210.17323)."""
    ALL = "all"
    """All of these, one after the other: the table alone, to choose by."""

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self in (QuantMethod.SMOOTHQUANT, QuantMethod.AWQ, QuantMethod.GPTQ)

    @property
    def format(self) -> WeightFormat:
        """What its weights are held in, where it finds nothing better."""
        match self:
            case QuantMethod.SMOOTHQUANT:
                return WeightFormat.W8A8
            case QuantMethod.AWQ | QuantMethod.GPTQ:
                return WeightFormat.INT4
            case QuantMethod.GGUF:
                return WeightFormat.DTYPE
            case _:
                return WeightFormat(self.value)
