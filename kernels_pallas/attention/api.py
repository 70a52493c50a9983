"""The public operation: checks, the choice of a body, and the gradient's frame that all bodies share."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import dispatch, masks
from kernels_pallas.attention import cudnn
from kernels_pallas.attention.merge import add_sinks
from kernels_pallas.attention.problem import DTYPES, AttentionBlocks, AttentionProblem, Operands
from kernels_pallas.attention.scores import DistanceBias
from kernels_pallas.masks import Mask


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = masks.causal,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    visible_to: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    relative_bias: DistanceBias | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    blocks: AttentionBlocks | None = None,
    interpret: Any = None,
) -> Any:  # jax.Array, or a pair with return_lse
    """softmax(scores) v without the T x S scores in memory (Dao et al. 2022, arXiv:2205.14135; arXiv:2307.08691).

    scores = cap(scale * q k^T) + biases where the mask and the segments allow, minus infinity elsewhere. Differentiable
    once in q, k, v, the bias table and the sinks, and through the logsumexp. The results are named "attention_out" and
    "attention_lse" (`jax.ad_checkpoint.checkpoint_name`): a remat policy that saves these names and q, k and v does not
    run the forward kernel again; with cuDNN, whose own residuals have no names, it does.

    Args:
        q: [B, T, N, H] float32, bfloat16 or float16; scores and softmax are float32.
        k: [B, S, K, H], where K divides N: query heads n * N/K .. (n + 1) * N/K - 1 share key head n.
        v: [B, S, K, Hv].
        mask: which positions see which; query t has position q_offset + t, key s position s.
        segment_ids: [B, T] int; a query sees only keys of its own segment. None: no segments.
        kv_segment_ids: [B, S] int; defaults to segment_ids.
        visible_to: [B, T] int, in place of all that the mask hides from above: query t sees keys s < visible_to[b, t]
            only, and of the mask only where its intervals start (a window's left side, the begin of a chunk). Causal
            attention is q_offset + t + 1; a prefix LM the prefix's end for the queries in the prefix; a bidirectional
            model S or the document's end. In any order, and also 0: such a query sees nothing. None: the mask alone.
        q_offset: position of the first query, one for all rows or [B]; may be negative.
        scale: defaults to H ** -0.5.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv:2408.00118).
        alibi_slopes: [N]; -slope * |query position - key position| is added (Press et al. 2022, arXiv:2108.12409).
            Constants: their gradient is zero.
        relative_bias: T5's bias, computed in the kernel from its table.
        sinks: [N]; an additional score of a key whose value is 0 (arXiv:2309.17453).
        return_lse: also return log sum exp(scores), for `merge_partials`.
        backend: "xla", "tpu", "gpu" (Hopper) or "cudnn"; "auto" follows the table recorded for the chip.
        blocks: tile sizes; None: from the tuning table.
        interpret: run the named "tpu" or "gpu" kernel in Pallas' interpreter: True, or its parameters object.

    Returns:
        [B, T, N, Hv] in q's dtype; 0 for a query that sees no key. With return_lse also float32 [B, N, T], about -1e30
        for such a query.

    Raises:
        ValueError: arguments do not fit each other, or the named backend cannot do this.
    """
    call, operands = _prepare(
        q,
        k,
        v,
        mask=mask,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        visible_to=visible_to,
        q_offset=q_offset,
        scale=scale,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        sinks=sinks,
        return_lse=return_lse,
        backend=backend,
        blocks=blocks,
        interpret=interpret,
    )
    if call.backend == "cudnn":
        return checkpoint_name(cudnn.attend(call.problem, operands), "attention_out")
    out, lse = _attention(call, operands)
    if sinks is not None:
        out, lse = add_sinks(out, lse, jnp.asarray(sinks))
    return (out, lse) if return_lse else out


def flash_attention_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    mask: Mask = masks.causal,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    visible_to: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    relative_bias: DistanceBias | None = None,
    backend: str = "auto",
    blocks: AttentionBlocks | None = None,
    interpret: Any = None,
) -> AttentionGradients:
    """What some of the keys contribute to the gradients of attention over all of them.

    Over parts whose union is all keys dq and the bias table's gradient add up; dk and dv are complete for the queries
    given. Sinks belong to no part: they are in lse and delta, and their gradient is -sum(exp(sink - lse) * delta) over
    rows and queries. That makes the backward
    pass of attention whose keys come piece by piece (Liu et al. 2023, arXiv:2310.01889): with the logsumexp over all
    keys, P = exp(scores - lse) are the final weights of a part, and dS = P * (dP - delta) (arXiv:2307.08691, sec. 3.1).

    Args:
        q, k, v, mask, segment_ids, kv_segment_ids, visible_to, q_offset, scale, soft_cap, alibi_slopes, relative_bias,
            blocks, interpret: as for `flash_attention` over these keys, of which the first has position 0.
        lse: float32 [B, N, T], logsumexp of each query's scores over all keys; about -1e30 where a query sees none.
        delta: float32 [B, N, T], rowsum(d_out * out) of the output over all keys, less the gradient of lse if any.
        d_out: [B, T, N, Hv] in q's dtype, gradient of the output over all keys.
        backend: as for `flash_attention`, but for "cudnn", which has no such function.

    Returns:
        The gradients of q, k, v and the bias table, in their shapes; the table's in float32, the others in q's dtype.

    Raises:
        ValueError: arguments do not fit each other, or the named backend cannot do this.
    """
    call, operands = _prepare(
        q,
        k,
        v,
        mask=mask,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        visible_to=visible_to,
        q_offset=q_offset,
        scale=scale,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        return_lse=True,
        backend=backend,
        blocks=blocks,
        interpret=interpret,
    )
    p = call.problem
    rows, out = (p.B, p.N, p.T), (p.B, p.T, p.N, p.Hv)
    for name, x, shape, dtype in (
        ("lse", lse, rows, jnp.float32),
        ("delta", delta, rows, jnp.float32),
        ("d_out", d_out, out, p.dtype),
    ):
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; it must be {jnp.dtype(dtype)}{list(shape)}")
    return AttentionGradients(*call.body.backward(p, call.blocks, operands, lse, delta, d_out, interpret=interpret))


class AttentionGradients(NamedTuple):
    """What `flash_attention_gradients` gives."""

    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, Hv]
    bias_table: jax.Array | None  # [N, n] float32; None without relative_bias


class _Call(NamedTuple):
    """What is known at compile time."""

    problem: AttentionProblem
    backend: str
    blocks: AttentionBlocks | None  # None: cuDNN
    interpret: Any

    @property
    def body(self) -> ModuleType:
        return dispatch.ATTENTION[self.backend]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, operands: Operands) -> tuple[jax.Array, jax.Array]:
    return call.body.forward(call.problem, call.blocks, operands, interpret=call.interpret)


def _fwd(call: _Call, operands: Operands) -> tuple[tuple[jax.Array, jax.Array], tuple[Operands, jax.Array, jax.Array]]:
    out, lse = call.body.forward(call.problem, call.blocks, operands, interpret=call.interpret)
    # Named, so that a remat policy can save them and never run the kernel above twice.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (operands, out, lse)


def _bwd(
    call: _Call, residuals: tuple[Operands, jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Operands]:
    """FlashAttention's backward, dS = P * (dP - delta), where delta = rowsum(dO * O).

    The logsumexp's own gradient enters as dS = P * d_lse, which is the same as taking it off delta.
    """
    operands, out, lse = residuals
    d_out, d_lse = gradients
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).swapaxes(1, 2) - d_lse
    dq, dk, dv, d_table = call.body.backward(
        call.problem, call.blocks, operands, lse, delta, d_out, interpret=call.interpret
    )
    slopes = operands.alibi_slopes
    none: Any = None  # integers have no gradient
    return (Operands(dq, dk, dv, none, none, none, None if slopes is None else jnp.zeros_like(slopes), d_table),)


_attention.defvjp(_fwd, _bwd)


def _prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    visible_to: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float | None,
    soft_cap: float | None,
    alibi_slopes: jax.Array | None,
    relative_bias: DistanceBias | None,
    sinks: jax.Array | None = None,
    return_lse: bool,
    backend: str,
    blocks: AttentionBlocks | None,
    interpret: Any,
) -> tuple[_Call, Operands]:
    """The arguments checked, a body chosen, and the arrays as it takes them."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    segment_ids, kv_segment_ids, visible_to, alibi_slopes = (
        None if x is None else jnp.asarray(x) for x in (segment_ids, kv_segment_ids, visible_to, alibi_slopes)
    )
    if isinstance(q_offset, np.integer):
        q_offset = int(q_offset)
    problem = _problem(
        q,
        k,
        v,
        mask,
        segment_ids,
        kv_segment_ids,
        visible_to,
        q_offset,
        scale,
        soft_cap,
        alibi_slopes,
        relative_bias,
        sinks,
        return_lse,
    )
    plan = dispatch.decide("flash_attention", problem, backend=backend, blocks=blocks, interpret=interpret)
    assert plan.blocks is None or isinstance(plan.blocks, AttentionBlocks)
    operands = Operands(
        q,
        k,
        v,
        segment_ids,
        segment_ids if kv_segment_ids is None else kv_segment_ids,
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (problem.B,)),
        None if alibi_slopes is None else alibi_slopes.astype(jnp.float32),
        None if relative_bias is None else jnp.asarray(relative_bias.table, jnp.float32),
        None if visible_to is None else visible_to.astype(jnp.int32),
    )
    return _Call(problem, plan.backend, plan.blocks, interpret), operands


