"""The server over the real engine: a tiny model of random weights."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import chats
import fake_engine
import httpx
import numpy as np
import openai
import pytest
from helpers import FLOAT32, initial_parameters, one_device, small_model, small_run
from pydantic import BaseModel, ConfigDict
from run_folder import BYTE_MODEL, make_run

from maxlm.config import EngineConfig, UserError, WeightFormat
from maxlm.data.text_ends import TextEnds
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Delta, Request
from maxlm.serve import main
from maxlm.serving.app import Service
from maxlm.serving.loading import serve_model
from maxlm.serving.served import Served

pytestmark = pytest.mark.usefixtures("programs_kept")

NAME = "tiny"
ASKED: list[Any] = [{"role": "user", "content": "Tell me all."}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    fake = fake_engine.make_served(tmp_path_factory.mktemp("tokenizer"), chats.CHATML)
    model = small_model(vocab_size=fake.vocab_size + 4, max_seq_len=256, n_layers=1)
    return LoadedRun(
        config=dataclasses.replace(small_run(model), execution=FLOAT32),
        layout=one_device(),
        parameters=initial_parameters(model),
        tokenizer=fake.tokenizer,
        step=0,
        ends=TextEnds((), (fake.tokenizer.eos_id,)),
        chat=fake.chat,
    )


@pytest.fixture(scope="module")
def served(run: LoadedRun) -> Iterator[Served]:
    config = EngineConfig(slots=2, tokens_per_step=2, block_size=8, decode_steps=1)  # one program
    [found] = serve_model(run, NAME, config, WeightFormat.DTYPE, embeddings=True).values()
    yield found
    loop: Any = found.loop
    loop.close()


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    with fake_engine.running_server(Service(models={NAME: served})) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_what_clients_get_is_what_the_engine_says(client: openai.OpenAI, served: Served) -> None:
    """Alone, in a stream, and among others; ids, log-probabilities and text."""
    prompt = served.tokenizer.encode("Once upon a time")
    deltas: list[Delta] = []
    done = concurrent.futures.Future[None]()

    def receive(delta: Delta) -> None:
        deltas.append(delta)
        if delta.finish is not None:
            done.set_result(None)

    served.loop.submit(
        Request(prompt=tuple(prompt), max_new_tokens=24, seed=5, logprobs=2, ends=served.ends.last), receive
    )
    done.result(timeout=60)
    scores = [score for delta in deltas for score in delta.scores]
    text = "".join(delta.text for delta in deltas)
    options: Any = {"model": NAME, "prompt": prompt, "max_tokens": 24, "seed": 5, "logprobs": 2}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        others = [pool.submit(client.completions.create, model=NAME, prompt=f"{i}" * 9, seed=i) for i in range(12)]
        answers = [pool.submit(client.completions.create, **options) for _ in range(3)]
        found = [answer.result().choices[0] for answer in answers]
        assert all(other.result().usage for other in others)
    for choice in found:
        assert choice.text == text and choice.logprobs is not None
        assert choice.logprobs.token_logprobs == [score.logprob for score in scores]
    streamed = [piece.choices[0] for piece in client.completions.create(**options, stream=True)]
    assert "".join(choice.text for choice in streamed) == text


def test_a_prompt_that_came_before_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "This beginning is shared by all of the requests."
    cached = []
    for _ in range(2):
        usage = client.completions.create(model=NAME, prompt=prompt, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0 and cached[1] is not None and cached[1] >= 8


def test_a_prompt_is_scored(client: openai.OpenAI, run: LoadedRun) -> None:
    """Against the whole model, without a cache."""
    ids = run.tokenizer.encode("How likely is this?")
    found = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    logits = np.asarray(run.model.logits(ids), np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        np.asarray(found.token_logprobs[1:], np.float64), wanted[np.arange(len(ids) - 1), ids[1:]], atol=1e-4
    )


def test_a_conversation(client: openai.OpenAI, served: Served) -> None:
    options: Any = {"model": NAME, "messages": ASKED, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    pieces = client.chat.completions.create(**options, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert served.chat is not None and whole.usage is not None
    assert whole.usage.prompt_tokens == len(served.chat.encode(served.tokenizer, ASKED).ids)


def test_embeddings(client: openai.OpenAI, run: LoadedRun) -> None:
    texts = ["short", "long enough", "short"]
    for pooling in ("mean", "last"):
        more: Any = {"pooling": pooling}
        data = client.embeddings.create(model=NAME, input=texts, extra_body=more).data
        for text, one in zip(texts, data, strict=True):
            states = np.asarray(run.model.hidden(run.tokenizer.encode(text)), np.float64)
            vector = states.mean(0) if pooling == "mean" else states[-1]
            np.testing.assert_allclose(one.embedding, vector / np.linalg.norm(vector), atol=1e-5)


def test_what_the_engine_refuses_is_an_answer(client: openai.OpenAI, url: str) -> None:
    many = {str(i): 1.0 for i in range(250)} | {"999999": 1.0}
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(model=NAME, prompt="x", logit_bias=many)
    assert httpx.get(f"{url}/health").status_code == 200
    text = httpx.get(f"{url}/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A process of its own: it says where it is, answers, and ends when it is told to."""
    make_run(tmp_path, model=dataclasses.replace(BYTE_MODEL, max_seq_len=2048))
    words = [sys.executable, "-m", "maxlm.serve", "--run", str(tmp_path / "run"), "--port", "0", "--name", "mine"]
    more = ["--engine.slots", "2", "--engine.tokens_per_step", "2", "--engine.decode_steps", "1"]
    environment = {**os.environ, "MAXLM_API_KEY": "k"}
    with (
        subprocess.Popen([*words, *more], stdout=subprocess.PIPE, text=True, env=environment) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)  # where the test fails, it would be waited for
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"mine at (http://127.0.0.1:\d+), with an API key; Ctrl-C ends it\n", line)
        assert found is not None, line
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="k", max_retries=0)
        stream = client.completions.create(
            model="mine", prompt="ab", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices and rest[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(timeout=60) == 0


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name one model"):
        main([])
    with pytest.raises(UserError, match="not a run folder"):
        main(["--run", str(tmp_path), "--port", "0"])
    with pytest.raises(UserError, match="--port"):
        main(["--run", str(tmp_path), "--port", "70000"])
    with pytest.raises(UserError, match="--api_key"):
        main(["--run", str(tmp_path), "--api_key", ""])


def test_clients_that_leave_give_everything_back(url: str, served: Served) -> None:
    rng = random.Random(0)

    def one(stream: bool, wait: float) -> None:
        body = {"model": NAME, "prompt": "x" * rng.randrange(1, 90), "max_tokens": 100, "stream": stream, "n": 2}
        with (
            contextlib.suppress(httpx.TimeoutException),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=wait) as answer,
        ):
            next(answer.iter_raw(), None)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(one, [i % 2 == 0 for i in range(40)], [rng.random() * 0.3 + 0.01 for _ in range(40)]))
    end = time.monotonic() + 60
    while (served.loop.stats.running or served.loop.stats.waiting) and time.monotonic() < end:
        time.sleep(0.05)
    stats = served.loop.stats
    assert stats.running == stats.waiting == 0 and stats.free_blocks == stats.blocks
    body = {"model": NAME, "prompt": "still there", "max_tokens": 3, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]["completion_tokens"] == 3


