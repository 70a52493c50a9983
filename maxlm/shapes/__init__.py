"""Every array of a model, declared once, without jax: what builds models, counts bytes and FLOPs, and names weights.

arrays.py: name, shape, dims, initial value, role of each array; what decoding keeps of each token
count.py: parameters and FLOPs, counted from them
device.py: a device's part of each
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
    mlp,
    norm,
    shared_experts,
)
from maxlm.shapes.count import FlopsPerToken, ParameterCount, flops_per_token, mfu, parameter_count
from maxlm.shapes.device import FLOAT32, device_bytes, device_shape

__all__ = [
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
    "block_norms",
    "device_bytes",
    "device_shape",
    "embedding",
    "flops_per_token",
    "head",
    "head_norms",
    "kept",
    "mfu",
    "mlp",
    "norm",
    "parameter_count",
    "shared_experts",
]