def _problem(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    visible_to: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float | None,
    soft_cap: float | None,
    alibi_slopes: jax.Array | None,
    relative_bias: DistanceBias | None,
    sinks: jax.Array | None,
    return_lse: bool,
) -> AttentionProblem:
    """The static description, with every check of the arguments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} {x.shape} has {x.ndim} dims; it must be [rows, positions, heads, head_dim]")
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape[0] != B or v.shape[:3] != k.shape[:3] or k.shape[3] != H:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: k must be [{B}, S, K, {H}] and v [{B}, S, K, Hv]")
    if min(*q.shape, *k.shape, *v.shape) < 1:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: no dim may be empty")
    if N % K:
        fitting = [n for n in range(1, N + 1) if N % n == 0]
        raise ValueError(
            f"q has {N} heads and k has {K}, which does not divide {N}; use one of {fitting} key heads. "
            "Where a mesh axis cuts heads, it must cut q and k into whole groups"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}; use {', '.join(DTYPES)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask = {mask!r} is no mask; use kernels_pallas.masks, as masks.causal or masks.local(1023, 0)"
        )
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("kv_segment_ids is given without segment_ids; give both or neither")
    keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    for name, ids, length in (
        ("segment_ids", segment_ids, T),
        ("kv_segment_ids", keys, S),
        ("visible_to", visible_to, T),
    ):
        if ids is not None and (ids.shape != (B, length) or not jnp.issubdtype(ids.dtype, jnp.integer)):
            raise ValueError(f"{name} is {ids.dtype}{list(ids.shape)}; it must be integers [{B}, {length}]")
    if not isinstance(q_offset, int):
        offsets = jnp.asarray(q_offset)
        if offsets.shape not in ((), (B,)) or not jnp.issubdtype(offsets.dtype, jnp.integer):
            raise ValueError(f"q_offset is {offsets.dtype}{list(offsets.shape)}; it must be one integer or [{B}]")
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None and jnp.shape(per_head) != (N,):
            raise ValueError(f"{name} {jnp.shape(per_head)} must be [{N}], one for each query head")
    if relative_bias is not None and not isinstance(relative_bias, DistanceBias):
        raise ValueError(f"relative_bias is of type {type(relative_bias).__name__}; give DistanceBias(table)")
    for name, number in (("scale", scale), ("soft_cap", soft_cap)):
        if number is not None and not (isinstance(number, int | float | np.number) and math.isfinite(number)):
            raise ValueError(f"{name} = {number} must be a finite Python number, known when the call is compiled")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap = {soft_cap} must be positive, or None for no cap")
    return AttentionProblem(
        B=B,
        T=T,
        S=S,
        N=N,
        K=K,
        H=H,
        Hv=v.shape[3],
        dtype=q.dtype,
        mask=mask if visible_to is None else mask.opened(),
        scale=H**-0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        segments=segment_ids is not None,
        visible_to=visible_to is not None,
        alibi=alibi_slopes is not None,
        buckets=None if relative_bias is None else relative_bias.buckets(N),
        q_offset=q_offset if isinstance(q_offset, int) else None,
        sinks=sinks is not None,
        return_lse=return_lse,
    )
