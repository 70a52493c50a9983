"""Context parallelism: attention over a sequence cut by the seq axis is attention, and costs what it promises."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import Case, compile_all, complaints, require_compiler
from attention_cases import mask_of
from helpers import gradient_function, one_device, packed_batch, small_model, small_run, with_attention
from jax.sharding import PartitionSpec as P
from test_layouts import assert_close, loss_and_gradients

from kernels_pallas import (
    AttentionGradients,
    DistanceBias,
    Scores,
    flash_attention,
    flash_attention_gradients,
    masks,
    oracle,
)
from maxlm.config import Backend, Context, Remat, ShardingConfig, UserError
from maxlm.models import init_parameters, ops
from maxlm.models.ops import ring
from maxlm.models.ops.ring import LOW, in_ring_order, make_ring, zigzag_order
from maxlm.sharding import Layout, make_layout


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads are those of all devices; the chunks of a ring have T / (2 * seq) positions."""

    seq: int
    heads: tuple[int, int] = (4, 4)
    T: int = 32
    window: int | None = None
    tensor: int = 1
    data: int = 1
    packed: bool = True
    words: oracle.Words | None = None
    """A mask in place of the causal one and its window."""
    features: frozenset[str] = frozenset()
    """Of alibi, bias, cap, sinks and the ways in which queries may see further: prefix, documents, any."""

    @property
    def mask(self) -> oracle.Words:
        return self.words or ("causal" if self.window is None else ("local", self.window - 1, 0))


RING = {
    "2 devices": Shape(2, data=4),
    "4 devices, grouped heads, tensor": Shape(4, heads=(8, 2), tensor=2),
    "8 devices, one key head, no documents": Shape(8, heads=(4, 1), packed=False),
    "a window within a chunk": Shape(4, window=3),
    "a window of one chunk": Shape(8, heads=(2, 1), window=2),
    "a window of a chunk and one": Shape(8, heads=(2, 1), window=3),
    "a window of several chunks, still a part of the ring": Shape(8, heads=(2, 1), window=6),
    "a window of nearly all chunks": Shape(4, heads=(2, 1), window=20, packed=False),
    "a window of the key itself": Shape(4, window=1),
    "a window longer than the sequence": Shape(2, window=100),
}

ULYSSES = {
    "2 devices": Shape(2, data=4),
    "4 devices, grouped heads, tensor": Shape(4, heads=(16, 8), tensor=2, data=1),
    "fewer key heads than devices": Shape(4, heads=(8, 2), window=5),
    "8 devices, one key head, no documents": Shape(8, heads=(8, 1), packed=False),
    "a window longer than a part": Shape(4, window=11),
}


def layout_of(context: Context, shape: Shape) -> Layout:
    config = ShardingConfig(data=shape.data, seq=shape.seq, tensor=shape.tensor, context=context)
    return make_layout(config, jax.devices()[: shape.data * shape.seq * shape.tensor])


def arrays_of(shape: Shape) -> dict[str, np.ndarray]:
    B, H, (N, K) = 4, 8, shape.heads
    rng = np.random.default_rng(0)
    normal = lambda *dims: np.asarray(rng.normal(size=dims), np.float32)
    arrays: dict[str, Any] = {
        "q": normal(B, shape.T, N, H),
        "k": normal(B, shape.T, K, H),
        "v": normal(B, shape.T, K, H),
        "d_out": normal(B, shape.T, N, H),
    }
    if shape.packed:
        arrays["segment_ids"] = np.cumsum(rng.random((B, shape.T)) < 0.1, axis=1).astype(np.int32)
    for name in shape.features & {"prefix", "documents", "any"}:
        arrays["visible_to"] = ends_of(name, arrays, rng)
    if "alibi" in shape.features:
        arrays["alibi_slopes"] = np.asarray(0.5 ** np.arange(1, N + 1), np.float32)
    if "bias" in shape.features:
        arrays["bias_table"] = normal(N, 8)
    if "sinks" in shape.features:
        arrays["sinks"] = normal(N)
    return arrays


