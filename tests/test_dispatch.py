"""Which body runs, as a function of target, problem and wish: decided without any device of the kind."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import AttentionBlocks, DistanceBias, explain, flash_attention, fused_glu, fused_glu_mlp, masks
from kernels_pallas.decision import TUNING, load_table
from kernels_pallas.targets import Family, Target, current_target, named, target_of

CHIPS = sorted(path.stem for path in TUNING.glob("*.json"))


def shapes(
    T: int = 1024, N: int = 4, K: int = 2, H: int = 128, Hv: int | None = None, dtype: Any = jnp.bfloat16
) -> Any:
    kv = jax.ShapeDtypeStruct((2, T, K, H), dtype)
    return jax.ShapeDtypeStruct((2, T, N, H), dtype), kv, jax.ShapeDtypeStruct((2, T, K, Hv or H), dtype)


SEGMENTS = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
BLOCKS = AttentionBlocks(q=128, k=128, q_backward=128, k_backward=128)
PER_HEAD = jax.ShapeDtypeStruct((4,), jnp.float32)


@pytest.mark.parametrize(
    ("target", "options", "backend"),
    [
        ("cpu", {}, "xla"),
        ("tpu_v5e", {}, "tpu"),
        ("tpu_v6e", {"segment_ids": SEGMENTS, "soft_cap": 30.0}, "tpu"),
        ("h200", {}, "cudnn"),
        ("h100", {"mask": masks.causal & masks.local(511, None)}, "cudnn"),
        ("a100", {"mask": masks.full}, "cudnn"),
        ("h200", {"mask": masks.causal | masks.prefix(64)}, "xla"),
        ("h200", {"segment_ids": SEGMENTS}, "xla"),
        ("h200", {"sinks": PER_HEAD}, "xla"),
        ("h200", {"return_lse": True}, "xla"),
        ("h200", {"q_offset": 1}, "xla"),
        ("h200", {"alibi_slopes": PER_HEAD}, "xla"),
        ("h200", {"segment_ids": SEGMENTS, "backend": "gpu"}, "gpu"),
        ("tpu_v5p", {"backend": "xla"}, "xla"),
    ],
)
def test_attention_goes_to(target: str, options: dict[str, Any], backend: str) -> None:
    plan = explain(flash_attention, *shapes(), target=target, **options)
    assert plan.backend == backend
    others = {"tpu", "gpu", "cudnn", "xla"} - {backend}
    assert set(plan.refused) == others
    assert all(plan.refused.values())


def test_short_and_foreign_calls_go_to_xla() -> None:
    assert explain(flash_attention, *shapes(T=256), target="tpu_v5e").backend == "xla"
    assert explain(flash_attention, *shapes(dtype=jnp.float16), target="tpu_v5e").backend == "xla"
    assert explain(flash_attention, *shapes(dtype=jnp.float32), target="h200").backend == "xla"
    unknown = Target("NVIDIA GeForce 256", Family.GPU)
    assert explain(flash_attention, *shapes(), target=unknown).backend == "xla"


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_unmeasured_of_ours_is_automatic_on_a_gpu(chip: str) -> None:
    table = load_table(chip)
    measured = [row for row in table["rows"] if row["provenance"] == "measured"]
    x, w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((8192, 4096), jnp.bfloat16)
    if not measured:
        assert explain(fused_glu, x, w, w, target=chip).backend == "xla"
        assert explain(fused_glu_mlp, x, w, w, down, target=chip).backend == "xla"
        if named(chip).family is Family.GPU:
            assert explain(flash_attention, *shapes(), target=chip).backend in ("cudnn", "xla")


@pytest.mark.parametrize("chip", CHIPS)
def test_tables_are_whole(chip: str) -> None:
    table = json.loads((TUNING / f"{chip}.json").read_text())
    assert table["chip"] == chip
    assert named(chip).name == chip
    assert set(table["auto"]) == {"flash_attention", "fused_glu", "fused_glu_mlp", "grouped_matmul", "paged_attention"}
    for order in table["auto"].values():
        assert order[-1]["backend"] == "xla"  # which can do everything
        assert "match" not in order[-1]
        assert all(entry["because"] for entry in order)
    for row in table["rows"]:
        assert row["provenance"] in ("measured", "compiled")
        assert row["provenance"] == "compiled" or row["microseconds"] > 0


def test_a_measured_row_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    row = {
        "op": "flash_attention",
        "backend": "gpu",
        "match": {"dtype": "bfloat16", "H": 128, "min_T": 1024, "segments": True},
        "blocks": {"stages": 2},
        "provenance": "measured",
        "microseconds": 50.0,
        "rival_microseconds": 100.0,
    }
    table = load_table("h200") | {"rows": [row]}
    (tmp_path / "h200.json").write_text(json.dumps(table))
    monkeypatch.setattr("kernels_pallas.decision.TUNING", tmp_path)
    load_table.cache_clear()
    try:
        plan = explain(flash_attention, *shapes(), segment_ids=SEGMENTS, target="h200")
        assert (plan.backend, plan.provenance) == ("gpu", "measured")
        assert "2.00 times" in plan.because
        assert explain(flash_attention, *shapes(), target="h200").backend == "cudnn"
        assert explain(flash_attention, *shapes(H=64), segment_ids=SEGMENTS, target="h200").backend == "xla"
        slower = table | {"rows": [row | {"microseconds": 101.0}]}
        (tmp_path / "h200.json").write_text(json.dumps(slower))
        load_table.cache_clear()
        assert explain(flash_attention, *shapes(), segment_ids=SEGMENTS, target="h200").backend == "xla"
    finally:
        load_table.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, r"backend = 'triton' is unknown to flash_attention; use auto, tpu, gpu, cudnn, xla"),
        ({"backend": "tpu"}, r"backend = 'tpu' cannot run this.*use xla \(or interpret=True"),
        ({"backend": "cudnn"}, r"backend = 'cudnn' cannot run this.*NVIDIA.*use xla"),
        ({"backend": "cudnn", "target": "h200", "soft_cap": 20.0}, r"soft_cap.*use gpu, xla"),
        ({"backend": "gpu", "target": "a100"}, r"backend = 'gpu' cannot run this.*sm_90.*use cudnn, xla"),
        ({"target": "tpu_v9"}, r"target = 'tpu_v9' is unknown; use cpu, a100"),
        ({"mask": "causal"}, r"mask = 'causal' is no mask; use kernels_pallas.masks"),
        ({"backend": "cudnn", "target": "h200", "visible_to": SEGMENTS}, r"visible_to.*use gpu, xla"),
        ({"visible_to": jax.ShapeDtypeStruct((1, 7), jnp.int32)}, r"visible_to is int32\[1, 7\]; it must be integers"),
        ({"soft_cap": 0.0}, r"soft_cap = 0.0 must be positive"),
        ({"scale": float("nan")}, r"scale = nan must be a finite Python number"),
        ({"soft_cap": jax.ShapeDtypeStruct((), jnp.float32)}, r"soft_cap = .* must be a finite Python number"),
        ({"interpret": True}, r"interpret = True is for kernels; name backend 'tpu' or 'gpu'"),
        ({"blocks": (128, 128)}, r"blocks = \(128, 128\) must be of kernels_pallas.AttentionBlocks"),
        ({"blocks": AttentionBlocks(q=0, k=128, q_backward=8, k_backward=8)}, r"blocks = {'q': 0}.*positive"),
        ({"blocks": BLOCKS, "target": "h200"}, r"runs as cudnn, which has none; name a backend"),
        ({"relative_bias": PER_HEAD}, r"relative_bias is of type .*; give DistanceBias\(table\)"),
        ({"sinks": jax.ShapeDtypeStruct((3,), jnp.float32)}, r"sinks \(3,\) must be \[4\]"),
        ({"alibi_slopes": jax.ShapeDtypeStruct((4, 1), jnp.float32)}, r"alibi_slopes \(4, 1\) must be \[4\]"),
        ({"relative_bias": DistanceBias(jax.ShapeDtypeStruct((3, 32), jnp.float32))}, r"must be \[4, buckets\]"),
        (
            {"relative_bias": DistanceBias(jax.ShapeDtypeStruct((4, 31), jnp.float32))},
            r"31 buckets; use a multiple of 2",
        ),
        ({"relative_bias": DistanceBias(jax.ShapeDtypeStruct((4, 32), jnp.float32), 16)}, r"must be more than 16"),
        ({"kv_segment_ids": SEGMENTS}, r"without segment_ids"),
        ({"segment_ids": jax.ShapeDtypeStruct((2, 3), jnp.int32)}, r"segment_ids is int32\[2, 3\].*\[2, 1024\]"),
        ({"segment_ids": jax.ShapeDtypeStruct((2, 1024), jnp.float32)}, r"must be integers"),
        ({"q_offset": jax.ShapeDtypeStruct((), jnp.float32)}, r"q_offset is float32\[\]; it must be one integer"),
        (
            {"q_offset": jax.ShapeDtypeStruct((3,), jnp.int32)},
            r"q_offset is int32\[3\]; it must be one integer or \[2\]",
        ),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        explain(flash_attention, *shapes(), **options)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit() -> None:
    q, k, v = shapes()
    with pytest.raises(ValueError, match=r"q has 4 heads and k has 3.*use one of \[1, 2, 4\].*whole groups"):
        explain(flash_attention, q, *(jax.ShapeDtypeStruct((2, 1024, 3, 128), jnp.bfloat16),) * 2)
    with pytest.raises(ValueError, match=r"k must be \[2, S, K, 128\]"):
        explain(flash_attention, q, jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16), v)
    with pytest.raises(ValueError, match="k is float32 and q is bfloat16; cast them"):
        explain(flash_attention, q, jax.ShapeDtypeStruct(k.shape, jnp.float32), v)
    with pytest.raises(ValueError, match="q is int8"):
        explain(flash_attention, *shapes(dtype=jnp.int8))
    with pytest.raises(ValueError, match=r"q \(2, 4, 128\) has 3 dims"):
        explain(flash_attention, jax.ShapeDtypeStruct((2, 4, 128), jnp.float32), k, v)


def test_explain_prints_the_decision() -> None:
    plan = explain(flash_attention, *shapes(), mask=masks.causal, target="tpu_v5e")
    text = str(plan)
    for piece in ("runs as", "blocks", "MiB", "FLOPs", "not gpu", "not cudnn", "not xla", "mask causal"):
        assert piece in text
    assert plan.flops == 2 * 2 * 4 * (1024 * 1025 // 2) * 256
    # q and out of 4 heads, k and v of 2, in bfloat16, and one float32 logsumexp a query
    assert plan.hbm_bytes == 2 * 1024 * (4 + 4 + 2 + 2) * 128 * 2 + 2 * 4 * 1024 * 4
    with pytest.raises(ValueError, match="calls none of flash_attention"):
        explain(jnp.sin, jnp.ones(2))


def test_a_decision_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kernels_pallas"):
        because = explain(flash_attention, *shapes(T=16)).because
        assert not caplog.messages
        jax.eval_shape(flash_attention, *shapes(T=16))
    assert caplog.messages == [f"flash_attention runs as xla on cpu: {because}"]


def test_the_target_is_the_meshs_chip() -> None:
    assert current_target() == Target("cpu", Family.CPU)
    seen = []

    def local(x: jax.Array) -> jax.Array:
        seen.append(current_target())
        return x

    device = jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("a",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(local, jnp.ones(2))
    assert seen == [Target("tpu_v5e", Family.TPU)]


@pytest.mark.parametrize(
    ("kind", "platform", "name", "hopper"),
    [
        ("TPU v4", "tpu", "tpu_v4", False),
        ("TPU v5 lite", "tpu", "tpu_v5e", False),
        ("TPU v5p", "tpu", "tpu_v5p", False),
        ("TPU v5", "tpu", "tpu_v5p", False),
        ("TPU v6 lite", "tpu", "tpu_v6e", False),
        ("TPU7x", "tpu", "tpu_7x", False),
        ("NVIDIA H100 80GB HBM3", "cuda", "h100", True),
        ("NVIDIA H200", "gpu", "h200", True),
        ("NVIDIA A100-SXM4-40GB", "cuda", "a100", False),
        ("NVIDIA GeForce RTX 5090", "cuda", "NVIDIA GeForce RTX 5090", False),
        ("cpu", "cpu", "cpu", False),
    ],
)
def test_chips_by_jaxs_names(kind: str, platform: str, name: str, hopper: bool) -> None:
    target = target_of(kind, platform)
    assert (target.name, target.hopper) == (name, hopper)
    assert re.fullmatch("cpu|tpu|gpu", target.family.value)
