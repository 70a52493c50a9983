"""Every array of a model, declared once, without jax: what builds models, counts bytes and FLOPs, and names weights.

arrays.py: name, shape, dims, initial value, role of each array; what decoding keeps of each token
count.py: parameters and FLOPs, counted from them
pools.py: blocks of what decoding keeps
device.py: a device's part of each, in training and as decoding holds it
"""

from maxlm.shapes.arrays import (
    Array,
    Constant,
    Init,
    Kept,
    Normal,
    Part,
    Role,
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
    norm,
    shared_experts,
)
from maxlm.shapes.count import (
    FlopsPerToken,
    ParameterCount,
    decoding_flops,
    flops_per_token,
    mfu,
    parameter_count,
    prefill_flops,
)
from maxlm.shapes.device import FLOAT32, device_bytes, device_cuts, device_shape
from maxlm.shapes.pools import CACHE_SHARE, block_bytes, cache_blocks, pools_bytes, window_of, windows

__all__ = [
    "CACHE_SHARE",
    "FLOAT32",
    "Array",
    "Constant",
    "FlopsPerToken",
    "Init",
    "Kept",
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
    "decoding_flops",
    "device_bytes",
    "device_cuts",
    "device_shape",
    "embedding",
    "flops_per_token",
    "head",
    "head_norms",
    "kept",
    "medusa_head",
    "mfu",
    "mlp",
    "norm",
    "parameter_count",
    "pools_bytes",
    "prefill_flops",
    "shared_experts",
    "window_of",
    "windows",
]