def ends_of(name: str, arrays: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """int32 [B, T]: a prefix of each row that sees itself whole, documents that do, or any number."""
    B, T = arrays["q"].shape[:2]
    t = np.arange(T)
    if name == "any":
        return rng.integers(0, T + 1, (B, T)).astype(np.int32)
    if name == "prefix":
        return np.maximum(t + 1, rng.integers(0, T, (B, 1)) * (t < 20)).astype(np.int32)
    ids = arrays["segment_ids"]
    return np.stack([np.searchsorted(row, row, side="right") for row in ids]).astype(np.int32)


BY_HEAD = ("alibi_slopes", "bias_table", "sinks")
CAP = 2.0
RULE = (6, True)  # of the buckets: max_distance, bidirectional


def compute(context: Context, shape: Shape, arrays: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    """Output and gradients of `ops.attention` on the mesh, their columns in the sequence's order."""
    layout = layout_of(context, shape)
    order = zigzag_order(shape.T, shape.seq) if context is Context.RING else np.arange(shape.T)
    placed = {
        name: jax.device_put(x, layout.sharding(layout.activation("heads")))
        if name in BY_HEAD
        else jax.device_put(x[:, order], layout.sharding(layout.activation("batch", "seq")))
        for name, x in arrays.items()
    }

    @jax.jit
    def run(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def attend(learned: dict[str, jax.Array]) -> jax.Array:
            table = learned.get("bias_table")
            scores = Scores(
                mask=mask_of(shape.mask),
                soft_cap=CAP if "cap" in shape.features else None,
                alibi_slopes=learned.get("alibi_slopes"),
                relative_bias=None if table is None else DistanceBias(table, *RULE),
                sinks=learned.get("sinks"),
            )
            rows = {name: arrays.get(name) for name in ("segment_ids", "visible_to")}
            return ops.attention(layout, learned["q"], learned["k"], learned["v"], scores, **rows, **options)

        out, pull = jax.vjp(attend, {name: arrays[name] for name in ("q", "k", "v", *BY_HEAD) if name in arrays})
        (gradients,) = pull(arrays["d_out"])
        return {"out": out} | gradients

    back = np.argsort(order)
    return {name: np.asarray(x)[:, back] if x.ndim == 4 else np.asarray(x) for name, x in run(placed).items()}


def check(context: Context, shape: Shape, **options: Any) -> None:
    arrays = arrays_of(shape)
    want = oracle.attention(
        *(arrays[name] for name in ("q", "k", "v", "d_out")),
        mask=shape.mask,
        soft_cap=CAP if "cap" in shape.features else None,
        bucket_rule=RULE,
        **{name: arrays.get(name) for name in ("segment_ids", "visible_to", *BY_HEAD)},
    )
    wanted = {
        "out": want.out,
        "q": want.dq,
        "k": want.dk,
        "v": want.dv,
        "bias_table": want.d_bias_table,
        "sinks": want.d_sinks,
        "alibi_slopes": 0.0,
    }
    for name, x in compute(context, shape, arrays, **options).items():
        # A bias's gradient is a sum over all rows and queries.
        np.testing.assert_allclose(x, wanted[name], atol=3e-5 if x.ndim < 4 else 1e-5, rtol=0, err_msg=name)
        small = name == "alibi_slopes" or (shape.window == 1 and name in ("q", "k"))
        assert abs(x).max() > 0.1 or small, f"{name}: too small to compare"


@pytest.mark.parametrize("name", RING)
def test_ring_is_attention(name: str) -> None:
    check(Context.RING, RING[name])


ALL = ("alibi", "bias", "cap", "sinks")
SHAPED = {
    "heads cut, all features": Shape(2, heads=(8, 4), tensor=2, data=2, features=frozenset(ALL)),
    "heads cut, prefix": Shape(2, heads=(4, 4), tensor=2, features=frozenset({"bias", "sinks", "prefix"})),
    "documents": Shape(4, features=frozenset({"alibi", "documents"})),
    "any ends, a window": Shape(4, heads=(4, 4), window=9, packed=False, features=frozenset({"cap", "bias", "any"})),
    "sees ahead": Shape(4, heads=(4, 4), words=("local", 7, 5), features=frozenset({"sinks"})),
    "sees everything": Shape(2, words="full", packed=False, features=frozenset({"alibi", "bias"})),
}


QUICK = {
    Context.ALL_GATHER: ["heads cut, all features"],
    Context.RING: ["heads cut, all features", "heads cut, prefix", "any ends, a window", "sees ahead"],
    Context.ULYSSES: ["heads cut, prefix", "documents"],
}


@pytest.mark.parametrize(
    ("context", "name"),
    [
        pytest.param(context, name, marks=[] if name in QUICK[context] else [pytest.mark.nightly])
        for context in Context
        for name in SHAPED
    ],
)
def test_what_shapes_scores_is_the_same_in_every_context(context: Context, name: str) -> None:
    check(context, SHAPED[name])


@pytest.mark.parametrize("name", ULYSSES)
def test_ulysses_is_attention(name: str) -> None:
    check(Context.ULYSSES, ULYSSES[name])


DECODERS = {
    "ring data": (ShardingConfig(data=2, seq=4, context=Context.RING), {}),
    "ring fsdp tensor": (ShardingConfig(data=1, fsdp=2, seq=2, tensor=2, context=Context.RING), {}),
    "ring tensor sp": (
        ShardingConfig(data=1, seq=4, tensor=2, sequence_parallel=True, context=Context.RING),
        {},
    ),
    "ring stage": (ShardingConfig(data=2, seq=2, stage=2, context=Context.RING), {"micro_batches": 2}),
    "ulysses data": (ShardingConfig(data=2, seq=4, context=Context.ULYSSES), {}),
    "ulysses fsdp tensor": (ShardingConfig(data=1, fsdp=2, seq=2, tensor=2, context=Context.ULYSSES), {}),
    "ulysses stage": (ShardingConfig(data=2, seq=2, stage=2, context=Context.ULYSSES), {"micro_batches": 2}),
}
QUICK = {"ring fsdp tensor", "ulysses data"}
SLOW = {"ring stage", "ulysses stage"}
"""What a pipeline adds; the others are nightly."""


@pytest.fixture(scope="module")
def reference() -> Any:
    return loss_and_gradients(small_run(z_loss=1e-3), one_device())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow if n in SLOW else pytest.mark.nightly)
        for n in DECODERS
    ],
)
def test_the_decoder_learns_the_same(name: str, reference: Any, capfd: pytest.CaptureFixture[str]) -> None:
    sharding, train = DECODERS[name]
    got = loss_and_gradients(small_run(sharding=sharding, z_loss=1e-3, **train), make_layout(sharding))
    assert_close(got, reference, 1e-5)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(got[1])) > 1e-2, "gradients too small to compare"
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_zigzag_order_gives_each_device_a_low_and_a_high_chunk(devices: int) -> None:
    chunk = 4
    order = zigzag_order(2 * devices * chunk, devices).reshape(devices, 2, chunk)
    for i, (low, high) in enumerate(order):
        np.testing.assert_array_equal(low, np.arange(chunk) + i * chunk)
        np.testing.assert_array_equal(high, np.arange(chunk) + (2 * devices - 1 - i) * chunk)
    with pytest.raises(UserError, match=r"train.seq_len = 36 is not a multiple of 32 .*use 32"):
        zigzag_order(36, 16)


