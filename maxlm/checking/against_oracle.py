"""Every kernel that this machine has against its formula in float64, on the shapes of scores that the model has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from kernels_pallas import (
    DistanceBias,
    Scores,
    dispatch,
    explain,
    flash_attention,
    fused_glu,
    grouped_matmul,
    oracle,
    paged_attention,
)
from maxlm.checking.shrinking import D_FF, D_MODEL
from maxlm.checking.verdicts import CheckRow, rounding
from maxlm.config import (
    Activation,
    Alibi,
    Attention,
    Experts,
    FixedPattern,
    GatedMlp,
    GroupedQuery,
    RelativeBias,
    RunConfig,
    StridedPattern,
    Swish,
)
from maxlm.config.mlp import Nonlinearity
from maxlm.models import ops
from maxlm.models.positions import alibi_slopes

_LENGTH = 200
"""Positions: more than a block of any kernel, and no multiple of one."""
_BLOCK, _BLOCKS = 16, 4
"""Positions of a block of the cache, and blocks of a text."""
_ROWS = 192

Found = Mapping[str, Any]


class _Case(NamedTuple):
    """A call of one operation."""

    bodies: Mapping[str, Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    run: Callable[[str], Found]
    """With one body: results and gradients by name."""
    right: Mapping[str, npt.NDArray[np.float64]]


def kernels(config: RunConfig) -> Iterator[CheckRow]:
    """Attention, paged attention, gated units and grouped products, as the model has them, by each of their bodies.

    Errors are largest ones, as parts of the largest number of the right array: of results, and of gradients where
    there are some.
    """
    model, dtype = config.model, jnp.dtype(config.execution.dtype.value)
    cases: dict[str, _Case] = {}
    for number, attention in enumerate(dict.fromkeys(block.attention for block in model.layers)):
        name = f"attention {number + 1}" if number else "attention"
        cases[name] = _attention(attention, dtype)
        if model.decodes and isinstance(attention, GroupedQuery):
            cases[f"paged {name}"] = _paged(attention, dtype)
    mlps = [block.mlp for block in model.layers]
    for number, act in enumerate(dict.fromkeys(mlp.activation for mlp in mlps if isinstance(mlp, GatedMlp))):
        cases[f"gated unit {number + 1}" if number else "gated unit"] = _glu(act, dtype)
    if any(isinstance(mlp, Experts) for mlp in mlps):
        cases["grouped product"] = _grouped(dtype)
    bound = rounding(config.execution.dtype, jax.default_backend())
    for name, case in cases.items():
        yield from _by_body(name, case, bound)


def _by_body(name: str, case: _Case, bound: float) -> Iterator[CheckRow]:
    refused = explain(case.function, *case.arguments, **case.options).refused
    for body in case.bodies:
        full = f"{name} = formula, {body}"
        try:
            explain(case.function, *case.arguments, **case.options, backend=body)
        except ValueError:  # how dispatch says that it cannot
            yield CheckRow.not_here(full, refused[body])
            continue
        found = {key: _error(x, case.right[key]) for key, x in case.run(body).items()}
        worst = max(found, key=lambda key: np.nan_to_num(found[key], nan=np.inf))
        yield CheckRow.at_most(full, found[worst], bound, f"of {', '.join(found)}: most in {worst}")


def _error(found: jax.Array, right: npt.NDArray[np.float64]) -> float:
    return float(np.abs(np.asarray(found, np.float64) - right).max() / np.abs(right).max())


def _normal(number: int, *shapes: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    generator = np.random.default_rng([23, number])
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def words(attention: Attention) -> oracle.Words:
    """Who sees whom, as the oracle is told."""
    if not isinstance(attention, GroupedQuery):
        return "causal"
    match attention.pattern:
        case StridedPattern(stride=stride):
            return ("or", ("local", stride - 1, 0), ("and", "causal", ("strided", stride)))
        case FixedPattern(chunk=chunk, summary=summary):
            return ("and", "causal", ("or", ("chunked", chunk), ("summaries", chunk, summary)))
        case None:
            return "causal" if attention.window is None else ("local", attention.window - 1, 0)


def _shaping(attention: Attention) -> tuple[Scores, dict[str, Any]]:
    """What shapes the scores, for our kernels and for the oracle."""
    if not isinstance(attention, GroupedQuery):
        return Scores(mask=ops.causal(), scale=attention.scale), {"mask": "causal", "scale": attention.scale}
    heads, bias, said = attention.n_heads, None, {}
    shaping: dict[str, Any] = {"scale": attention.scale, "soft_cap": attention.soft_cap}
    table, sinks = _normal(0, (heads, 32), (heads,), dtype=jnp.float32)
    if attention.sinks:
        shaping["sinks"] = sinks
    if isinstance(attention.position, Alibi):
        shaping["alibi_slopes"] = jnp.asarray(alibi_slopes(heads))
    if isinstance(attention.position, RelativeBias):
        bias = DistanceBias(table, max_distance=attention.position.max_distance)
        said = {"bias_table": np.asarray(table), "bucket_rule": (attention.position.max_distance, False)}
    scores = Scores(mask=ops.causal(attention.window, attention.pattern), relative_bias=bias, **shaping)
    return scores, {"mask": words(attention), **shaping, **said}


def _attention(attention: Attention, dtype: Any) -> _Case:
    """Two rows, one of packed documents, forward and backward."""
    N, K, H, Hv = attention.n_heads, attention.n_kv_heads, attention.key_head_dim, attention.value_head_dim
    B, T = 2, _LENGTH
    q, k, v, d_out = _normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, Hv), (B, T, N, Hv), dtype=dtype)
    segments = jnp.asarray(np.arange(T) // np.array([[67], [T]]), jnp.int32)
    scores, said = _shaping(attention)
    options = vars(scores) | {"segment_ids": segments}

    def run(body: str) -> Found:
        out, back = jax.vjp(jax.jit(lambda *qkv: flash_attention(*qkv, **options, backend=body)), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *back(d_out)), strict=True))

    answer = oracle.attention(q, k, v, d_out, segment_ids=segments, **said)
    right = {"out": answer.out, "dq": answer.dq, "dk": answer.dk, "dv": answer.dv}
    return _Case(dispatch.ATTENTION, flash_attention, (q, k, v), options, run, right)


def _paged(attention: GroupedQuery, dtype: Any) -> _Case:
    """Two texts in blocks that lie anywhere, and one row without a token."""
    N, K, H, Hv = attention.n_heads, attention.n_kv_heads, attention.key_head_dim, attention.value_head_dim
    blocks = 2 * _BLOCKS + 1
    q, k, v = _normal(2, (6, N, H), (1, blocks, K, _BLOCK, H), (1, blocks, K, _BLOCK, Hv), dtype=dtype)
    tables = jnp.asarray(1 + np.random.default_rng(3).permutation(blocks - 1).reshape(2, _BLOCKS), jnp.int32)
    slots, positions = jnp.array([0, 0, 0, 1, 1, 0], jnp.int32), jnp.array([0, 17, 40, 31, 63, -1], jnp.int32)
    scores, said = _shaping(attention)
    arguments = (q, k, v, jnp.int32(0), tables, slots, positions, scores)
    run = lambda body: {"out": jax.jit(functools.partial(paged_attention, backend=body))(*arguments)}
    right = oracle.paged_attention(q, k, v, 0, np.asarray(tables), np.asarray(slots), np.asarray(positions), **said)
    return _Case(dispatch.PAGED, paged_attention, arguments, {}, run, {"out": right})


def _glu(act: Nonlinearity, dtype: Any) -> _Case:
    """Forward and backward."""
    x, gate, up, dh = _normal(4, (_ROWS, D_MODEL), (D_MODEL, D_FF), (D_MODEL, D_FF), (_ROWS, D_FF), dtype=dtype)
    match act:
        case Swish(beta=beta):
            options: dict[str, Any] = {"act": "swish", "beta": beta or 1.0}
        case Activation():
            options = {"act": act.value}
        case _:
            assert_never(act)

    def run(body: str) -> Found:
        h, back = jax.vjp(jax.jit(functools.partial(fused_glu, **options, backend=body)), x, gate, up)
        return dict(zip(("h", "dx", "dw_gate", "dw_up"), (h, *back(dh)), strict=True))

    answer = oracle.glu(x, gate, up, dh, **options)
    right = {"h": answer.h, "dx": answer.dx, "dw_gate": answer.dw_gate, "dw_up": answer.dw_up}
    return _Case(dispatch.GLU, fused_glu, (x, gate, up), options, run, right)


def _grouped(dtype: Any) -> _Case:
    """Groups of which one is empty, and rows after the last; forward and backward."""
    sizes = np.array([_ROWS // 2, 0, _ROWS // 3, _ROWS // 8], np.int32)
    x, w, dy = _normal(5, (_ROWS, D_MODEL), (len(sizes), D_MODEL, D_FF), (_ROWS, D_FF), dtype=dtype)

    def run(body: str) -> Found:
        product = lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), backend=body)
        out, back = jax.vjp(jax.jit(product), x, w)
        return dict(zip(("out", "dx", "dw"), (out, *back(dy)), strict=True))

    right = oracle.grouped_matmul(x, w, sizes, dy)._asdict()
    return _Case(dispatch.GROUPED, grouped_matmul, (x, w, jnp.asarray(sizes)), {}, run, right)
