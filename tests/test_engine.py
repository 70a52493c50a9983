"""The engine on a real model: a text is the same to the bit whatever else runs, and what the forward pass says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, run_decoder, small_model, small_run, with_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import BYTE_MODEL, parameters_of

from maxlm.config import (
    CacheFormat,
    EngineConfig,
    Experts,
    GatedMlp,
    ModelConfig,
    SamplingConfig,
    ShardingConfig,
    TopKRouter,
    with_experts,
)
from maxlm.data.tokenizers import Bytes
from maxlm.inference.engine import Engine, Ticket
from maxlm.inference.load import LoadedRun
from maxlm.inference.loop import EngineLoop
from maxlm.inference.programs import Programs
from maxlm.inference.request import BadRequest, Delta, Draining, Finish, QueueFull, Request, TokenScore
from maxlm.inference.structured import JsonSchema, Regex
from maxlm.models import Execution, Tokens, bind, ops
from maxlm.sharding import Layout, make_layout

pytestmark = pytest.mark.usefixtures("programs_kept")

SMALL = EngineConfig(slots=4, tokens_per_step=8, block_size=8, cache_tokens=160, decode_steps=3, queue=64)


def wide_model() -> ModelConfig:
    """Wide enough for products of different numbers of rows to be rounded differently; a window, and a whole layer."""
    model = small_model(vocab_size=512, d_model=256, max_seq_len=128, init_std=0.05)
    wide = dataclasses.replace(with_attention(model, head_dim=32, n_heads=8).blocks[0], mlp=GatedMlp(d_ff=688))
    local = dataclasses.replace(wide, attention=dataclasses.replace(wide.attention, window=12))
    return dataclasses.replace(model, blocks=(local, wide))


def loaded(model: ModelConfig, sharding: ShardingConfig = ShardingConfig(data=1), devices: int = 1) -> LoadedRun:
    config = dataclasses.replace(small_run(model=model, sharding=sharding), execution=FLOAT32)
    layout = make_layout(sharding, jax.devices()[:devices])
    return LoadedRun(config=config, layout=layout, parameters=parameters_of(config), tokenizer=Bytes(), step=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(loaded(wide_model()), SMALL)


def finish(engine: Engine, asked: list[Request]) -> list[list[Delta]]:
    """All of them at once."""
    found: dict[Ticket, list[Delta]] = {engine.submit(request): [] for request in asked}
    while not engine.idle:
        for ticket, delta in engine.step():
            found[ticket].append(delta)
    return list(found.values())


def outcome(deltas: list[Delta]) -> tuple[Any, ...]:
    """Tokens, log-probabilities to the bit, text, and why it ended."""
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    scores = tuple((score.logprob, score.top) for delta in deltas for score in delta.scores)
    return tokens, scores, "".join(delta.text for delta in deltas), deltas[-1].finish


def fresh(engine: Engine, request: Request) -> tuple[Any, ...]:
    """Alone, with nothing in the cache."""
    for shard in engine._shards:
        for pool in shard.pools.values():
            pool.forget()
    return outcome(finish(engine, [request])[0])


def test_a_device_has_a_row_for_every_slot_if_a_class_does() -> None:
    """A step of a device that reads the weights once for all rows takes as long for 2 of them; on a CPU it does not."""
    for on_cpu, expected in ((True, [2, 8]), (False, [32])):
        how = SimpleNamespace(layout=SimpleNamespace(on_cpu=on_cpu))
        programs: Any = SimpleNamespace(_config=EngineConfig(slots=32), _how=how)
        assert max([[2, 8], [32]], key=lambda widths: Programs._worth(programs, widths, 32)) == expected


def test_the_compiler_may_choose_how_weights_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on chips, where it does; and weights that come later lie so too."""
    run, request = loaded(BYTE_MODEL), Request(prompt=(5, 6, 7), max_new_tokens=9, logprobs=0)
    twice = jax.tree.map(lambda x: 2 * x, run.parameters)

    def texts() -> Iterator[list[TokenScore]]:
        engine = Engine(run, SMALL)
        for parameters in (run.parameters, twice):
            engine.update_weights(parameters)
            yield [score for delta in finish(engine, [request])[0] for score in delta.scores]

    usual = list(texts())
    monkeypatch.setattr(Layout, "on_cpu", property(lambda self: False))
    for found, wanted in zip(texts(), usual, strict=True):
        assert [score.token for score in found] == [score.token for score in wanted]
        np.testing.assert_allclose(
            [score.logprob for score in found], [score.logprob for score in wanted], rtol=1e-4, atol=1e-5
        )