def test_every_device_sees_as_many_keys_at_every_stop() -> None:
    """Counted elementwise from the positions alone."""
    devices, T = 8, 64
    positions = zigzag_order(T, devices).reshape(devices, -1)
    for r in range(devices):
        visible = [(positions[i][:, None] >= positions[(i - r) % devices]).sum() for i in range(devices)]
        assert len(set(visible)) == 1, f"stop {r}: {visible}"
    consecutive = np.arange(T).reshape(devices, -1)
    visible = [(consecutive[i][:, None] >= consecutive[(i - 1) % devices]).sum() for i in range(devices)]
    assert set(visible) == {0, (T // devices) ** 2}, "what zig-zag order is there to avoid"


def attended(of: ring.Ring) -> list[list[tuple[int, int]]]:
    """The (query chunk, key chunk) pairs that each device attends, in the order of the stops."""
    mesh = jax.make_mesh((of.devices,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_device() -> jax.Array:
        own = jax.lax.axis_index("seq")
        pairs = [(0, LOW, LOW), *itertools.chain(*map(of.pairs, range(of.first, of.last + 1)))]
        chunk = lambda device, half: jnp.where(half == LOW, device, 2 * of.devices - 1 - device)
        return jnp.stack([jnp.stack([chunk(own, q), chunk((own - r) % of.devices, k)]) for r, q, k in pairs])[None]

    found = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(), out_specs=P("seq"), check_vma=False))()
    return [[(int(q), int(k)) for q, k in device] for device in np.asarray(found)]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_ring_attends_what_is_visible_once_and_nothing_else(devices: int) -> None:
    pairs = attended(make_ring(masks.causal, devices, 8, "auto"))
    chunks = range(2 * devices)
    assert Counter(itertools.chain(*pairs)) == Counter((q, k) for q in chunks for k in chunks if k <= q)
    assert {len(of_device) for of_device in pairs} == {1 + 2 * devices}


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 13, 16, 64])
def test_a_window_shortens_the_ring(window: int) -> None:
    """Chunks of 4 positions on 8 devices: none that a window reaches is missing, and no device further off visited."""
    of = make_ring(masks.local(window - 1, 0), 8, 8, "auto")
    reach = -(-(window - 1) // 4)  # chunks before a query's own
    seen = Counter(itertools.chain(*attended(of)))
    visible = {(q, k) for q in range(16) for k in range(16) if q - reach <= k <= q}
    assert visible <= set(seen) and max(seen.values()) == 1
    assert of.last - of.first == min(2 * reach, 7)


def test_attended_pairs_know_how_far_apart_they_are() -> None:
    """Causal attention of a value that says its own position: the mean over keys depends on every offset."""
    shape = Shape(4, heads=(1, 1), packed=False)
    arrays = arrays_of(shape)
    arrays["q"] *= 0
    arrays["v"][...] = np.arange(shape.T, dtype=np.float32)[None, :, None, None]
    out = compute(Context.RING, shape, arrays)["out"]
    np.testing.assert_allclose(out[0, :, 0, 0], np.arange(shape.T) / 2, atol=1e-5)


def temporary_bytes(context: Context, seq: int, per_device: int = 128) -> int:
    """Of one attention's forward and backward pass, on each device."""
    shape = Shape(seq, T=per_device * seq)
    layout = layout_of(context, shape)
    spec = layout.sharding(layout.activation("batch", "seq"))
    x = jax.ShapeDtypeStruct((1, shape.T, 8, 64), jnp.float32, sharding=spec)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(ops.attention, layout, scores=Scores()), q, k, v)
        return out, pull(d_out)

    memory = jax.jit(run).lower(x, x, x, x).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_a_rings_memory_does_not_grow_with_the_sequence() -> None:
    part = 128 * 8 * 64 * 4  # of keys, on one device
    grown = {context: temporary_bytes(context, 8) - temporary_bytes(context, 4) for context in Context}
    assert abs(grown[Context.RING]) < 0.1 * part, grown
    # The measure can see what it is to see: keys and values of four parts more.
    assert grown[Context.ALL_GATHER] >= 2 * 4 * part, grown


