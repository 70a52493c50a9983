"""What is said of one array of a model."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Normal:
    """Normally distributed around 0."""

    std: float
    by_layer: bool = False
    """In layer l, counted from 1, divided by sqrt(2l)."""


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    value: float


Init = Normal | Constant


class Role(enum.Enum):
    """What an array does: it decides about weight decay and number formats, where the number of dims tells nothing."""

    PRODUCT = "product"
    """Multiplies activations. Decayed; used in the compute dtype."""
    TABLE = "table"
    """Rows of it are looked up by token or position. Decayed; used in the compute dtype."""
    ROUTER = "router"
    """Multiplies activations to scores of experts. Decayed; used in float32, as it decides."""
    OTHER = "other"
    """Scales, biases, tables by head: small. Neither decayed nor cast."""

    @property
    def decays(self) -> bool:
        """Whether weight decay shrinks it."""
        return self is not Role.OTHER

    @property
    def casts(self) -> bool:
        """Whether every use casts it to the compute dtype anyway."""
        return self in (Role.PRODUCT, Role.TABLE)


class Part(enum.Enum):
    """What an array belongs to, for people who count."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    """Projections, their biases, position tables, and the norms of query and key heads."""
    MLP = "mlp"
    """What every token uses: dense MLPs, shared experts and routers."""
    EXPERTS = "experts"
    """Routed experts."""
    NORMS = "norms"
    """Of the residual stream."""
    UNEMBEDDING = "unembedding"
    MEDUSA = "medusa"
    """Heads that guess at later tokens."""
    ADAPTER = "adapter"
    """What is trained beside a model that is not."""


@dataclass(frozen=True)
class Array:
    """One array of a model; all are float32."""

    name: str
    """Its path in the tree of parameters, as blocks/0/attention/q_proj."""
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    """The name of each dim, as in `PARAMETER_DIMS`; "layers" first where layers are stacked."""
    init: Init
    role: Role
    part: Part
    uses: float = 1.0
    """How often a token uses each number of it, in a multiplication or a sum; less than once where a token uses some of
    many experts, 0 where its row is only looked up."""
    inputs: tuple[str, ...] = ()
    """The dims that a product with activations sums over; none if there is no product, or one that is never rounded."""

    learning_rate: float = 1.0
    """Factor of the optimizer's, in the list of a whole model; see `ModelConfig.mup_base_width`. 0: it is not trained,
    and has neither gradient nor optimizer state."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def trained(self) -> bool:
        """In a run of its model."""
        return self.learning_rate > 0

    @property
    def stacked(self) -> int:
        """Layers in the stack; 1 for an array outside of it."""
        return self.shape[0] if self.dims[0] == "layers" else 1
