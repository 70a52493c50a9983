"""The Mosaic TPU attention body: walks over blocks, races, block sizes. Numbers are tested for all bodies alike.

The simulator runs a kernel as a TPU would: copies land as late as they may, memory starts as NaN, and two cores share
the dimensions of the grid that a kernel calls parallel, in random order.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import masks, oracle
from kernels_pallas.attention import tpu, tpu_tile
from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Buckets, Operands
from kernels_pallas.attention.tpu_tile import Walk
from kernels_pallas.targets import Family, Target

V5E = Target("tpu_v5e", Family.TPU)

MASKS = {
    "full": masks.full,
    "causal": masks.causal,
    ("local", 20, 9): masks.local(20, 9),
    ("and", "causal", ("chunked", 24)): masks.causal & masks.chunked(24),
    ("or", "causal", ("prefix", 30)): masks.causal | masks.prefix(30),
    ("and", "causal", ("or", ("local", 20, 0), ("prefix", 4))): masks.causal & (masks.local(20, 0) | masks.prefix(4)),
}
"""By the oracle's words."""


def make_problem(**changes: Any) -> AttentionProblem:
    sizes = {"B": 1, "T": 64, "S": 64, "N": 2, "K": 1, "H": 32, "Hv": 32}
    rest = {"dtype": jnp.dtype("float32"), "mask": masks.causal, "scale": 0.2}
    return AttentionProblem(**(sizes | rest | changes))


