"""cuDNN's flash attention, called through `jax.nn.dot_product_attention`. It brings its own backward pass."""

from __future__ import annotations

import jax

from kernels_pallas.attention.problem import AttentionProblem, Operands
from kernels_pallas.targets import Family, Target


def unsupported(problem: AttentionProblem, target: Target) -> str | None:
    """Why cuDNN cannot do this, or None."""
    if target.family is not Family.GPU:
        return f"cuDNN runs on NVIDIA GPUs, and the target is {target.name}"
    if problem.dtype.name not in ("bfloat16", "float16"):
        return f"{problem.dtype.name}: it takes bfloat16 and float16"
    widest = 256 if target.hopper else 128
    H = problem.H
    if problem.Hv != H or H % 8 or widest < H:
        return f"H {problem.H}, Hv {problem.Hv}: it takes equal head dims, multiples of 8 up to {widest}"
    for name, present in (
        ("segment_ids", problem.segments),
        ("visible_to", problem.visible_to),
        ("soft_cap", problem.soft_cap is not None),
        ("alibi_slopes", problem.alibi),
        ("relative_bias", problem.buckets is not None),
        ("sinks", problem.sinks),
        ("return_lse", problem.return_lse),
        ("a q_offset other than 0", problem.q_offset != 0),
    ):
        if present:
            return f"{name} (only as a T x S array in memory, or not at all)"
    window = _window(problem)
    if window is not None and window[0] is not None and problem.T > problem.S:
        return f"T {problem.T} > S {problem.S} with a window: queries that see no key"
    if window is None:
        return f"mask {problem.mask}: it takes full, causal, and causal with a window"
    return None


def attend(problem: AttentionProblem, operands: Operands) -> jax.Array:
    """Attention of a problem that is not `unsupported`: [B, T, N, Hv]."""
    window = _window(problem)
    assert window is not None
    left, is_causal = window
    return jax.nn.dot_product_attention(
        operands.q,
        operands.k,
        operands.v,
        scale=problem.scale,
        is_causal=is_causal,
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    )


def _window(problem: AttentionProblem) -> tuple[int | None, bool] | None:
    """(keys to the left or None, is causal), or None for a mask that cuDNN has no name for."""
    match problem.mask.as_window():
        case (None, None):
            return None, False
        case (left, 0):
            return left, True
    return None


def default_blocks(problem: AttentionProblem, target: Target) -> None:
    """None: cuDNN chooses its own."""
