"""`python -m maxlm.data chat`: tokens with their mask, figures, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import chats
import pytest
from rich.console import Console

from maxlm.config import Conversations, Purpose, UserError
from maxlm.data.__main__ import EXIT_UNREADABLE, main
from maxlm.data.chat_report import Survey, pieces, report
from maxlm.data.shards import Split, open_prepared
from maxlm.data.texts import Text
from maxlm.data.tokenizers import Bytes

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi \u65e5"},
    {"role": "assistant", "content": "Two <|eos|>\nlines\x1b[31m."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


def write(folder: Path, *records: Any) -> str:
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_what_is_shown_where_there_are_no_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(
        tmp_path, {"messages": TALK}, {"prompt": "a", "completion": "b"}, {"messages": TALK[:2]},
        {"messages": TALK[:4]}, {"x": 1},
    )  # fmt: skip
    assert main(["chat", file, "--tokenizer", "bytes", "--show", "1"]) == EXIT_UNREADABLE
    said = capsys.readouterr().out
    # bos and eos are one token each, all others are bytes
    first = 1 + len("System: Be brief.\n\nUser: Hi \u65e5\n\nAssistant: Two <|eos|>\nlines\x1b[31m.".encode()) + 1
    second = len("\n\nUser: Why?\n\nAssistant: So.\n\n") + 1
    counted = len(" Two <|eos|>\nlines\x1b[31m.") + 1 + len(" So.") + 1
    assert said.startswith(
        f"{file}:1: {first + second} tokens, {counted} count, value 1\n"
        "  <|bos|>System: Be brief.\n  \n  User: Hi \u65e5\n  \n  Assistant:\n"
        "+  Two <|eos|>\n+ lines\\x1b[31m.<|eos|>\n  \n  \n  User: Why?\n  \n  Assistant:\n+  So.<|eos|>\n"
    )
    rest = said[said.index("2 records") :].splitlines()
    assert rest[0] == f"2 records, 2 texts, {first + second + 25} tokens"
    assert rest[1:] == [
        f"  {counted + 3} count, {(counted + 3) / (first + second + 25):.1%}",
        f"  tokens of a text: at least 25, median 25, 90% up to {first + second}, at most {first + second}",
        "  turns: assistant 3, system 1, user 3",
        "3 records refused:",
        f"  2: {file}:3: messages: ends with user, and the assistant must have the last word",
        f"  1: {file}:5: has the keys 'x', of no known format; known: chosen, rejected; completions, prompt; "
        "completion, prompt; messages; conversations; instruction, output",
    ]


def test_a_published_folder_has_its_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = chats.write_folder(tmp_path / "model", "chatml", chats.CHATML)
    file = write(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    words = ["chat", file, "--tokenizer", str(folder), "--purpose", "preference"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{file}:1, text 2 of 2: " in said and "<|im_start|>user" in said and "+ c<|im_end|>\n" in said
    assert main([*words, "--template", "plain"]) == 0
    assert "Assistant:\n+  c<|endoftext|>\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="template 'chatlm': must be one of chatml"):
        main([*words, "--template", "chatlm"])
    with pytest.raises(UserError, match="paths"):
        main(["chat", "--tokenizer", "bytes"])


def test_colours_say_which_tokens_count() -> None:
    tokenizer = Bytes()
    ids = [256, *"a\u65e5".encode(), 98, 99, 257]
    text = Text(ids, [False] * 5 + [True] * 3, 1.0)
    assert [(len(run), piece) for run, piece in pieces(ids, tokenizer)] == [
        (1, "<|bos|>"), (1, "a"), (3, "\u65e5"), (1, "b"), (1, "c"), (1, "<|eos|>")
    ]  # fmt: skip
    found = Survey()
    found.add("x:1", {}, None, [text], 1)
    out = io.StringIO()
    report(Console(file=out, force_terminal=True, color_system="standard", width=80), found, tokenizer)
    assert (
        "\x1b[36m<|bos|>\x1b[0m\x1b[2ma\x1b[0m\x1b[2m\u65e5\x1b[0m"
        "\x1b[1;32mb\x1b[0m\x1b[32mc\x1b[0m\x1b[1;7;32m<|eos|>\x1b[0m"
    ) in out.getvalue()


def test_records_are_prepared_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the template that came with the tokenizer; then, with the tokenizer of that data, with the same one."""
    folder = chats.write_folder(tmp_path / "model", "chatml", chats.CHATML)
    file = write(tmp_path, *({"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(9)))
    words = ["prepare", file, "--purpose", "preference", "--workers", "1", "--validation_fraction", "0"]
    assert main([*words, "--tokenizer", str(folder), "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--tokenizer", str(tmp_path / "one" / "tokenizer"), "--out", str(tmp_path / "two")]) == 0
    assert "18 texts" in capsys.readouterr().out
    for name in ("one", "two"):
        info = open_prepared(tmp_path / name, verify=True).info
        assert isinstance(info.prepare.documents, Conversations)
        assert info.prepare.documents.purpose is Purpose.PREFERENCE and info.documents(Split.TRAIN) == 18
        assert (tmp_path / name / "chat" / "chat_template.jinja").read_text() == chats.CHATML
    with pytest.raises(UserError, match="of records; say --purpose"):
        main(["prepare", file, "--template", "plain", "--tokenizer", "bytes", "--out", str(tmp_path / "three")])
    with pytest.raises(UserError, match="--purpose sft: records come from files"):
        main(["prepare", "--stdlib", "--purpose", "sft", "--tokenizer", "bytes", "--out", str(tmp_path / "three")])
    with pytest.raises(UserError, match=r"has no key 'text'.*or purpose, of conversations"):
        main(["prepare", file, "--tokenizer", "bytes", "--out", str(tmp_path / "three")])
