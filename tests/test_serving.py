"""The server as its clients see it: OpenAI's own, LangChain's, and plain HTTP. The engine is a fake."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chats
import fake_engine
import httpx
import numpy as np
import openai
import pytest
from fake_engine import NAME, FakeLoop
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from maxlm.data.chat import ChatTemplate
from maxlm.data.tool_calls import ToolReader
from maxlm.inference.request import Delta, Finish, TokenScore
from maxlm.inference.structured import JsonSchema
from maxlm.serving.app import Service
from maxlm.serving.chat_format import conversation_ids
from maxlm.serving.jobs import _joined, completion_job
from maxlm.serving.schema import CalledFunction, CompletionRequest, Message, ToolCall
from maxlm.serving.served import Served

SAYS = "Hello, w\u00f6rld! \U0001f600 <tag> & more"
ASKED: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = fake_engine.make_served(tmp_path_factory.mktemp("served"))
    yield found
    found.loop.stop()


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    with fake_engine.running_server(Service(models={NAME: served})) as (address, _):
        yield address


@pytest.fixture
def loop(served: Served) -> Iterator[FakeLoop]:
    """The engine, as it was after the test."""
    found: Any = served.loop
    says = found.says
    found.seen.clear()
    yield found
    found.says, found.fails = says, None


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_an_adapter_is_a_model_of_its_own(served: Served) -> None:
    service = Service(models={NAME: served, "poet": dataclasses.replace(served, name="poet", adapter="poet")})
    asked = CompletionRequest(model="poet", prompt=["a"])
    for name, adapter in ((NAME, None), ("poet", "poet"), (None, None)):
        [request] = completion_job(service.find(name), asked).requests
        assert request.adapter == adapter
    text = service.metrics.text().decode()
    assert f'maxlm:steps_total{{model_name="{NAME}"}}' in text and "poet" not in text, "one engine is counted once"


def test_models(client: openai.OpenAI, url: str) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match=r"model = .other. is not here; use .little"):
        client.models.retrieve("other")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_name_chooses_what_answers(served: Served, tmp_path: Path) -> None:
    other = dataclasses.replace(fake_engine.make_served(tmp_path), name="other")
    loop: Any = other.loop
    loop.says = lambda request: "of the other"
    with fake_engine.running_server(Service(models={NAME: served, "other": other})) as (url, _):
        post = lambda path, **body: httpx.post(f"{url}/{path}", json=body)
        said = [
            post("v1/chat/completions", model=name, messages=ASKED).json()["choices"][0]["message"]["content"]
            for name in (NAME, "other")
        ]
        refused = [
            post("v1/completions", model="third", prompt="x"),
            post("v1/chat/completions", model="third", messages=ASKED),
            post("v1/embeddings", model="third", input="x"),
            post("tokenize", model="third", prompt="x"),
            httpx.get(f"{url}/v1/models/third"),
        ]
    loop.stop()
    assert said == [SAYS, "of the other"]
    for answer in refused:
        error = answer.json()["error"]
        assert answer.status_code == 404 and (error["code"], error["param"]) == ("model_not_found", "model")
        assert error["message"] == 'model = "third" is not here; use "little" or "other"'


def test_a_completion(client: openai.OpenAI, served: Served, loop: FakeLoop) -> None:
    found = client.completions.create(model=NAME, prompt="Say", max_tokens=100, temperature=0.5, seed=7)
    assert found.choices[0].text == SAYS and found.choices[0].finish_reason == "stop"
    n = len(served.tokenizer.encode(SAYS)) + 1
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, n, n + 3)
    assert found.usage.prompt_tokens_details.cached_tokens == fake_engine.CACHED
    (request,) = loop.seen
    assert request.prompt == tuple(served.tokenizer.encode("Say")) and request.seed == 7
    assert request.sampling.temperature == 0.5 and request.max_new_tokens == 100 and request.ends == served.ends.last
    loop.seen.clear()
    client.completions.create(model=NAME, prompt="Say")
    assert loop.seen[0].max_new_tokens == 16


def test_every_setting_reaches_the_engine(client: openai.OpenAI, loop: FakeLoop) -> None:
    client.completions.create(
        model=NAME,
        prompt=[5, 6],
        temperature=0,
        top_p=0.5,
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={"7": -100, "8": 2},
        stop=["xx", "yy"],
        seed=-1,
        user="me",
        extra_body={"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 3, "ignore_eos": False},
    )
    (one,) = loop.seen
    sampling = one.sampling
    assert one.prompt == (5, 6) and one.stop == ("xx", "yy") and one.logit_bias == {7: -100.0, 8: 2.0}
    assert one.seed == 2**32 - 1 and (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_new_tokens) == (0.1, 1.1, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 1.5)
    loop.seen.clear()
    client.completions.create(model=NAME, prompt="x", max_tokens=40, extra_body={"ignore_eos": True, "min_tokens": 3})
    assert loop.seen[0].ends == () and loop.seen[0].sampling.min_new_tokens == 0
    assert (loop.seen[0].guidance_scale, loop.seen[0].negative_prompt) == (1.0, ())


def test_guidance(client: openai.OpenAI, served: Served, loop: FakeLoop) -> None:
    body = {"guidance_scale": 1.5, "negative_prompt": "not this"}
    client.completions.create(model=NAME, prompt=["x", "y"], max_tokens=4, extra_body=body)
    assert {one.guidance_scale for one in loop.seen} == {1.5}
    assert {one.negative_prompt for one in loop.seen} == {tuple(served.tokenizer.encode("not this"))}
    loop.seen.clear()
    # In a conversation the negative prompt takes the place of what the system says.
    ask: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    client.chat.completions.create(model=NAME, messages=ask, extra_body={**body, "negative_prompt": "be rude"})
    ask[0]["content"] = "be rude"
    client.chat.completions.create(model=NAME, messages=ask, extra_body={"guidance_scale": 0})
    guided, other = loop.seen
    assert guided.negative_prompt == other.prompt != guided.prompt and other.negative_prompt == ()
    assert other.guidance_scale == 0


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "prompt": ["a", "bc"], "max_tokens": 100, "n": 2, "logprobs": 1, "echo": True}
    whole = client.completions.create(**options)
    texts, reasons, tokens = [""] * 4, [""] * 4, [list[str]() for _ in range(4)]
    for piece in client.completions.create(**options, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
    assert texts == [choice.text for choice in whole.choices] == [f"{p}{SAYS}" for p in ("a", "a", "bc", "bc")]
    assert reasons == ["stop"] * 4
    assert tokens == [choice.logprobs and choice.logprobs.tokens for choice in whole.choices]
    assert whole.usage is not None and whole.usage.prompt_tokens == 3


def test_tokens_that_come_fast_are_sent_together(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, and nothing is lost."""
    monkeypatch.setattr("maxlm.serving.jobs._APART_S", 0.5)
    stream = client.completions.create(model=NAME, prompt="Hi", max_tokens=60, stream=True, logprobs=0)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in choices) == SAYS and len(choices) <= 4 and choices[0].text != SAYS
    assert choices[-1].finish_reason == "stop"
    assert sum(len(choice.logprobs.tokens or ()) for choice in choices if choice.logprobs) > 20


