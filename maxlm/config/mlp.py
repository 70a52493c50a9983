"""The MLP of a block that every token uses whole: plain or gated."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from maxlm.config.errors import require_positive


class Activation(enum.Enum):
    """The nonlinearity of an MLP, or of the gate of a gated one."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    SIGMOID = "sigmoid"
    IDENTITY = "identity"


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(activation(up(x))) (Vaswani et al. 2017, arXiv:1706.03762, section 3.3, with ReLU; GPT-2 with GELU)."""

    d_ff: int
    activation: Activation = Activation.GELU
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive("model.blocks[].mlp.d_ff", self.d_ff)


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). SwiGLU with the default activation."""

    d_ff: int
    activation: Activation = Activation.SILU
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive("model.blocks[].mlp.d_ff", self.d_ff)
