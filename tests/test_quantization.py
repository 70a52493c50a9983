"""Methods that make weights smaller: GPTQ, AWQ and SmoothQuant against formulas in float64; the command, end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import published
import pytest
import safetensors.numpy
from helpers import initial_parameters, latent_model, packed_batch, plainly, small_model, small_run, with_attention
from run_folder import make_run
from tokenizers import Tokenizer, models

from maxlm import convert, evaluate, generate, quantize, shapes
from maxlm.config import (
    BlockConfig,
    GatedMlp,
    GroupedQuery,
    LayerNorm,
    LmHead,
    Mlp,
    ModelConfig,
    Parallel,
    QuantMethod,
    RmsNorm,
    Rope,
    Sandwich,
    ShardingConfig,
    UserError,
    WeightFormat,
)
from maxlm.data.packing import Batch
from maxlm.hub import converting
from maxlm.hub.bitsandbytes import BitsAndBytes
from maxlm.hub.compressed import CompressedTensors, pack_to_int32
from maxlm.hub.names import Piece, Tensor
from maxlm.inference.load import load_run
from maxlm.models import Tokens
from maxlm.models.weights.by_channel import Int8Activations
from maxlm.models.weights.by_group import ByGroup
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Quantised
from maxlm.models.weights.normal_float import NormalFloat4
from maxlm.models.weights.watched import SeenInputs
from maxlm.quantization.calibration import _none_seen, _run, _see, flat, layer_by_layer, nested
from maxlm.quantization.comparing import WindowSums, fidelity
from maxlm.quantization.folding import by_inputs, folded, folds, shared_by_heads
from maxlm.quantization.gptq import gptq, product_errors
from maxlm.quantization.llama_blocks import found_blocks
from maxlm.quantization.methods import quantise
from maxlm.quantization.scale_search import awq_scales, clipped, smoothing_scales
from maxlm.recipes.starting import open_source

pytestmark = pytest.mark.usefixtures("programs_kept")

Matrix = npt.NDArray[np.float64]


def problem(seed: int, tokens: int, inputs: int, outputs: int) -> tuple[Matrix, Matrix, Matrix]:
    """A weight, the Gram matrix of activations that depend on each other, and scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ rng.normal(size=(inputs, inputs)) * np.exp(rng.normal(size=inputs))
    w = rng.normal(size=(inputs, outputs))
    return w, x.T @ x, np.broadcast_to(np.abs(w).max(0) / 7.5, w.shape).copy()


def one_after_the_other(w: Matrix, gram: Matrix, scales: Matrix) -> Matrix:
    """Optimal Brain Quantisation in the order of the diagonal, by least squares: after each rounding the rest is what
    has the least error of products, given what is rounded."""
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    order = np.argsort(-np.diag(gram), kind="stable")
    codes, now = np.zeros_like(w), w.copy()
    for number, i in enumerate(order):
        codes[i] = np.clip(np.round(now[i] / scales[i]), -8, 7)
        done, rest = order[: number + 1], order[number + 1 :]
        off = codes[done] * scales[done] - w[done]
        now[rest] = w[rest] - np.linalg.solve(damped[np.ix_(rest, rest)], damped[np.ix_(rest, done)] @ off)
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_greedy_least_squares_and_never_worse_than_rounding(seed: int) -> None:
    w, gram, scales = problem(seed, 400, 150, 3)  # more than one block of 128
    codes = gptq(w, gram, scales)
    error = lambda codes: product_errors(w - codes * scales, gram)
    plain = np.clip(np.round(w / scales), -8, 7)
    greedy = one_after_the_other(w, gram, scales)
    assert (error(codes) <= error(plain)).all()
    better = error(greedy) < error(plain)
    assert better.any()
    np.testing.assert_array_equal(codes[:, better], greedy[:, better])
    exact = np.trace((w - codes * scales).T @ gram @ (w - codes * scales))
    np.testing.assert_allclose(error(codes).sum(), exact)


