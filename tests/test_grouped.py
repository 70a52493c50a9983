"""Grouped products: every body against the float64 formula, row by row, and what they must not read or keep."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import GroupedBlocks, explain, grouped_matmul, oracle
from kernels_pallas.grouped import tpu
from kernels_pallas.grouped.problem import GroupedProblem
from kernels_pallas.targets import Family, Target

BLOCKS = GroupedBlocks(
    m=16, f=128, d=128, m_rows=16, f_rows=128, d_rows=128, m_weights=32, f_weights=128, d_weights=128
)
BODIES: dict[str, dict[str, Any]] = {
    "xla": {"backend": "xla"},
    "loop": {"backend": "loop", "blocks": BLOCKS},
    "tpu": {"backend": "tpu", "interpret": True, "blocks": BLOCKS},
}
CEILINGS = {"float32": (5e-6, 1e-5), "bfloat16": (1e-2, 1e-2)}  # of values and of gradients, by the largest

M, D, F = 75, 200, 150  # five tiles of rows or three, two of columns, two slices of depth: the last of each is ragged
SIZES = {
    "equal": [15, 15, 15, 15, 15],
    "empty groups": [30, 0, 0, 20, 25],
    "first and last empty": [0, 40, 0, 35, 0],
    "all rows in one": [0, 0, 75, 0, 0],
    "at edges of tiles": [16, 32, 0, 16, 11],
    "beside edges of tiles": [17, 14, 1, 33, 10],
    "single rows": [1, 1, 71, 1, 1],
    "many in one tile": [3, 0, 4, 2, 5],
    "rows of no group": [3, 0, 9, 20, 3],
    "an edge, then rows of no group": [16, 0, 0, 16, 0],
    "no rows": [0, 0, 0, 0, 0],
}


class Arguments(NamedTuple):
    x: Any
    w: Any
    dy: Any


@functools.cache
def arguments(E: int, dtype: str, weight_dtype: str, rows: int = M) -> Arguments:
    """Random, such that every sum is of size one."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)
    w = draw(E, D, F, dtype=weight_dtype) * jnp.asarray(D**-0.5, weight_dtype)
    return Arguments(draw(rows, D, dtype=dtype), w, draw(rows, F, dtype=dtype))


def broken(case: str) -> tuple[Arguments, jax.Array]:
    """Arguments whose rows of no group are no numbers, and the sizes of the groups."""
    x, w, dy = arguments(5, "float32", "float32")
    in_group = np.arange(M)[:, None] < sum(SIZES[case])
    return Arguments(jnp.where(in_group, x, jnp.nan), w, jnp.where(in_group, dy, jnp.inf)), jnp.array(SIZES[case])