def full_log_probs(run: LoadedRun, tokens: list[int]) -> np.ndarray:
    """float64 [T, V] by the forward pass that training uses."""
    model = run.config.model

    @jax.jit
    def forward(parameters: Any, ids: jax.Array) -> jax.Array:
        how = Execution(run.layout, FLOAT32)
        hidden = run_decoder(model, parameters, how, ids, Tokens(jnp.arange(ids.shape[1])[None])).hidden
        return ops.logits(hidden, bind(model, parameters).unembedding)

    logits = np.asarray(forward(run.parameters, jnp.asarray([tokens], jnp.int32)), np.float64)[0]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


SHARED = tuple(np.random.default_rng(5).integers(0, 258, 40).tolist())
samplings = st.sampled_from(
    [
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=1.3, top_k=20, top_p=0.9),
        SamplingConfig(temperature=0.8, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.5),
    ]
)
requests = st.builds(
    lambda common, own, new, sampling, seed, scale, negative: Request(
        prompt=SHARED[:common] + tuple(own) or (3,),
        max_new_tokens=new,
        sampling=sampling,
        seed=seed,
        ends=(257,),
        logprobs=3,
        guidance_scale=scale,
        negative_prompt=SHARED[:negative],
    ),
    st.sampled_from([0, 7, 8, 16, 24, 33, 40]),
    st.lists(st.integers(0, 257), max_size=9),
    st.integers(1, 24),
    samplings,
    st.integers(0, 3),
    st.sampled_from([1.0, 1.0, 1.7]),
    st.sampled_from([0, 8, 19]),
)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_text_is_the_same_to_the_bit_whatever_else_runs(engine: Engine, data: st.DataObject) -> None:
    """Any order and time of arrival, in few blocks, with beginnings in the cache, beside texts that are cancelled."""
    # All is drawn first: a draw may end the example, which must not leave texts in the engine.
    asked = data.draw(st.lists(requests, min_size=2, max_size=7), "requests")
    order = data.draw(st.permutations(range(len(asked))), "order")
    doomed = data.draw(st.lists(requests, max_size=2), "cancelled")
    pauses = data.draw(st.lists(st.integers(0, 4), min_size=len(asked), max_size=len(asked)), "steps between")
    want = [fresh(engine, request) for request in asked]
    found: dict[Ticket, list[Delta]] = {}
    places: dict[int, Ticket] = {}
    victims = []
    for n, pause in zip(order, pauses, strict=True):
        places[n] = engine.submit(asked[n])
        found[places[n]] = []
        if doomed:
            victims.append(engine.submit(doomed.pop()))
            found[victims[-1]] = []
        for _ in range(pause):
            for ticket, delta in engine.step():
                found[ticket].append(delta)
    for victim in victims:
        engine.cancel(victim)
    while not engine.idle:
        for ticket, delta in engine.step():
            found[ticket].append(delta)
    for n, ticket in places.items():
        assert outcome(found[ticket]) == want[n]
    assert engine.stats.free_blocks == engine.stats.blocks


@pytest.mark.nightly
def test_experts_give_a_text_the_same_beside_others() -> None:
    """Their products are of as many rows as tokens chose an expert, which depends on the other texts."""
    model = wide_model()
    one = dataclasses.replace(model, blocks=model.blocks[1:])
    engine = Engine(loaded(with_experts(one, Experts(n_experts=4, d_ff=344, router=TopKRouter(top_k=2)))), SMALL)
    greedy = SamplingConfig(temperature=0)
    asked = [Request(prompt=SHARED[n : 2 * n + 5], max_new_tokens=12, sampling=greedy, logprobs=3) for n in range(6)]
    want = [fresh(engine, request) for request in asked]
    assert [outcome(deltas) for deltas in finish(engine, asked)] == want


@pytest.mark.nightly
def test_a_cache_of_int8_gives_a_text_the_same_beside_others() -> None:
    """In few blocks, so that texts give theirs back and are read again; log-probabilities are near."""
    engine = Engine(loaded(wide_model()), dataclasses.replace(SMALL, kv_cache=CacheFormat.INT8))
    greedy = SamplingConfig(temperature=0)
    asked = [
        Request(prompt=SHARED[: 8 * n + 5], max_new_tokens=30, sampling=greedy, logprobs=3, prompt_logprobs=1)
        for n in (0, 1, 2, 3, 4, 4, 2)
    ]
    want = [fresh(engine, request) for request in asked]
    assert [outcome(deltas) for deltas in finish(engine, asked)] == want
    scores = finish(engine, asked[4:5])[0][0].prompt_scores
    exact = full_log_probs(loaded(wide_model()), list(asked[4].prompt))
    off = [abs(score.logprob - exact[i, score.token]) for i, score in enumerate(scores)]
    assert 1e-5 < max(off) < 0.1


