"""The page to chat with. Its functions run in node, where that is installed; no browser looks at it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import pytest

from maxlm import serving
from maxlm.serving.app import Service

PAGE = (Path(serving.__file__).parent / "chat_page.html").read_text()
(SCRIPT,) = re.findall(r"<script>(.*)</script>", PAGE, re.DOTALL)


def in_node(expression: str) -> Any:
    """The value of an expression after the page's script."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    program = f"{SCRIPT}\nconsole.log(JSON.stringify({expression}))"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_is_served_and_needs_nothing_else(tmp_path: Path) -> None:
    served = fake_engine.make_served(tmp_path)
    with fake_engine.running_server(Service(models={"little": served}, api_key="k")) as (url, _):
        answer = httpx.get(url)
    assert answer.status_code == 200 and answer.text == PAGE and "text/html" in answer.headers["content-type"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["'](?!data:)""", PAGE) and "innerHTML" not in PAGE


def test_every_element_that_the_script_asks_for_is_there() -> None:
    asked = set(re.findall(r'\bat\("(\w+)"\)', SCRIPT)) | {"temperature", "top_p", "top_k", "max_tokens", "seed"}
    assert asked == set(re.findall(r'\bid="(\w+)"', PAGE))


def test_events_are_read_as_they_come(tmp_path: Path) -> None:
    """All that a stream says, cut anywhere, gives the text and the probabilities."""
    served = fake_engine.make_served(tmp_path)
    body = {"model": "little", "stream": True, "logprobs": True, "top_logprobs": 1,
            "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
    with fake_engine.running_server(Service(models={"little": served})) as (url, _):
        stream = httpx.post(f"{url}/v1/chat/completions", json=body).text
        prompt = {"model": "little", "stream": True, "logprobs": 1, "prompt": "x", "max_tokens": 8}
        plain = httpx.post(f"{url}/v1/completions", json=prompt).text
    read = """(stream) => {
      const tokens = new Tokens(); let buffer = "", found = [];
      for (let i = 0; i < stream.length; i += 7) {
        const [events, rest] = takeEvents(buffer + stream.slice(i, i + 7)); buffer = rest;
        for (const event of events) if (event !== "[DONE]")
          for (const choice of JSON.parse(event).choices) found.push(...tokens.of(choice));
      }
      return [found.map((one) => one.text).join(""), found.length, describe(found[0])];
    }"""
    chat, text = in_node(f"[({read})({json.dumps(stream)}), ({read})({json.dumps(plain)})]")
    assert chat == ["Hello, w\u00f6rld! \U0001f600 <tag> & more", 32, '58.3 % likely\n"]"  3.2e-25 %']
    assert text == ["Hello, w", 8, '58.3 % likely\n"]"  3.2e-25 %']


def test_what_the_page_asks() -> None:
    turns = '[{role: "user", content: "a"}, {role: "assistant", content: "b"}]'
    (path, body), (other, text) = in_node(
        f'[question({{id: "m", chat: true}}, {turns}, "s", {{seed: 1}}), question({{id: "m"}}, {turns}, "", {{}})]'
    )
    assert path == "v1/chat/completions" and body["seed"] == 1 and body["model"] == "m"
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant"]
    assert other == "v1/completions" and text["prompt"] == "ab"
