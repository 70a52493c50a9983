"""The page to chat with in headless Chromium: typed at, read while it streams, and stopped. The server is a process.

`MAXLM_REQUIRE_BROWSER=1`: where there is no browser the tests fail, and are not skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chats
import fake_engine
import httpx
import published
import pytest
import safetensors.numpy

from maxlm.data.passages import Passage
from maxlm.inference.request import Finish
from maxlm.inference.retrieval import Index
from maxlm.serving.app import Service

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    if os.environ.get("MAXLM_REQUIRE_BROWSER") == "1":
        raise
    pytest.skip("needs playwright: pip install -e '.[browser]'", allow_module_level=True)

pytestmark = pytest.mark.nightly

KEY, LENGTH = "a key", 8192
DOCUMENTS = {
    "harbour.md": "# The harbour\n\nBoats leave before sunrise.",
    "lamp.txt": "The lamp is lit in the evening.",
}
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script> **bold** [a](javascript:window.hacked=1)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as library:
        own = library.chromium.executable_path
        installed = [own if os.path.exists(own) else None, *map(shutil.which, ("chromium", "google-chrome"))]
        path = next(filter(None, installed), None)
        if path is None:
            reason = "needs Chromium: apt-get install chromium, or python -m playwright install chromium"
            (pytest.fail if os.environ.get("MAXLM_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
        with library.chromium.launch(executable_path=path) as started:
            yield started


def write_model(folder: Path) -> None:
    """A published model of random weights that writes small letters and blanks, and never ends by itself."""
    tokenizer = chats.make_tokenizer("chatml")
    chats.write_folder(folder, "chatml", chats.CHATML)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": LENGTH}
    published.write_model({**published.MODELS["llama"], **sizes}, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    letters = [tokenizer.token_to_id(name) for name in "abcdefghijklmnopqrstuvwxyz\u0120"]
    tensors["model.embed_tokens.weight"][:, 0] = 4  # in every state, as no layer changes it: the head counts on it
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][0] = 0
    tensors["lm_head.weight"][:, 0] = -20
    tensors["lm_head.weight"][letters, 0] = 0
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})


class Server(NamedTuple):
    url: str
    preferences: Path

    def asked(self, body: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a conversation, not through the page."""
        header = {"authorization": f"Bearer {KEY}"}
        answer: dict[str, Any] = httpx.post(
            f"{self.url}/v1/chat/completions", json=body, headers=header, timeout=60
        ).json()
        return answer

    def running(self) -> float:
        [found] = re.findall(r"^vllm:num_requests_running\S* (\S+)$", httpx.get(f"{self.url}/metrics").text, re.M)
        return float(found)

    def becomes_idle(self) -> bool:
        end = time.monotonic() + 30
        while self.running() and time.monotonic() < end:
            time.sleep(0.05)
        return self.running() == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    write_model(folder / "model")
    (folder / "docs").mkdir()
    for name, text in DOCUMENTS.items():
        (folder / "docs" / name).write_text(text)
    kept = folder / "kept.jsonl"
    words = [sys.executable, "-m", "maxlm.serve", "--hf", str(folder / "model"), "--port", "0", "--engine.slots", "4",
             "--docs", str(folder / "docs"), "--preferences", str(kept)]  # fmt: skip
    environment = {**os.environ, "MAXLM_API_KEY": KEY}
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stdout is not None
        [url] = re.findall(r"http://127.0.0.1:\d+", process.stdout.readline())
        yield Server(url, kept)


class Watched(NamedTuple):
    """A page, and what it did."""

    page: Page
    errors: list[str]
    """On its console, or thrown by its script."""