def permutes(remat: Remat) -> int:
    """Collective permutes in the program of a gradient, each of which stands for a ring of k or of v or of a sum."""
    sharding = ShardingConfig(data=1, seq=8, context=Context.RING)
    config = small_run(small_model(remat=remat), sharding)
    layout = make_layout(sharding)
    parameters = jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0)))
    gradient = gradient_function(config, layout)
    jaxpr = jax.make_jaxpr(gradient)(parameters, packed_batch(config))
    return len(re.findall(r"\bppermute\[", str(jaxpr)))


def test_remat_by_names_does_not_go_round_again() -> None:
    forward = 3  # k, v and segments
    backward = 3 + 2 + 2 + 2  # the same, the sums for k and v: in the loop, to the last stop, and home
    assert permutes(Remat.NONE) == forward + backward
    assert permutes(Remat.NAMES) == forward + backward
    assert permutes(Remat.FULL) == 2 * forward + backward


@pytest.mark.parametrize(
    "remat",
    [Remat.NAMES, *(pytest.param(remat, marks=pytest.mark.nightly) for remat in (Remat.DOTS, Remat.FULL))],
)
def test_remat_changes_nothing(remat: Remat, reference: Any) -> None:
    sharding = ShardingConfig(data=1, seq=2, fsdp=4, context=Context.RING)
    config = small_run(small_model(remat=remat), sharding, z_loss=1e-3)
    assert_close(loss_and_gradients(config, make_layout(sharding)), reference, 1e-5)


def test_the_tpu_kernels_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (
        ("flash_attention", flash_attention),
        ("flash_attention_gradients", flash_attention_gradients),
    ):
        monkeypatch.setattr(ring, name, functools.partial(function, interpret=True))
    check(Context.RING, Shape(2, heads=(2, 1)), backend=Backend.TPU)


def test_a_batch_is_reordered_column_by_column() -> None:
    config = small_run()
    batch = packed_batch(config) | {"seeds": np.arange(8, dtype=np.uint32)}
    sharding = ShardingConfig(data=2, seq=4, context=Context.RING)
    got = jax.jit(functools.partial(in_ring_order, make_layout(sharding)))(batch)
    order = zigzag_order(32, 4)
    for name, x in batch.items():
        np.testing.assert_array_equal(got[name], x if name == "seeds" else x[:, order])
    for other in (ShardingConfig(data=8, context=Context.RING), ShardingConfig(data=2, seq=4)):
        assert in_ring_order(make_layout(other), batch) is batch