def test_answers_that_keep_to_a_schema(client: openai.OpenAI) -> None:
    """Of a model that would say anything."""

    class Person(BaseModel):
        model_config = ConfigDict(extra="forbid")  # such a model would go on with more fields for ever
        name: Literal["Ada", "Bo"]
        age: Literal[1, 22]

    parsed = client.chat.completions.parse(model=NAME, messages=ASKED, response_format=Person, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    tool: Any = {"type": "function", "function": {"name": "call", "parameters": Person.model_json_schema()}}
    for stream in (False, True):
        options: Any = {"model": NAME, "messages": ASKED, "tools": [tool], "tool_choice": "required", "seed": 2}
        if stream:
            pieces = list(client.chat.completions.create(**options, stream=True))
            (call,) = [one for piece in pieces for one in piece.choices[0].delta.tool_calls or []]
            assert pieces[-1].choices[0].finish_reason == "tool_calls" and call.function is not None
            Person.model_validate_json(call.function.arguments or "")
        else:
            (choice,) = client.chat.completions.create(**options).choices
            assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
            found: Any = choice.message.tool_calls[0]
            Person.model_validate_json(found.function.arguments)
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "number", "multipleOf": "x"}}}
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(model=NAME, messages=ASKED, response_format=bad)
    with pytest.raises(openai.BadRequestError, match="ends is empty"):
        json_object: Any = {"response_format": {"type": "json_object"}, "ignore_eos": True}
        client.completions.create(model=NAME, prompt="x", extra_body=json_object)