Open = Callable[..., Watched]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens an address; in the end nothing may have been asked of any other host, or gone wrong unseen."""
    opened: list[tuple[str, Watched, list[str]]] = []
    with contextlib.ExitStack() as stack:

        def at(url: str, key: str = "", **context: Any) -> Watched:
            page = stack.enter_context(browser.new_context(**context)).new_page()
            watched, asked = Watched(page, []), list[str]()
            opened.append((url, watched, asked))
            bad = lambda said: said.type in ("error", "warning")
            page.on("console", lambda said: watched.errors.append(said.text) if bad(said) else None)
            page.on("pageerror", lambda error: watched.errors.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(url)
            if key:
                expect(page.locator(".error")).to_have_text(re.compile("API key is missing or wrong.*Settings has"))
                set_up(page, key=key)
                expect(page.locator(".error")).to_have_count(0)
                assert len(watched.errors) == 1 and "401" in watched.errors.pop()
            expect(page.locator("#model option")).to_have_count(1)
            return watched

        yield at
        for url, watched, asked in opened:
            assert not watched.errors
            assert asked and all(one.startswith((f"{url}/", "data:,")) for one in asked)


def set_up(page: Page, **settings: Any) -> None:
    page.locator("#settings > summary").click()
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator(f"#{next(iter(settings))}").press("Escape")
    expect(page.locator("#settings > div")).to_be_hidden()


def say(page: Page, text: str) -> dict[str, Any]:
    """Types it; what the page then asks of the server."""
    page.locator("#text").press_sequentially(text)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    body: dict[str, Any] = asked.value.post_data_json
    return body


def answer(page: Page) -> str:
    """The last one, when it is whole."""
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    return written(page)


def written(page: Page) -> str:
    return "".join(page.locator(".answer").last.locator(".token").all_text_contents())


def test_an_answer_streams_and_is_stopped(server: Server, open_page: Open) -> None:
    page, errors = open_page(server.url, KEY)
    set_up(page, max_tokens=4000, temperature=1)
    say(page, "Tell me all.")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    lengths = [len(written(page))]
    while len(lengths) < 4:
        expect(page.locator(".token").nth(lengths[-1])).to_be_attached()
        lengths.append(len(written(page)))
        assert page.locator("#stop").is_visible() and page.locator("#send").is_hidden()
    assert lengths == sorted(set(lengths)) and server.running() == 1
    page.locator("#stop").click()
    expect(page.locator("#send")).to_be_visible()
    assert server.becomes_idle()
    stopped = written(page)
    assert lengths[-1] <= len(stopped) < 4000 and re.fullmatch("[a-z ]+", stopped)
    expect(page.locator(".assistant .figures")).to_have_text(re.compile(r"^\d+ tokens, [\d.]+ tokens/s, stopped$"))
    expect(page.locator("#text")).to_be_focused()
    page.wait_for_timeout(300)
    assert written(page) == stopped
    # What was said until then is part of the conversation, and the slot is free for more.
    body = say(page, "Go on")
    assert [one["content"] for one in body["messages"]] == ["Tell me all.", stopped, "Go on"]
    assert server.running() == 1
    page.reload()
    assert server.becomes_idle()
    # A new page knows neither the conversation nor the key; what is typed without one stays where it is.
    expect(page.get_by_role("alert")).to_have_text(re.compile("API key"))
    expect(page.locator(".turn")).to_have_count(1)
    page.locator("#text").fill("kept")
    with page.expect_response("**/v1/models"):
        page.locator("#send").click()
    expect(page.get_by_role("alert")).to_have_text(re.compile("API key"))
    expect(page.locator("#text")).to_have_value("kept")
    assert len(errors) == 2 and all("401" in error for error in errors)
    errors.clear()


def test_settings_and_how_likely_each_token_was(server: Server, open_page: Open) -> None:
    page, errors = open_page(server.url, KEY)
    set_up(page, temperature=0, max_tokens=12, system="Be brief.")
    first = say(page, "Hi")
    said = answer(page)
    assert first["temperature"] == 0 and first["max_tokens"] == 12
    assert [one["role"] for one in first["messages"]] == ["system", "user"]
    expect(page.locator(".assistant .figures")).to_have_text(re.compile("^12 tokens.*, cut off: .*, prompt [0-9]+ "))
    [choice] = server.asked({name: first[name] for name in first if not name.startswith("stream")})["choices"]
    assert said == choice["message"]["content"] and len(said) == 12
    for place in (0, 7):
        scores = choice["logprobs"]["content"][place]
        page.locator(".token").nth(place).hover()
        lines = page.locator("#about").inner_text().splitlines()
        assert lines[0] == f"{100 * math.exp(scores['logprob']):.1f} % likely"
        assert [json.loads(line.rpartition('"')[0] + '"') for line in lines[1:]] == [
            one["token"] for one in scores["top_logprobs"]
        ]
    page.locator("#text").hover()
    expect(page.locator("#about")).to_be_hidden()
    page.locator("#reset").click()
    again = say(page, "Hi")
    assert again == first and answer(page) == said
    set_up(page, temperature=2)
    page.locator("#reset").click()
    say(page, "Hi")
    assert answer(page) != said
    assert errors == []


def test_a_conversation_is_sent_whole(server: Server, open_page: Open) -> None:
    page = open_page(server.url, KEY).page
    set_up(page, max_tokens=5)
    box = page.locator("#text")
    box.press_sequentially("two")
    box.press("Shift+Enter")
    box.press_sequentially("lines")
    expect(box).to_have_value("two\nlines")
    expect(page.locator(".turn")).to_have_count(0)
    say(page, "!")
    expect(box).to_have_value("")
    first = answer(page)
    second = say(page, "more")
    assert [(one["role"], one["content"]) for one in second["messages"]] == [
        ("user", "two\nlines!"), ("assistant", first), ("user", "more"),
    ]  # fmt: skip
    answer(page)
    box.fill("  \n ")
    box.press("Enter")
    expect(page.locator(".user")).to_have_count(2)  # blanks are no message
    box.fill("")
    page.locator("#reset").click()
    assert [one["content"] for one in say(page, "new")["messages"]] == ["new"]
    answer(page)


def test_answers_are_ranked(server: Server, open_page: Open) -> None:
    page = open_page(server.url, KEY).page
    set_up(page, max_tokens=8, temperature=1, seed=3, answers=3)
    assert say(page, "Which?")["n"] == 3
    answer(page)
    texts = ["".join(one.locator(".token").all_text_contents()) for one in page.locator(".assistant").all()]
    page.get_by_role("button", name="Best", exact=True).nth(2).click()
    page.get_by_role("button", name="Next best").first.click()
    expect(page.locator(".answer > .figures").last).to_have_text("Saved, in pairs: 3")
    kept = [json.loads(line) for line in server.preferences.read_text().splitlines()]
    assert [(one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in kept] == [
        (texts[2], texts[0]), (texts[2], texts[1]), (texts[0], texts[1]),
    ]  # fmt: skip
    assert all(one["messages"] == [{"role": "user", "content": "Which?"}] for one in kept)
    assert say(page, "And?")["messages"][1]["content"] == texts[2]
    answer(page)


def test_sources_are_shown(server: Server, open_page: Open) -> None:
    page = open_page(server.url, KEY).page
    set_up(page, max_tokens=3)
    say(page, "When is the lamp lit?")
    answer(page)
    sources = page.locator("details.figures")
    assert sources.count() == len(DOCUMENTS)
    for n, source in enumerate(sources.all(), start=1):
        number, name = source.locator("summary").inner_text().split()
        file = name.partition(":")[0]
        assert number == f"[{n}]"
        source.locator("summary").click()
        assert DOCUMENTS[file].splitlines()[-1] in source.inner_text()


def test_what_the_server_refuses_is_said_and_can_be_mended(server: Server, open_page: Open) -> None:
    page, errors = open_page(server.url, KEY)
    set_up(page, max_tokens=4)
    page.locator("#text").fill("x" * 9000)
    page.locator("#text").press("Enter")
    expect(page.get_by_role("alert")).to_have_text(
        re.compile(rf"^the prompt has [0-9]+ tokens, .* more than the {LENGTH} .*; use a shorter prompt$")
    )
    assert len(errors) == 1 and "400" in errors.pop()  # as the browser itself notes it
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator("#text")).to_have_value("x" * 9000)
    page.locator("#text").fill("")
    assert [one["content"] for one in say(page, "short")["messages"]] == ["short"]
    assert len(answer(page)) == 4
    expect(page.locator(".error")).to_have_count(0)
    set_up(page, temperature=5)
    page.locator("#text").fill("hot")
    page.locator("#text").press("Enter")
    expect(page.get_by_role("alert")).to_have_text(re.compile("temperature.*2"))
    assert len(errors) == 1 and "400" in errors.pop()


CONTRAST = """(element) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const behind = [dark ? "#121212" : "#ffffff"], chain = [];
  for (let one = element; one; one = one.parentElement) chain.unshift(getComputedStyle(one).backgroundColor);
  behind.push(...chain);
  const [a, b] = [over(behind), over([...behind, getComputedStyle(element).color])].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
