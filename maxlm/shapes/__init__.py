"""Every array of a model, declared once, without jax: what builds models, counts bytes and FLOPs, and names weights.

array.py: what is said of one: name, shape, dims, initial value, role
arrays.py: each array of a model; what decoding keeps of each token
additions.py: what an adapter adds, and what it leaves as it is
count.py: parameters and FLOPs, counted from them
pools.py: blocks of what decoding keeps
base_bytes.py: parameters as they are held, and a base under an adapter
device.py: a device's part of each, in training and as decoding holds it
optimizer_state.py: what an optimizer keeps for them, and which of them are matrices to it
"""

from maxlm.shapes.additions import PREFIX, is_input_of, is_linear, targets
from maxlm.shapes.array import Array, Constant, Init, Normal, Part, Role
from maxlm.shapes.arrays import (
    MTP,
    Kept,
    arrays,
    attention,
    block,
    block_norms,
    embedding,
    head,
    head_norms,
    kept,
    medusa_head,
    mlp,
    mtp_module,
    mtp_norms,
    norm,
    shared_experts,
)
from maxlm.shapes.base_bytes import decoding_bytes, held_bytes, is_rounded
from maxlm.shapes.count import (
    FlopsPerToken,
    ParameterCount,
    decoding_flops,
    flops_per_token,
    mfu,
    parameter_count,
    prefill_flops,
    reading_flops,
)
from maxlm.shapes.device import FLOAT32, device_bytes, device_cuts, device_shape
from maxlm.shapes.optimizer_state import MatrixDims, matrix_dims, optimizer_bytes, seen_by_optimizer
from maxlm.shapes.pools import CACHE_SHARE, block_bytes, cache_blocks, pools_bytes, window_of, windows

__all__ = [
    "CACHE_SHARE",
    "FLOAT32",
    "MTP",
    "PREFIX",
    "Array",
    "Constant",
    "FlopsPerToken",
    "Init",
    "Kept",
    "MatrixDims",
    "Normal",
    "ParameterCount",
    "Part",
    "Role",
    "arrays",
    "attention",
    "block",
    "block_bytes",
    "block_norms",
    "cache_blocks",
    "decoding_bytes",
    "decoding_flops",
    "device_bytes",
    "device_cuts",
    "device_shape",
    "embedding",
    "flops_per_token",
    "head",
    "head_norms",
    "held_bytes",
    "is_input_of",
    "is_linear",
    "is_rounded",
    "kept",
    "matrix_dims",
    "medusa_head",
    "mfu",
    "mlp",
    "mtp_module",
    "mtp_norms",
    "norm",
    "optimizer_bytes",
    "parameter_count",
    "pools_bytes",
    "prefill_flops",
    "reading_flops",
    "seen_by_optimizer",
    "shared_experts",
    "targets",
    "window_of",
    "windows",
]