def test_deltas_are_joined_text_by_text() -> None:
    """What failed stays behind what came before it, which a client still gets."""
    score = TokenScore(token=1, logprob=-1.0, top=())
    arrived = [
        (0, Delta(tokens=(1,), text="a", scores=(score,), cached_tokens=3, seconds=0.5)),
        (1, Delta(tokens=(7,), text="x")),
        (0, Delta(tokens=(2, 3), text="b", scores=(score, score), seconds=0.25)),
        (1, Delta(finish=Finish.ERROR, error="broken")),
        (0, Delta(tokens=(4,), text="c", finish=Finish.STOP, stop_reason="c")),
    ]
    whole = Delta(tokens=(1, 2, 3, 4), text="abc", scores=(score,) * 3, finish=Finish.STOP, stop_reason="c",
                  cached_tokens=3, seconds=0.75)  # fmt: skip
    assert _joined(arrived) == [(0, whole), (1, Delta(tokens=(7,), text="x")), (1, arrived[3][1])]


def test_logprobs_of_a_completion(client: openai.OpenAI, served: Served) -> None:
    found = client.completions.create(model=NAME, prompt="ab", max_tokens=100, logprobs=2, echo=True)
    text, logprobs = found.choices[0].text, found.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    ids = served.tokenizer.encode("ab" + SAYS)
    assert logprobs.token_logprobs == [None, *(pytest.approx(-0.5 - i / 1000) for i in ids[1:])]
    assert logprobs.tokens[:3] == ["a", "b", "H"] and "bytes:\\xc3" in logprobs.tokens
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[:2] == [None, {"]": -61.0, "^": -62.0}]
    starts = dict(zip(logprobs.text_offset, logprobs.tokens, strict=True))  # of a character in parts, the last
    assert all(text[at] == token for at, token in starts.items() if not token.startswith("bytes:"))
    assert "".join(text[at] for at in starts) == text and starts[text.index("\u00f6")] == "bytes:\\xb6"
    for options in ({"n": 2}, {"n": 2, "best_of": 3}):  # each text has places of its own
        several: Any = client.completions.create(
            model=NAME, prompt="ab", max_tokens=100, logprobs=2, echo=True, extra_body=options
        )
        assert [choice.logprobs.text_offset for choice in several.choices] == [logprobs.text_offset] * 2
    plain = client.completions.create(model=NAME, prompt="ab", logprobs=0).choices[0].logprobs
    assert plain is not None and plain.top_logprobs is None and plain.tokens is not None and len(plain.tokens) == 16


