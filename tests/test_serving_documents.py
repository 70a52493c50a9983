"""Answers from documents: files as passages, what is near to a question, and what the model is then asked."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import numpy as np
import pytest
from fake_engine import NAME
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.chat import ChatOptions, talk
from maxlm.config import ChosenModel, DocumentsConfig, UserError
from maxlm.data import passages
from maxlm.data.passages import OVERLAP, PASSAGE, Passage, passages_of
from maxlm.data.tokenizers import Bytes
from maxlm.inference.retrieval import Index, with_sources
from maxlm.serving.app import Service
from maxlm.serving.served import Served

HTML = """<html><head><title>no</title>
<style>p { no }</style></head><body>
<nav>no</nav>
<h1>Title</h1>
<p>Some <b>bold</b>
text.</p><p>More &amp; more</p>
<pre>a
 b</pre><script>no()</script><!-- no -->
</body></html>"""


def pdf(*pages: str) -> bytes:
    """The least file that shows these words, a page each (ISO 32000-1, 7.5)."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, words in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({words}) Tj ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * i} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, places = b"%PDF-1.4\n", list[int]()
    for number, one in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{one}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF"
    return out + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_places_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("# Head\n\nOne\ntwo\n\n\n- three\n")
    (tmp_path / "b.html").write_text(HTML)
    (tmp_path / "sub/c.PDF").write_bytes(pdf("First page", "Second page"))
    (tmp_path / "d.txt").write_bytes("\ufeffMark\r\n".encode())
    (tmp_path / "e.bin").write_bytes(b"no")
    found = passages_of(tmp_path, Bytes())
    assert [(one.place, one.text) for one in found] == [
        ("a.md:1-7", "# Head\n\nOne\ntwo\n\n- three"),
        ("b.html:4-8", "Title\n\nSome bold text.\n\nMore & more\n\na\n b"),
        ("d.txt:1", "Mark"),
        ("sub/c.PDF:page 1-2", "First page\n\nSecond page"),
    ]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=8), st.integers(0, 9))
def test_passages_hold_all_words_at_their_lines(sizes: list[tuple[int, bool]], seed: int) -> None:
    """Each within its limit, at the lines that it says, with no word lost, and beginning with the end of the last."""
    rng = np.random.default_rng(seed)
    word = iter(f"w{i}" for i in range(10_000))
    text = ""
    for size, gap in sizes:
        paragraph = ""
        while len(paragraph) < size:
            paragraph += next(word) + ("\n" if rng.random() < 0.1 else " ")
        text += paragraph.rstrip() + ("\n\n\n" if gap else "\n\n")
    lines = text.splitlines()
    found = list(passages._passages("f.md", list(passages.of_lines(text)), Bytes()))
    assert [w for one in found for w in one.text.split()] != []
    assert {w for one in found for w in one.text.split()} == set(text.split())
    for one, after in zip(found, [*found[1:], None], strict=True):
        assert one.tokens <= PASSAGE and one.tokens <= len(one.text)
        there = " ".join(lines[one.first - 1 : one.last])
        assert set(one.text.split()) <= set(there.split())
        assert one.text.split()[0] in lines[one.first - 1] and one.text.split()[-1] in lines[one.last - 1]
        if after is not None:
            shared = [w for w in one.text.split() if w in set(after.text.split())]
            assert sum(map(len, shared)) <= OVERLAP and shared == after.text.split()[: len(shared)]


def test_what_cannot_be_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "docs", tmp_path / "outside"
    for place in (folder / ".git", outside):
        place.mkdir(parents=True)
        (place / "secret.md").write_text("secret")
    with pytest.raises(UserError, match=r"docs has 0 documents .* name another folder"):
        passages_of(folder, Bytes())
    with pytest.raises(UserError, match="is no folder"):
        passages_of(tmp_path / "none", Bytes())
    (folder / "link.md").symlink_to(outside / "secret.md")
    (folder / "folder").symlink_to(outside)
    (folder / "gone.md").symlink_to(folder / "nothing")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    (folder / "latin.txt").write_bytes(b"\xe4")
    (folder / "huge.md").write_text("x" * 99)
    (folder / "blank.md").write_text("\n \n")
    monkeypatch.setattr(passages, "LARGEST", 50)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="docs has 4 documents"):
        passages_of(folder, Bytes())
    said = caplog.text
    assert "huge.md: passed over: has 99 bytes; at most 50 are read" in said and "latin.txt: passed over" in said
    assert "broken.pdf: passed over: no PDF that can be read" in said
    (folder / "same.md").write_text("inside")
    (folder / "alias.md").symlink_to(folder / "same.md")
    assert [one.file for one in passages_of(folder, Bytes())] == ["alias.md", "same.md"]