def test_gptq_beside_the_best_of_all_codes() -> None:
    lost = []
    for seed in range(10):
        w, gram, scales = problem(100 + seed, 12, 4, 1)
        every = np.array(list(itertools.product(range(-8, 8), repeat=4)), np.float64).T
        best = product_errors(w - every * scales, gram).min()
        of = lambda codes: float(product_errors(w - codes * scales, gram)[0])  # noqa: B023
        found, plain = of(gptq(w, gram, scales)), of(np.clip(np.round(w / scales), -8, 7))
        assert best * (1 - 1e-9) <= found <= plain
        lost.append((found / best, plain / best))
    gained, rounded = np.exp(np.log(lost).mean(0))
    assert gained < 0.5 * rounded


def test_gptq_takes_inputs_that_are_always_0_or_always_the_same() -> None:
    w, gram, scales = problem(3, 3, 12, 4)  # three tokens: of rank 3
    gram[:, 5] = gram[5] = 0
    codes = gptq(w, gram, scales, damping=0.0)
    plain = np.round(w / scales).clip(-8, 7)
    assert np.abs(codes).max() <= 8
    assert (product_errors(w - codes * scales, gram) <= product_errors(w - plain * scales, gram)).all()


def layered(model: ModelConfig) -> tuple[dict[str, Any], dict[str, shapes.Array], list[Batch]]:
    """Layer 0 of the model with norms that are not all 1, its arrays as declared, and text."""
    rng = np.random.default_rng(1)
    first = flat(jax.tree.map(lambda x: x[0], initial_parameters(model)["blocks"]["0"]))
    layer = {
        name: jnp.asarray(
            x * np.exp(0.3 * rng.normal(size=x.shape)) + (0.1 if name.endswith("bias") else 0), jnp.float32
        )
        for name, x in first.items()
    }
    batch = packed_batch(small_run(model, batch_size=2))
    return layer, {array.name: array for array in shapes.block(model.blocks[0], model)}, [batch]


BLOCK = BlockConfig(
    attention=GroupedQuery(n_heads=4, n_kv_heads=2, head_dim=8, position=Rope(), qkv_bias=True),
    mlp=GatedMlp(d_ff=48, bias=True),
)
MODELS = {
    "gated": small_model(blocks=(BLOCK,), norm=RmsNorm(one_plus=True)),
    "plain, parallel": small_model(
        blocks=(dataclasses.replace(BLOCK, mlp=Mlp(d_ff=48), residual=Parallel()),), norm=LayerNorm()
    ),
    "sandwich": small_model(blocks=(dataclasses.replace(BLOCK, residual=Sandwich()),)),
    "latents": latent_model(),
}


