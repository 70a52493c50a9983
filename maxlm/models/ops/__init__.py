"""The model's heavy operations. This package alone imports `kernels_pallas`: here kernels meet the mesh.

The compiler cannot split a kernel over devices by itself, so kernels run inside `shard_map`.

dense.py: products, gated unit, embedding
attention.py: attention within sequences, wherever their keys are
paged.py: attention to the blocks of a cache
ring.py: keys go round; zig-zag order
ulysses.py: heads for positions
experts.py: tokens to their experts and back
narrow_groups.py: experts' products in 8 bits
backends.py: kernels named in the config
"""

from kernels_pallas import DistanceBias, Scores, TokenTree
from maxlm.models.ops.attention import attention, causal
from maxlm.models.ops.dense import (
    activate,
    bare,
    begun,
    dense,
    embed,
    glu,
    logits,
    of_experts,
    project,
    prompted,
    small_mlp,
    unit_rows,
)
from maxlm.models.ops.experts import (
    EXPERT_IN_DIMS,
    EXPERT_OUT_DIMS,
    ExpertWeights,
    GatedUnit,
    capacity_experts,
    dropless_experts,
    picked_experts,
    top_k,
)
from maxlm.models.ops.paged import CacheBlocks, attention_to_blocks
from maxlm.models.weights.by_layer import in_layer

__all__ = [
    "EXPERT_IN_DIMS",
    "EXPERT_OUT_DIMS",
    "CacheBlocks",
    "DistanceBias",
    "ExpertWeights",
    "GatedUnit",
    "Scores",
    "TokenTree",
    "activate",
    "attention",
    "attention_to_blocks",
    "bare",
    "begun",
    "capacity_experts",
    "causal",
    "dense",
    "dropless_experts",
    "embed",
    "glu",
    "in_layer",
    "logits",
    "of_experts",
    "picked_experts",
    "project",
    "prompted",
    "small_mlp",
    "top_k",
    "unit_rows",
]
