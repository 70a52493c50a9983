"""The MLP of a block that every token uses whole: plain or gated."""

from __future__ import annotations

import enum

from maxlm.config.fields import Changes, Positive, config


class Activation(enum.Enum):
    """The nonlinearity of an MLP, or of the gate of a gated one, that has no number."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"
    """relu(x)^2 (Primer, So et al. 2021, arXiv:2109.08668, section 4.2)."""
    SIGMOID = "sigmoid"
    IDENTITY = "identity"


@config("model.blocks[].mlp.activation.", changes=Changes.IDENTITY)
class Swish:
    """x sigmoid(beta x) (Ramachandran et al. 2017, arXiv:1710.05941). With beta = 1 it is SILU, with 1.702 the quick
    GELU of CLIP and gpt-oss (arXiv:1606.08415, section 2)."""

    beta: Positive[float] | None = None
    """Its number; None: learned, one for each layer, which begins at 1."""


Nonlinearity = Activation | Swish


@config("model.blocks[].mlp.", changes=Changes.IDENTITY)
class Mlp:
    """down(activation(up(x))) (Vaswani et al. 2017, arXiv:1706.03762, section 3.3, with ReLU; GPT-2 with GELU)."""

    d_ff: Positive[int]
    """Width of the hidden layer."""
    activation: Nonlinearity = Activation.GELU
    """Nonlinearity of the hidden layer."""
    bias: bool = False
    """Every projection adds a learned vector."""


@config("model.blocks[].mlp.", changes=Changes.IDENTITY)
class GatedMlp:
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). SwiGLU with the default activation."""

    d_ff: Positive[int]
    """Width of the hidden layer."""
    activation: Nonlinearity = Activation.SILU
    """Nonlinearity of the gate."""
    bias: bool = False
    """Every projection adds a learned vector."""