def letters(texts: list[list[int]], pooling: str) -> list[list[float]]:
    """How often each byte is there, as a vector of unit length."""
    counts = np.array([np.bincount(text, minlength=400) for text in texts], float)
    return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).tolist()


def index_of(*texts: str, top: int = 2) -> Index:
    passages = [Passage(f"{n}.md", 1, 1, text, len(text)) for n, text in enumerate(texts)]
    return Index(passages, letters, Bytes(), top=top, longest=100)


def test_the_nearest_are_found() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef"), 30)) for _ in range(20)]
    count = lambda text: np.array([text.count(letter) for letter in "abcdef"], np.float64)
    cosine = lambda a, b: count(a) @ count(b) / np.linalg.norm(count(a)) / np.linalg.norm(count(b))
    found = index_of(*texts, top=5).find("aabbf")
    want = sorted(range(20), key=lambda i: -cosine(texts[i], "aabbf"))[:5]
    assert [one.file for one in found] == [f"{i}.md" for i in want]
    text, kept = with_sources(index_of("aaaa", "a" * 50, "aab"), "aa", room=10)
    assert [one.file for one in kept] == ["0.md"] and text.endswith("[1] 0.md:1\naaaa\n\nQuestion: aa")
    assert with_sources(index_of("a" * 50), "aa", room=10) == ("aa", [])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    plain = fake_engine.make_served(tmp_path_factory.mktemp("served"))
    yield dataclasses.replace(plain, documents=index_of("zebra", "Hi there", "quartz"))
    plain.loop.stop()  # type: ignore[attr-defined]


def test_answers_tell_their_sources(served: Served) -> None:
    loop: Any = served.loop
    asked = [{"role": "user", "content": "zoo"}, {"role": "assistant", "content": "yes"},
             {"role": "user", "content": "Hi there?"}]  # fmt: skip
    body = {"model": NAME, "messages": asked}
    models = {NAME: served, "plain": dataclasses.replace(served, name="plain", documents=None)}
    with fake_engine.running_server(Service(models=models)) as (url, _):
        post = lambda **more: httpx.post(f"{url}/v1/chat/completions", json={**body, **more})
        whole, streamed = post().json(), post(stream=True, n=2).text
        without, plain = post(documents=False).json(), post(model="plain").json()
        refused = post(model="plain", documents=True)
        shown = httpx.get(f"{url}/v1/models").json()["data"]
    want = [{"place": "1.md:1", "file": "1.md", "first": 1, "last": 1, "text": "Hi there", "tokens": 8}]
    assert whole["sources"][:1] == want and len(whole["sources"]) == 2
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert [piece["sources"] for piece in pieces if "sources" in piece] == [whole["sources"]]
    assert "sources" not in without and "sources" not in plain
    assert refused.status_code == 400 and "start it with --docs" in refused.json()["error"]["message"]
    prompts = [served.tokenizer.decode(request.prompt) for request in loop.seen]
    assert "[1] 1.md:1\nHi there\n\n[2]" in prompts[0] and prompts[0].count("Question:") == 1
    assert "Question: Hi there?" in prompts[0] and "1.md" not in prompts[3] + prompts[4]
    assert [one["documents"] for one in shown] == [True, False]


def test_the_terminal_shows_sources(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter(["Hi there?"])

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talk(served, ChatOptions(model=ChosenModel(run="x")), read)
    assert "\n[1] 1.md:1\n[2] " in capsys.readouterr().out
    with pytest.raises(UserError, match="--docs_run x searches documents, and there are none; add --docs DIR"):
        DocumentsConfig(docs_run="x")