@pytest.mark.parametrize("words", MASKS, ids=lambda words: str(MASKS[words]))
@pytest.mark.parametrize("offset", [0, 37, -20])
@pytest.mark.parametrize("outer_is_q", [True, False])
def test_a_walk_visits_each_needed_block_once_and_no_other(words, offset, outer_is_q):
    T, S, q, k = 90, 130, 16, 8
    visible = oracle.mask_matrix(words, offset + np.arange(T), np.arange(S))
    visible = np.pad(visible, ((0, -T % q), (0, -S % k))).reshape(-(-T // q), q, -(-S // k), k).any((1, 3))
    needed = visible if outer_is_q else visible.T

    for known in (offset, None):
        walk = Walk(make_problem(T=T, S=S, mask=MASKS[words], q_offset=known), q, k, outer_is_q)
        i, step = np.mgrid[: walk.n_outer, : walk.steps]
        blocks, active = jax.jit(walk.visit)({"offset": jnp.array([offset])}, 0, i, step)
        for row, visited, counts in zip(needed, np.asarray(blocks), np.asarray(active), strict=True):
            assert visited[counts].tolist() == np.flatnonzero(row).tolist()
            # Nothing more is fetched once the last needed block was.
            assert set(visited[~counts]) <= {visited[counts][-1] if counts.any() else 0}
        if known is not None:
            assert walk.steps == max(1, needed.sum(1).max())


@pytest.mark.parametrize("kind", ["causal", "documents", "any"])
@pytest.mark.parametrize("outer_is_q", [True, False])
def test_a_walk_by_ends_spans_what_is_needed(kind, outer_is_q):
    """Of each row of the batch: from the first block that is needed to the last."""
    T, S, q, k = 90, 130, 16, 8
    rng = np.random.default_rng(0)
    ends = {
        "causal": np.arange(T)[None] + np.array([[1], [40]]),
        "documents": np.stack([np.repeat([30, 70, 90], [30, 40, 20]), np.full(T, 130)]),
        "any": rng.integers(-5, 60, (2, T)),
    }[kind]
    visible = np.arange(S) < ends[:, :, None]
    visible = np.pad(visible, ((0, 0), (0, -T % q), (0, -S % k))).reshape(2, -(-T // q), q, -(-S // k), k).any((2, 4))
    needed = visible if outer_is_q else visible.swapaxes(1, 2)

    problem = make_problem(B=2, T=T, S=S, mask=masks.causal.opened(), visible_to=True)
    walk = Walk(problem, q, k, outer_is_q)
    zeros = jnp.zeros((2, 1, 1, 1))
    operands = Operands(zeros, zeros, zeros, None, None, jnp.zeros(2, jnp.int32), None, None, jnp.asarray(ends))
    i, step = np.mgrid[: walk.n_outer, : walk.steps]
    for b in range(2):
        blocks, active = jax.jit(walk.visit)(tpu_tile.scalars(walk, operands), b, i, step)
        for row, visited, counts in zip(needed[b], np.asarray(blocks), np.asarray(active), strict=True):
            (found,) = np.nonzero(row)
            span = range(found[0], found[-1] + 1) if found.size else range(0)
            assert visited[counts].tolist() == list(span)


@pytest.mark.parametrize("offset, steps", [(0, 3), (None, 4)])
@pytest.mark.parametrize("outer_is_q", [True, False])
def test_a_window_in_a_long_sequence_is_a_short_walk(offset, steps, outer_is_q):
    mask = masks.causal & masks.local(1023, 0)
    walk = Walk(make_problem(T=2**15, S=2**15, mask=mask, q_offset=offset), 512, 512, outer_is_q)
    assert walk.steps == steps


@pytest.fixture
def simulator() -> Iterator[pltpu.InterpretParams]:
    yield pltpu.InterpretParams(
        detect_races=True,
        num_cores_or_threads=2,
        random_seed=3,
        dma_execution_mode="on_wait",
        uninitialized_memory="nan",
    )
    pltpu.reset_tpu_interpret_mode_state()


def gradients(problem, blocks, operands, d_out, d_lse, interpret):
    """Output, logsumexp and the body's gradients for the two cotangents."""

    @jax.jit
    def run(operands, d_out, d_lse):
        out, lse = tpu.forward(problem, blocks, operands, interpret=interpret)
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).swapaxes(1, 2) - d_lse
        return out, lse, *tpu.backward(problem, blocks, operands, lse, delta, d_out, interpret=interpret)

    return jax.block_until_ready(run(operands, d_out, d_lse))


def case(problem: AttentionProblem, offset=0):
    """Random operands, cotangents and the options of the oracle that say the same."""
    p, random = problem, np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), p.dtype)
    q, k, v = normal(p.B, p.T, p.N, p.H), normal(p.B, p.S, p.K, p.H), normal(p.B, p.S, p.K, p.Hv)
    ids = [np.sort(random.integers(0, 3, (p.B, n)), 1).astype(np.int32) for n in (p.T, p.S)]
    slopes = random.random(p.N).astype(np.float32)
    ends = random.integers(-5, p.S + 9, (p.B, p.T)).astype(np.int32)
    table = random.standard_normal((p.N, p.buckets.n if p.buckets else 1)).astype(np.float32)
    operands = Operands(
        q,
        k,
        v,
        jnp.asarray(ids[0]) if p.segments else None,
        jnp.asarray(ids[1]) if p.segments else None,
        jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (p.B,)),
        jnp.asarray(slopes) if p.alibi else None,
        jnp.asarray(table) if p.buckets else None,
        jnp.asarray(ends) if p.visible_to else None,
    )
    options: dict[str, Any] = {"q_offset": offset, "scale": p.scale, "soft_cap": p.soft_cap}
    if p.segments:
        options |= {"segment_ids": ids[0], "kv_segment_ids": ids[1]}
    if p.visible_to:
        options |= {"visible_to": ends}
    if p.alibi:
        options |= {"alibi_slopes": slopes}
    if p.buckets:
        options |= {"bias_table": table, "bucket_rule": (p.buckets.max_distance, p.buckets.bidirectional)}
    return operands, normal(p.B, p.T, p.N, p.Hv), normal(p.B, p.N, p.T).astype(jnp.float32), options


BLOCKS = AttentionBlocks(q=16, k=16, q_backward=16, k_backward=16)

BUCKETS = Buckets(n=8, max_distance=20, bidirectional=True)

