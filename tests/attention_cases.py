"""Cases of attention, their computation through the public function, and their comparison with the oracle."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import AttentionBlocks, DistanceBias, flash_attention, masks, oracle
from kernels_pallas.masks import Mask

# Largest error allowed, over the largest value of the reference.
OUT = {"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}
LSE = 5e-6
GRADIENT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
HIDDEN = -1e29  # a logsumexp below it says that the query sees nothing

BLOCKS = {
    "xla": AttentionBlocks(q=64, k=48, q_backward=48, k_backward=64, rows=1),
    "tpu": AttentionBlocks(q=128, k=128, q_backward=128, k_backward=128),
}


def mask_of(words: oracle.Words) -> Mask:
    """The mask that the oracle's words mean."""
    word, *arguments = (words,) if isinstance(words, str) else words
    if word == "and":
        return mask_of(arguments[0]) & mask_of(arguments[1])
    if word == "or":
        return mask_of(arguments[0]) | mask_of(arguments[1])
    made = getattr(masks, word)
    return made(*arguments) if arguments else made


@dataclass(frozen=True)
class Options:
    """What is known at compile time, beside the shapes."""

    backend: str = "xla"
    words: oracle.Words = "causal"
    q_offset: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    bucket_rule: tuple[int, bool] | None = None
    return_lse: bool = True
    blocks: AttentionBlocks | None = None


