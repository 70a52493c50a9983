"""The backward kernels for Hopper, in the GPU interpreter, against the float64 oracle."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import masks, oracle
from kernels_pallas.attention import gpu_backward
from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Operands
from kernels_pallas.masks import Mask
from kernels_pallas.targets import HOPPER_SHARED_BYTES

GRADIENT = {"bfloat16": 2e-2, "float16": 4e-3}  # largest error, over the largest value of the reference

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax 0.10 has no interpreter of Mosaic GPU kernels"
)

CAUSAL, FULL = (masks.causal, "causal"), (masks.full, "full")
WINDOW = (masks.causal & masks.local(20, 0), ("and", "causal", ("local", 20, 0)))
CHUNKS = (masks.causal & masks.chunked(96), ("and", "causal", ("chunked", 96)))
OPEN, OPEN_WINDOW = (masks.causal.opened(), "causal"), (masks.local(50, 0).opened(), ("local", 50, 0))
PREFIX = (masks.causal | masks.prefix(70), ("or", "causal", ("prefix", 70)))


def problem_of(**changes: Any) -> AttentionProblem:
    fields: dict[str, Any] = {"B": 1, "T": 128, "S": 128, "N": 1, "K": 1, "H": 64, "Hv": 64, "dtype": "bfloat16"}
    fields |= {"mask": masks.causal, "q_offset": None, **changes}
    fields["dtype"] = jnp.dtype(fields["dtype"])
    return AttentionProblem(**{"scale": fields["H"] ** -0.5, **fields})


def arrays_of(problem: AttentionProblem, offsets: Any = 0) -> tuple[Operands, jax.Array]:
    """Operands and d_out."""
    p, rng = problem, np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), p.dtype)

    def ids(length: int) -> jax.Array:
        return jnp.asarray(np.sort(rng.integers(0, 3, (p.B, length)), 1), jnp.int32)

    operands = Operands(
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
    return operands, array(p.B, p.T, p.N, p.Hv)


def right_answer(problem: AttentionProblem, words: Any, operands: Operands, d_out: jax.Array) -> oracle.AttentionAnswer:
    q, k, v, cotangent = (np.asarray(x.astype(jnp.float32)) for x in (*operands[:3], d_out))
    return oracle.attention(
        q,
        k,
        v,
        cotangent,
        mask=words,
        segment_ids=operands.q_segments,
        kv_segment_ids=operands.k_segments,
        visible_to=operands.visible_to,
        q_offset=operands.q_offset,
        scale=problem.scale,
        soft_cap=problem.soft_cap,
        alibi_slopes=operands.alibi_slopes,
    )


def run(
    problem: AttentionProblem,
    operands: Operands,
    d_out: jax.Array,
    right: oracle.AttentionAnswer,
    interpret: Any = True,
    **blocks: int,
) -> list[np.ndarray]:
    chosen = AttentionBlocks(**{"q": 128, "k": 64, "q_backward": 64, "k_backward": 64, "stages": 2, **blocks})
    lse = jnp.asarray(np.where(np.isfinite(right.lse), right.lse, MASKED), jnp.float32)
    delta = jnp.asarray(np.einsum("btnh,btnh->bnt", right.out, np.asarray(d_out.astype(jnp.float32))), jnp.float32)
    body = functools.partial(gpu_backward.backward, problem, chosen, interpret=interpret)
    dq, dk, dv, table = jax.jit(lambda *arrays: body(*arrays))(operands, lse, delta, d_out)
    assert table is None and {x.dtype for x in (dq, dk, dv)} == {problem.dtype}
    return [np.asarray(x.astype(jnp.float32)) for x in (dq, dk, dv)]


def check(problem: AttentionProblem, got: list[np.ndarray], right: oracle.AttentionAnswer) -> None:
    for name, mine in zip(("dq", "dk", "dv"), got, strict=True):
        reference = getattr(right, name)
        assert mine.shape == reference.shape
        error = np.abs(mine - reference).max() / np.abs(reference).max()
        assert error <= GRADIENT[problem.dtype.name], f"{name}: {error}"


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "fields", "offsets", "blocks"),
    [
        pytest.param(CAUSAL, {"T": 200, "S": 200, "N": 2}, 0, {}, id="causal, ragged, shared key head"),
        pytest.param(FULL, {"T": 70, "S": 72, "dtype": "float16"}, 0, {}, id="float16"),
        pytest.param(WINDOW, {"segments": True, "T": 150, "S": 190}, 30, {"stages": 1}, id="window, segments"),
        pytest.param(CHUNKS, {"B": 2, "S": 200, "soft_cap": 2.0}, [60, 7], {}, id="chunks, offsets, soft cap"),
        pytest.param(PREFIX, {"alibi": True, "N": 2, "K": 2}, 0, {"k_backward": 128}, id="prefix, alibi"),
        pytest.param(OPEN, {"visible_to": True, "T": 200, "S": 190}, 0, {}, id="ends"),
        pytest.param(OPEN_WINDOW, {"visible_to": True, "segments": True, "T": 150}, 30, {}, id="ends, segments"),
        pytest.param(CAUSAL, {"H": 80, "Hv": 96}, 0, {"q_backward": 128}, id="80/96"),
        pytest.param(CAUSAL, {"H": 192, "Hv": 128, "T": 100, "S": 90, "N": 2}, 0, {}, id="192/128"),
        pytest.param(FULL, {"H": 256, "Hv": 256, "S": 64}, 0, {}, id="256"),
    ],
)
def test_gradients(mask: tuple[Mask, Any], fields: dict, offsets: Any, blocks: dict) -> None:
    problem = problem_of(mask=mask[0], **fields)
    operands, d_out = arrays_of(problem, offsets)
    right = right_answer(problem, mask[1], operands, d_out)
    check(problem, run(problem, operands, d_out, right, **blocks), right)


@interpreted
def test_rows_that_see_nothing_have_no_gradient() -> None:
    problem = problem_of(T=64, S=64)
    operands, d_out = arrays_of(problem, offsets=-40)
    right = right_answer(problem, "causal", operands, d_out)
    dq, dk, dv = run(problem, operands, d_out, right)
    check(problem, [dq, dk, dv], right)
    assert not dq[:, :40].any() and not dk[:, 24:].any() and not dv[:, 24:].any()


@interpreted
@pytest.mark.parametrize("segments", [False, True])
def test_hidden_blocks_are_not_read(segments: bool) -> None:
    """What no kept block needs is NaN, which any product with it would spread."""
    problem = problem_of(S=256, mask=masks.full if segments else masks.local(63, 0), segments=segments)
    operands, d_out = arrays_of(problem, offsets=0)
    if segments:
        ids = jnp.where(jnp.arange(256) < 128, 4, 7)[None]
        operands = operands._replace(q_segments=ids[:, :128], k_segments=ids)
    words = "full" if segments else ("local", 63, 0)
    right = right_answer(problem, words, operands, d_out)
    hidden = operands._replace(k=operands.k.at[:, 128:].set(jnp.nan), v=operands.v.at[:, 128:].set(jnp.nan))
    dq, dk, dv = run(problem, hidden, d_out, right)
    check(problem, [dq, dk, dv], right)
    assert not dk[:, 128:].any() and not dv[:, 128:].any()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"T": 200, "segments": True}, {"H": 192, "Hv": 128, "T": 64, "S": 64}])
def test_no_races(fields: dict) -> None:
    problem = problem_of(**fields)
    operands, d_out = arrays_of(problem)
    right = right_answer(problem, "causal", operands, d_out)
    interpret = plgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined, unused-ignore]
    check(problem, run(problem, operands, d_out, right, interpret), right)


@pytest.mark.parametrize("changes", [{"q_backward": 32}, {"k_backward": 96}, {"k_backward": 320}])
def test_refuses_other_blocks(changes: dict[str, int]) -> None:
    problem = problem_of()
    operands, d_out = arrays_of(problem)
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=rf"blocks\.{name} = {value} must be"):
        run(problem, operands, d_out, right_answer(problem, "causal", operands, d_out), **changes)


@pytest.mark.parametrize("width", range(16, 257, 16))
def test_default_blocks_fit(width: int) -> None:
    blocks = AttentionBlocks(q=128, k=64, q_backward=64, k_backward=64, stages=4)
    assert gpu_backward.backward_bytes(problem_of(H=width, Hv=width, segments=True), blocks) <= HOPPER_SHARED_BYTES