def test_what_cannot_be_is_said_in_the_configs_words() -> None:
    shape = Shape(4, heads=(4, 2))
    arrays = arrays_of(shape)
    with pytest.raises(UserError, match=r"execution.kernels.attention = cudnn, but .*; use xla"):
        compute(Context.RING, shape, arrays, backend=Backend.CUDNN)
    with pytest.raises(UserError, match=r"execution.kernels.attention = gpu, but .*; use xla"):
        compute(Context.RING, shape, arrays, backend=Backend.GPU)
    with pytest.raises(
        UserError, match=r"sharding.seq = 4 must divide the 6 query heads .*; use sharding.seq = 1 or 2"
    ):
        shape = Shape(4, heads=(6, 2))
        compute(Context.ULYSSES, shape, arrays_of(shape))
    with pytest.raises(UserError, match=r"mask causal & chunked\(8\) is no window.*; use all_gather or ulysses"):
        make_ring(masks.causal & masks.chunked(8), 4, 8, "auto")
    config = small_run(with_attention(small_model()), ShardingConfig(data=1, seq=8, context=Context.RING), seq_len=24)
    with pytest.raises(UserError, match=r"train.seq_len = 24 is not a multiple of 16 .*use 16"):
        loss_and_gradients(config, make_layout(config.sharding))


def test_gradients_of_parts_add_up() -> None:
    """Keys in two parts, one of them hidden from some of the queries, against the oracle over all of them."""
    shape = Shape(1, heads=(4, 2))
    arrays = arrays_of(shape)
    q, k, v, d_out, ids = (jnp.asarray(arrays[name]) for name in ("q", "k", "v", "d_out", "segment_ids"))
    want = oracle.attention(q, k, v, d_out, segment_ids=ids)
    lse = jnp.asarray(want.lse, jnp.float32)
    delta = jnp.asarray((want.out * np.asarray(d_out)).sum(-1).swapaxes(1, 2), jnp.float32)

    def part(first: int, last: int) -> AttentionGradients:
        return flash_attention_gradients(
            q, k[:, first:last], v[:, first:last], lse, delta, d_out,
            segment_ids=ids, kv_segment_ids=ids[:, first:last], q_offset=-first,
        )  # fmt: skip

    one, other = part(0, 20), part(20, 32)
    np.testing.assert_allclose(one.q + other.q, want.dq, atol=1e-5, rtol=0)
    np.testing.assert_allclose(jnp.concatenate([one.k, other.k], 1), want.dk, atol=1e-5, rtol=0)
    np.testing.assert_allclose(jnp.concatenate([one.v, other.v], 1), want.dv, atol=1e-5, rtol=0)
    assert one.bias_table is None

    with pytest.raises(ValueError, match=r"lse is float32\[4, 32, 4\]; it must be float32\[4, 4, 32\]"):
        flash_attention_gradients(q, k, v, lse.swapaxes(1, 2), delta, d_out)
    with pytest.raises(ValueError, match=r"backend = 'cudnn' cannot run this flash_attention"):
        flash_attention_gradients(q, k, v, lse, delta, d_out, backend="cudnn")


TOKENS = 2048  # of each device


def cases(chip: str) -> dict[str, Case]:
    """Forward and backward pass of one attention layer, grouped heads and packed documents, in each chip's kernels."""
    backend = Backend.TPU if chip == "tpu_v5p" else Backend.GPU

    def lower(context: Context, devices: Sequence[Any]) -> jax.stages.Lowered:
        layout = make_layout(ShardingConfig(data=1, seq=len(devices), context=context), devices)
        tokens = layout.sharding(layout.activation("batch", "seq"))
        shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
            (1, TOKENS * len(devices), *dims), dtype, sharding=tokens
        )

        def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, ids: jax.Array) -> Any:
            attend = functools.partial(ops.attention, layout, scores=Scores(), segment_ids=ids, backend=backend)
            out, pull = jax.vjp(attend, q, k, v)
            return out, pull(d_out)

        q, kv = shape(16, 128), shape(4, 128)
        return jax.jit(run).lower(q, kv, kv, q, shape(dtype=jnp.int32))

    q_bytes = TOKENS * 16 * 128 * 2
    kernels = ("attention_forward", "attention_backward")
    return {
        context.value: Case(
            functools.partial(lower, context), kernels, 16 * q_bytes, square=2 * TOKENS, collectives=collectives
        )
        for context, collectives in {
            Context.RING: ("collective-permute",),
            Context.ULYSSES: ("all-to-all", "all-gather"),
        }.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("chip", [pytest.param("tpu_v5p", marks=pytest.mark.nightly), "h200"])
def test_context_parallelism_compiles(chip: str) -> None:
    """With the kernels, without a tensor of the whole sequence squared, and with no other collectives."""
    require_compiler(chip)
    programs = cases(chip)
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]
