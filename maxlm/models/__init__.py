"""The decoder. One letter per dim, the same in every comment, einsum and shape of this package:

B batch        T query length    S key length      L layers
D d_model      F d_ff            V vocabulary
N query heads  K key/value heads G = N / K         H head_dim
"""

from maxlm.models.decoder import (
    Decoder,
    abstract_parameters,
    bind,
    declared,
    init_parameters,
    parameter_dims,
)
from maxlm.models.execution import Execution
from maxlm.models.tokens import Tokens

__all__ = [
    "Decoder",
    "Execution",
    "Tokens",
    "abstract_parameters",
    "bind",
    "declared",
    "init_parameters",
    "parameter_dims",
]