def test_log_probabilities_are_those_of_the_forward_pass(engine: Engine) -> None:
    """Of the prompt and of what follows; a greedy token is the likeliest one."""
    run, prompt = loaded(wide_model()), SHARED[:21]
    request = Request(
        prompt=prompt, max_new_tokens=9, sampling=SamplingConfig(temperature=0), logprobs=2, prompt_logprobs=1
    )
    [deltas] = finish(engine, [request])
    tokens = outcome(deltas)[0]
    want = full_log_probs(run, [*prompt, *tokens])
    given = deltas[0].prompt_scores
    assert [score.token for score in given] == list(prompt[1:])
    np.testing.assert_allclose(
        [score.logprob for score in given], [want[i, token] for i, token in enumerate(prompt[1:])], atol=2e-5
    )
    scores = [score for delta in deltas for score in delta.scores]
    places = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    known = want[:, : Bytes().vocab_size]
    assert tokens == tuple(known[place].argmax() for place in places)
    expected = [want[place, score.token] for place, score in zip(places, scores, strict=True)]
    np.testing.assert_allclose([score.logprob for score in scores], expected, atol=2e-5)
    for place, score in zip(places, scores, strict=True):
        assert [i for i, _ in score.top] == np.argsort(-want[place], kind="stable")[:2].tolist()


def test_nothing_is_compiled_after_the_start(engine: Engine) -> None:
    """Whatever a request asks for."""
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    finish(
        engine,
        [
            Request(prompt=(1, 2, 3), max_new_tokens=4, sampling=SamplingConfig(temperature=0.7, top_p=0.5, min_p=0.1)),
            Request(prompt=SHARED, max_new_tokens=2, prompt_logprobs=3, logit_bias={5: 4.0}, banned=((1, 2), (9,))),
            Request(prompt=(4,), max_new_tokens=30, sampling=SamplingConfig(no_repeat_ngram=2, dry_multiplier=1.0)),
            Request(prompt=(65,), max_new_tokens=5, grammar=Regex("[0-9]{3}"), ends=(257,), guidance_scale=1.3),
        ],
    )
    assert not compiled


def test_a_grammar_is_held(engine: Engine) -> None:
    schema = JsonSchema(json.dumps({"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}},
                                    "required": ["a"], "additionalProperties": False}))  # fmt: skip
    hot = SamplingConfig(temperature=2.0)
    asked = [
        Request(prompt=(10 + n,), max_new_tokens=60, sampling=hot, seed=n, ends=(257,), grammar=schema)
        for n in range(5)
    ]
    asked += [Request(prompt=SHARED, max_new_tokens=20, sampling=hot, ends=(257,))]
    for deltas in finish(engine, asked)[:5]:
        tokens, _, text, ended = outcome(deltas)
        assert ended is Finish.STOP and tokens[-1] == 257
        assert set(json.loads(text)) == {"a"}


def test_a_grammar_that_grows_too_large_ends_its_own_text(engine: Engine) -> None:
    level = {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}
    endless = JsonSchema(json.dumps({"$defs": {"n": level}, "$ref": "#/$defs/n"}))
    asked = Request(prompt=(65,), max_new_tokens=40, ends=(257,), grammar=endless)
    other = Request(prompt=SHARED, max_new_tokens=20)
    alone = fresh(engine, other)
    first, second = finish(engine, [asked, other])
    assert (first[-1].finish, outcome(second)) == (Finish.NOTHING_FITS, alone)
    assert first[-1].error.startswith("the grammar: ") and "\n" not in first[-1].error


def test_stop_strings_end_a_text_and_are_never_shown(engine: Engine) -> None:
    letters = dict.fromkeys(range(97, 105), 100.0)  # a character for each token
    ask = Request(prompt=SHARED[:5], max_new_tokens=40, logit_bias=letters, ends=(257,), logprobs=0)
    whole = fresh(engine, ask)[2]
    assert len(whole) == 40
    stop = whole[6:9]
    [deltas] = finish(engine, [dataclasses.replace(ask, stop=("never there", stop))])
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert (deltas[-1].finish, deltas[-1].stop_reason) == (Finish.STOP, stop)
    # The text ends where the first stop string is whole, and nothing is counted that was drawn after it, however many
    # tokens came at a time: three while a text is alone, one while another's prompt is read.
    for first in range(20, 23):
        asked = dataclasses.replace(ask, stop=(whole[first : first + 6], whole[first + 2 : first + 5]))
        alone = fresh(engine, asked)
        end, start = min((whole.index(stop) + len(stop), whole.index(stop)) for stop in asked.stop)
        assert (len(alone[0]), len(alone[1]), alone[2]) == (end, end, whole[:start])
        assert outcome(finish(engine, [asked, Request(prompt=SHARED * 3, max_new_tokens=1)])[0]) == alone