def test_only_the_prompt_can_be_scored(client: openai.OpenAI) -> None:
    found = client.completions.create(model=NAME, prompt=[60, 61, 62], max_tokens=0, logprobs=1, echo=True)
    (choice,) = found.choices
    assert choice.logprobs is not None and choice.logprobs.token_logprobs == pytest.approx([None, -0.561, -0.562])
    assert choice.finish_reason == "length" and len(choice.text) == 3
    assert found.usage is not None and found.usage.completion_tokens == 0
    # One token has no probability; it is still there.
    options: Any = {"model": NAME, "prompt": [60], "max_tokens": 1, "logprobs": 1, "echo": True}
    whole: Any = client.completions.create(**options).choices[0]
    streamed: Any = [piece.choices[0] for piece in client.completions.create(**options, stream=True)]
    for logprobs in (whole.logprobs, streamed[0].logprobs):
        assert (logprobs.tokens, logprobs.token_logprobs[0]) == (["]", "H"], None)
        assert logprobs.text_offset == [0, 1]


def test_the_best_of_several(client: openai.OpenAI, loop: FakeLoop) -> None:
    loop.says = lambda request: "!" if request.seed == 12 else "~"  # ! is the likelier
    found = client.completions.create(model=NAME, prompt=["p", "q"], best_of=4, n=1, seed=10)
    assert [(choice.index, choice.text) for choice in found.choices] == [(0, "!"), (1, "!")]
    assert sorted(request.seed for request in loop.seen) == [10, 10, 11, 11, 12, 12, 13, 13]
    assert found.usage is not None and found.usage.completion_tokens == 16 and found.usage.prompt_tokens == 2


def test_a_stop_string(client: openai.OpenAI) -> None:
    found = client.completions.create(model=NAME, prompt="x", max_tokens=90, stop="rld")
    assert found.choices[0].text == "Hello, w\u00f6" and found.choices[0].finish_reason == "stop"


