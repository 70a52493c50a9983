"""Reading through the cache against the full forward pass, text against what it says."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import (
    FLOAT32,
    latent_model,
    one_device,
    plainly,
    small_model,
    small_run,
    through_cache,
    whole_logits,
    with_attention,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import BYTE_MODEL, parameters_of

from maxlm.config import (
    Alibi,
    Capacity,
    CausalLm,
    Context,
    DataConfig,
    Dataset,
    DeepNorm,
    Dtype,
    DynamicNtkScaling,
    EngineConfig,
    ExecutionConfig,
    ExpertChoiceRouter,
    Experts,
    FixedPattern,
    GlmRope,
    LayerNorm,
    Learned,
    LmHead,
    LongRopeScaling,
    MaskedLm,
    ModelConfig,
    NtkScaling,
    OutputNorm,
    Pretrain,
    QkNorm,
    RelativeBias,
    RelativeSinusoids,
    Residual,
    RmsNorm,
    Rope,
    SamplingConfig,
    Sandwich,
    Sft,
    ShardingConfig,
    StridedPattern,
    TopKRouter,
    TrainSentencePiece,
    UserError,
    WeightFormat,
    YarnScaling,
    Zero,
    with_experts,
)
from maxlm.config.prediction_rules import masked_alone
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Bytes, HuggingFace, Tokenizer
from maxlm.data.train_tokenizer import train_sentencepiece
from maxlm.evaluation.scoring import RunExaminee
from maxlm.inference.engine import Engine
from maxlm.inference.generator import Generator
from maxlm.inference.held import by_layer, held
from maxlm.inference.load import LoadedRun
from maxlm.inference.text_stream import TextStream
from maxlm.models import Execution
from maxlm.models.kv_cache import empty_cache
from maxlm.models.weights.by_layer import ByLayer
from maxlm.sharding import decoding_layout, make_layout

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingConfig(temperature=0)


def with_residual(model: ModelConfig, residual: Residual) -> ModelConfig:
    blocks = tuple(dataclasses.replace(block, residual=residual) for block in model.blocks)
    return dataclasses.replace(model, blocks=blocks)


MODELS = {
    "mha": with_attention(small_model(), n_kv_heads=4),
    "gqa": small_model(),
    "window": with_attention(small_model(), window=5),
    "biases_norms": with_attention(
        small_model(head=LmHead(tied=True)), qkv_bias=True, out_bias=True, qk_norm=QkNorm.HEADS
    ),
    "pattern": small_model(n_layers=4, blocks=with_attention(small_model(), window=3).blocks + small_model().blocks),
    "gpt2": with_attention(small_model(norm=LayerNorm(), embedded_position=Learned()), position=None),
    "opt": with_attention(small_model(norm=LayerNorm(), embedded_position=Learned(offset=2)), position=None),
    "gpt_j": with_attention(small_model(), position=Rope(dims=4, interleaved=True), scale=0.8),
    "xpos": with_attention(small_model(), position=Rope(decay=4.0)),
    "yarn_sinks": with_attention(
        small_model(), position=Rope(theta=100.0, scaling=YarnScaling(factor=4.0, original_max_len=8)), sinks=True
    ),
    "long_rope_whole_norm": with_attention(
        small_model(),
        position=Rope(
            theta=100.0,
            scaling=LongRopeScaling(short_factors=(1.0,) * 4, long_factors=(1.5, 2.0, 4.0, 9.0), original_max_len=8),
        ),
        qk_norm=QkNorm.WHOLE,
    ),
    "ntk_log_length": with_attention(
        small_model(), position=Rope(theta=100.0, scaling=NtkScaling(factor=4.0)), log_length=5, sinks=True, window=5
    ),
    "dynamic_up_to_its_length": with_attention(
        small_model(), position=Rope(scaling=DynamicNtkScaling(factor=4.0, original_max_len=64))
    ),
    "alibi": with_attention(small_model(), position=Alibi(), soft_cap=2.0),
    "t5_bias": with_attention(small_model(), position=RelativeBias(buckets=8, max_distance=16)),
    "strided": with_attention(small_model(), pattern=StridedPattern(stride=5)),
    "fixed": with_attention(small_model(), pattern=FixedPattern(chunk=6, summary=1)),
    "glm": with_attention(small_model(), position=GlmRope(theta=50.0)),
    "transformer_xl": with_attention(
        small_model(init_std=0.3), position=RelativeSinusoids(dims=32), qk_norm=QkNorm.HEADS
    ),
    "gemma": with_residual(
        small_model(norm=RmsNorm(one_plus=True), embedding_scale=6.0, head=LmHead(tied=True, soft_cap=3.0)), Sandwich()
    ),
    "output_norm": with_residual(small_model(head=LmHead(bias=True, scale=0.5)), OutputNorm()),
    "deep_norm": with_residual(small_model(embedding_norm=True, head=LmHead(normalized=True)), DeepNorm()),
    "latents": latent_model(query_rank=8),
    "dense_then_experts": with_experts(
        small_model(n_layers=3), Experts(n_experts=4, d_ff=24, router=TopKRouter(top_k=2)), first_dense=1
    ),
}


TEXTS = [np.random.default_rng(0).integers(0, 64, n).tolist() for n in (18, 11, 8)]


@pytest.mark.parametrize("name", MODELS)
def test_a_text_read_through_the_cache_gives_the_full_forward_pass(name: str) -> None:
    config = MODELS[name]
    parameters = parameters_of(small_run(config))
    got = through_cache(config, parameters, plainly(), TEXTS, widths=[5])
    for logits, want in zip(got, whole_logits(config, parameters, TEXTS), strict=True):
        np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "window", "latents"])
def test_a_long_text_reads_as_the_full_forward_pass(name: str) -> None:
    """In pieces of many sizes, beside another."""
    config = MODELS[name]
    parameters, texts = parameters_of(small_run(config)), np.random.default_rng(1).integers(0, 64, (2, 60)).tolist()
    got = through_cache(config, parameters, plainly(), texts, widths=[20, 2], block_size=16)
    for logits, want in zip(got, whole_logits(config, parameters, texts), strict=True):
        np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)


def loaded(
    model: ModelConfig = BYTE_MODEL,
    sharding: ShardingConfig = ShardingConfig(data=1),
    devices: int = 1,
    execution: ExecutionConfig = FLOAT32,
    **changes: Any,
) -> LoadedRun:
    config = dataclasses.replace(small_run(model=model, sharding=sharding), execution=execution)
    values = {"parameters": parameters_of(config), "tokenizer": Bytes(), **changes}
    return LoadedRun(config=config, layout=make_layout(sharding, jax.devices()[:devices]), step=0, **values)


def test_a_run_that_learned_masked_tokens_alone_does_not_write() -> None:
    """Refused where an engine is made, and so by all that writes, before anything is placed."""
    run = loaded()
    masked = dataclasses.replace(run.config, task=Pretrain(predict=MaskedLm()))
    with pytest.raises(UserError) as caught:
        dataclasses.replace(run, config=masked).generate("a", max_new_tokens=1)
    assert str(caught.value) == (
        "task.predict = MaskedLm is all that the model has learned, so it cannot write; use a run with another "
        "prediction, or measure this one's held-out loss with python -m maxlm.evaluate"
    )
    with pytest.raises(UserError, match=r"^task.predict = MaskedLm is all"):
        RunExaminee(dataclasses.replace(run, config=masked)).scores([([1], [2])])
    asked = lambda *predict: DataConfig(datasets=tuple(Dataset(path="unused", predict=one) for one in predict))
    masked = dataclasses.replace(run.config, data=asked(MaskedLm(), MaskedLm()))
    with pytest.raises(UserError, match=r"^data.datasets.0.predict = MaskedLm is all"):
        Engine(dataclasses.replace(run, config=masked))
    assert masked_alone(Pretrain(), asked(MaskedLm(), None).datasets) is None
    assert masked_alone(Pretrain(predict=MaskedLm()), asked(CausalLm()).datasets) is None
    assert masked_alone(Sft(), asked(None).datasets) is None


PROMPTS = ["hello", "", "a prompt of more than sixteen bytes"]


SMALL = EngineConfig(slots=3, tokens_per_step=8, block_size=4)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(loaded(), engine=SMALL)


@contextlib.contextmanager
def with_parameters(generator: Generator, parameters: Any) -> Iterator[None]:
    """The generator with others than its own, for a while."""
    generator.engine.update_weights(parameters)
    try:
        yield
    finally:
        generator.engine.update_weights(parameters_of(small_run(BYTE_MODEL)))


@pytest.fixture(scope="module")
def greedy_tokens(generator: Generator) -> list[list[int]]:
    return [g.tokens for g in generator.generate(PROMPTS, max_new_tokens=20, sampling=GREEDY)]


def test_greedy_is_the_naive_loop(greedy_tokens: list[list[int]]) -> None:
    """Each token is the likeliest one after all before it, by the forward pass."""
    run, new = loaded(), greedy_tokens[0]
    prompt = run.tokenizer.prompt_ids(PROMPTS[0])
    [logits] = whole_logits(BYTE_MODEL, run.parameters, [[*prompt, *new]])
    assert new == np.argmax(logits[len(prompt) - 1 : -1, : Bytes().vocab_size], -1).tolist()
    assert len(new) == 20


def test_rows_of_a_batch_do_not_meet(generator: Generator, greedy_tokens: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, greedy_tokens, strict=True):
        assert generator.generate([prompt], max_new_tokens=20, sampling=GREEDY)[0].tokens == tokens


@pytest.mark.parametrize(
    ("sharding", "devices"),
    [
        pytest.param(ShardingConfig(data=1, tensor=2), 2, marks=pytest.mark.slow),
        (ShardingConfig(data=1, fsdp=4, tensor=2), 8),
        pytest.param(ShardingConfig(data=2, seq=2, tensor=2, sequence_parallel=True), 8, marks=pytest.mark.slow),
        (ShardingConfig(data=1, seq=2, stage=2, fsdp=2, context=Context.RING, zero=Zero.OPTIMIZER), 8),
    ],
)
def test_every_layout_gives_the_same_text(
    sharding: ShardingConfig, devices: int, greedy_tokens: list[list[int]]
) -> None:
    generator = Generator(loaded(sharding=sharding, devices=devices), engine=EngineConfig(slots=2, tokens_per_step=2))
    got = generator.generate(PROMPTS, max_new_tokens=20, sampling=GREEDY)
    assert [g.tokens for g in got] == greedy_tokens


@pytest.mark.parametrize(("d_model", "data", "fsdp"), [(32, 1, 4), (30, 2, 2)])
def test_stages_join_an_axis_that_keeps_the_parameters_cut(d_model: int, data: int, fsdp: int) -> None:
    """Two stages and two fsdp shards: four shards where d_model allows it."""
    sharding = ShardingConfig(data=1, fsdp=2, stage=2, tensor=2, virtual_stages=2, zero=Zero.OPTIMIZER)
    training = make_layout(sharding)
    decoding = decoding_layout(training, d_model)
    assert dict(decoding.mesh.shape) == {"data": data, "fsdp": fsdp, "stage": 1, "seq": 1, "tensor": 2, "expert": 1}
    assert decoding.config.sizes(8) == dict(decoding.mesh.shape)
    assert (decoding.config.virtual_stages, decoding.config.zero) == (1, Zero.PARAMETERS)
    assert set(decoding.mesh.devices.flat) == set(training.mesh.devices.flat)
    # Devices that shared a tensor group still do.
    groups = lambda mesh: {frozenset(row) for row in np.moveaxis(mesh.devices, 4, -1).reshape(-1, 2).tolist()}
    assert groups(decoding.mesh) == groups(training.mesh)


def test_a_model_whose_experts_choose_cannot_decode() -> None:
    experts = Experts(n_experts=4, d_ff=48, router=ExpertChoiceRouter(), dispatch=Capacity(factor=2.0))
    run = loaded()
    config = dataclasses.replace(run.config, model=with_experts(run.config.model, experts))
    with pytest.raises(UserError, match="looks at later tokens and cannot decode"):
        Generator(dataclasses.replace(run, config=config))


def test_a_model_that_stretches_with_the_length_cannot_decode() -> None:
    model = with_attention(BYTE_MODEL, position=Rope(scaling=DynamicNtkScaling(factor=2.0, original_max_len=8)))
    run = loaded()
    words = "DynamicNtkScaling and model.max_seq_len = .* above its original_max_len: such a model looks at later"
    with pytest.raises(UserError, match=words):
        Generator(dataclasses.replace(run, config=dataclasses.replace(run.config, model=model)))
    with pytest.raises(ValueError, match="has no cache"):
        empty_cache(model, {0: 2}, 4, plainly())


def test_the_seed_decides_and_the_engines_sizes_do_not(generator: Generator) -> None:
    ask = {"max_new_tokens": 25, "sampling": SamplingConfig(temperature=1.5, top_p=0.95)}
    first = generator.generate(["x", "x"], seed=5, **ask)
    assert first[0].tokens != first[1].tokens, "rows have their own randomness"
    assert [g.tokens for g in generator.generate(["x", "x"], seed=5, **ask)] == [g.tokens for g in first]
    assert generator.generate(["x", "x"], seed=6, **ask)[0].tokens != first[0].tokens
    sizes = EngineConfig(slots=1, tokens_per_step=3, block_size=16, decode_steps=3)
    other = Generator(loaded(), engine=sizes).generate(["x", "x"], seed=5, **ask)
    assert [g.tokens for g in other] == [g.tokens for g in first]


def test_streamed_text_is_the_whole_text(generator: Generator) -> None:
    ask = {"max_new_tokens": 40, "sampling": SamplingConfig(temperature=2.0), "seed": 1}
    stream, pieces = generator.stream("x", **ask), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            streamed = end.value
            break
    whole = generator.generate(["x"], **ask)[0]
    assert "".join(pieces) == streamed.text == whole.text
    assert streamed.tokens == whole.tokens and len(pieces) > 1
    assert streamed.tokens_per_s > 0 and whole.tokens_per_s > 0


def test_eos_ends_a_row_and_the_others_go_on(
    generator: Generator, greedy_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Bytes()
    eos = tokenizer.eos_id = greedy_tokens[0][4]
    want = [row[: row.index(eos) + 1] if eos in row else row for row in greedy_tokens]
    assert len(want[0]) <= 5 and any(len(row) == 20 for row in want)
    monkeypatch.setattr(generator.engine, "ends", TextEnds.of_documents(tokenizer))
    got = generator.generate([PROMPTS[0], PROMPTS[2]], max_new_tokens=20, sampling=GREEDY)
    assert [g.tokens for g in got] == [want[0], want[2]]


def test_one_token_needs_no_decoding(generator: Generator, greedy_tokens: list[list[int]]) -> None:
    [one] = generator.generate(PROMPTS[:1], max_new_tokens=1, sampling=GREEDY)
    assert one.tokens == greedy_tokens[0][:1] and one.tokens_per_s is None
    assert generator.generate([], max_new_tokens=1) == []


def test_padded_ids_are_never_chosen(generator: Generator) -> None:
    parameters = dict(parameters_of(small_run(BYTE_MODEL)))
    parameters["unembed"] = parameters["unembed"].at[Bytes().vocab_size :].mul(100.0)
    with with_parameters(generator, parameters):
        for sampling in (GREEDY, SamplingConfig(top_k=3)):
            [got] = generator.generate(["x"], max_new_tokens=15, sampling=sampling)
            assert max(got.tokens) < Bytes().vocab_size


def test_bfloat16_weights_change_no_logit() -> None:
    """Casting a matrix once gives what casting it at each use gives."""
    how = Execution(one_device(), ExecutionConfig(dtype=Dtype.BFLOAT16))
    parameters = parameters_of(small_run(BYTE_MODEL))
    cast = held(parameters, BYTE_MODEL, how, WeightFormat.DTYPE)
    assert cast["embed"].dtype == jnp.bfloat16 and cast["final_norm"]["scale"].dtype == jnp.float32
    for narrow, wide in zip(
        *(through_cache(BYTE_MODEL, by_layer(BYTE_MODEL, one), how, TEXTS, widths=[5]) for one in (cast, parameters)),
        strict=True,
    ):
        np.testing.assert_array_equal(narrow, wide)


def test_weights_by_layer_are_those_of_the_stack() -> None:
    """A pattern of two different blocks that occurs twice."""
    block = BYTE_MODEL.blocks[0]
    local = dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=3))
    (latent,) = latent_model(BYTE_MODEL).blocks
    experts = Experts(n_experts=4, d_ff=24, router=TopKRouter(top_k=2), bias=True)
    model = dataclasses.replace(BYTE_MODEL, n_layers=4, blocks=(local, dataclasses.replace(latent, mlp=experts)))
    stacked = parameters_of(small_run(model))
    apart = by_layer(model, stacked)
    assert isinstance(apart["blocks"]["1"]["mlp"]["down_proj"], ByLayer)
    together, each = (through_cache(model, one, plainly(), TEXTS, widths=[5]) for one in (stacked, apart))
    np.testing.assert_allclose(np.concatenate(each), np.concatenate(together), atol=1e-5)


def test_what_does_not_fit_is_refused(generator: Generator) -> None:
    with pytest.raises(UserError, match=r"4 tokens and max_new_tokens = 61 make 65, more than .* = 64; .* <= 60"):
        generator.generate(["abc"], max_new_tokens=61)
    assert generator.generate(["abc"], max_new_tokens=60, sampling=GREEDY)[0].tokens
    with pytest.raises(UserError, match="shorten the prompt to at most"):
        generator.generate(["a" * 80], max_new_tokens=1)
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        generator.generate(["a"], max_new_tokens=0)
    with pytest.raises(UserError, match="seed = -1"):
        generator.generate(["a"], max_new_tokens=1, seed=-1)
    with pytest.raises(UserError, match="vocab_size = 64 is less than the tokenizer's 258"):
        Generator(loaded(model=small_model()))
    nan = jax.tree.map(lambda x: x * jnp.nan, parameters_of(small_run(BYTE_MODEL)))
    with with_parameters(generator, nan), pytest.raises(UserError, match="not finite"):
        generator.generate(["a"], max_new_tokens=2)


def byte_fallback(path: Path) -> Tokenizer:
    """As Llama 2's tokenizer.json: a few letters, and bytes for the rest."""
    pieces = ["</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "a")], byte_fallback=True
        )
    )
    model.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    model.add_special_tokens(["</s>"])
    model.save(str(path))
    return HuggingFace(path)


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    text = ["def function(self, value):\n    return value\n" * 20, "the cat sat on the mat and the dog did too\n" * 20]
    piece_model = train_sentencepiece(TrainSentencePiece(vocab_size=300), text, folder / "sp")
    return [Bytes(), piece_model, byte_fallback(folder / "tokenizer.json")]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_to_the_text_they_decode_to(all_tokenizers: list[Tokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(all_tokenizers), "tokenizer")
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    fitting = st.text("ab éĀ🙂日�\n", max_size=4).map(tokenizer.encode)
    parts = st.lists(st.one_of(fitting, st.lists(any_id, max_size=4)), max_size=8)
    ids = [i for part in data.draw(parts, "ids") for i in part]
    stream = TextStream(tokenizer, tokenizer.prompt_ids(data.draw(st.sampled_from(["", "a ", "é", "🙂"]), "prompt")))
    shown = ""
    while ids:
        n = data.draw(st.integers(1, 3))
        shown += stream.add(ids[:n])
        assert stream.text.startswith(shown)
        ids = ids[n:]
    assert shown + stream.finish() == stream.text


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("abcé", min_size=1, max_size=12),
    stops=st.lists(st.text("abcé", min_size=1, max_size=3), min_size=1, max_size=4),
    size=st.integers(1, 12),
)
def test_a_text_ends_at_the_stop_string_that_ends_first(text: str, stops: list[str], size: int) -> None:
    tokenizer = Bytes()
    ids, stream, shown = tokenizer.encode(text), TextStream(tokenizer, tokenizer.prompt_ids("a"), stops), ""
    for at in range(0, len(ids), size):  # more may come at a time than are needed
        shown += stream.add(ids[at : at + size])
    shown += stream.finish()
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    stop = max((stop for stop in stops if ends and text[: ends[0]].endswith(stop)), key=len, default=None)
    assert stream.stopped == stop
    assert shown == stream.text == (text if stop is None else text[: ends[0] - len(stop)])


def test_ids_beyond_the_vocabulary_are_no_text(all_tokenizers: list[Tokenizer]) -> None:
    for tokenizer in all_tokenizers:
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 60]
        assert tokenizer.decode([*tokenizer.encode("a b"), *beyond]) == "a b"
        stream = TextStream(tokenizer, [*tokenizer.encode("a"), *beyond])
        assert stream.add(tokenizer.encode(" b")[:1]) + stream.finish()


def test_a_character_comes_whole_and_spaces_stay(all_tokenizers: list[Tokenizer]) -> None:
    for tokenizer in all_tokenizers:
        stream = TextStream(tokenizer, tokenizer.prompt_ids("a"))
        pieces = [stream.add([i]) for i in tokenizer.encode(" b 🙂é a日 b")]
        assert "".join(pieces) + stream.finish() == " b 🙂é a日 b"
        assert not any("\ufffd" in piece for piece in pieces)
        assert "🙂" in "".join(pieces)
