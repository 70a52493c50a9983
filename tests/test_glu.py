"""Gated linear units: every body against the float64 formula, and what the gradient keeps, computes and names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import GluBlocks, fused_glu, fused_glu_mlp, oracle
from kernels_pallas.glu import tpu
from kernels_pallas.glu.activations import ACTIVATIONS, activate, activate_with_slope
from kernels_pallas.glu.problem import GluProblem, Save
from kernels_pallas.targets import Family, Target

BLOCKS = GluBlocks(m=32, f=128, d=128, m_backward=16, f_backward=128, d_backward=128)
BODIES: dict[str, dict[str, Any]] = {
    "xla": {"backend": "xla"},
    "tpu": {"backend": "tpu", "interpret": True, "blocks": BLOCKS},
}
CEILINGS = {"float32": (5e-6, 1e-5), "bfloat16": (1e-2, 1e-2)}  # of values and of gradients, by the largest

LEAD, D, F = (2, 37), 200, 150  # three tiles of rows, two of columns, two slices of D: the last of each is ragged


class Arguments(NamedTuple):
    x: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    b_gate: Any
    b_up: Any
    dh: Any
    dy: Any


def arguments(dtype: str = "float32", *, lead: tuple[int, ...] = LEAD, biases: bool = True) -> Arguments:
    """Random, such that every sum is of size one, and in one dtype."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, scale=1.0: jnp.asarray(rng.normal(size=shape) * scale, dtype)
    w_gate, w_up, w_down = (draw(*shape, scale=shape[0] ** -0.5) for shape in ((D, F), (D, F), (F, D)))
    b_gate, b_up = (draw(F), draw(F)) if biases else (None, None)
    return Arguments(draw(*lead, D), w_gate, w_up, w_down, b_gate, b_up, draw(*lead, F), draw(*lead, D))


def formula(values: Arguments, act: str, mlp: bool, beta: float = 1.0) -> dict[str, np.ndarray]:
    """The result and all gradients, in float64."""
    exact = (np.asarray(0.0 if v is None else v, np.float64) for v in values)
    x, w_gate, w_up, w_down, b_gate, b_up, dh, dy = exact
    r = oracle.glu(x, w_gate, w_up, dy @ w_down.T if mlp else dh, b_gate, b_up, act=act, beta=beta)
    found = {"x": r.dx, "w_gate": r.dw_gate, "w_up": r.dw_up, "b_gate": r.db_gate, "b_up": r.db_up}
    if not mlp:
        return {"out": r.h, **found}
    return {"out": r.h @ w_down, **found, "w_down": r.h.reshape(-1, F).T @ dy.reshape(-1, D)}


def names(values: Arguments, mlp: bool) -> list[str]:
    wanted = ["x", "w_gate", "w_up"] + ["w_down"] * mlp + ["b_gate", "b_up"]
    return [name for name in wanted if getattr(values, name) is not None]


def measured(values: Arguments, mlp: bool, **options: Any) -> dict[str, jax.Array]:
    """The result and all gradients, as one program."""

    @jax.jit
    def run(given: dict[str, jax.Array], d_out: jax.Array) -> dict[str, jax.Array]:
        out, pull = jax.vjp(lambda given: (fused_glu_mlp if mlp else fused_glu)(**given, **options), given)
        return {"out": out, **pull(d_out)[0]}

    return run({name: getattr(values, name) for name in names(values, mlp)}, values.dy if mlp else values.dh)


def assert_close(found: dict[str, jax.Array], wanted: dict[str, np.ndarray], dtype: str = "float32") -> None:
    value, gradient = CEILINGS[dtype]
    for name, array in found.items():
        assert array.dtype == dtype
        error = np.abs(np.asarray(array, np.float64) - wanted[name]).max() / np.abs(wanted[name]).max()
        assert error <= (value if name == "out" else gradient), (name, error)


