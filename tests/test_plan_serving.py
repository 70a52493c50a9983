"""What serving costs: counts against formulas of papers and against the arrays that decoding makes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import latent_model, small_model, small_run

from maxlm.config import (
    BlockConfig,
    CacheFormat,
    Capacity,
    Dtype,
    EngineConfig,
    ExecutionConfig,
    ExpertChoiceRouter,
    Experts,
    GroupedQuery,
    LmHead,
    Mlp,
    ModelConfig,
    RunConfig,
    ScalarHead,
    ShardingConfig,
    TopKRouter,
    UserError,
    WeightFormat,
)
from maxlm.config.cli import load_config
from maxlm.inference import held as holding
from maxlm.inference.held import held
from maxlm.inference.programs import pool_sizes
from maxlm.models import Execution, init_parameters
from maxlm.models.kv_cache import empty_cache
from maxlm.plan import __main__
from maxlm.plan.machines import parse_machine
from maxlm.plan.serving import ServingForecast, analyse_serving, experts_touched
from maxlm.plan.serving_load import ServingLoad
from maxlm.shapes import Part, arrays, decoding_flops, parameter_count, pools_bytes, prefill_flops
from maxlm.sharding import decoding_layout, make_layout

ROOT = Path(__file__).parent.parent
BF16 = ExecutionConfig(dtype=Dtype.BFLOAT16)


def mixture() -> ModelConfig:
    experts = Experts(n_experts=8, d_ff=24, router=TopKRouter(top_k=2), n_shared_experts=1)
    block = dataclasses.replace(small_model().blocks[0], mlp=experts)
    return small_model(blocks=(block,))


def with_windows(window: int = 20) -> ModelConfig:
    """Every other layer looks so many keys back."""
    whole = small_model().blocks[0]
    near = dataclasses.replace(whole, attention=dataclasses.replace(whole.attention, window=window))
    return small_model(blocks=(whole, near), n_layers=4)


MODELS = {"heads": small_model(), "windows": with_windows(), "latents": latent_model(), "experts": mixture()}


def forecast(config: RunConfig, target: str = "cpu:1", **load: Any) -> ServingForecast:
    return analyse_serving(config, parse_machine(target), ServingLoad(**load))


def seven_b(**sharding: int) -> RunConfig:
    config = load_config(str(ROOT / "configs/llama2_7b.py"))
    return dataclasses.replace(config, sharding=ShardingConfig(**{"data": 1, **sharding}))


@pytest.mark.parametrize(("texts", "context"), [(1, 1), (3, 17), (8, 64)])
def test_a_layer_of_gpt_is_24_b_d2_and_4_b_d_s(texts: int, context: int) -> None:
    """Q, K, V and O are 8 d^2, the MLP with d_ff = 4 d is 16 d^2, scores and weighted values are 2 d s each."""
    d, V, layers = 32, 64, 5
    attention = GroupedQuery(n_heads=4, n_kv_heads=4, head_dim=d // 4)
    block = BlockConfig(attention=attention, mlp=Mlp(d_ff=4 * d))
    model = small_model(blocks=(block,), n_layers=layers, head=LmHead(tied=False))
    norms = 2 * (2 * layers + 1) * d
    found = texts * (decoding_flops(model, context) - 2 * V * d - norms)
    assert found == layers * (24 * texts * d**2 + 4 * texts * d * context)
    step = forecast(small_run(model), slots=texts, context=context).step
    assert step.flops == texts * decoding_flops(model, context)


def test_a_decoded_token_that_sees_latents() -> None:
    """arXiv:2405.04434, table 9: what each projection has; queries see latents as keys and values (appendix C)."""
    d, n, rank, content, rope, value = 32, 4, 12, 6, 4, 10  # latent_model
    model = latent_model()
    projections = d * n * (content + rope) + d * rank + d * rope + rank * n * (content + value) + n * value * d
    gated, norms = 3 * d * 48, 2 * d + rank
    keys = n * (rank + rope) + n * rank
    layer = lambda seen: 2 * (projections + gated + norms + keys * seen)
    for context in (1, 33):
        assert decoding_flops(model, context) == 2 * layer(context) + 2 * d + 2 * 64 * d


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tokens", [1, 19, 20, 21, 50])
def test_a_prompt_is_its_tokens_with_the_logits_of_one(model: ModelConfig, tokens: int) -> None:
    each = sum(decoding_flops(model, seen) for seen in range(1, tokens + 1))
    assert prefill_flops(model, tokens) == each - (tokens - 1) * 2 * model.vocab_size * model.d_model


def on_a_device(tree: Any) -> int:
    """Bytes of arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