@pytest.mark.parametrize(
    "name", ["gated", *(pytest.param(name, marks=pytest.mark.nightly) for name in MODELS if name != "gated")]
)
def test_a_fold_changes_nothing_but_what_products_see(name: str) -> None:
    model, how = MODELS[name], plainly()
    block = model.blocks[0]
    layer, arrays, (batch,) = layered(model)
    x = np.random.default_rng(2).normal(size=(*batch["inputs"].shape, model.d_model)).astype(np.float32)
    tokens = Tokens(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
    see = lambda layer: _see(model, block, how, dict(layer), _none_seen(model, block), x, tokens)
    before, seen = _run(model, block, how, nested(layer), x, tokens), see(layer)
    rng = np.random.default_rng(3)
    made = folds(block, model)
    assert {fold.source for fold in made} >= {"attention_norm", "attention/v_proj"}
    for fold in made:
        s = jnp.asarray(np.exp(rng.normal(size=seen[fold.targets[0]].size.shape)), jnp.float32)
        layer, seen = folded(fold, shared_by_heads(fold, s, arrays), layer, seen, arrays, model.norm)
    np.testing.assert_allclose(_run(model, block, how, nested(layer), x, tokens), before, atol=2e-4, rtol=1e-4)
    for product, told in see(layer).items():
        for ours, theirs in zip(told, seen[product], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-3 * np.abs(np.asarray(theirs)).max())


def test_the_scales_of_awq_and_smoothquant() -> None:
    rng = np.random.default_rng(4)
    array = shapes.Array(
        "w", (32, 6), ("embed", "mlp"), shapes.Constant(0), shapes.Role.PRODUCT, shapes.Part.MLP, inputs=("embed",)
    )
    x = rng.normal(size=(64, 32)) * np.exp(1.5 * rng.normal(size=32))
    w = rng.normal(size=(32, 6)).astype(np.float32)
    seen = SeenInputs(*(jnp.asarray(one, jnp.float32) for one in (x.T @ x, np.abs(x).sum(0), np.abs(x).max(0))))
    s = np.asarray(awq_scales({"w": jnp.asarray(w)}, seen, seen.size, [array], 16), np.float64)

    def error(s: Matrix) -> float:
        """Of the products with what s w is rounded to."""
        rounded = quantised(jnp.asarray(w * s[:, None], jnp.float32), array, WeightFormat.INT4, 16)
        assert isinstance(rounded, ByGroup)
        plain = np.asarray(rounded.dense(jnp.dtype(jnp.float32)), np.float64) / s[:, None]
        return float(np.square(x @ (w - plain)).sum())

    tried = []
    for step in range(20):
        one = (np.abs(x).sum(0) / np.abs(x).sum(0).mean()) ** (step / 20)
        tried.append(error(one / np.sqrt(one.max() * one.min())))
    assert error(s) <= min(tried) * (1 + 1e-3)
    assert error(s) < 0.8 * tried[0]  # plain rounding
    smooth = smoothing_scales({"w": jnp.asarray(w)}, seen, [array])
    np.testing.assert_allclose(smooth, np.sqrt(np.abs(x).max(0) / np.abs(w).max(1)), rtol=1e-5)
    assert by_inputs(smooth, array).shape == (32, 1)


def test_ranges_of_awq_are_those_of_its_search() -> None:
    """In the order of its code: clamp a group's numbers, round them, multiply with the group's activations."""
    rng = np.random.default_rng(5)
    dims = ("heads", "head_dim", "embed")
    array = shapes.Array(
        "w", (2, 32, 5), dims, shapes.Constant(0), shapes.Role.PRODUCT, shapes.Part.MLP, inputs=("heads", "head_dim")
    )
    x = rng.normal(size=(50, 64)) @ rng.normal(size=(64, 64))
    w = (rng.normal(size=(64, 5)) ** 3).astype(np.float32)
    found = clipped(jnp.asarray(w.reshape(2, 32, 5)), jnp.asarray(x.T @ x, jnp.float32), array, 16)
    dense = np.asarray(found.dense(jnp.dtype(jnp.float32)), np.float64).reshape(64, 5)
    assert found.shape == (2, 32, 5) and found.group == 16
    improved = 0
    for g, o in np.ndindex(4, 5):
        at = slice(16 * g, 16 * g + 16)
        part, exact = w[at, o].astype(np.float64), x[:, at] @ w[at, o]
        errors = []
        for step in range(10):
            most = np.abs(part).max() * (1 - step / 20)
            scale = np.float64(jnp.bfloat16(np.float32(jnp.bfloat16(np.abs(w[at, o]).max() / 7.5)) * (1 - step / 20)))
            rounded = np.clip(np.round(np.clip(part, -most, most) / scale), -8, 7) * scale
            errors.append(np.square(x[:, at] @ rounded - exact).sum())
        ours = np.square(x[:, at] @ dense[at, o] - exact).sum()
        assert ours <= min(errors) * (1 + 1e-3) and ours <= errors[0] * (1 + 1e-6)
        improved += ours < 0.8 * errors[0]
    assert improved >= 5


@pytest.mark.nightly
def test_layers_see_what_the_layers_before_give_now() -> None:
    """The second layer is calibrated on what the changed first layer gives, and every array finds its place again."""
    model, how = small_model(), plainly()
    parameters = initial_parameters(model)
    batches = [packed_batch(small_run(model, batch_size=1), seed) for seed in range(2)]
    saw: list[Any] = []

    def change(number: int, block: BlockConfig, layer: Any, seen: Any) -> Any:
        saw.append(seen)
        return {name: leaf * 1.5 if name.endswith("_proj") else leaf for name, leaf in layer.items()}

    changed = layer_by_layer(model, how, parameters, batches, change)
    want = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1.5 if path[0].key == "blocks" and path[-1].key.endswith("_proj") else leaf,
        parameters,
    )
    jax.tree.map(np.testing.assert_array_equal, changed, want)
    first = flat(jax.tree.map(lambda leaf: leaf[0], want["blocks"]["0"]))
    second = flat(jax.tree.map(lambda leaf: leaf[1], parameters["blocks"]["0"]))
    seen = _none_seen(model, model.blocks[0])
    for batch in batches:
        tokens = Tokens(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
        x = _run(model, model.blocks[0], how, nested(first), parameters["embed"][batch["inputs"]], tokens)
        seen = _see(model, model.blocks[0], how, second, seen, x, tokens)
    for name, one in seen.items():
        np.testing.assert_allclose(
            saw[1][name].gram, one.gram, rtol=1e-4, atol=1e-4 * np.abs(np.asarray(one.gram)).max()
        )


@pytest.mark.nightly
def test_what_methods_make() -> None:
    model, how = with_attention(small_model(d_model=64, head=LmHead(tied=True)), n_kv_heads=4), plainly()
    parameters, batches = (
        initial_parameters(model),
        [packed_batch(small_run(model, batch_size=4), seed) for seed in range(2)],
    )
    of = lambda method: quantise(model, how, parameters, method, group=32, batches=batches)
    rounded, by_gptq, by_awq, smooth = (
        of(method) for method in (QuantMethod.INT4, QuantMethod.GPTQ, QuantMethod.AWQ, QuantMethod.SMOOTHQUANT)
    )
    assert rounded.errors.keys() == by_gptq.errors.keys() == by_awq.errors.keys() == smooth.errors.keys()
    assert len(rounded.errors) == 8 and all(
        len(layers) == 2 for name, layers in rounded.errors.items() if name != "embed"
    )
    for made, kind in ((by_gptq, ByGroup), (by_awq, ByGroup), (smooth, Int8Activations)):
        assert isinstance(made.parameters["blocks"]["0"]["mlp"]["down_proj"], kind)
        assert made.parameters["blocks"]["0"]["mlp"]["down_proj"].shape == (2, 48, 64)
    assert np.median(by_gptq.errors["blocks/0/mlp/down_proj"]) < 0.9 * np.median(
        rounded.errors["blocks/0/mlp/down_proj"]
    )
    # One scale a group of inputs, that of plain rounding: static groups.
    ours, theirs = (made.parameters["blocks"]["0"]["attention"]["o_proj"] for made in (by_gptq, rounded))
    np.testing.assert_array_equal(ours.scales[0], theirs.scales[0])
    assert ours.values.shape == theirs.values.shape and (ours.values != theirs.values).any()


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_1", 5.0)])
def test_blocks_of_a_gguf_file_are_found_again(kind: str, bits: float) -> None:
    """As the package gguf writes them."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(24, 128)) * np.exp(rng.normal(size=(24, 1))) * 0.05).astype(np.float32)
    w[3, :32] = 0
    number = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(w, number)
    dense = gguf.quants.dequantize(stored, number)
    for axis in (-1, -2):
        ours = lambda theirs: theirs if axis == -1 else np.ascontiguousarray(theirs.T)  # noqa: B023
        found = found_blocks(ours(dense), axis)
        assert found is not None and found.group == 32
        np.testing.assert_allclose(found.dense(jnp.dtype(jnp.float32)), ours(dense), rtol=1e-6)
        assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(found)) / w.size == bits
        if kind == "Q4_0":  # its bytes, after the scale: low bits first half
            bytes_of_codes = stored.reshape(24, 4, 18)[:, :, 2:].reshape(24, 64)
            np.testing.assert_array_equal(found.values, ours(bytes_of_codes))
    assert found_blocks(w, -1) is None
    with pytest.raises(UserError, match="method gguf finds no blocks of 32 numbers"):
        quantise(small_model(), plainly(), initial_parameters(small_model()), QuantMethod.GGUF, group=32)


def test_figures_over_windows() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 20, 50).astype(np.float64)
    full = tokens * rng.normal(2, 0.3, 50)
    found = fidelity(WindowSums(full + 0.02 * tokens, full, 0.01 * tokens, tokens))
    assert found.perplexity.value == pytest.approx(np.exp((full.sum() / tokens.sum()) + 0.02))
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    # Paired: what differs by the same in every window is known exactly.
    np.testing.assert_allclose(found.change, np.expm1(0.02))
    np.testing.assert_allclose(found.divergence, 0.01)
    assert found.tokens == tokens.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    with np.load(Path(__file__).parent / "compressed_tensors.npz", allow_pickle=False) as known:
        values = known[f"values_{bits}"].astype(np.int64) + 2 ** (bits - 1)
        np.testing.assert_array_equal(pack_to_int32(values, bits), known[f"packed_{bits}"])


def test_zero_points_are_packed_as_those_of_compressed_tensors() -> None:
    """And with them the numbers are those that a group of codes stands for."""
    with np.load(Path(__file__).parent / "compressed_tensors.npz", allow_pickle=False) as known:
        packed_known, zeros = known["packed_zero_points"], known["zero_points"]
    np.testing.assert_array_equal(pack_to_int32(zeros.T.astype(np.int64) + 8, 4).T, packed_known)
    w = np.random.default_rng(0).normal(size=(2, 32, 24)).astype(np.float32) + 0.5
    w[0, :16, 3] = 0
    array = shapes.Array(
        "w", (2, 32, 24), ("layers", "embed", "mlp"), shapes.Constant(0), shapes.Role.PRODUCT, shapes.Part.MLP,
        inputs=("embed",),
    )  # fmt: skip
    held = ByGroup.of(jnp.asarray(w), -2, 16, symmetric=False)
    writer = CompressedTensors({"w": held}, np.dtype(np.float32))
    entries = writer.entries(Tensor("a.weight", "w", (Piece(array, (1,)),)))
    assert entries is not None
    found = {entry.name: entry.make() for entry in entries}
    assert all(found[entry.name].shape == entry.spec.shape for entry in entries)
    codes = unpacked(found["a.weight_packed"], 4, 32)
    zeros = unpacked(found["a.weight_zero_point"].T, 4, 24).T
    dense = (codes - np.repeat(zeros, 16, 1)) * np.repeat(found["a.weight_scale"].astype(np.float64), 16, 1)
    np.testing.assert_array_equal(dense.T, np.asarray(held.dense(jnp.dtype(jnp.float32)))[1])
    (group,) = writer.config()["quantization_config"]["config_groups"].values()
    assert group["weights"]["symmetric"] is False and writer.config()["quantization_config"]["dequantize"]


def test_nf4_is_written_as_bitsandbytes_has_it() -> None:
    """The bytes that it gave once for this matrix; its state as `QuantState.from_dict` reads it."""
    with np.load(Path(__file__).parent / "nf4_reference.npz", allow_pickle=False) as stored:
        known = dict(stored)
    w = known["w"].astype(np.float32)
    array = shapes.Array(
        "w", w.T.shape, ("embed", "mlp"), shapes.Constant(0), shapes.Role.PRODUCT, shapes.Part.MLP, inputs=("embed",)
    )
    writer = BitsAndBytes({"w": NormalFloat4.of(jnp.asarray(w.T), 1, 1)}, np.dtype(np.float32))
    entries = writer.entries(Tensor("a.weight", "w", (Piece(array, ()),)))
    assert entries is not None
    found = {entry.name.removeprefix("a.weight"): entry.make() for entry in entries}
    assert all((made.shape, made.dtype) == entry.spec for made, entry in zip(found.values(), entries, strict=True))
    np.testing.assert_array_equal(found[""][:, 0], known["packed"])
    np.testing.assert_array_equal(found[".absmax"], known["absmax"])
    np.testing.assert_array_equal(found[".nested_absmax"], known["scales"])
    np.testing.assert_array_equal(found[".quant_map"], known["levels"])
    np.testing.assert_array_equal(found[".nested_quant_map"], known["map"])
    state = json.loads(bytes(found[".quant_state.bitsandbytes__nf4"]))
    assert (state["shape"], state["blocksize"], state["nested_blocksize"]) == (list(w.shape), 64, 256)
    assert np.float32(state["nested_offset"]) == known["mean"] and state["dtype"] == "float32"


def unpacked(words: npt.NDArray[np.int32], bits: int, inputs: int) -> npt.NDArray[np.int64]:
    """By the format's description: number i of a row has bits i b ... (i + 1) b - 1 of it, and 2^(b - 1) too much."""
    rows = []
    for row in words.astype("<i4"):
        number = int.from_bytes(row.tobytes(), "little")
        rows.append([(number >> (i * bits)) % 2**bits - 2 ** (bits - 1) for i in range(inputs)])
    return np.array(rows)


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["int4_affine", "nf4"])
def test_transformers_reads_offsets_and_nf4(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24, with compressed-tensors 0.20 and bitsandbytes 0.50.2 in float32, said once what the logits of
    this folder are."""
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    published.write_model(published.MODELS["llama"] | {"hidden_size": 64, "intermediate_size": 128}, tmp_path / "hf")
    vocabulary = {chr(33 + i): i for i in range(published.V - 1)} | {"</s>": published.V - 1}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "hf/tokenizer.json"))
    words = ["--hf", f"{tmp_path}/hf", "--method", method, "--out", f"{tmp_path}/run", "--speed_tokens", "0"]
    quantize.main([*words, "--group_size", "16"])
    with np.load(Path(__file__).parent / "compressed_tensors.npz", allow_pickle=False) as known:
        logits = load_run(tmp_path / "run").model(published.ids())
        np.testing.assert_allclose(logits, known[f"wide_{method}"], atol=3e-5)
    converting.write_published(converting.open_run(tmp_path / "run"), tmp_path / "out", None)
    found = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert found["model.layers.2.mlp.down_proj." + ("weight" if method == "nf4" else "weight_packed")].nbytes == 4096
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    plain = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]  # heads of 16 have no block of 64
    assert said.get("llm_int8_skip_modules", said.get("ignore")) == ["lm_head", *(plain if method == "nf4" else ())]


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_transformers_reads_it_as_the_same_model(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 with compressed-tensors 0.20 said once what the logits of this folder are."""
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    published.write_model(published.MODELS["llama"], tmp_path / "hf")
    vocabulary = {chr(33 + i): i for i in range(published.V - 1)} | {"</s>": published.V - 1}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "hf/tokenizer.json"))
    quantize.main(["--hf", f"{tmp_path}/hf", "--method", method, "--out", f"{tmp_path}/run", "--speed_tokens", "0"])
    opened = converting.open_run(tmp_path / "run")
    converting.write_published(opened, tmp_path / "out", None)
    found = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    run = load_run(tmp_path / "run")
    with np.load(Path(__file__).parent / "compressed_tensors.npz", allow_pickle=False) as known:
        np.testing.assert_allclose(run.model(published.ids()), known[method], atol=2e-5)
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"
    for layer in range(3):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{name}"
            groups = [
                one for one in said["config_groups"].values() if any(re.match(t[3:], module) for t in one["targets"])
            ]
            (weights,) = (one["weights"] for one in groups)
            scales, (rows, inputs) = found[f"{module}.weight_scale"].astype(np.float64), found[f"{module}.weight_shape"]
            codes = unpacked(found[f"{module}.weight_packed"], weights["num_bits"], inputs)
            dense = codes * np.repeat(scales, weights["group_size"] or inputs, 1)
            part, end = name.split(".")
            ours = run.parameters["blocks"]["0"][part.replace("self_attn", "attention")][end][layer]
            ours = np.asarray(ours.dense(jnp.float32)).reshape(inputs, rows)
            np.testing.assert_allclose(dense.T, ours, rtol=1e-6)
    assert found["model.embed_tokens.weight"].dtype == np.float32
    assert "model.layers.0.mlp.up_proj.weight" not in found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantise")
    make_run(place, model=small_model(vocab_size=264, d_model=64, head=LmHead(tied=True)))
    return place