BETAS = {"swish": 1.702}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_slopes(act: str) -> None:
    a = np.concatenate([np.linspace(-12, 12, 4001), [-0.0, 60.0, -60.0]]).astype(np.float32)
    beta = BETAS.get(act, 1.0)
    value, slope = activate_with_slope(act, jnp.asarray(a), beta)
    wanted_value, wanted_slope = oracle.activation(act, a.astype(np.float64), beta)
    np.testing.assert_allclose(value, wanted_value, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slope, wanted_slope, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(activate(act, jnp.asarray(a), beta), value)


def test_gelu_keeps_the_digits_of_its_tail() -> None:
    """At -5 the usual 1 + erf has one digit left."""
    a = np.linspace(-5, -0.01, 1001).astype(np.float32)
    wanted = [x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in a.astype(float)]
    np.testing.assert_allclose(activate("gelu", jnp.asarray(a)), wanted, rtol=3e-6)


@pytest.mark.parametrize("mlp", [False, True], ids=["glu", "mlp"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("body", BODIES)
def test_every_activation(body: str, act: str, mlp: bool) -> None:
    values, beta = arguments(), BETAS.get(act, 1.0)
    assert_close(measured(values, mlp, act=act, beta=beta, **BODIES[body]), formula(values, act, mlp, beta))


@pytest.mark.parametrize("mlp", [False, True], ids=["glu", "mlp"])
@pytest.mark.parametrize("save", ["none", "ag"])
@pytest.mark.parametrize("dtype", CEILINGS)
@pytest.mark.parametrize("body", BODIES)
def test_every_dtype_and_what_is_saved(body: str, dtype: str, save: Save, mlp: bool) -> None:
    values = arguments(dtype, biases=False)
    assert_close(measured(values, mlp, save=save, **BODIES[body]), formula(values, "silu", mlp), dtype)


@pytest.mark.parametrize("lead", [(), (1,), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_any_leading_dims_and_the_default_blocks(body: str, lead: tuple[int, ...]) -> None:
    values = arguments(lead=lead)
    found = measured(values, True, **BODIES[body] | {"blocks": None})
    assert found["out"].shape == (*lead, D)
    assert_close(found, formula(values, "silu", True))


@pytest.mark.parametrize("body", BODIES)
def test_a_down_projection_to_another_width(body: str) -> None:
    """Only the kernel of the backward pass needs Dout = D."""
    values = arguments()
    w_down = values.w_down[:, :72]
    run = lambda x: fused_glu_mlp(x, values.w_gate, values.w_up, w_down, save="ag", **BODIES[body])
    out, pull = jax.vjp(run, values.x)
    wide = values._replace(
        w_down=values.w_down.at[:, 72:].set(0), dy=values.dy.at[..., 72:].set(0), b_gate=None, b_up=None
    )
    wanted = formula(wide, "silu", True)
    wanted["out"] = wanted["out"][..., :72]
    assert_close({"out": out, "x": pull(values.dy[..., :72])[0]}, wanted)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("save", ["none", "ag"])
def test_gradients_keep_the_weights_dtype(save: Save, body: str) -> None:
    x = jnp.ones((2, 8), jnp.bfloat16)
    w_gate, w_up, bias = jnp.ones((8, 4), jnp.float32), jnp.ones((8, 4), jnp.bfloat16), jnp.ones(4, jnp.float32)
    run = lambda x, w_gate, w_up, b_gate, b_up: fused_glu_mlp(
        x, w_gate, w_up, jnp.ones((4, 8)), b_gate=b_gate, b_up=b_up, save=save, **BODIES[body] | {"blocks": None}
    )
    y, pull = jax.vjp(run, x, w_gate, w_up, bias, bias)
    assert y.dtype == jnp.bfloat16
    assert [g.dtype.name for g in pull(y)] == ["bfloat16", "float32", "bfloat16", "float32", "float32"]


@pytest.mark.parametrize("body", BODIES)
def test_gradients_of_float32_weights_are_summed_in_float32(body: str) -> None:
    """257 equal terms: formed in bfloat16, their sum would be 256."""
    x, w = jnp.ones((257, 1), jnp.bfloat16), jnp.zeros((1, 3))
    glu = lambda w_up: fused_glu(x, w, w_up, b_gate=jnp.ones(3), b_up=jnp.ones(3), act="identity", **BODIES[body]).sum()
    np.testing.assert_array_equal(jax.grad(glu)(w), np.full((1, 3), 257.0))


@pytest.mark.parametrize("body", BODIES)
def test_bias_gradients_sum_many_tokens(body: str) -> None:
    """4096 equal terms: a sum that runs in bfloat16 would stall at 256."""
    x, w, bias = jnp.zeros((4096, 2), jnp.bfloat16), jnp.zeros((2, 3)), jnp.ones(3)
    options = BODIES[body] | {"blocks": None}
    glu = lambda b_up: fused_glu(x, w, w, b_gate=bias, b_up=b_up, act="identity", **options).astype(jnp.float32).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(glu))(bias), np.full(3, 4096.0))


@pytest.mark.parametrize("mlp", [False, True], ids=["glu", "mlp"])
@pytest.mark.parametrize("save", ["none", "ag"])
@pytest.mark.parametrize("body", BODIES)
def test_what_is_kept_for_the_backward_pass(body: str, save: Save, mlp: bool) -> None:
    """Nothing beside x and the parameters, or two [M, F] arrays."""
    values = arguments("bfloat16")
    given = {name: getattr(values, name) for name in names(values, mlp)}
    operation = functools.partial(fused_glu_mlp if mlp else fused_glu, save=save, **BODIES[body])
    _, pull = jax.vjp(lambda given: operation(**given), given)
    kept = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(pull)}
    saved = 2 * math.prod(LEAD) * F * 2 if save == "ag" else 0
    assert sum(kept.values()) <= sum(array.nbytes for array in given.values()) + saved


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation whose results are used, those of inner programs too, but not inside kernels.

    XLA drops a kernel without a reader, but jax before 0.12 leaves it in its own program.
    """
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    for eqn in jaxpr.eqns:
        if not any(id(v) in read for v in eqn.outvars):
            continue
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for value in eqn.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    yield from equations(getattr(value, "jaxpr", value))


def count(primitive: str, function: Callable[..., Any], *args: Any) -> int:
    return sum(eqn.primitive.name == primitive for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr))


NAMES = jax.checkpoint_policies.save_only_these_names("glu_gate", "glu_up", "glu_out")


@pytest.mark.parametrize(
    ("operation", "save", "policy", "kernels"),
    [
        ("glu", "ag", NAMES, 1),
        ("glu", "none", NAMES, 2),  # forward, and the one that computes gate and up again
        ("mlp", "ag", NAMES, 1),
        ("mlp", "none", NAMES, 2),
        ("glu", "ag", jax.checkpoint_policies.nothing_saveable, 2),
        ("mlp", "none", jax.checkpoint_policies.nothing_saveable, 2),
    ],
)
def test_saved_names_keep_remat_from_running_a_kernel_again(
    operation: str, save: Save, policy: Any, kernels: int
) -> None:
    x, w_gate, w_up, w_down, *_ = arguments(lead=(8,))

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x: jax.Array, w_gate: jax.Array, w_down: jax.Array) -> jax.Array:
        if operation == "mlp":
            return fused_glu_mlp(x, w_gate, w_up, w_down, save=save, **BODIES["tpu"]).sum()
        return jnp.sin(fused_glu(x, w_gate, w_up, save=save, **BODIES["tpu"]) @ w_down).sum()

    assert count("pallas_call", jax.grad(layer, (0, 1, 2)), x, w_gate, w_down) == kernels


@pytest.mark.parametrize(
    ("save", "policy", "products"),
    [
        ("ag", jax.checkpoint_policies.dots_saveable, 3 + 6),
        ("ag", NAMES, 3 + 6),
        ("ag", jax.checkpoint_policies.nothing_saveable, 3 + 2 + 6),
        ("none", jax.checkpoint_policies.nothing_saveable, 3 + 2 + 6),
    ],
)
def test_remat_policies_see_the_products_of_xla(save: Save, policy: Any, products: int) -> None:
    """Three products forward, two of them again unless they are saved, six backward."""
    x, w_gate, w_up, w_down, *_ = arguments(lead=(8,))

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array) -> jax.Array:
        return fused_glu_mlp(x, w_gate, w_up, w_down, save=save, backend="xla").sum()

    assert count("dot_general", jax.grad(layer, (0, 1, 2, 3)), x, w_gate, w_up, w_down) == products


@pytest.mark.parametrize(("save", "barriers"), [("ag", 0), ("none", 1)])
def test_what_xla_computes_again_stands_behind_a_barrier(save: Save, barriers: int) -> None:
    """Without one the compilers for TPU and GPU merge it with the forward pass of the same program, and keep that."""
    x, w_gate, w_up, *_ = arguments(lead=(8,))
    loss = lambda x, w_gate, w_up: fused_glu(x, w_gate, w_up, save=save, backend="xla").sum()
    assert count("optimization_barrier", jax.grad(loss, (0, 1, 2)), x, w_gate, w_up) == barriers


def test_batches_and_devices() -> None:
    """vmap, and shard_map over rows and columns, of the kernels."""
    values = arguments(biases=False)
    run = lambda x, w_gate, w_up: fused_glu(x, w_gate, w_up, **BODIES["tpu"])
    wanted = formula(values, "silu", False)["out"]
    batched = jax.vmap(run, in_axes=(0, None, None))(values.x, values.w_gate, values.w_up)
    assert_close({"out": batched}, {"out": wanted})
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    column = P(None, "tensor")
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P("data"), column, column), out_specs=P("data", None, "tensor"), check_vma=False
    )
    out, pull = jax.vjp(jax.jit(mapped), values.x, values.w_gate, values.w_up)
    found = dict(zip(("x", "w_gate", "w_up"), pull(values.dh), strict=True))
    assert_close({"out": out, **found}, formula(values, "silu", False))


@pytest.mark.parametrize("mlp", [False, True], ids=["glu", "mlp"])
def test_kernels_have_no_races(mlp: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """In the simulator of a TPU with two cores, whose memory starts as NaN and whose copies arrive late.

    With this seed it runs the two slices of D the wrong way round if they are called parallel.
    """
    values, blocks = arguments(lead=(24,)), replace(BLOCKS, m=16)
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, random_seed=0, dma_execution_mode="on_wait"
    )
    try:
        found = jax.block_until_ready(
            measured(values, mlp, **BODIES["tpu"] | {"blocks": blocks, "interpret": interpret})
        )
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out  # later versions of jax raise
    assert_close(found, formula(values, "silu", mlp))


@pytest.mark.parametrize("chip", ["tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu_7x"])
@pytest.mark.parametrize("sizes", [(8192, 4096, 11008), (4096, 8192, 28672), (100_000, 1000, 130), (3, 7, 5)], ids=str)
def test_default_blocks_fit_and_are_legal(chip: str, sizes: tuple[int, int, int]) -> None:
    M, D, F = sizes
    limit = {"tpu_v5e": 16, "tpu_v5p": 16, "tpu_v6e": 32, "tpu_7x": 32}[chip] * 2**20
    saves: tuple[Save, ...] = ("ag", "none")
    for save in saves:
        for down in (None, D):
            for dtype in ("bfloat16", "float32"):
                p = GluProblem(M=M, D=D, F=F, dtype=jnp.dtype(dtype), act="silu", save=save, down=down)
                b = tpu.default_blocks(p, Target(chip, Family.TPU))
                assert tpu.on_chip_bytes(p, b) <= limit
                for m, f, d in ((b.m, b.f, b.d), (b.m_backward, b.f_backward, b.d_backward)):
                    assert m % 16 == 0 or m >= M
                    assert f % 128 == 0 or f == F
                    assert d % 128 == 0 or d == D


X, W, B = jnp.ones((4, 16)), jnp.ones((16, 8)), jnp.ones(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused_glu(X, W, W, act="mish"), r"act = 'mish' is unknown; use one of \['gelu'"),
        (lambda: fused_glu(X, W, W, beta=2.0), r"beta = 2.0 is the number of act = 'swish', but act = 'silu'"),
        (
            lambda: fused_glu(X, W, W, save="all"),  # type: ignore[arg-type]
            "save = 'all' is unknown; use 'ag'",
        ),
        (lambda: fused_glu(X.astype(int), W, W), r"x int32\[4, 16\] must be floating point"),
        (lambda: fused_glu(X, W.T, W), r"w_gate \[8, 16\] must be \[16, F\], as x is \[4, 16\]; is it transposed\?"),
        (lambda: fused_glu(X, W, W[:, :4]), r"w_up \[16, 4\] must be \[16, 8\], the shape of w_gate"),
        (lambda: fused_glu(X, W, W, b_up=B), "b_up is given without b_gate; give both or neither"),
        (lambda: fused_glu(X, W, W, b_up=B[:4], b_gate=B), r"b_up \[4\] must be \[8\]"),
        (lambda: fused_glu_mlp(X, W, W, W), r"w_down \[16, 8\] must be \[8, Dout\]"),
        (lambda: fused_glu(X, W, W, backend="triton"), "backend = 'triton' is unknown"),
        (lambda: fused_glu(X.astype("float16"), W, W, **BODIES["tpu"]), "float16 has no TPU kernel"),
        (lambda: fused_glu(X[:0], W, W, **BODIES["tpu"]), "M 0, D 16, F 8: an empty array has no tiles"),
        (lambda: fused_glu_mlp(X, W, W, W.T[:, :4], **BODIES["tpu"]), "Dout = 4 and x has D = 16"),
        (
            lambda: fused_glu(
                X,
                jnp.ones((16, 300)),
                jnp.ones((16, 300)),
                backend="tpu",
                interpret=True,
                blocks=GluBlocks(m=8, f=200, d=16, m_backward=8, f_backward=128, d_backward=16),
            ),
            "f = 200 must be a multiple of 128 or at least 300; use 256",
        ),
    ],
)
def test_errors_name_what_works(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