CASES = {
    "group and segments": ("causal", {"N": 4, "K": 2, "T": 40, "S": 40, "segments": True}, 0),
    "ragged, capped": ("full", {"T": 25, "S": 37, "Hv": 16, "soft_cap": 2.0}, 0),
    "window, offset at run time": (("local", 20, 9), {"B": 2, "T": 24, "alibi": True, "q_offset": None}, [3, 20]),
    "buckets": (("or", "causal", ("prefix", 30)), {"T": 37, "S": 50, "buckets": BUCKETS}, 0),
    "ends, segments": (("local", 20, 9), {"T": 40, "S": 50, "N": 2, "segments": True, "visible_to": True}, 5),
    "rows that see nothing": ("causal", {"T": 40, "S": 40, "q_offset": -20, "dtype": jnp.dtype("bfloat16")}, -20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_simulator_finds_no_race_and_the_same_numbers(name, simulator, capfd):
    words, sizes, offset = CASES[name]
    mask = MASKS[words].opened() if "visible_to" in sizes else MASKS[words]
    problem = make_problem(mask=mask, **sizes)
    operands, d_out, d_lse, options = case(problem, offset)
    found = gradients(problem, BLOCKS, operands, d_out, d_lse, simulator)
    assert_no_race(capfd)

    wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (*operands[:3], d_out)]
    expected = oracle.attention(*wide, d_lse, mask=words, **options)
    exact = problem.dtype == jnp.float32
    ceilings = (5e-6, 5e-6, 1e-5, 1e-5, 1e-5, 1e-5) if exact else (1.5e-2, 5e-6, 2e-2, 2e-2, 2e-2, 2e-2)
    for result, want, ceiling in zip(found, expected, ceilings, strict=False):
        if result is not None:
            want = np.where(np.isneginf(want), MASKED, want)
            blind = want == MASKED
            assert (np.asarray(result)[blind] == np.float32(MASKED)).all()
            error = np.abs(np.asarray(result.astype(jnp.float32), np.float64) - want)[~blind].max()
            assert error <= ceiling * np.abs(want[~blind]).max()


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_dk_dv", "attention_backward_dq"])
def test_the_simulator_does_find_a_race(kernel, simulator, capfd, monkeypatch):
    """Where the steps of a walk are called parallel, two cores write the one result."""
    call = tpu.pl.pallas_call

    def wrong(*args, name, compiler_params, **options):
        if name == kernel:
            parallel = ("parallel",) * len(compiler_params.dimension_semantics)
            compiler_params = dataclasses.replace(compiler_params, dimension_semantics=parallel)
        return call(*args, name=name, compiler_params=compiler_params, **options)

    monkeypatch.setattr(tpu.pl, "pallas_call", wrong)
    # One outer block, so that nothing but the steps can be shared.
    lengths = {"T": 32, "S": 16} if kernel == "attention_backward_dk_dv" else {"T": 16, "S": 32}
    problem = make_problem(N=1, mask=masks.full, **lengths)
    operands, d_out, row, _ = case(problem)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=r"(?i)race"):
        if kernel == "attention_forward":
            found = tpu.forward(problem, BLOCKS, operands, interpret=simulator)
        else:
            found = tpu.backward(problem, BLOCKS, operands, row, row, d_out, interpret=simulator)
        jax.block_until_ready(found)
        assert_no_race(capfd)


def assert_no_race(capfd) -> None:
    """jax 0.12 raises at a race; before it only prints, and goes on."""
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err


def test_what_the_body_cannot_do_is_named():
    assert tpu.unsupported(make_problem(), V5E) is None
    assert "bfloat16 or float32" in tpu.unsupported(make_problem(dtype=jnp.dtype("float16")), V5E)
    assert "T 1, S 64" in tpu.unsupported(make_problem(T=1, dtype=jnp.dtype("bfloat16")), V5E)
    assert "no TPU" in tpu.unsupported(make_problem(), Target("h200", Family.GPU, hopper=True))


def test_a_block_that_the_lanes_cannot_hold_is_refused():
    problem = make_problem(T=500, S=500)
    operands, *_ = case(problem)
    blocks = AttentionBlocks(q=200, k=128, q_backward=128, k_backward=128)
    with pytest.raises(ValueError, match=r"blocks.q = 200 must be a multiple of 128.*use 256"):
        tpu.forward(problem, blocks, operands, interpret=None)


@pytest.mark.parametrize("H", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip, limit", [("tpu_v5e", 16), ("tpu_v5p", 16), ("tpu_v6e", 32), ("tpu_7x", 32)])
def test_default_blocks_fit_the_memory_of_a_kernel(H, dtype, chip, limit):
    problem = make_problem(T=5000, S=1100, H=H, Hv=H, dtype=jnp.dtype(dtype), buckets=Buckets(n=32))
    blocks = tpu.default_blocks(problem, Target(chip, Family.TPU))
    assert all(size % 128 == 0 and size >= 256 for size in (blocks.q, blocks.k, blocks.q_backward, blocks.k_backward))
    assert 2**20 < tpu.on_chip_bytes(problem, blocks) <= limit * 2**20