"""WCAG 2.2, "contrast ratio" and "relative luminance", of an element's text on all that lies behind it."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_can_be_read(server: Server, open_page: Open, scheme: str, width: int) -> None:
    """On a phone and on a screen, by day and by night: nothing lies outside, and text has a contrast of 4.5."""
    page = open_page(server.url, KEY, color_scheme=scheme, viewport={"width": width, "height": 640}).page
    set_up(page, max_tokens=200, answers=2)
    say(page, "long " * 30)
    answer(page)
    page.locator("#settings > summary").click()
    page.locator("#shade").check()
    for place in ("#settings > div", "#text", "#send", ".columns", "details.figures"):
        box = page.locator(place).first.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    for place in ("h1", ".user", ".token", ".figures", "#text", "#send", "#reset", "summary", ".turn button"):
        assert page.locator(place).first.evaluate(CONTRAST) >= 4.5, place
    names = page.locator("input, textarea, select, button").evaluate_all(
        "(all) => all.map((one) => one.ariaLabel || one.labels?.[0]?.textContent || one.textContent)"
    )
    assert all(name.strip() for name in names)


def test_text_is_never_more_than_text(tmp_path: Path, open_page: Open) -> None:
    served = fake_engine.make_served(tmp_path)
    loop: Any = served.loop
    loop.says = lambda request: HOSTILE
    passages = [Passage(HOSTILE, 1, 1, HOSTILE, 9)]
    index = Index(passages, fake_engine.fake_embed, served.tokenizer, top=1, longest=100)
    service = Service(models={HOSTILE: dataclasses.replace(served, name=HOSTILE, documents=index)})
    with fake_engine.running_server(service) as (url, _):
        page = open_page(url).page
        say(page, HOSTILE)
        assert answer(page) == HOSTILE
        page.locator(".token").first.hover()
        expect(page.locator(".user")).to_have_text(HOSTILE)
        page.locator("details.figures summary").click()
        assert HOSTILE in page.locator("details.figures").inner_text()
        assert page.locator("img, a, strong, main script").count() == 0
        assert page.evaluate("window.hacked") is None


def test_a_new_chat_ends_an_answer_and_knows_nothing_of_it(tmp_path: Path, open_page: Open) -> None:
    served = fake_engine.make_served(tmp_path, pause_s=0.05)
    with fake_engine.running_server(Service(models={fake_engine.NAME: served})) as (url, _):
        page = open_page(url).page
        say(page, "old")
        expect(page.locator(".token").nth(2)).to_be_attached()
        page.locator("#reset").click()
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.locator("#text")).to_have_value("")
        assert [one["content"] for one in say(page, "new")["messages"]] == ["new"]
        page.locator("#stop").click()
        expect(page.locator("#send")).to_be_visible()


def test_who_scrolls_up_stays_there(tmp_path: Path, open_page: Open) -> None:
    served = fake_engine.make_served(tmp_path, pause_s=0.02)
    loop: Any = served.loop
    loop.says = lambda request: "\n." * 60
    top = "document.getElementById('turns').scrollTop"
    with fake_engine.running_server(Service(models={fake_engine.NAME: served})) as (url, _):
        page = open_page(url, viewport={"width": 400, "height": 300}).page
        say(page, "Many lines")
        expect(page.locator(".token").nth(40)).to_be_attached()
        assert page.evaluate(top) > 100
        page.locator("#turns").evaluate("(main) => { main.scrollTop = 0; }")
        n = page.locator(".token").count()
        expect(page.locator(".token").nth(n + 20)).to_be_attached()
        answer(page)
        assert page.evaluate(top) == 0


def test_half_a_character_is_shown_as_one_that_is_none(tmp_path: Path, open_page: Open) -> None:
    served = fake_engine.make_served(tmp_path)
    loop: Any = served.loop
    loop.says = lambda request: "a\U0001f600"
    with fake_engine.running_server(Service(models={fake_engine.NAME: served})) as (url, _):
        page = open_page(url).page
        set_up(page, max_tokens=3)
        say(page, "Hi")
        assert answer(page) == "a"
        expect(page.locator(".assistant")).to_have_text(re.compile("^a\ufffd3 tokens"))
        assert say(page, "on")["messages"][1]["content"] == "a\ufffd"
        answer(page)


def test_an_answer_that_breaks_off_is_kept_and_said_so(tmp_path: Path, open_page: Open) -> None:
    served = fake_engine.make_served(tmp_path, pause_s=0.03)
    loop: Any = served.loop
    with fake_engine.running_server(Service(models={fake_engine.NAME: served})) as (url, _):
        page, errors = open_page(url)
        say(page, "Hi")
        expect(page.locator(".token").nth(3)).to_be_attached()
        loop.fails = Finish.ERROR
        expect(page.get_by_role("alert")).to_have_text(re.compile("output is not finite"))
        assert written(page).startswith("Hell") and errors == []
        loop.fails = None
        assert [one["content"] for one in say(page, "on")["messages"]] == ["Hi", written_before(page), "on"]
        answer(page)
    page.locator("#text").fill("Anybody?")
    page.locator("#text").press("Enter")
    expect(page.get_by_role("alert")).to_have_text(re.compile("^the connection to the server failed"))
    expect(page.locator("#text")).to_have_value("Anybody?")
    assert len(errors) == 1 and "ERR_CONNECTION_REFUSED" in errors.pop()


def written_before(page: Page) -> str:
    return "".join(page.locator(".answer").first.locator(".token").all_text_contents())
