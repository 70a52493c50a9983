"""`python -m maxlm.chat`: what it does with what is typed. The model is a fake."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_engine
import pytest

from maxlm.chat import ChatOptions, main, talk
from maxlm.config import ChosenModel, UserError
from maxlm.inference.request import Finish
from maxlm.serving.served import Served

SAYS = "Hello, w\u00f6rld! \U0001f600 <tag> & more"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = fake_engine.make_served(tmp_path)
    yield found
    found.loop.stop()


def say(served: Served, *lines: str, **options: Any) -> None:
    typed = iter(lines)

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talk(served, ChatOptions(model=ChosenModel(run="x"), **options), read)


def test_a_conversation(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "saved.json"
    say(served, "Hi", "  ", "/usr/bin is a path", f"/save {file}", seed=3, max_new_tokens=60)
    loop: Any = served.loop
    assert served.chat is not None
    saved = json.loads(file.read_text())["messages"]
    assert [(one["role"], one["content"]) for one in saved] == [
        ("user", "Hi"), ("assistant", SAYS), ("user", "/usr/bin is a path"), ("assistant", SAYS),
    ]  # fmt: skip
    assert [request.prompt for request in loop.seen] == [
        tuple(served.chat.encode(served.tokenizer, saved[:n]).ids) for n in (1, 3)
    ]
    assert loop.seen[0].seed == 3 and loop.seen[0].sampling.temperature == 0.7
    out = capsys.readouterr().out
    assert out.startswith(SAYS) and out.count("[33 tokens") == 2 and f"4 messages in {file}" in out


def test_commands(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, loop = tmp_path / "saved.json", served.loop
    say(served, "Hi", "/reset", "/system Be [brief].", "/nothing", "/help", f"/save {tmp_path / 'no/file'}",
        f"/save {file}", "/exit", "never", system="first")  # fmt: skip
    out = capsys.readouterr().out
    assert "/nothing is no command; there are /reset" in out and "cannot be written (No such file" in out
    assert json.loads(file.read_text())["messages"] == [{"role": "system", "content": "Be [brief]."}]
    seen: Any = loop
    assert len(seen.seen) == 1 and "first" in served.tokenizer.decode(seen.seen[0].prompt)


def test_what_goes_wrong_is_a_line(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    loop: Any = served.loop
    loop.fails = Finish.ERROR
    say(served, "Hi", "x" * 3000)
    out = capsys.readouterr().out
    assert "error: the model's output is not finite" in out
    assert "the model is meant for 2000; use /reset" in out
    with pytest.raises(UserError, match="name one model"):
        main([])


_IN_A_TERMINAL = """
import fcntl, sys, tempfile, termios
from pathlib import Path

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, {tests!r})
import fake_engine
from maxlm.chat import ChatOptions, _typed, talk
from maxlm.config import ChosenModel

served = fake_engine.make_served(Path(tempfile.mkdtemp()), pause_s=0.05)
served.loop.says = lambda request: "\\x1b[31mred \\u202e" + "word " * (1 if len(request.prompt) < 40 else 4000)
talk(served, ChatOptions(model=ChosenModel(run="x")), _typed)
"""


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        """The program is to make standard input its terminal (TIOCSCTTY)."""
        self._there, here = pty.openpty()
        self.process = subprocess.Popen(words, stdin=here, stdout=here, stderr=here, start_new_session=True)
        os.close(here)
        self._unseen = b""

    def types(self, text: str) -> None:
        os.write(self._there, text.encode())

    def shows(self, words: str, seconds: float) -> str | None:
        """What there is to see, from where the last call ended to the end of these words; None: not in that time."""
        end = time.monotonic() + seconds
        while words.encode() not in self._unseen:
            ready, _, _ = select.select([self._there], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return None
            self._unseen += os.read(self._there, 4096)
        before, found, self._unseen = self._unseen.partition(words.encode())
        return (before + found).decode(errors="replace")

    def until(self, words: str) -> str:
        found = self.shows(words, 60)
        assert found is not None, self._unseen
        return found


def test_in_a_terminal() -> None:
    """Ctrl-C ends an answer and not the conversation, at the prompt it drops the line; what a model writes commands no
    terminal; Ctrl-D ends."""
    terminal = Terminal(sys.executable, "-c", _IN_A_TERMINAL.format(tests=str(Path(__file__).parent)))
    terminal.until("> ")
    terminal.types("Hi\n")
    said = terminal.until("before them]")
    assert r"\x1b[31mred \u202eword" in said and "\x1b[31m" not in said and "\u202e" not in said
    terminal.until("> ")
    terminal.types("tell me more of all this\n")
    terminal.until("word word")
    terminal.types("\x03")
    assert "tokens" in terminal.until("before them]")
    terminal.until("> ")
    for _ in range(20):  # Python misses a signal that comes between the prompt and its reading
        terminal.types("dropped\x03")
        if terminal.shows("> ", 2):
            break
    terminal.types("/help\n")
    assert "/reset" in terminal.until("/exit")
    terminal.until("> ")
    terminal.types("\x04")
    assert terminal.process.wait(60) == 0


def test_a_model_without_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        chat = None

    monkeypatch.setattr("maxlm.hub.models.load_chosen", lambda chosen: Run())
    with pytest.raises(UserError, match=r"no chat template; continue texts with python -m maxlm.generate"):
        main(["--run", str(tmp_path)])
