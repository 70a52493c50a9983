"""Attention, gated linear units and grouped products as functions of arrays: usable without the rest, on jax alone.

Every operation has one meaning and several bodies: kernels for TPU (Pallas Mosaic) and NVIDIA Hopper (Pallas Mosaic
GPU), plain XLA in blocks for every device, and cuDNN. `explain` says which one a call takes and why; docs/kernels.md
tells the rest.

masks.py: who sees whom, as unions of intervals
dispatch.py: which body runs and why; explain
decision.py: the answer of explain, and tuning/*.json that it comes from
targets.py: the chip that is compiled for
oracle.py: float64 formulas that every body must meet
mixed.py: products of two formats
compat.py: differences between versions of jax
bench.py: command: time the kernels
tune.py: command: find block sizes
"""

from kernels_pallas import masks
from kernels_pallas.attention.api import AttentionGradients, flash_attention, flash_attention_gradients
from kernels_pallas.attention.merge import merge_partials
from kernels_pallas.attention.problem import AttentionBlocks
from kernels_pallas.attention.scores import DistanceBias, Scores
from kernels_pallas.dispatch import explain
from kernels_pallas.glu.api import fused_glu, fused_glu_mlp, plan_glu
from kernels_pallas.glu.problem import GluBlocks
from kernels_pallas.grouped.api import grouped_matmul
from kernels_pallas.grouped.problem import GroupedBlocks
from kernels_pallas.mixed import mixed_einsum
from kernels_pallas.paged.api import paged_attention
from kernels_pallas.paged.problem import CacheScales, PagedBlocks, TokenTree

__all__ = [
    "AttentionBlocks",
    "AttentionGradients",
    "CacheScales",
    "DistanceBias",
    "GluBlocks",
    "GroupedBlocks",
    "PagedBlocks",
    "Scores",
    "TokenTree",
    "explain",
    "flash_attention",
    "flash_attention_gradients",
    "fused_glu",
    "fused_glu_mlp",
    "grouped_matmul",
    "masks",
    "merge_partials",
    "mixed_einsum",
    "paged_attention",
    "plan_glu",
]