def run(folder: Path, method: str, *words: str) -> dict[str, Any]:
    sizes = ["--seq_len", "32", "--calibration_tokens", "96", "--evaluation_tokens", "256", "--speed_tokens", "4"]
    text = ["--run", str(folder / "run"), "--data", str(folder / "data"), *sizes]
    quantize.main(["--method", method, "--out", str(folder / method), *text, *words])
    found: dict[str, Any] = json.loads((folder / method / "quantization.json").read_text())
    return found


def test_a_run_of_rounded_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded are the weights that the formula gives, and the logits are those of the numbers they stand for."""
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    place = folder / "rounded"
    words = ["--method", "int4", "--run", str(folder / "run"), "--out", str(place), "--speed_tokens", "0"]
    quantize.main([*words, "--group_size", "16"])
    full, loaded = load_run(folder / "run"), load_run(place)
    groups = full.parameters["blocks"]["0"]["mlp"]["up_proj"].reshape(2, 4, 16, 48)
    held = loaded.parameters["blocks"]["0"]["mlp"]["up_proj"]
    assert isinstance(held, ByGroup) and held.group == 16 and held.values.shape == (2, 32, 48)
    scales = (np.abs(np.asarray(groups)).max(2) / np.float32(7.5)).astype(held.scales.dtype)
    np.testing.assert_array_equal(held.scales, scales)
    dense = lambda w: w if isinstance(w, jax.Array) else w.dense(jnp.float32)
    plain = jax.tree.map(dense, loaded.parameters, is_leaf=lambda w: isinstance(w, Quantised))
    ids = np.arange(24)[None] % 264
    want = dataclasses.replace(full, parameters=plain).model(ids)
    np.testing.assert_allclose(loaded.model(ids), want, atol=1e-5)
    assert np.abs(np.asarray(full.model(ids)) - want).max() > 1e-3
    full_row, row = json.loads((place / "quantization.json").read_text())["methods"]
    assert row["fidelity"] is None and row["bytes"] < 0.35 * full_row["bytes"]


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["int4", "gptq"])
def test_a_quantised_run_goes_everywhere(
    method: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    full, row = run(folder, method)["methods"]
    place, out = str(folder / method), capsys.readouterr().out
    assert method in out and f"{place} is written" in out
    assert row["method"] == method and row["bytes"] < 0.3 * full["bytes"] and row["bits"] < 8
    assert row["of_products"] == (method == "gptq")
    assert abs(row["fidelity"]["change"]["value"]) < 0.2 and 0 < row["fidelity"]["divergence"]["value"] < 0.5
    assert full["fidelity"]["divergence"]["value"] == pytest.approx(0, abs=1e-6) and row["tokens_per_s"] > 0

    loaded = load_run(place)
    weight = loaded.parameters["blocks"]["0"]["attention"]["q_proj"]
    assert isinstance(weight, ByGroup) and weight.values.dtype == jnp.uint8 and weight.group == 64
    ids = np.arange(24)[None] % 264
    logits = np.asarray(loaded.model(ids))
    cut = load_run(place, sharding=ShardingConfig(data=1, tensor=2, fsdp=2))
    np.testing.assert_allclose(cut.model(ids), logits, atol=1e-4)

    generate.main(["--run", place, "--max_new_tokens", "4", "--json"])
    evaluate.main(["--run", place, "--batch_size", "1", "--batches", "8", "--json"])
    *_, said = map(json.loads, capsys.readouterr().out.splitlines())
    assert said["perplexity"] == pytest.approx(row["fidelity"]["perplexity"]["value"], rel=1e-4)
    with pytest.raises(UserError, match="its weights are quantised; start from the run that it was made of"):
        open_source(place).read({})
    with pytest.raises(UserError, match="its weights are quantised already; name the run"):
        quantize.main(["--method", "int8", "--out", str(folder / "twice"), "--run", place])

    convert.main(["--from", f"run:{place}", "--to", f"run:{place}-plain"])  # the numbers that they stand for
    np.testing.assert_allclose(load_run(f"{place}-plain").model(ids), logits, atol=1e-5)


@pytest.mark.nightly
def test_the_table_of_all_methods(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    full, *rows = run(folder, "all")["methods"]
    assert [row["method"] for row in rows] == [method.value for method in QuantMethod][1:-1]  # not a GGUF file's
    divergence = {row["method"]: row["fidelity"]["divergence"]["value"] for row in rows}
    assert divergence["int8"] < divergence["fp8"] < divergence["int4"]
    assert divergence["gptq"] < divergence["int4"]
    assert all(row["bytes"] < 0.35 * full["bytes"] for row in rows)
    assert [file.name for file in (folder / "all").iterdir()] == ["quantization.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gptq", "--out", "x", "--run", "r"], "--method gptq looks at text; name prepared data with"),
        (["--method", "int8", "--out", "x"], "name one model: --run RUN_DIR"),
        (["--method", "int8", "--out", "x", "--run", "r", "--hf", "h"], "name one model"),
        (["--method", "int3", "--out", "x", "--run", "r"], "int3"),
        (["--method", "int8", "--out", "{folder}", "--run", "r"], "is there already"),
        (
            ["--method", "int8", "--out", f"{__file__}/x", "--run", "r"],
            "test_quantization.py is no folder; name another",
        ),
        (["--method", "int8", "--out", "x", "--run", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        quantize.main([word.format(folder=folder) for word in words])
    assert "\n" not in str(caught.value)
