"""The public operation: checks, and the choice of a body."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.attention.problem import DTYPES
from kernels_pallas.attention.scores import Scores
from kernels_pallas.masks import Mask
from kernels_pallas.paged.problem import CacheScales, PagedBlocks, PagedOperands, PagedProblem, TokenTree


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    scores: Scores,
    *,
    tree: TokenTree | None = None,
    scales: CacheScales | None = None,
    backend: str = "auto",
    blocks: PagedBlocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of T tokens, each to the keys of its own text, which lie in blocks of a cache (arXiv:2309.06180).

    Every row is one token: many of one text, as in a prompt, or one of each of many. The keys of a text's position p
    are at [layer, tables[slot, p // C], :, p % C], and so are its values; the token's own are there already. Nothing
    of the cache is copied, and of each text the blocks from the first visible key to the last are read. What unseen
    positions hold need not be numbers. Of "xla" on a CPU and of the kernels a row's result depends, to the bit, on its
    own query, position and keys alone. No gradient.

    Args:
        q: [T, N, H] float32, bfloat16 or float16; scores and softmax are float32.
        k: [L, P, K, C, H] in q's dtype, or int8 with `scales`: layers, blocks, key heads, positions of a block. K
            divides N: query heads n * N/K .. (n + 1) * N/K - 1 share key head n.
        v: [L, P, K, C, Hv] in k's dtype. Where it is k itself, "tpu" reads it once.
        layer: int32 scalar.
        tables: int32 [S, M], blocks of each slot's text in order. Entries that no row sees into may be any block.
        slots: int32 [T], the slot of each row's text.
        positions: int32 [T], of the queries, below M * C. -1: a row without a token, whose result is 0.
        scores: what shapes the scores. Its mask shows no key after the query.
        tree: where rows are nodes of trees; None: a key's place is its position, and a row sees all before it. The mask
            must not hide what is as near to a query as its own path is long.
        scales: of k and v that are int8; None: those are in q's dtype.
        backend: "xla", "tpu" or "gpu" (Hopper); "auto" follows the table recorded for the chip. On several devices call
            the kernels inside `jax.shard_map(..., check_vma=False)`.
        blocks: keys of a tile; None: from the tuning table.
        interpret: run the named kernel in Pallas' interpreter: True, or its parameters object.

    Returns:
        [T, N, Hv] in q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: arguments do not fit each other, or the named backend cannot do this.
    """
    problem = _problem(q, k, v, layer, tables, slots, positions, scores, tree, scales)
    plan = dispatch.decide("paged_attention", problem, backend=backend, blocks=blocks, interpret=interpret)
    float32 = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
    int32 = lambda x: jnp.asarray(x, jnp.int32)
    operands = PagedOperands(
        q,
        k,
        v,
        int32(layer),
        int32(tables),
        int32(slots),
        int32(positions),
        float32(scores.alibi_slopes),
        None if scores.relative_bias is None else float32(scores.relative_bias.table),
        float32(scores.sinks),
        None if tree is None else TokenTree(*map(int32, tree)),
        scales,
    )
    return dispatch.PAGED[plan.backend].forward(problem, plan.blocks, operands, interpret=interpret)


def _problem(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    scores: Scores,
    tree: TokenTree | None,
    scales: CacheScales | None,
) -> PagedProblem:
    """The static description, with every check of the arguments."""
    for name, x, dims in (("q", q, "T, N, H"), ("k", k, "L, P, K, C, H"), ("v", v, "L, P, K, C, Hv")):
        if x.ndim != dims.count(",") + 1 or 0 in x.shape:
            raise ValueError(f"{name} {list(x.shape)} must be [{dims}], and no dim empty")
        if scales is not None and name != "q":
            if x.dtype != jnp.int8:
                raise ValueError(f"{name} is {x.dtype}, with scales; it must be int8")
            continue
        if x.dtype.name not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}; use {', '.join(DTYPES)}, or int8 with scales")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
    T, N, H = q.shape
    L, P, K, C, _ = k.shape
    if v.shape[:4] != k.shape[:4] or k.shape[4] != H:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: "
            f"k must be [L, P, K, C, {H}], as q is wide, and v {[*k.shape[:4]]} with a width of its own"
        )
    for name, x in () if scales is None else scales._asdict().items():
        if x.shape != k.shape[:4] or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"scales.{name} is {x.dtype}{list(x.shape)}; it must be of floats {list(k.shape[:4])}")
    if N % K:
        raise ValueError(
            f"q has {N} heads and k has {K}, which does not divide {N}. "
            "Where a mesh axis cuts heads, it must cut q and k into whole groups"
        )
    of_rows = {"slots": slots, "positions": positions} | ({} if tree is None else tree._asdict())
    for name, x, shape in (("layer", layer, ()), *((name, x, (T,)) for name, x in of_rows.items())):
        x = jnp.asarray(x)
        if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; it must be int32{list(shape)}")
    if tables.ndim != 2 or 0 in tables.shape or not jnp.issubdtype(tables.dtype, jnp.integer):
        raise ValueError(f"tables is {tables.dtype}{list(tables.shape)}; it must be int32[S, M], and no dim empty")
    _check_causal(scores.mask)
    for name, per_head in (("alibi_slopes", scores.alibi_slopes), ("sinks", scores.sinks)):
        if per_head is not None and jnp.shape(per_head) != (N,):
            raise ValueError(f"scores.{name} {jnp.shape(per_head)} must be [{N}], one for each query head")
    if tree is not None and (scores.alibi_slopes is not None or scores.relative_bias is not None):
        raise ValueError(
            "tree: biases by distance (scores.alibi_slopes, scores.relative_bias) take a key's place for "
            "its position, which it is not in a tree; leave out one of the two"
        )
    return PagedProblem(
        T=T,
        N=N,
        K=K,
        H=H,
        Hv=v.shape[4],
        L=L,
        P=P,
        C=C,
        S=tables.shape[0],
        M=tables.shape[1],
        dtype=jnp.dtype(q.dtype),
        mask=scores.mask,
        scale=H**-0.5 if scores.scale is None else float(scores.scale),
        soft_cap=None if scores.soft_cap is None else float(scores.soft_cap),
        alibi=scores.alibi_slopes is not None,
        buckets=None if scores.relative_bias is None else scores.relative_bias.buckets(N),
        sinks=scores.sinks is not None,
        one_cache=v is k,
        tree=tree is not None,
        scaled=scales is not None,
    )


def _check_causal(mask: Mask) -> None:
    """What comes after a query may be in the cache, or not yet."""
    for interval in mask.intervals:
        if not any(bound.step == 1 and bound.offset <= 1 for bound in interval.stops):
            raise ValueError(f"mask {mask} shows keys after the query, which a cache may lack; add `& masks.causal`")