LAYOUTS = [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "seq": 2, "stage": 2}]


@pytest.mark.parametrize(
    ("axes", "kept_in"), [*((axes, CacheFormat.DTYPE) for axes in LAYOUTS), (LAYOUTS[1], CacheFormat.INT8)], ids=str
)
@pytest.mark.parametrize("model", [with_windows(4), latent_model()], ids=["windows", "latents"])
def test_the_cache_is_that_of_the_engine(model: ModelConfig, axes: dict[str, int], kept_in: CacheFormat) -> None:
    run = dataclasses.replace(small_run(model, ShardingConfig(**axes)), execution=BF16)
    found = forecast(run, "cpu:8", slots=3, context=50, block_size=8, tokens_per_step=4, kv_cache=kept_in)
    layout = decoding_layout(make_layout(run.sharding), model.d_model)
    assert dict(layout.mesh.shape) == found.mesh
    assert found.texts == 3 * layout.batch_shards and found.cache_tokens == 3 * 56
    how = Execution.of(run, layout)
    engine = EngineConfig(slots=3, cache_tokens=found.cache_tokens, block_size=8, tokens_per_step=4)
    blocks = pool_sizes(model, engine, how, 4)
    assert len(set(blocks.values())) == len(blocks)  # a window's pool is smaller
    assert found.cache_bytes == on_a_device(jax.jit(lambda: empty_cache(model, blocks, 8, how, kept_in))())
    if kept_in is CacheFormat.INT8:  # and of the heads' 8 numbers or more, a scale is a fourth at most
        bf16 = pools_bytes(model, blocks, 8, dtype=Dtype.BFLOAT16, tensor=found.mesh["tensor"])
        assert 0.5 * bf16 < found.cache_bytes <= 0.625 * bf16


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize(
    ("name", "axes"), [("latents", LAYOUTS[1]), ("experts", {"data": 2, "expert": 2, "tensor": 2})]
)
def test_weights_are_those_that_decoding_holds(name: str, axes: dict[str, int], weights: WeightFormat) -> None:
    model = MODELS[name]
    run = dataclasses.replace(small_run(model, ShardingConfig(**axes)), execution=BF16)
    how = Execution.of(run, decoding_layout(make_layout(run.sharding), model.d_model))
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    made = held(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), model, how, weights)
    assert forecast(run, "cpu:8", weights=weights).weight_bytes == on_a_device(made)


