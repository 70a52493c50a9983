"""What clients do wrong, one by one: each is told so, and the server goes on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chats
import fake_engine
import httpx
import pytest
from fake_engine import NAME

from maxlm.config import UserError
from maxlm.inference.request import QueueFull, Request
from maxlm.serving import connection, jobs
from maxlm.serving.app import Service
from maxlm.serving.listening import bind_address, is_loopback
from maxlm.serving.served import Served

MAX_BODY = 20_000
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = fake_engine.make_served(
        tmp_path_factory.mktemp("served"), chats.LLAMA_3.replace("eot_id", "im_end"), queue=8
    )
    yield found
    found.loop.stop()


@pytest.fixture(scope="module")
def service(served: Served) -> Service:
    return Service(models={NAME: served}, max_body=MAX_BODY)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with fake_engine.running_server(service) as (address, _):
        yield address


TEXT, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
FUNCTION = {"type": "function", "function": {"name": "f"}}
deep: Any = {}
for _ in range(70):
    deep = {"not": deep}

WRONG: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (TEXT, {"model": "other"}, 404, "model", 'model = "other" is not here; use "little"'),
    (TEXT, {"model": "../../etc/passwd"}, 404, "model", "is not here"),
    (TEXT, {"model": None}, 400, "model", "model = null: must be"),
    (TEXT, {"prompt": None}, 400, "prompt", "prompt = null: must be a string, a list of token ids"),
    (TEXT, {"prompt": []}, 400, "prompt", "none of them an empty list"),
    (TEXT, {"prompt": [[]]}, 400, "prompt", "none of them an empty list"),
    (TEXT, {"prompt": [1, "a"]}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": [True]}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": [1, 999]}, 400, "prompt", "prompt.0.1 = 999 must be a token id in [0, 268)"),
    (TEXT, {"prompt": [-1]}, 400, "prompt", "prompt.0.0 = -1 must be"),
    (TEXT, {"prompt": ["x"] * 3000}, 400, "prompt", "holds 3,000 texts, must hold at most 2,048"),
    (TEXT, {"prompt": "x" * 3000}, 400, "prompt", "the prompt has 3000 tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 2000}, 400, "prompt", "use max_tokens <= 1999 or a shorter prompt"),
    (TEXT, {"prompt": ["x", "y" * 1999], "max_tokens": 2}, 400, "prompt", "prompt.1 has 1999 tokens"),
    (TEXT, {"prompt": [13]}, 400, None, "begins with 13; must not"),
    (TEXT, {"max_tokens": 0}, 400, None, "max_tokens = 0 must be at least 1 where echo is not true"),
    (TEXT, {"max_tokens": -1}, 400, "max_tokens", "max_tokens = -1: must be greater than or equal to 0"),
    (TEXT, {"max_tokens": 1.5}, 400, "max_tokens", "max_tokens = 1.5: must be"),
    (TEXT, {"max_tokens": "5"}, 400, "max_tokens", 'max_tokens = "5": must be integer'),
    (TEXT, {"max_tokens": True}, 400, "max_tokens", "max_tokens = true: must be integer"),
    (TEXT, {"temperature": 2.1}, 400, "temperature", "temperature = 2.1: must be less than or equal to 2"),
    (TEXT, {"temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
    (TEXT, {"top_p": 0}, 400, "top_p", "top_p = 0: must be greater than 0"),
    (TEXT, {"top_k": -2}, 400, "top_k", "top_k = -2"),
    (TEXT, {"min_p": 1.1}, 400, "min_p", "min_p = 1.1"),
    (TEXT, {"presence_penalty": 3}, 400, "presence_penalty", "presence_penalty = 3"),
    (TEXT, {"frequency_penalty": -3}, 400, "frequency_penalty", "frequency_penalty = -3"),
    (TEXT, {"repetition_penalty": 0}, 400, "repetition_penalty", "repetition_penalty = 0"),
    (TEXT, {"guidance_scale": -1}, 400, "guidance_scale", "guidance_scale = -1: must be greater than or equal to 0"),
    (TEXT, {"negative_prompt": "x"}, 400, None, "negative_prompt must be left out where guidance_scale is not there"),
    (TEXT, {"n": 0}, 400, "n", "n = 0: must be greater than or equal to 1"),
    (TEXT, {"n": 129}, 400, "n", "n = 129: must be less than or equal to 128"),
    (TEXT, {"n": 3, "best_of": 2}, 400, None, "best_of = 2 must be at least n = 3"),
    (TEXT, {"best_of": 2, "stream": True}, 400, None, "best_of = 2 must be n = 1"),
    (TEXT, {"logprobs": 21}, 400, "logprobs", "logprobs = 21: must be less than or equal to 20"),
    (TEXT, {"seed": 2**65}, 400, "seed", "seed = "),
    (TEXT, {"stop": [""]}, 400, "stop", "none of them empty"),
    (TEXT, {"stop": ["x"] * 17}, 400, "stop", "at most 16 strings of at most 256"),
    (TEXT, {"stop": 3}, 400, "stop", "stop = 3: must be a string or a list of strings"),
    (TEXT, {"logit_bias": {"x": 1}}, 400, "logit_bias", "has the key 'x', which is no token id"),
    (TEXT, {"logit_bias": {"1": 101}}, 400, "logit_bias", "gives 101 to 1, must be a number in [-100, 100]"),
    (TEXT, {"logit_bias": [1]}, 400, "logit_bias", "must be an object"),
    (TEXT, {"stream_options": {}}, 400, None, "stream_options must be left out where stream is not true"),
    (TEXT, {"temprature": 1}, 400, "temprature", "temprature is not known here; did you mean temperature?"),
    (TEXT, {"suffix": "x"}, 400, "suffix", "suffix"),
    (TEXT, {"response_format": {"type": "xml"}}, 400, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    (TEXT, {"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema must be there"),
    (TEXT, {"n": 128}, 429, None, "8 requests wait already"),
    (TEXT, {"n": 128, "prompt": ["x"] * 17}, 400, None, "17 prompts with 128 texts each must be at most 2,048 texts"),
    (TEXT, {"min_tokens": 2**31}, 400, "min_tokens", "min_tokens = 2147483648: must be less than"),
    (CHAT, {"messages": []}, 400, "messages", "messages = []: must be"),
    (CHAT, {"messages": "hi"}, 400, "messages", 'messages = "hi": must be array'),
    (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0", "content must be there"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content", "string or a list of parts"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        400,
        "messages.0.content",
        "has a part of type 'image_url'",
    ),
    (CHAT, {"messages": [*ASKED * 500, {"role": "user", "content": "x" * 999}]}, 400, "prompt", "tokens"),
    (CHAT, {"max_tokens": 0}, 400, None, "max_tokens = 0 must be at least 1"),
    (CHAT, {"top_logprobs": 1}, 400, None, "top_logprobs must be left out"),
    (CHAT, {"logprobs": 1}, 400, "logprobs", "logprobs = 1: must be"),
    (CHAT, {"tool_choice": "auto"}, 400, None, "tool_choice must be left out where there are no tools"),
    (CHAT, {"tool_choice": "maybe"}, 400, "tool_choice", "must be 'none', 'auto', 'required'"),
    (CHAT, {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, None, "f"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name", "pattern"),
    (
        CHAT,
        {"tools": [FUNCTION], "tool_choice": "required", "response_format": {"type": "json_object"}},
        400,
        None,
        "must not be there together",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"id": str(i), "function": {"name": "f", "arguments": ""}}
          for i in range(2)]}]},
        400,
        None,
        "the chat template refuses them: One tool call at a time!",
    ),
    (CHAT, {"chat_template_kwargs": {"messages": "x"}}, 400, "chat_template_kwargs", "must not hold messages"),
    (CHAT, {"chat_template_kwargs": {"x": []}}, 400, "chat_template_kwargs", "an object of strings, numbers"),
    (CHAT, {"chat_template": "{{ 1 }}"}, 400, "chat_template", "chat_template is not known here"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
        400,
        "response_format.json_schema.schema",
        "nested more than 64 deep",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///etc/passwd"}}}},
        400,
        "response_format.json_schema.schema",
        "must begin with #/",
    ),
    (EMBED, {"input": [1] * 2001}, 400, "input", "input.0 has 2001 tokens, must have at most 2000"),
    (EMBED, {"dimensions": 3}, 400, "dimensions", "dimensions = 3"),
    (EMBED, {"encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
    ("/tokenize", {"prompt": "x", "messages": ASKED}, 400, None, "either prompt or messages must be there"),
    ("/detokenize", {"tokens": [300]}, 400, "prompt", "tokens.0 = 300 must be a token id in [0, 268)"),
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    TEXT: {"model": NAME, "prompt": "x"},
    CHAT: {"model": NAME, "messages": ASKED},
    EMBED: {"model": NAME, "input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, in the form that OpenAI's clients read."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    found: dict[str, Any] = body["error"]
    return found


def test_what_is_wrong_is_said(url: str, served: Served) -> None:
    with httpx.Client(base_url=url, timeout=30) as client:
        found = []
        for path, change, status, param, words in WRONG:
            answer = client.post(path, json={**GOOD[path], **change})
            assert answer.status_code == status, (path, change)
            error = error_of(answer)
            if (answer.status_code, error["param"]) != (status, param) or words not in error["message"]:
                found.append((change, answer.status_code, error))
        assert not found
        for path, body in GOOD.items():
            assert client.post(path, json=body).status_code == 200
        for path in (TEXT, CHAT):  # as clients send that write every field they know
            assert client.post(path, json={**GOOD[path], "function_call": None, "audio": None}).status_code == 200
    assert served.loop.stats.running == 0


def test_bodies_that_are_none(url: str) -> None:
    headers = {"content-type": "application/json"}
    post = lambda content, **more: httpx.post(f"{url}{TEXT}", content=content, headers={**headers, **more})
    for content, words in [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[1]", "must be"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[" * 5000, "the body is not JSON"),
        (b'{"model": "little", "prompt": "\\ud800"}', "the body is not JSON"),
        (b'{"model": "little", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "little", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"model": "little"}', "prompt is missing"),
    ]:
        answer = post(content)
        assert answer.status_code == 400 and words in error_of(answer)["message"], (content[:50], answer.text)
    answer = post(b" " * (MAX_BODY + 1))
    assert answer.status_code == 413 and "20,000 bytes" in error_of(answer)["message"]
    answer = post(b" " * 9 for _ in range(MAX_BODY))  # without a length
    assert answer.status_code == 413
    answer = httpx.post(f"{url}{TEXT}", content=json.dumps(GOOD[TEXT]), headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in error_of(answer)["message"]


def test_addresses_that_are_none(url: str) -> None:
    for method, path, status in [
        ("GET", "/v2", 404),
        ("GET", TEXT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/", 405),
        ("GET", "/v1/models/../../x", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
    ]:
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and error_of(answer)["code"] in ("not_found", "model_not_found")


def test_keys_and_hosts(tmp_path: Path) -> None:
    served = fake_engine.make_served(tmp_path)
    service = Service(models={NAME: served}, api_key="s\u00e9cret", hosts=("127.0.0.1", "localhost", "::1"))
    with fake_engine.running_server(service) as (url, _):
        for key in (None, "Bearer", "Bearer wrong", "Basic s\u00e9cret", "Bearer s\u00e9cret2"):
            headers = {} if key is None else {"authorization": key.encode()}
            answer = httpx.post(f"{url}{TEXT}", json=GOOD[TEXT], headers=headers)
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer s\u00e9cret".encode()}
        assert httpx.post(f"{url}{TEXT}", json=GOOD[TEXT], headers=right).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        for host, status in [("evil.example:80", 403), ("", 403), ("localhost", 200), ("[::1]:8000", 200)]:
            assert httpx.get(f"{url}/health", headers={"host": host}).status_code == status


def test_a_body_that_does_not_come(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_S", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode())
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_that_nobody_reads(url: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    loop: Any = served.loop
    monkeypatch.setattr(connection, "SEND_S", 0.3)
    monkeypatch.setattr(loop, "says", lambda request: "x" * 500)
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**GOOD[TEXT], "prompt": ["x"] * 8, "max_tokens": 1900, "stream": True, "logprobs": 20})
    unread = socket.socket()
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    unread.connect((host, int(port)))
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    unread.sendall((head + body).encode())
    assert wait_until(lambda: loop.stats.running == 8)
    assert wait_until(lambda: loop.stats.running == 0)
    unread.close()
    assert httpx.post(f"{url}{TEXT}", json=GOOD[TEXT]).status_code == 200


def test_the_texts_of_a_refused_request_are_not_asked_for(
    url: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(*_: Any) -> Any:
        calls.append(0)
        time.sleep(0.005)
        raise QueueFull("no room")

    monkeypatch.setattr(served.loop, "submit", full)
    answer = httpx.post(f"{url}{TEXT}", json={**GOOD[TEXT], "n": 128, "prompt": ["x"] * 16}, timeout=60)
    assert answer.status_code == 429
    jobs._WAITING.submit(len, "").result()  # begins after all of them
    assert len(calls) < 2048


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.mark.parametrize("clients", [40, pytest.param(1000, marks=pytest.mark.nightly)])
def test_clients_that_leave_are_forgotten(clients: int, tmp_path: Path) -> None:
    """At any moment: while they ask, while they wait, in the middle of the answer."""
    served = fake_engine.make_served(tmp_path, queue=10_000, pause_s=0.001)
    loop: Any = served.loop
    service = Service(models={NAME: served})
    loop.says = lambda request: "x" * 1000

    async def one(url: str, seed: int) -> None:
        rng = random.Random(seed)
        body = json.dumps({**GOOD[TEXT], "max_tokens": 1900, "stream": rng.random() < 0.7, "n": rng.choice([1, 2])})
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        host, port = url.removeprefix("http://").split(":")
        await asyncio.sleep(rng.random() * clients / 100)
        reader, writer = await asyncio.open_connection(host, int(port))
        whole = (head + body).encode()
        writer.write(whole[: rng.choice([len(whole)] * 4 + [rng.randrange(len(whole))])])
        await writer.drain()
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(rng.random() * 0.05)
            if rng.random() < 0.5:
                with_time = asyncio.wait_for(reader.read(500), 0.05)
                await asyncio.gather(with_time, return_exceptions=True)
        writer.transport.abort() if rng.random() < 0.5 else writer.close()

    async def all_of_them(url: str) -> None:
        await asyncio.gather(*(one(url, seed) for seed in range(clients)))

    with fake_engine.running_server(service) as (url, _):
        asyncio.run(all_of_them(url))
        assert wait_until(lambda: loop.stats.running == 0 and service.busy == 0)
        assert loop.cancelled > clients / 4
        assert httpx.post(f"{url}{TEXT}", json={**GOOD[TEXT], "max_tokens": 5}).json()["choices"][0]["text"] == "xxxxx"
    loop.stop()


def test_the_server_ends_its_work_before_it_ends(tmp_path: Path) -> None:
    served = fake_engine.make_served(tmp_path, pause_s=0.01)
    service = Service(models={NAME: served})
    loop: Any = served.loop
    with (
        fake_engine.running_server(service) as (url, server),
        concurrent.futures.ThreadPoolExecutor() as pool,
        httpx.Client(base_url=url) as kept,
    ):
        assert kept.get("/health").status_code == 200
        asked = pool.submit(httpx.post, f"{url}{TEXT}", json={**GOOD[TEXT], "max_tokens": 60})
        assert wait_until(lambda: loop.stats.running == 1)
        server.handle_exit(15, None)
        answer = kept.post(TEXT, json=GOOD[TEXT])
        assert answer.status_code == 503 and error_of(answer)["code"] == "shutting_down"
        assert kept.get("/health").status_code == 503 and answer.headers["retry-after"] == "1"
        assert len(asked.result().json()["choices"][0]["text"]) == 28
        assert wait_until(lambda: server.should_exit)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    served = fake_engine.make_served(tmp_path, pause_s=0.05)
    with fake_engine.running_server(Service(models={NAME: served})) as (_, server):
        server.handle_exit(15, None)
        server.handle_exit(15, None)
        assert server.should_exit


def test_a_mistake_of_the_server_is_an_answer_and_tells_nothing(
    url: str, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: Request, on_delta: Any) -> Any:
        raise RuntimeError(served.tokenizer.decode(request.prompt))

    monkeypatch.setattr(served.loop, "submit", broken)
    answer = httpx.post(f"{url}{TEXT}", json={**GOOD[TEXT], "prompt": "secret"})
    assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
    assert "RuntimeError" in caplog.text and "in broken" in caplog.text
    assert "secret" not in caplog.text + answer.text


def test_where_to_listen() -> None:
    taken = r"--port \d+: cannot listen there \(Address already in use\)"
    with bind_address("127.0.0.1", 0) as there, pytest.raises(UserError, match=taken):
        bind_address("127.0.0.1", there.getsockname()[1])  # though the first does not listen yet
    with pytest.raises(UserError, match=r"--host 203.0.113.1 --port 0: cannot listen there"):
        bind_address("203.0.113.1", 0)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip
