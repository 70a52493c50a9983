"""Caches in blocks, the texts in them, and paged attention over them against the oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import OUT, mask_of

from kernels_pallas import CacheScales, DistanceBias, PagedBlocks, Scores, TokenTree, oracle, paged_attention


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the arrays; `C` positions in a block, `M` blocks in a table."""

    N: int = 4
    K: int = 2
    H: int = 8
    Hv: int = 8
    C: int = 4
    M: int = 10
    L: int = 2
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """Of the scores, in the oracle's words."""

    words: oracle.Words = "causal"
    scale: float | None = None
    soft_cap: float | None = None
    alibi: bool = False
    bias: tuple[int, bool] | None = None
    sinks: bool = False

    def arrays(self, N: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        made = {
            "alibi_slopes": self.alibi and 0.5 ** np.arange(2, N + 2),
            "bias_table": self.bias is not None and rng.normal(size=(N, 8)),
            "sinks": self.sinks and rng.normal(size=N),
        }
        return {name: np.asarray(x, np.float32) for name, x in made.items() if x is not False}

    def scores(self, N: int) -> Scores:
        arrays = {name: jnp.asarray(x) for name, x in self.arrays(N).items()}
        table = arrays.pop("bias_table", None)
        bias = None if table is None or self.bias is None else DistanceBias(table, *self.bias)
        return Scores(mask=mask_of(self.words), scale=self.scale, soft_cap=self.soft_cap, relative_bias=bias, **arrays)


class Rows(NamedTuple):
    """Arguments after q, k, v and the layer."""

    tables: np.ndarray  # [S, M] int32
    slots: np.ndarray  # [T] int32
    positions: np.ndarray  # [T] int32


def texts(shape: Shape, lengths: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and tables of one text a slot. Blocks lie anywhere; all else in the cache is not a number."""
    rng = np.random.default_rng(0)
    needed = [-(-length // shape.C) for length in lengths]
    P = sum(needed) + 3
    free = list(np.random.default_rng(seed).permutation(np.arange(1, P)))
    tables = np.zeros((len(lengths), shape.M), np.int32)
    k = np.full((shape.L, P, shape.K, shape.C, shape.H), np.nan, np.float32)
    v = np.full((*k.shape[:4], shape.Hv), np.nan, np.float32)
    for slot, length in enumerate(lengths):
        tables[slot, : needed[slot]] = [free.pop() for _ in range(needed[slot])]
        for position in range(length):
            place = (slice(None), tables[slot, position // shape.C], slice(None), position % shape.C)
            k[place] = rng.normal(size=(shape.L, shape.K, shape.H))
            v[place] = rng.normal(size=(shape.L, shape.K, shape.Hv))
    return k, v, tables


@functools.partial(jax.jit, static_argnames=("shaping", "backend", "blocks", "interpret"))
def attend(
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    rows: Rows,
    *,
    tree: TokenTree | None = None,
    scales: CacheScales | None = None,
    shaping: Shaping,
    backend: str = "auto",
    blocks: PagedBlocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """With one cache for both where v is None."""
    scores = shaping.scores(q.shape[1])
    options = {"tree": tree, "scales": scales, "backend": backend, "blocks": blocks, "interpret": interpret}
    return paged_attention(q, k, k if v is None else v, layer, *rows, scores, **options)


def check(
    shape: Shape,
    shaping: Shaping,
    lengths: tuple[int, ...],
    rows: tuple[tuple[int, int], ...],
    *,
    tree: TokenTree | None = None,
    unseen: int | None = None,
    int8: bool = False,
    one_cache: bool = False,
    **options: Any,
) -> None:
    """The rows, (slot, position) each, of texts of these lengths, against the oracle.

    Args:
        tree: of the rows. Places that none of them sees are made no numbers.
        unseen: what the tables hold where no row has to look.
        int8: keep codes with scales of any size, which are no numbers where nothing is written.
        one_cache: values are the keys.
    """
    k, v, tables = texts(shape, lengths, seed=1)
    if tree is not None:
        forget_unseen(k, v, tables, rows, tree)
    given = tables if unseen is None else np.where(needed_entries(shape, shaping, rows, tables), tables, unseen)
    q = np.random.default_rng(2).normal(size=(len(rows), shape.N, shape.H))
    q, k, v = (jnp.asarray(x, shape.dtype) for x in (q, k, k if one_cache else v))
    scales, numbers = None, [k, v]
    if int8:
        k, k_scales = codes_of(k, seed=3)
        v, v_scales = (k, k_scales) if one_cache else codes_of(v, seed=4)
        scales = CacheScales(k_scales, v_scales)
        numbers = [x * np.asarray(s, np.float64)[..., None] for x, s in ((k, k_scales), (v, v_scales))]
    slots, positions = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    layer = shape.L - 1
    got = attend(
        q, k, None if one_cache else v, jnp.int32(layer), Rows(given, slots, positions),
        tree=tree, scales=scales, shaping=shaping, **options,
    )  # fmt: skip
    assert got.dtype == q.dtype
    want = oracle.paged_attention(
        *(np.asarray(x, np.float64) for x in (q, *numbers)), layer, tables, slots, positions, tree=tree,
        mask=shaping.words, scale=shaping.scale, soft_cap=shaping.soft_cap, bucket_rule=shaping.bias or (128, False),
        **shaping.arrays(shape.N),
    )  # fmt: skip
    assert np.isfinite(np.asarray(got, np.float32)).all()
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error <= OUT[shape.dtype] * np.abs(want).max(), f"error {error:.2e} of {np.abs(want).max():.2e}"


def codes_of(numbers: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Any int8 [..., H], with bfloat16 scales [...] that differ by factors; NaN where the numbers are."""
    rng, written = np.random.default_rng(seed), np.isfinite(np.asarray(numbers[..., 0], np.float32))
    codes = rng.integers(-127, 128, numbers.shape).astype(np.int8)
    return codes, np.where(written, rng.lognormal(-4.5, 0.5, written.shape), np.nan).astype(jnp.bfloat16)


def needed_entries(shape: Shape, shaping: Shaping, rows: tuple[tuple[int, int], ...], tables: np.ndarray) -> np.ndarray:
    """[S, M]: the entries from a row's first visible key to its last, of any row."""
    needed = np.zeros(tables.shape, bool)
    for slot, position in rows:
        if position >= 0:
            [seen] = oracle.mask_matrix(shaping.words, np.array([position]), np.arange(position + 1))
            needed[slot, np.append(np.flatnonzero(seen), position)[0] // shape.C : position // shape.C + 1] = True
    return needed


def forget_unseen(
    k: np.ndarray, v: np.ndarray, tables: np.ndarray, rows: tuple[tuple[int, int], ...], tree: TokenTree
) -> None:
    """Make the places of trees that no row sees no numbers, as of paths that were given up."""
    seen: set[tuple[int, int]] = set()
    for (slot, _), first, path in zip(rows, tree.first, tree.path, strict=True):
        seen |= {(slot, place) for place in range(first)}
        seen |= {(slot, first + j) for j in range(32) if int(path) >> j & 1}
    C = k.shape[3]
    for slot, table in enumerate(tables):
        for place in range(len(table) * C):
            if table[place // C] and (slot, place) not in seen:
                k[:, table[place // C], :, place % C] = v[:, table[place // C], :, place % C] = np.nan


LENGTHS = (37, 4, 1, 23, 16)
ROWS = ((0, 36), (3, 22), (0, 35), (2, 0), (1, -1), (4, 15), (1, 3), (3, 0), (0, 11))
"""Of texts of those lengths: their last tokens, tokens in their middle, their first, one that is no token."""

KINDS = {
    "causal": Shaping(),
    "window": Shaping(words=("local", 6, 0)),
    "window of one": Shaping(words=("local", 0, 0)),
    "chunks": Shaping(words=("and", "causal", ("chunked", 8))),
    "strided": Shaping(words=("or", ("local", 4, 0), ("and", "causal", ("strided", 5)))),
    "fixed": Shaping(words=("and", "causal", ("or", ("chunked", 8), ("summaries", 8, 2)))),
    "summaries alone": Shaping(words=("and", "causal", ("summaries", 16, 1))),  # the first 15 see nothing
    "scale": Shaping(scale=0.7),
    "cap": Shaping(soft_cap=1.5),
    "alibi": Shaping(alibi=True),
    "distance": Shaping(bias=(20, False)),
    "distance both ways": Shaping(bias=(20, True)),
    "sinks": Shaping(sinks=True),
    "all": Shaping(words=("local", 9, 0), scale=0.5, soft_cap=2.0, alibi=True, bias=(20, False), sinks=True),
}


def tree_rows(*trees: tuple[int, int, tuple[int, ...]]) -> tuple[tuple[tuple[int, int], ...], TokenTree]:
    """Rows (slot, position) of trees, and what the call is told of them.

    Args:
        *trees: slot, the place of the first node, and for each node its parent, -1 for the first.
    """
    rows, places, firsts, paths = [], [], [], []
    for slot, first, parents in trees:
        known: list[int] = []
        for node, parent in enumerate(parents):
            known.append((known[parent] if parent >= 0 else 0) | 1 << node)
            rows.append((slot, first + known[-1].bit_count() - 1))
            places.append(first + node)
            firsts.append(first)
        paths += known
    as_rows = lambda x: np.array(x, np.uint32).view(np.int32)
    return tuple(rows), TokenTree(as_rows(places), as_rows(firsts), as_rows(paths))


def chosen(
    rows: tuple[tuple[int, int], ...], tree: TokenTree, numbers: list[int]
) -> tuple[tuple[tuple[int, int], ...], TokenTree]:
    """Some of the rows, in any order; -1: one without a token."""
    some = tuple(rows[n] if n >= 0 else (1, -1) for n in numbers)
    return some, TokenTree(*(np.where(np.array(numbers) < 0, -1, x[numbers]) for x in tree))


BRANCHES = (-1, 0, 0, 0, 1, 1, 2, 4, 7)
"""A tree: the first node has three successors, of which the first goes deepest."""
TREES = chosen(
    *tree_rows(
        (0, 28, BRANCHES),
        (3, 14, BRANCHES),
        (4, 15, (-1,)),
        (1, 0, (-1, 0, 0, 1)),
        (2, 0, (-1,)),
        (0, 5, (-1, *[0] * 31)),
    ),
    [3, 8, -1, 0, 1, 17, 2, 12, 18, 21, 22, 16, 4, 55, 23, 7],
)
"""Of texts of LENGTHS: rows of trees at their ends and at a beginning, rows of no tree, one without a token, and the
last of 32 nodes, which sees the first and itself."""
TREE_KINDS = {
    "causal": KINDS["causal"],
    "window": KINDS["window"],
    "strided": KINDS["strided"],
    "all": Shaping(words=("local", 9, 0), scale=0.5, soft_cap=2.0, sinks=True),
}