@functools.cache
def program(body: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The result and both gradients, compiled once for all sizes of groups."""

    @jax.jit
    def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **BODIES[body]), x, w)
        return out, *pull(dy)

    return run


def assert_close(found: tuple[jax.Array, ...], values: Arguments, sizes: Any) -> None:
    x, w, dy = values
    wanted = oracle.grouped_matmul(x, w.astype(x.dtype), sizes, dy)
    value, gradient = CEILINGS[x.dtype.name]
    # Products of what is exact in float32 are summed in float32, and dw is rounded to the weights' dtype alone.
    ceilings = value, gradient, CEILINGS[w.dtype.name][1]
    for array, exact, like, ceiling in zip(found, wanted, (dy, x, w), ceilings, strict=True):
        assert array.dtype == like.dtype
        error = np.abs(np.asarray(array, np.float64) - exact).max()
        assert error <= ceiling * np.abs(exact).max()
        np.testing.assert_array_equal(np.asarray(array, np.float64)[exact == 0], 0)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("body", BODIES)
def test_groups_of_any_size(body: str, case: str) -> None:
    """What stands in rows of no group, here no number, goes nowhere."""
    values, sizes = broken(case)
    assert_close(program(body)(*values, sizes), arguments(5, "float32", "float32"), sizes)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("body", BODIES)
def test_dtypes(body: str, dtype: str, weight_dtype: str) -> None:
    """The gradient of a weight is in the weight's own dtype, and not rounded to x's before."""
    values, sizes = arguments(5, dtype, weight_dtype), jnp.array(SIZES["beside edges of tiles"])
    assert_close(program(body)(*values, sizes), values, sizes)


@pytest.mark.parametrize(("E", "rows"), [(1, M), (128, M), (3, 5)])
@pytest.mark.parametrize("body", BODIES)
def test_numbers_of_groups_and_rows(body: str, E: int, rows: int) -> None:
    values = arguments(E, "float32", "float32", rows)
    sizes = np.bincount(np.random.default_rng(E).integers(0, E, rows - 1), minlength=E)
    assert_close(program(body)(*values, jnp.asarray(sizes)), values, sizes)


@pytest.mark.parametrize("body", ["loop", "tpu"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_sizes_exactly(body: str, data: st.DataObject) -> None:
    """Small whole numbers, whose sums are exact: equal to the last bit, however the rows are cut."""
    rows, E = 70, 6
    ends = sorted(data.draw(st.lists(st.integers(0, rows), min_size=E, max_size=E)))
    sizes = np.diff(ends, prepend=0)
    rng = np.random.default_rng(1)
    values = [rng.integers(-3, 4, shape).astype(np.float32) for shape in ((rows, 8), (E, 8, 24), (rows, 24))]
    found = program(body)(*values, jnp.asarray(sizes))
    x, w, dy = values
    for array, exact in zip(found, oracle.grouped_matmul(x, w, sizes, dy), strict=True):
        np.testing.assert_array_equal(array, exact)


@pytest.mark.parametrize("body", BODIES)
def test_gradients_of_float32_weights_are_summed_in_float32(body: str) -> None:
    """257 equal terms: formed in bfloat16, their sum would be 256."""
    options = BODIES[body] | {"blocks": None}
    f = lambda w: grouped_matmul(jnp.ones((257, 1), jnp.bfloat16), w, jnp.array([0, 257]), **options).sum()
    np.testing.assert_array_equal(jax.grad(f)(jnp.zeros((2, 1, 1)))[:, 0, 0], [0, 257])


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("body", ["xla", "loop"])
def test_on_eight_devices(body: str, check_vma: bool) -> None:
    """Each has rows and groups of its own; the gradient of the weights they share is the sum of theirs."""
    x, w, dy = arguments(5, "float32", "float32", 8 * 9)
    sizes = np.random.default_rng(2).multinomial(8, [0.2] * 5, size=8)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    run = jax.shard_map(
        lambda x, w, sizes: grouped_matmul(x, w, sizes[0], **BODIES[body]),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    out, pull = jax.vjp(jax.jit(lambda x, w: run(x, w, jnp.asarray(sizes))), x, w)
    parts = [
        oracle.grouped_matmul(x, w, own, dy) for x, own, dy in zip(np.split(x, 8), sizes, np.split(dy, 8), strict=True)
    ]
    dx, dw = pull(dy)
    wanted = np.concatenate([p.out for p in parts]), np.concatenate([p.dx for p in parts]), sum(p.dw for p in parts)
    for array, exact in zip((out, dx, dw), wanted, strict=True):
        np.testing.assert_allclose(array, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("body", ["loop", "tpu"])
def test_inside_scan_and_checkpoint(body: str) -> None:
    """As the layers of a model are run: other sizes in every step."""
    values = arguments(5, "float32", "float32")
    steps = jnp.array([SIZES["equal"], SIZES["many in one tile"]])

    @jax.jit
    @jax.value_and_grad
    def loss(w: jax.Array) -> jax.Array:
        def step(total: jax.Array, sizes: jax.Array) -> tuple[jax.Array, None]:
            run = jax.checkpoint(lambda w: (grouped_matmul(values.x, w, sizes, **BODIES[body]) * values.dy).sum())
            return total + run(w), None

        return jax.lax.scan(step, jnp.float32(0), steps)[0]

    value, dw = loss(values.w)
    wanted = [oracle.grouped_matmul(values.x, values.w, sizes, values.dy) for sizes in steps]
    exact = sum((part.out * values.dy).sum() for part in wanted)
    assert abs(value - exact) <= 1e-5 * abs(exact)
    np.testing.assert_allclose(dw, wanted[0].dw + wanted[1].dw, atol=1e-5 * np.abs(wanted[0].dw).max())


@pytest.mark.parametrize(("names", "kept"), [((), 0), (("grouped_out",), 1)])
@pytest.mark.parametrize("body", BODIES)
def test_the_result_can_be_saved_by_name(body: str, names: tuple[str, ...], kept: int) -> None:
    values, sizes = arguments(5, "float32", "float32"), jnp.array(SIZES["equal"])

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sin(grouped_matmul(x, w, sizes, **BODIES[body])).sum()

    _, pull = jax.vjp(layer, values.x, values.w)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)].count((M, F)) == kept


@pytest.mark.slow
def test_kernels_have_no_races(capfd: pytest.CaptureFixture[str]) -> None:
    """In the simulator of a TPU with two cores, whose memory starts as NaN and whose copies arrive late."""
    values, sizes = arguments(5, "float32", "float32"), jnp.array([17, 0, 14, 30, 1])
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, random_seed=0, dma_execution_mode="on_wait"
    )
    options = BODIES["tpu"] | {"interpret": interpret}
    try:
        out, pull = jax.vjp(jax.jit(lambda x, w: grouped_matmul(x, w, sizes, **options)), values.x, values.w)
        found = jax.block_until_ready((out, *pull(values.dy)))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out  # later versions of jax raise
    assert_close(found, values, sizes)


@pytest.mark.parametrize("chip", ["tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu_7x"])
@pytest.mark.parametrize(
    "sizes", [(16384, 2048, 768, 128), (65536, 4096, 14336, 8), (8192, 1000, 130, 60), (3, 7, 5, 1)], ids=str
)
def test_default_blocks_fit_and_are_legal(chip: str, sizes: tuple[int, int, int, int]) -> None:
    rows, D, F, E = sizes
    target = Target(chip, Family.TPU)
    for dtype, weight_dtype in (("bfloat16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        problem = GroupedProblem(M=rows, D=D, F=F, E=E, dtype=jnp.dtype(dtype), weight_dtype=jnp.dtype(weight_dtype))
        blocks = tpu.default_blocks(problem, target)
        assert tpu.on_chip_bytes(problem, blocks) <= target.kernel_bytes  # raises where they are not legal


def test_a_call_of_the_kernel_runs_only_the_visits_there_are() -> None:
    """Of 5 tiles and 5 groups: one visit for each tile of a group."""
    for case, visits in (("equal", 9), ("all rows in one", 5), ("many in one tile", 4 + 5), ("no rows", 5)):
        sizes = jnp.array(SIZES[case])
        whole = jnp.append(sizes, M - sizes.sum())
        assert int(tpu._visits(whole, M, 16, at_least=0)[1]) == visits


X, W, SIX = jnp.ones((8, 16)), jnp.ones((6, 16, 4)), jnp.array([1, 2, 0, 3, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_matmul(X[None], W, SIX), r"x float32\[1, 8, 16\] must be floating point \[M, D\]"),
        (lambda: grouped_matmul(X.astype(int), W, SIX), r"x int32\[8, 16\] must be floating point"),
        (lambda: grouped_matmul(X, W[0], SIX), r"w float32\[16, 4\] must be floating point \[E, D, F\]"),
        (lambda: grouped_matmul(X, W.mT, SIX), r"w \[6, 4, 16\] must be \[E, 16, F\].*is it transposed\?"),
        (lambda: grouped_matmul(X, W, SIX[:5]), r"group_sizes int32\[5\] must be int32\[6\]"),
        (lambda: grouped_matmul(X, W, SIX * 1.0), r"group_sizes float32\[6\] must be int32\[6\]"),
        (
            lambda: grouped_matmul(X, W, SIX, backend="gpu"),
            "backend = 'gpu' is unknown to grouped_matmul; use auto, tpu",
        ),
        (lambda: grouped_matmul(X, W, SIX, backend="tpu"), r"target cpu is no TPU; use loop, xla \(or interpret=True"),
        (lambda: grouped_matmul(X.astype("float16"), W, SIX, **BODIES["tpu"]), "dtype float16 has no TPU kernel"),
        (lambda: grouped_matmul(X, W, SIX, blocks=(8, 8)), "must be of kernels_pallas.GroupedBlocks"),  # type: ignore[arg-type]
        (lambda: grouped_matmul(X[:0], W, SIX, backend="loop"), "M 0, E 6: without rows or groups"),
        (
            lambda: grouped_matmul(X, W, SIX, **BODIES["tpu"] | {"blocks": replace(BLOCKS, m_rows=12)}),
            "m_rows = 12 must be a multiple of 8; use 16",
        ),
        (
            lambda: grouped_matmul(
                X, jnp.ones((6, 16, 300)), SIX, **BODIES["tpu"] | {"blocks": replace(BLOCKS, f_weights=200)}
            ),
            "f_weights = 200 must be a multiple of 128 or at least 300; use 256",
        ),
    ],
)
def test_errors_name_what_works(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("M", "E"), [(0, 3), (4, 3)])
def test_no_rows_and_no_groups_to_speak_of(M: int, E: int) -> None:
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.zeros(E, int)), jnp.ones((M, 5)), jnp.ones((E, 5, 2)))
    dx, dw = pull(jnp.ones((M, 2)))
    for array, shape in ((out, (M, 2)), (dx, (M, 5)), (dw, (E, 5, 2))):
        np.testing.assert_array_equal(array, np.zeros(shape))


@pytest.mark.parametrize(
    ("chip", "dtype", "backend"),
    [
        ("cpu", "float32", "loop"),
        ("h200", "bfloat16", "loop"),
        ("tpu_v5p", "bfloat16", "tpu"),
        ("tpu_v5p", "float16", "loop"),
    ],
)
def test_goes_to(chip: str, dtype: str, backend: str) -> None:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    plan = explain(grouped_matmul, shape((4096, 256)), shape((8, 256, 512)), sizes, target=chip)
    assert plan.backend == backend
    assert plan.flops == 2 * 4096 * 256 * 512
    assert plan.hbm_bytes == (4096 * 256 + 8 * 256 * 512 + 4096 * 512) * jnp.dtype(dtype).itemsize


MUTATIONS = [
    ("tpu", "jnp.where(own, total[...].astype(out.dtype), out[...])", "total[...].astype(out.dtype)"),
    ("tpu", "    @pl.when(step == 0)\n    def start() -> None:\n        total[...] = jnp.zeros_like(total)\n", ""),
    ("tpu", "    @pl.when(first <= begin)\n    def start", "    @pl.when(first < begin)\n    def start"),
    ("tpu", "@pl.when(first + m >= end)", "@pl.when(first + m > end)"),
    ("tpu", "@pl.when(e < n_groups)", "@pl.when(e <= n_groups)"),
    ("tpu", "(positions >= begin) & (positions < end)", "positions >= begin"),
    ("tpu", "(positions >= begin) & (positions < end)", "positions < end"),
    ("tpu", "if D % depth == 0:", "if True:"),
    ("tpu", "(end - 1) // m - first + 1", "(end - 1 - begin) // m + 1"),
    ("tpu", "sizes, M, tile.m, at_least=1", "sizes, M, tile.m, at_least=0"),
    ("loop", "(rows >= wanted) & (rows < end)", "rows < end"),
    ("loop", "(rows >= wanted) & (rows < end)", "rows >= wanted"),
    ("loop", "first = jnp.minimum(wanted, M - m)", "first = wanted"),
    ("loop", "(end - begin + m - 1) // m", "(end - begin) // m"),
]


@pytest.mark.parametrize("case", range(len(MUTATIONS)), ids=lambda case: f"{MUTATIONS[case][0]} {case}")
def test_a_changed_line_is_noticed(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body, old, new = MUTATIONS[case]
    source = (Path(tpu.__file__).parent / f"{body}.py").read_text()
    assert source.count(old) == 1, f"{body}.py has {source.count(old)} of {old!r}"
    module = types.ModuleType(f"kernels_pallas.grouped.{body}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.replace(old, new), f"{body}.py, mutated", "exec"), module.__dict__)
    values = arguments(5, "float32", "float32")
    problem = GroupedProblem(M=M, D=D, F=F, E=5, dtype=values.x.dtype, weight_dtype=values.w.dtype)
    options = {"interpret": BODIES[body].get("interpret")}

    @jax.jit
    def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        return (
            module.forward(problem, BLOCKS, x, w, sizes, **options),
            module.row_gradient(problem, BLOCKS, dy, w, sizes, **options),
            module.weight_gradient(problem, BLOCKS, x, dy, sizes, **options),
        )

    def is_right(name: str) -> bool:
        values, sizes = broken(name)
        try:
            assert_close(run(*values, sizes), arguments(5, "float32", "float32"), sizes)
        except AssertionError:
            return False
        return True

    assert not all(map(is_right, ("beside edges of tiles", "rows of no group", "empty groups")))
