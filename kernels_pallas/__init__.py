"""Attention and gated linear units as functions of arrays: usable by themselves, importing nothing but jax.

Every operation has one meaning and several bodies. So far there is one body each, plain XLA in blocks, which runs on
every device and is the specification that others must equal.
"""

from kernels_pallas.attention.masks import Causal
from kernels_pallas.attention.xla import flash_attention
from kernels_pallas.glu.xla import fused_glu
from kernels_pallas.mixed import mixed_einsum

__all__ = ["Causal", "flash_attention", "fused_glu", "mixed_einsum"]