def attend(options: Options, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """flash_attention of named arrays; lse is 0 where it is not asked for."""
    table = arrays.get("bias_table")
    result = flash_attention(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        mask=mask_of(options.words),
        segment_ids=arrays.get("segment_ids"),
        kv_segment_ids=arrays.get("kv_segment_ids"),
        visible_to=arrays.get("visible_to"),
        q_offset=arrays.get("q_offset", 0) if options.q_offset is None else options.q_offset,
        scale=options.scale,
        soft_cap=options.soft_cap,
        alibi_slopes=arrays.get("alibi_slopes"),
        relative_bias=None if table is None else DistanceBias(table, *options.bucket_rule),
        sinks=arrays.get("sinks"),
        return_lse=options.return_lse,
        backend=options.backend,
        blocks=options.blocks or BLOCKS[options.backend],
        interpret=True if options.backend == "tpu" else None,
    )
    return result if options.return_lse else (result, jnp.zeros((), jnp.float32))


LEARNED = ("q", "k", "v", "bias_table", "sinks")


@functools.partial(jax.jit, static_argnums=0)
def compute(options: Options, arrays: dict[str, Any], d_out: jax.Array, d_lse: jax.Array) -> dict[str, jax.Array]:
    """Results and gradients by name."""
    learned = {name: arrays[name] for name in LEARNED if name in arrays}
    (out, lse), pull = jax.vjp(lambda learned: attend(options, arrays | learned), learned)
    gradients = pull((d_out, d_lse if options.return_lse else jnp.zeros_like(lse)))[0]
    results = {"out": out} | {f"d_{name}": value for name, value in gradients.items()}
    return results | {"lse": lse} if options.return_lse else results


def reference(
    options: Options, arrays: dict[str, Any], d_out: jax.Array, d_lse: jax.Array
) -> dict[str, np.ndarray | None]:
    names = ("segment_ids", "kv_segment_ids", "visible_to", "alibi_slopes", "bias_table", "sinks")
    want = oracle.attention(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        d_out,
        d_lse if options.return_lse else 0.0,
        mask=options.words,
        q_offset=np.asarray(arrays.get("q_offset", 0) if options.q_offset is None else options.q_offset),
        scale=options.scale,
        soft_cap=options.soft_cap,
        bucket_rule=options.bucket_rule or (128, False),
        **{name: arrays.get(name) for name in names},
    )
    return {
        "out": want.out,
        "lse": want.lse,
        "d_q": want.dq,
        "d_k": want.dk,
        "d_v": want.dv,
        "d_bias_table": want.d_bias_table,
        "d_sinks": want.d_sinks,
    }


def compare(got: dict[str, jax.Array], want: dict[str, np.ndarray | None], dtype: str, least: float = 0.0) -> None:
    """Every result within its ceiling of the reference, whose size counts as at least `least`."""
    B, T = want["out"].shape[:2]
    # A query's terms in the table's gradient cancel, so that the sum over queries may be of any size, or 0; the errors
    # of the queries do not cancel: each is about one ceiling, of either sign.
    sizes = {"d_bias_table": math.sqrt(B * T)}
    for name, value in got.items():
        g, w = np.asarray(value, np.float64), want[name]
        assert w is not None and g.shape == w.shape, f"{name}: shape {g.shape}"
        assert np.isfinite(g).all(), f"{name}: not finite"
        if name == "lse":
            assert (g[w == -np.inf] < HIDDEN).all(), "lse: of queries that see nothing"
            g, w = g[w > -np.inf], w[w > -np.inf]
        ceiling = {"out": OUT[dtype], "lse": LSE}.get(name, GRADIENT[dtype])
        size = max(np.abs(w).max(initial=0.0), sizes.get(name, least))
        error = np.abs(g - w).max(initial=0.0)
        assert error <= ceiling * size, f"{name}: error {error:.2e} against a reference of size {size:.2e}"


def check(options: Options, arrays: dict[str, Any], d_out: jax.Array, d_lse: jax.Array, least: float = 0.0) -> None:
    """Values and gradients against the oracle."""
    got = compute(options, arrays, d_out, d_lse)
    assert got["out"].dtype == got["d_q"].dtype == got["d_k"].dtype == got["d_v"].dtype == arrays["q"].dtype
    compare(got, reference(options, arrays, d_out, d_lse), arrays["q"].dtype.name, least)


def random_arrays(
    B: int, T: int, S: int, N: int, K: int, H: int, Hv: int | None = None, dtype: str = "float32", seed: int = 0
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Unit normal q, k and v, and cotangents of out and lse."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    arrays = {"q": normal(B, T, N, H), "k": normal(B, S, K, H), "v": normal(B, S, K, Hv or H)}
    return arrays, normal(B, T, N, Hv or H), jnp.asarray(rng.normal(size=(B, N, T)), jnp.float32)


def build(row: dict[str, Any], backend: str) -> tuple[Options, dict[str, Any], jax.Array, jax.Array]:
    B, (T, S), (N, K), (H, Hv) = 2, row["lengths"], row["heads"], row["dims"]
    arrays, d_out, d_lse = random_arrays(B, T, S, N, K, H, Hv, row["dtype"])
    rng = np.random.default_rng(1)
    offset = row["q_offset"]
    if offset == "array":
        arrays["q_offset"] = jnp.asarray([S - T, 25 - T // 4], jnp.int32)
    if row["segments"] == "packed":  # documents in order; queries belong to that of their position
        kv = np.cumsum(rng.random((B, S)) < 1 / 40, axis=1)
        positions = np.broadcast_to(arrays.get("q_offset", offset), (B,))[:, None] + np.arange(T)
        arrays["kv_segment_ids"] = jnp.asarray(kv, jnp.int32)
        arrays["segment_ids"] = jnp.asarray(np.take_along_axis(kv, positions.clip(0, S - 1), 1), jnp.int32)
    if row["segments"] == "foreign":  # in no order, and two that no key has
        arrays["segment_ids"] = jnp.asarray(rng.integers(0, 5, (B, T)), jnp.int32)
        arrays["kv_segment_ids"] = jnp.asarray(rng.integers(0, 3, (B, S)), jnp.int32)
    if row["visible_to"] == "prefix":  # the first 60 positions see each other, the rest is causal
        positions = np.broadcast_to(arrays.get("q_offset", offset), (B,))[:, None] + np.arange(T)
        arrays["visible_to"] = jnp.asarray(np.where(positions < 60, 60, positions + 1), jnp.int32)
    if row["visible_to"] == "any":  # in no order, some before all keys and some beyond
        spans = rng.integers(-20, S + 40, (B, -(-T // 30)))
        arrays["visible_to"] = jnp.asarray(np.repeat(spans, 30, 1)[:, :T] + rng.integers(-9, 9, (B, T)), jnp.int32)
    if row["alibi"]:
        arrays["alibi_slopes"] = jnp.asarray(0.5 ** np.arange(2, N + 2), jnp.float32)
    if row["bias"]:
        arrays["bias_table"] = jnp.asarray(rng.normal(size=(N, 16)), jnp.float32)
    if row["sinks"]:
        arrays["sinks"] = jnp.asarray(rng.normal(size=N), jnp.float32)
    options = Options(
        backend=backend,
        words=row["words"],
        q_offset=None if offset == "array" else offset,
        scale=row["scale"],
        soft_cap=row["soft_cap"],
        bucket_rule=row["bias"],
        return_lse=row["return_lse"],
    )
    return options, arrays, d_out, d_lse