def test_an_empty_stop_string_is_refused(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="stop: holds an empty string"):
        engine.submit(Request(prompt=(1,), max_new_tokens=2, stop=("a", "")))


def test_other_weights_give_other_texts_and_no_old_beginnings(engine: Engine) -> None:
    parameters = loaded(wide_model()).parameters
    ask = Request(prompt=SHARED[:24], max_new_tokens=6, sampling=SamplingConfig(temperature=0), logprobs=1)
    first = fresh(engine, ask)
    engine.update_weights(jax.tree.map(lambda x: x * 1.1, parameters))
    [deltas] = finish(engine, [ask])
    assert deltas[0].cached_tokens == 0 and outcome(deltas) != first
    engine.update_weights(parameters)
    assert outcome(finish(engine, [ask])[0]) == first


@pytest.mark.parametrize(
    ("sharding", "devices"),
    [
        (ShardingConfig(data=2, tensor=2), 4),
        pytest.param(ShardingConfig(data=1, fsdp=2), 2, marks=pytest.mark.nightly),
    ],
)
def test_a_mesh_decodes_the_same_texts(engine: Engine, sharding: ShardingConfig, devices: int) -> None:
    on_mesh = Engine(loaded(wide_model(), sharding, devices), dataclasses.replace(SMALL, slots=2, tokens_per_step=4))
    asked = [
        Request(prompt=SHARED[n : n + 9], max_new_tokens=8, sampling=SamplingConfig(temperature=0)) for n in range(6)
    ]
    want = [fresh(engine, request)[0] for request in asked]
    assert [outcome(deltas)[0] for deltas in finish(on_mesh, asked)] == want


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    good = Request(prompt=(1, 2), max_new_tokens=3)
    for change, words in (
        ({"prompt": ()}, "prompt has no tokens"),
        ({"prompt": (512,)}, r"id 512; must lie in \[0, 512\)"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 127}, "more than model.max_seq_len = 128"),
        ({"seed": -1}, "seed = -1"),
        ({"logprobs": 21}, r"logprobs = 21; must lie in \[0, 20\]"),
        ({"logit_bias": {999: 1.0}}, "logit_bias: 999"),
        ({"guidance_scale": -0.5}, r"guidance_scale = -0.5 must be in \[0, 100\]"),
        ({"guidance_scale": 2.0, "negative_prompt": (512,)}, r"negative_prompt holds id 512; must lie in \[0, 512\)"),
        ({"guidance_scale": 2.0, "negative_prompt": (1,) * 126}, "negative_prompt's 126 tokens and max_new_tokens = 3"),
        (
            {"guidance_scale": 2.0, "prompt": (1,) * 90, "negative_prompt": (1,) * 90},
            "the prompts' 180 tokens .* whole cache",
        ),
        ({"grammar": Regex("("), "ends": (257,)}, "regex"),
        ({"grammar": Regex("a")}, "ends is empty"),
    ):
        with pytest.raises(BadRequest, match=words):
            engine.submit(dataclasses.replace(good, **change))
    assert engine.idle


def test_the_loop_serves_threads_and_drains(engine: Engine) -> None:
    loop = EngineLoop(engine)
    found: dict[int, list[Delta]] = {n: [] for n in range(6)}
    greedy = SamplingConfig(temperature=0)
    asked = [Request(prompt=SHARED[n : n + 3], max_new_tokens=12, sampling=greedy) for n in range(6)]
    loop.pause()
    tickets = [loop.submit(request, found[n].append) for n, request in enumerate(asked)]
    loop.cancel(tickets[5])
    late: list[Delta] = []
    loop.submit(dataclasses.replace(asked[0], deadline_s=0.0), late.append)
    loop.resume()
    assert loop.drain(60)
    with pytest.raises(Draining):
        loop.submit(asked[0], found[0].append)
    loop.close()
    assert [found[n][-1].finish for n in range(6)] == [Finish.LENGTH] * 5 + [Finish.CANCELLED]
    assert late[-1].finish is Finish.DEADLINE
    assert [outcome(found[n])[0] for n in range(5)] == [fresh(engine, request)[0] for request in asked[:5]]


def test_a_full_queue_refuses(engine: Engine) -> None:
    ask = Request(prompt=(1,), max_new_tokens=1)
    tickets = [engine.submit(ask) for _ in range(SMALL.queue)]
    with pytest.raises(QueueFull, match="64 requests wait already"):
        engine.submit(ask)
    for ticket in tickets:
        engine.cancel(ticket)
    assert engine.idle
