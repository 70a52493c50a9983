"""The forward kernel for Hopper, in the GPU interpreter, against the float64 oracle."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import masks, oracle
from kernels_pallas.attention import gpu
from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Buckets, Operands
from kernels_pallas.masks import Mask
from kernels_pallas.targets import target_of

H200 = target_of("NVIDIA H200", "gpu")
OUT = {"bfloat16": 1.5e-2, "float16": 2e-3}  # largest error, over the largest value of the reference
LSE = 5e-6

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax 0.10 has no interpreter of Mosaic GPU kernels"
)

CAUSAL, FULL = (masks.causal, "causal"), (masks.full, "full")
WINDOW = (masks.local(50, 0), ("local", 50, 0))
CHUNKS = (masks.causal & masks.chunked(96), ("and", "causal", ("chunked", 96)))
OPEN, OPEN_WINDOW = (masks.causal.opened(), "causal"), (masks.local(50, 0).opened(), ("local", 50, 0))
PREFIX = (masks.causal | masks.prefix(70), ("or", "causal", ("prefix", 70)))


def problem_of(**changes: Any) -> AttentionProblem:
    fields: dict[str, Any] = {"B": 1, "T": 256, "S": 256, "N": 2, "K": 1, "H": 64, "Hv": 64, "dtype": "bfloat16"}
    fields |= {"mask": masks.causal, "q_offset": None, **changes}
    fields["dtype"] = jnp.dtype(fields["dtype"])
    return AttentionProblem(**{"scale": fields["H"] ** -0.5, **fields})


def operands_of(problem: AttentionProblem, offsets: Any = 0) -> Operands:
    p, rng = problem, np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), p.dtype)

    def ids(length: int) -> jax.Array:
        return jnp.asarray(np.sort(rng.integers(0, 3, (p.B, length)), 1), jnp.int32)

    return Operands(
        array(p.B, p.T, p.N, p.H),
        array(p.B, p.S, p.K, p.H),
        array(p.B, p.S, p.K, p.Hv),
        ids(p.T) if p.segments else None,
        ids(p.S) if p.segments else None,
        jnp.broadcast_to(jnp.asarray(offsets, jnp.int32), (p.B,)),
        jnp.asarray(2.0 ** -np.arange(1, p.N + 1), jnp.float32) if p.alibi else None,
        None,
        jnp.asarray(rng.integers(-9, p.S + 30, (p.B, p.T)), jnp.int32) if p.visible_to else None,
    )


def run(
    problem: AttentionProblem, operands: Operands, interpret: Any = True, **blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    chosen = replace(gpu.default_blocks(problem, H200), **blocks)
    body = functools.partial(gpu.forward, problem, chosen, interpret=interpret)
    out, lse = jax.jit(lambda operands: body(operands))(operands)
    assert out.dtype == problem.dtype and lse.dtype == jnp.float32
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def check(problem: AttentionProblem, words: oracle.Words, operands: Operands, out: np.ndarray, lse: np.ndarray) -> None:
    q, k, v = (np.asarray(x.astype(jnp.float32)) for x in operands[:3])
    right = oracle.attention(
        q,
        k,
        v,
        np.zeros((problem.B, problem.T, problem.N, problem.Hv)),
        mask=words,
        segment_ids=operands.q_segments,
        kv_segment_ids=operands.k_segments,
        visible_to=operands.visible_to,
        q_offset=operands.q_offset,
        scale=problem.scale,
        soft_cap=problem.soft_cap,
        alibi_slopes=operands.alibi_slopes,
    )
    assert out.shape == right.out.shape and lse.shape == right.lse.shape
    assert np.abs(out - right.out).max() <= OUT[problem.dtype.name] * np.abs(right.out).max()
    seen = np.isfinite(right.lse)
    assert np.abs(lse - right.lse)[seen].max() <= LSE * np.abs(right.lse[seen]).max()
    assert (lse[~seen] == np.float32(MASKED)).all() and not out.swapaxes(1, 2)[~seen].any()


@interpreted
@pytest.mark.parametrize(
    ("mask", "fields", "offsets", "blocks"),
    [
        pytest.param(CAUSAL, {}, 0, {"k": 64}, id="causal"),
        pytest.param(FULL, {"T": 200, "S": 72, "dtype": "float16"}, 0, {}, id="ragged"),
        pytest.param(CAUSAL, {"T": 1, "S": 200, "N": 4, "K": 4, "H": 128, "Hv": 128}, 150, {}, id="one query"),
        pytest.param(CAUSAL, {"segments": True}, 0, {"k": 64}, id="segments"),
        pytest.param(WINDOW, {"soft_cap": 2.0, "dtype": "float16"}, 0, {"k": 64}, id="soft cap"),
        pytest.param(FULL, {"alibi": True, "T": 130}, 40, {"stages": 2}, id="alibi"),
        pytest.param(CHUNKS, {"B": 2, "T": 100, "S": 300}, [200, 50], {"k": 64}, id="chunks, offsets"),
        pytest.param(PREFIX, {"H": 192, "Hv": 128, "T": 130, "S": 130, "segments": True}, 0, {"k": 64}, id="192/128"),
        pytest.param(PREFIX, {"Hv": 96, "T": 130, "S": 130, "alibi": True, "soft_cap": 5.0}, 0, {}, id="64/96"),
        pytest.param(CAUSAL, {"H": 32, "Hv": 16, "T": 128, "S": 65, "segments": True}, 0, {}, id="32/16, segments"),
        pytest.param(FULL, {"H": 80, "Hv": 80, "T": 64, "S": 64, "scale": -0.2}, 0, {}, id="80, negative scale"),
        pytest.param(CAUSAL, {"H": 256, "Hv": 256, "T": 70, "S": 140}, 70, {}, id="256"),
        pytest.param(OPEN, {"visible_to": True, "T": 150, "S": 200}, 0, {"k": 64}, id="ends"),
        pytest.param(
            OPEN_WINDOW,
            {"visible_to": True, "B": 2, "T": 70, "segments": True},
            [9, 150],
            {"k": 64},
            id="ends, segments",
        ),
        pytest.param(CAUSAL, {"N": 4, "K": 2, "T": 140, "S": 333}, 0, {"k": 64, "stages": 1}, id="groups, one slot"),
    ],
)
def test_forward(mask: tuple[Mask, oracle.Words], fields: dict, offsets: Any, blocks: dict) -> None:
    problem = problem_of(mask=mask[0], **fields)
    operands = operands_of(problem, offsets)
    check(problem, mask[1], operands, *run(problem, operands, **blocks))


@interpreted
def test_rows_that_see_nothing_are_zero() -> None:
    problem = problem_of(T=64, S=64)
    out, lse = run(problem, operands_of(problem, offsets=-40))
    assert not out[:, :40].any() and (lse[:, :, :40] == np.float32(MASKED)).all()
    assert out[:, 40:].all() and np.abs(lse[:, :, 40:]).max() < 100


@interpreted
@pytest.mark.parametrize("segments", [False, True])
def test_hidden_blocks_are_not_read(segments: bool) -> None:
    """Keys and values of blocks that no query needs are NaN, which any product with them would spread."""
    mask = masks.causal if segments else masks.local(63, 0)
    problem = problem_of(T=128, S=384, segments=segments, mask=mask)
    operands = operands_of(problem, offsets=192)
    k, v = (x.at[:, :128].set(jnp.nan).at[:, 320:].set(jnp.nan) for x in (operands.k, operands.v))
    ids = jnp.where(jnp.arange(384) < 128, 4, 7)[None] if segments else None
    q_ids = jnp.full((1, 128), 7) if segments else None
    out, lse = run(problem, operands._replace(k=k, v=v, q_segments=q_ids, k_segments=ids), k=64)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


@interpreted
def test_blocks_beyond_the_ends_are_not_read() -> None:
    problem = problem_of(T=128, S=384, visible_to=True, mask=masks.full)
    operands = operands_of(problem)
    k, v = (x.at[:, 192:].set(jnp.nan) for x in (operands.k, operands.v))
    ends = jnp.minimum(jnp.arange(128)[None] + 1, 130)
    out, lse = run(problem, operands._replace(k=k, v=v, visible_to=ends), k=64)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "stages"),
    [({"T": 200, "S": 300, "segments": True}, 2), ({"Hv": 96}, 1), ({"H": 96, "soft_cap": 9.0}, 3)],
)
def test_no_races(fields: dict, stages: int) -> None:
    problem = problem_of(**fields)
    operands = operands_of(problem)
    interpret = plgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined, unused-ignore]
    out, lse = run(problem, operands, interpret, k=64, stages=stages)
    check(problem, "causal", operands, out, lse)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"H": 72}, "it takes multiples of 16 up to"),
        ({"Hv": 320}, "Hv 320"),
        ({"buckets": Buckets(n=32)}, "relative_bias"),
    ],
)
def test_says_what_it_cannot_do(fields: dict, word: str) -> None:
    assert gpu.unsupported(problem_of(), H200) is None
    why = gpu.unsupported(problem_of(**fields), H200)
    assert why is not None and word in why


def test_needs_hopper() -> None:
    assert "a100" in str(gpu.unsupported(problem_of(), target_of("NVIDIA A100", "gpu"))).lower()


@pytest.mark.parametrize("changes", [{"q": 64}, {"k": 96}, {"k": 320}, {"stages": 0}])
def test_refuses_other_blocks(changes: dict[str, int]) -> None:
    problem = problem_of()
    blocks = AttentionBlocks(**{"q": 128, "k": 64, "q_backward": 64, "k_backward": 64, **changes})
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=rf"blocks\.{name} = {value} must be"):
        gpu.forward(problem, blocks, operands_of(problem))


@pytest.mark.parametrize("H", range(16, 257, 16))
def test_default_blocks_fit(H: int) -> None:
    for Hv in range(16, 257, 16):
        problem = problem_of(H=H, Hv=Hv, segments=True)
        assert gpu.on_chip_bytes(problem, gpu.default_blocks(problem, H200)) <= 227 * 1024