def test_parameters_that_come_again_are_held_without_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that learns gives its engine others before each rollout."""
    run, traced = small_run(small_model()), list[Any]()
    how = Execution.of(run, decoding_layout(make_layout(run.sharding), run.model.d_model))
    monkeypatch.setattr(holding, "quantised", lambda w, *rest: traced.append(w) or w)
    zeros = jax.tree.map(jnp.zeros_like, init_parameters(run.model, jax.random.key(0)))
    for value in (0.0, 1.0):
        traced.clear()
        made = holding.held(jax.tree.map(lambda x, value=value: x + value, zeros), run.model, how, WeightFormat.INT4)
        assert all((x == value).all() for x in jax.tree.leaves(made))
    assert not traced


def test_experts_that_a_batch_touches() -> None:
    """Every way in which three tokens choose two of four experts."""
    pairs = list(itertools.combinations(range(4), 2))
    ways = list(itertools.product(pairs, repeat=3))
    mean = Fraction(sum(len(set(itertools.chain(*way))) for way in ways), len(ways) * 4)
    assert experts_touched(0.5, 3) == float(mean) == 0.875
    run, n = small_run(mixture()), sum(a.size for a in arrays(mixture()) if a.part is Part.EXPERTS)
    read = [forecast(run, slots=slots).step.weight_bytes for slots in (1, 2, 10_000)]
    row = 32 * 4  # looked up
    assert read[1] - read[0] == pytest.approx(row + n * 4 * (0.25 - 0.25**2))
    assert read[2] == pytest.approx(4 * sum(array.size for array in arrays(mixture())))


def test_the_roofline_of_7b_by_hand() -> None:
    """Llama 2 7B on one H200 (989.4 TFLOP/s, 4.8 TB/s): 32 layers of 32 heads of 128, in 2 bytes."""
    found = forecast(seven_b(), "gpu:h200:1", slots=16, context=1024, prompt=1024, tokens_per_step=512)
    V, D, norms = 32_000, 4096, 65 * 4096
    matmul = parameter_count(found.config.model).matmul
    assert matmul == 6_738_415_616 - V * D
    weights, position = 2 * (matmul - norms) + 4 * norms, 32 * 2 * 32 * 128 * 2
    step, prefill = found.step, found.prefill
    assert step.weight_bytes == weights + 16 * D * 2
    assert step.cache_bytes == 16 * 1024 * position
    assert step.flops == 16 * (2 * matmul + 4 * D * 1024 * 32)
    assert step.seconds == pytest.approx((weights + 16 * D * 2 + 16 * 1024 * position) / 4.8e12)
    assert step.limited_by == "memory" and found.tokens_per_s == pytest.approx(1 / step.seconds)
    assert found.all_tokens_per_s == pytest.approx(16 / step.seconds)
    products = 2 * (1024 * (matmul - V * D) + V * D) + 4 * D * 32 * (1024 * 1025 // 2)
    assert prefill.flops == products and prefill.limited_by == "compute"
    assert prefill.seconds == pytest.approx(products / 989.4e12)
    assert prefill.weight_bytes == 2 * weights + 1024 * D * 2  # in two pieces
    assert prefill.cache_bytes == (512 + 1024) * position


def test_windows_are_read_no_further() -> None:
    whole, near = (forecast(small_run(m), slots=2, context=60) for m in (small_model(n_layers=4), with_windows()))
    position = 2 * 2 * 8 * 4  # keys and values of two heads of 8 in float32
    assert whole.step.cache_bytes == 2 * 4 * 60 * position
    assert near.step.cache_bytes == 2 * (2 * 60 + 2 * 20) * position
    assert near.step.flops < whole.step.flops


def test_as_many_texts_as_fit_and_no_more() -> None:
    found = forecast(seven_b(), "gpu:h200:1", context=3000)
    assert found.most_slots is not None and found.fullest is not None and found.fits
    most = found.most_slots
    assert forecast(seven_b(), "gpu:h200:1", context=3000, slots=most).fits
    assert not forecast(seven_b(), "gpu:h200:1", context=3000, slots=most + 1).fits
    assert found.limit is not None
    room = 0.8 * (found.limit - found.weight_bytes)
    assert most == (room // (16 * 2**19) - 1) // 188  # blocks of 16 positions of 512 KiB; 188 of a text
    assert found.fullest.load.slots == most
    assert forecast(seven_b(), "gpu:rtx3090:1").most_slots is not None
    with_70b = dataclasses.replace(seven_b(), model=load_config(str(ROOT / "configs/llama2_70b.py")).model)
    assert forecast(with_70b, "gpu:h100:1").most_slots == 0


def test_what_grows_with_what() -> None:
    def rising(values: list[Any]) -> bool:
        return all(a < b for a, b in itertools.pairwise(values))

    def figures(name: str, key: str, values: list[Any], config: RunConfig | None = None) -> list[Any]:
        return [getattr(forecast(config or seven_b(), "gpu:h200:1", **{key: value}), name) for value in values]

    slots, contexts = [1, 4, 16, 64, 256], [256, 1024, 4096]
    assert rising(figures("all_tokens_per_s", "slots", slots))
    assert rising(figures("tokens_per_s", "slots", slots)[::-1])
    assert rising(figures("tokens_per_s", "context", contexts)[::-1])
    assert rising(figures("most_slots", "context", contexts)[::-1])
    assert rising(figures("weight_bytes", "weights", [WeightFormat.INT8, WeightFormat.DTYPE]))
    assert rising(figures("tokens_per_s", "weights", [WeightFormat.DTYPE, WeightFormat.INT8]))
    cut = [forecast(seven_b(tensor=n), f"gpu:h200:{n}", slots=32) for n in (1, 2, 4, 8)]
    for name in ("tokens_per_s", "most_slots"):
        assert rising([getattr(one, name) for one in cut])
    for name in ("weight_bytes", "cache_bytes"):
        assert rising([getattr(one, name) for one in cut[::-1]])
    copies = forecast(seven_b(data=4), "gpu:h200:4", slots=32)
    assert copies.texts == 128 and copies.step == cut[0].step and copies.weight_bytes == cut[0].weight_bytes


@pytest.mark.parametrize(
    ("change", "load", "match"),
    [
        ({}, {"context": 65}, r"--context 65 is more than model.max_seq_len = 64"),
        ({}, {"prompt": 65}, r"--prompt 65 is more than"),
        ({}, {"slots": 8, "tokens_per_step": 4}, r"tokens_per_step = 4 is less than .*slots = 8"),
        ({"head": ScalarHead()}, {}, r"ScalarHead gives no logits"),
    ],
)
def test_what_cannot_be_served(change: dict[str, Any], load: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        forecast(small_run(small_model(**change)), **load)


def test_layouts_and_models_that_cannot_be_served() -> None:
    experts = dataclasses.replace(mixture().blocks[0].mlp, router=ExpertChoiceRouter(), dispatch=Capacity())
    block = dataclasses.replace(mixture().blocks[0], mlp=experts)
    with pytest.raises(UserError, match="looks at later tokens"):
        forecast(small_run(small_model(blocks=(block,))))
    with pytest.raises(UserError, match=r"sharding.tensor = 4 does not divide .*n_kv_heads = 2"):
        forecast(small_run(small_model(), ShardingConfig(tensor=4)), "cpu:4")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = f"--serve --config {ROOT}/configs/llama2_7b.py --target gpu:h200:1 --sharding.fsdp 1".split()
    assert __main__.main([*words, "--slots", "8", "--context", "2048"]) == 0
    text = capsys.readouterr().out
    for word in ("8 texts of 2,048 tokens", "fits, with", "limited by memory", "nothing is measured", "12.55 GiB",
                 "--engine.slots 8 --engine.cache_tokens 16384"):  # fmt: skip
        assert word in text, word
    assert max(map(len, text.splitlines())) <= 100
    assert __main__.main([*words, "--slots", "2000"]) == 3
    assert "does not fit: a shard has room for 37 of 2000 texts" in capsys.readouterr().out
    for option in (["--compile"], ["--search"], ["--breaks"], ["--picture", "x.png"]):
        with pytest.raises(UserError, match=rf"{option[0]} is of training; leave it out with --serve"):
            __main__.main([*words, *option])
    with pytest.raises(UserError, match="--slots"):
        __main__.main([*words, "--slots", "0"])
    with pytest.raises(UserError, match="--slots"):
        __main__.main([word for word in words if word != "--serve"] + ["--slots", "2"])


def test_json_without_jax() -> None:
    code = "import sys; from maxlm.plan.__main__ import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    words = "--config configs/qwen3_30b_a3b.py --target tpu:v5p:2x2x1 --serve --json "
    words += "--sharding.data 1 --sharding.fsdp 1 --sharding.expert 1 --sharding.tensor 4"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["mesh"]["tensor"] == 4 and found["step"]["limited_by"] == "memory" and found["warnings"] == []
    assert found["step"]["seconds"] == max(found["step"]["compute_seconds"], found["step"]["memory_seconds"])
    assert found["all_tokens_per_s"] == pytest.approx(found["texts"] * found["tokens_per_s"])