def test_a_conversation(client: openai.OpenAI, served: Served, loop: FakeLoop) -> None:
    parts: list[Any] = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "refusal": None, "annotations": []},
        {"role": "user", "content": parts},
    ]
    found = client.chat.completions.create(model=NAME, messages=asked, n=2)
    assert [choice.message.content for choice in found.choices] == [SAYS, SAYS]
    assert served.chat is not None
    plain = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "one\ntwo")]
    messages = [{"role": role, "content": content} for role, content in plain]
    ids = served.chat.encode(served.tokenizer, messages).ids
    assert loop.seen[0].prompt == tuple(ids) and loop.seen[0].max_new_tokens == 2000 - len(ids)
    loop.seen.clear()
    more = {"chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(model=NAME, messages=ASKED, max_completion_tokens=3, extra_body=more)
    assert served.tokenizer.decode(loop.seen[0].prompt).endswith("</think>\n\n") and loop.seen[0].max_new_tokens == 3


def test_logprobs_of_a_conversation(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "messages": ASKED, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None and whole.content is not None
    assert b"".join(bytes(one.bytes or []) for one in whole.content).decode() == SAYS
    assert [top.logprob for top in whole.content[0].top_logprobs] == [-61, -62]
    pieces = [
        one
        for piece in client.chat.completions.create(**options, stream=True)
        if piece.choices and piece.choices[0].logprobs is not None
        for one in piece.choices[0].logprobs.content or []
    ]
    assert pieces == whole.content


def test_a_stream_of_a_conversation(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == SAYS
    assert pieces[-1].choices[0].finish_reason == "stop" and all(piece.usage is None for piece in pieces)
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 33


def test_arguments_are_what_the_template_wants(served: Served) -> None:
    """An object, or, where it fails with that, the string."""
    call = ToolCall(id="c", function=CalledFunction(name="f", arguments='{"a": 1}'))
    messages = [Message(role="user", content="x"), Message(role="assistant", tool_calls=[call])]
    show = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ F }}{% endfor %}{% endfor %}"
    for how, text in (("c.function.arguments | tojson", '{"a": 1}'), ("'<' + c.function.arguments", '<{"a": 1}')):
        template = ChatTemplate(sources={"default": show.replace("F", how)}, tokens={}, place="x")
        assert conversation_ids(template, served.tokenizer, messages, None).text == text


CALLS = {
    "hermes": 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>',
    "llama": '{"name": "get_weather", "parameters": {"city": "Bonn"}}',
    "mistral": ' [{"name": "get_weather", "arguments": {"city": "Bonn"}},'
    ' {"name": "get_weather", "arguments": "{\\"city\\": \\"K\u00f6ln\\"}"}]',
    "plain": ' Let me see.\nCall: {"name": "get_weather", "arguments": {"city": "Bonn"}}\n'
    'Call: {"name": "get_weather", "arguments": {"city": "K\u00f6ln"}}',
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_of_tools(form: str, client: openai.OpenAI, loop: FakeLoop) -> None:
    loop.says = lambda request: CALLS[form]
    cities = ["Bonn"] if form == "llama" else ["Bonn", "K\u00f6ln"]
    options: Any = {"model": NAME, "messages": ASKED, "tools": [chats.TOOL]}
    (choice,) = client.chat.completions.create(**options).choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    said = (choice.message.content or "").strip()
    assert said == ("Let me see." if form in ("hermes", "plain") else "")
    calls: list[Any] = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": city} for city in cities]
    assert {call.function.name for call in calls} == {"get_weather"} and len({call.id for call in calls}) == len(calls)
    deltas = [piece.choices[0] for piece in client.chat.completions.create(**options, stream=True)]
    streamed = [call for delta in deltas for call in delta.delta.tool_calls or []]
    assert [(call.index, call.function and call.function.arguments) for call in streamed] == [
        (i, call.function.arguments) for i, call in enumerate(calls)
    ]
    assert deltas[-1].finish_reason == "tool_calls"
    assert "".join(delta.delta.content or "" for delta in deltas).strip() == said
    answered: list[Any] = [
        *ASKED,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "Sun"},
    ]
    loop.seen.clear()
    client.chat.completions.create(model=NAME, messages=answered, tools=options["tools"])
    assert len(loop.seen) == 1


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_text_that_is_no_call_stays_text(size: int) -> None:
    for text in (
        "plain <tool",
        'a\nCall: {"name": "f", "arguments": {}} or not',
        'a\nCall: {"name": "f", "arguments": {}}\nCall: me',
        "a <tool_call> {not json} </tool_call> b",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '{"name": "f", "arguments": 3}',
        '{"name": "f"}',
        "[1, 2",
        "  \n",
        "{" * 3000,
        '{"name": "f", "arguments": {}} and more',
        '{"name": ["f"], "arguments": {}}',
        '{"name": {}, "arguments": {}}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "f", "arguments": "{\\"x\\": \\"\\\\ud800\\"}"}',
    ):
        reader = ToolReader(["f"])
        shown = "".join(reader.add(text[at : at + size])[0] for at in range(0, len(text), size))
        rest, calls = reader.finish()
        assert shown + rest == text and not calls


def test_a_tool_that_must_be_called(client: openai.OpenAI, loop: FakeLoop) -> None:
    loop.says = lambda request: '{"name": "get_weather", "arguments": {"city": "Ulm"}}'
    other: Any = {"type": "function", "function": {"name": "other"}}
    options: Any = {"model": NAME, "messages": ASKED, "tools": [chats.TOOL, other]}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        found = client.chat.completions.create(**options, tool_choice=choice)
        assert found.choices[0].finish_reason == "tool_calls"
    grammars: list[Any] = [request.grammar for request in loop.seen]
    any_of, one = (json.loads(grammar.schema) for grammar in grammars)
    assert any_of == {
        "anyOf": [one, {**one, "properties": {"name": {"const": "other"}, "arguments": {"type": "object"}}}]
    }
    assert one["properties"] == {
        "name": {"const": "get_weather"},
        "arguments": chats.TOOL["function"]["parameters"],
    }
    loop.seen.clear()
    found = client.chat.completions.create(**options, tool_choice="none")
    assert found.choices[0].message.tool_calls is None and loop.seen[0].grammar is None


def test_answers_that_keep_to_a_schema(client: openai.OpenAI, loop: FakeLoop) -> None:
    class Person(BaseModel):
        name: str
        age: int

    loop.says = lambda request: '{"name": "Ada", "age": 36}'
    found = client.chat.completions.parse(model=NAME, messages=ASKED, response_format=Person)
    assert found.choices[0].message.parsed == Person(name="Ada", age=36)
    client.chat.completions.create(model=NAME, messages=ASKED, response_format={"type": "json_object"})
    client.chat.completions.create(model=NAME, messages=ASKED, response_format={"type": "text"})
    grammars: list[Any] = [request.grammar for request in loop.seen]
    assert json.loads(grammars[0].schema)["properties"]["age"]["type"] == "integer"
    assert grammars[1:] == [JsonSchema('{"type": "object"}'), None]
    with pytest.raises(openai.BadRequestError, match="impossible; use another"):
        impossible: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"impossible": 1}}}
        client.chat.completions.create(model=NAME, messages=ASKED, response_format=impossible)


def test_langchain(url: str, loop: FakeLoop) -> None:
    @tool
    def get_weather(city: str) -> str:
        """The weather."""
        return city

    model = ChatOpenAI(model=NAME, base_url=f"{url}/v1", api_key=SecretStr("none"), max_retries=0)
    asked = [SystemMessage("Be brief."), HumanMessage("Hi")]
    assert model.invoke(asked).content == SAYS
    assert "".join(str(piece.content) for piece in model.stream(asked)) == SAYS
    loop.says = lambda request: CALLS["hermes"]
    called: Any = model.bind_tools([get_weather]).invoke(asked)
    assert [call["args"] for call in called.tool_calls] == [{"city": "Bonn"}, {"city": "K\u00f6ln"}]

    class Person(BaseModel):
        name: str

    loop.says = lambda request: '{"name": "Ada"}'
    assert model.with_structured_output(Person, method="json_schema").invoke(asked) == Person(name="Ada")


def test_embeddings(client: openai.OpenAI, url: str) -> None:
    found = client.embeddings.create(model=NAME, input=["abc", "d"])  # the client asks for base64
    assert [one.embedding for one in found.data] == [[3.0, 1.0], [1.0, 1.0]] and found.usage.prompt_tokens == 4
    last: Any = {"pooling": "last"}
    found = client.embeddings.create(model=NAME, input=[[1, 2]], encoding_format="float", extra_body=last)
    assert found.data[0].embedding == [2.0, 2.0]
    raw = httpx.post(f"{url}/v1/embeddings", json={"model": NAME, "input": "ab", "encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4").tolist() == [2.0, 1.0]


def test_tokens_and_back(url: str, served: Served) -> None:
    post = lambda path, **body: httpx.post(f"{url}/{path}", json=body).json()
    found = post("tokenize", prompt="a<|im_end|>")
    assert found == {"count": 8, "max_model_len": 2000, "tokens": served.tokenizer.encode("a<|im_end|>")}
    assert post("detokenize", tokens=found["tokens"]) == {"prompt": "a<|im_end|>"}
    assert served.chat is not None
    chat = served.chat.encode(served.tokenizer, ASKED, tools=[chats.TOOL])
    assert post("tokenize", messages=ASKED, tools=[chats.TOOL], model=NAME)["tokens"] == chat.ids


def test_metrics(client: openai.OpenAI, url: str) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count")
    before = [value(name) for name in names]
    client.completions.create(model=NAME, prompt="abcd", max_tokens=9)
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [4, 9, 1]
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_preemptions_total"):
        assert value(name) == 0
    assert [value(f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted")] == [8, 5]
    assert value("vllm:kv_cache_usage_perc") == 0.25 and value("maxlm:answers_total") > 0


def test_an_engine_that_fails_is_an_error(client: openai.OpenAI, loop: FakeLoop) -> None:
    statuses = {Finish.ERROR: 500, Finish.NOTHING_FITS: 400, Finish.DEADLINE: 504, Finish.CANCELLED: 503}
    for finish, status in statuses.items():
        loop.fails = finish
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=NAME, prompt="x")
        assert caught.value.status_code == status
        with pytest.raises(openai.APIError):
            list(client.completions.create(model=NAME, prompt="x", stream=True))
    loop.fails = None
    assert client.completions.create(model=NAME, prompt="x").choices[0].text
    loop.failure = "no device"
    answer = httpx.get(f"{client.base_url}".replace("/v1/", "/health"))
    loop.failure = None
    assert answer.status_code == 500 and "the engine of little failed: no device" in answer.text


def test_a_model_without_a_template(tmp_path: Path) -> None:
    served = fake_engine.make_served(tmp_path, template=None)
    with fake_engine.running_server(Service(models={NAME: served})) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template; ask /v1/completions"):
            client.chat.completions.create(model=NAME, messages=ASKED)
        assert client.completions.create(model=NAME, prompt="").choices[0].text
