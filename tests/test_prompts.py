"""Prompts in prepared folders: ids as the model is asked, records beside them, the order in which they are drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from maxlm.config import (
    ByteTokenizer,
    Conversations,
    DataConfig,
    Dataset,
    PrepareConfig,
    Purpose,
    UserError,
    serialize,
)
from maxlm.data import dealing
from maxlm.data.__main__ import EXIT_UNREADABLE, main
from maxlm.data.chat import find_chat_template
from maxlm.data.conversation_formats import BadRecord, read
from maxlm.data.conversations import encode
from maxlm.data.loader import open_batches
from maxlm.data.prepare import prepare
from maxlm.data.prompts import Prompts, open_prompts
from maxlm.data.shards import CHAT, RECORD, Split
from maxlm.data.tokenizers import Bytes

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}


def problems(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n} + {n}?\u2028\u65e5", "answer": str(2 * n), "tests": {"n": [n, None]}}
        for n in range(first, first + count)
    ]


def write(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def config_of(file: Path, **changes: Any) -> PrepareConfig:
    values: dict[str, Any] = {"validation_fraction": 0.25, "shard_tokens": 300, "workers": 1} | changes
    more = {key: values.pop(key) for key in ("template", "max_tokens") if key in values}
    documents = Conversations(paths=(str(file),), purpose=Purpose.PROMPTS, **more)
    return PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), **values)


def prepared(folder: Path, records: list[Any], **changes: Any) -> Dataset:
    """In `folder`, of a file beside it."""
    prepare(config_of(write(folder.with_suffix(".jsonl"), records), **changes), folder)
    return Dataset(path=str(folder))


def opened(*datasets: Dataset, split: Split = Split.TRAIN, seed: int = 0) -> Prompts:
    prompts = open_prompts(DataConfig(datasets=datasets, seed=seed), split)
    assert prompts is not None
    return prompts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("prompts") / "data", problems(60))


def test_each_prompt_is_there_once_with_its_whole_record(dataset: Dataset) -> None:
    """Over several shards, against the file; the ids are what the template says, bytes and bos as they are."""
    prompts = {split: opened(dataset, split=split) for split in Split}
    assert len(list(Path(dataset.path).glob("train-*.records"))) > 2
    found = [prompts[split][n] for split in Split for n in range(len(prompts[split]))]
    assert sorted((prompt.record for prompt in found), key=lambda one: int(one["answer"])) == problems(60)
    assert all(len(prompts[split]) for split in Split)
    for prompt in found:
        said = prompt.record["prompt"]
        assert prompt.turns == [{"role": "user", "content": said}]
        assert prompt.ids == (Bytes.bos_id, *f"User: {said}\n\nAssistant:".encode())
    assert [prompts[Split.TRAIN][n].number for n in range(5)] == list(range(5))
    assert prompts[Split.TRAIN].folders == (Path(dataset.path),)
    for number in (-1, len(prompts[Split.TRAIN])):
        with pytest.raises(IndexError):
            prompts[Split.TRAIN][number]


def test_an_answer_learned_begins_where_the_prompt_ends(dataset: Dataset) -> None:
    """The ids of SFT are the prompt's, then the answer's, which count: nothing between, nothing twice."""
    template = find_chat_template(Path(dataset.path) / CHAT)
    talk = {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER, ASSISTANT]}
    [learned] = encode(talk, template, Bytes())
    [asked] = encode(talk, template, Bytes(), purpose=Purpose.PROMPTS)
    [of_prompt] = encode({"prompt": talk["messages"][:-1]}, template, Bytes(), purpose=Purpose.PROMPTS)
    assert asked == of_prompt and asked.value == 0 and not any(asked.counts)
    assert learned.ids[: len(asked.ids)] == asked.ids
    assert learned.counts[len(asked.ids)] and not learned.counts[len(asked.ids) - 1]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "Why?"}, [USER]),
        ({"prompt": "Why?", "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, USER]),
        ({"prompt": "Why?", "completion": "", "answer": 3}, [USER]),
        ({"prompt": [USER, ASSISTANT, USER], "completions": []}, [USER, ASSISTANT, USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, ASSISTANT]}, [USER]),
        ({"messages": [USER, ASSISTANT, USER], "tools": [TOOL]}, [USER, ASSISTANT, USER]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, [USER]),
        ({"instruction": "Why?", "output": "So."}, [USER]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "No."}]}, [USER]),
    ],
)
def test_records_of_every_kind_can_be_asked(record: dict[str, Any], turns: list[dict[str, Any]]) -> None:
    found = read(record, Purpose.PROMPTS)
    assert found == (turns, [], [TOOL] if "tools" in record else None, None)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": " "}, "prompt: is empty"),
        ({"prompt": []}, "prompt: must be a list of messages that is not empty"),
        ({"answer": "3"}, "has the keys 'answer', of no known format; known: chosen, rejected; prompt; messages; conv"),
        ({"prompt": [USER, ASSISTANT]}, "prompt: ends with assistant, and the assistant must come next"),
        ({"messages": [ASSISTANT]}, "messages: has no turn of the user"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages: ends with system, and the assistant must come"),
        ({"messages": [USER, USER]}, "messages: message 1 is of user after user"),
        ({"prompt": "a", "tools": [3]}, r"tools\[0\]: must be an object"),
    ],
)
def test_what_cannot_be_asked_is_refused(record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        read(record, Purpose.PROMPTS)


def test_refused_records_are_counted_and_told_by_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "p.jsonl", [*problems(4), {"answer": "3"}, {"prompt": [USER, ASSISTANT]}])
    words = ["--purpose", "prompts", "--tokenizer", "bytes"]
    out = ["--out", str(tmp_path / "out"), "--validation_fraction", "0"]
    assert main(["prepare", str(file), *words, *out]) == EXIT_UNREADABLE
    said = capsys.readouterr()
    assert f"{file}:5: has the keys 'answer'" in said.err and f"{file}:6: prompt: ends with assistant" in said.err
    assert "train                 4 prompts" in said.out
    assert main(["chat", str(file), *words, "--show", "1"]) == EXIT_UNREADABLE
    shown = capsys.readouterr().out
    assert shown.startswith(f"{file}:1: 31 tokens\n  <|bos|>User: 0 + 0?") and "Assistant:\n" in shown
    assert "  keys: prompt 4, answer 4, tests 4\n" in shown and "2 records refused:\n" in shown


def test_a_file_without_prompts_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: holds no text"):
        prepared(tmp_path / "none", [])
    with pytest.raises(UserError, match=r"none of 1 records can be learned from; first .*:1: has the keys 'a', of no"):
        prepared(tmp_path / "bad", [{"a": 1}])


def test_a_prompt_that_is_too_long_loses_old_turns_or_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = {"prompt": [USER, ASSISTANT, USER, ASSISTANT, USER]}
    most = 1 + len(b"User: Why?\n\nAssistant:")
    dataset = prepared(tmp_path / "data", [talk, {"prompt": "Why? " * 20}], max_tokens=most, validation_fraction=0)
    [prompt] = [opened(dataset)[n] for n in range(len(opened(dataset)))]
    assert bytes(prompt.ids[1:]) == b"User: Why?\n\nAssistant:" and len(prompt.turns) == 5
    length = 1 + len(b"User: " + b"Why? " * 20 + b"\n\nAssistant:")
    assert f":2: is a prompt of {length} tokens with its last turn alone, max_tokens = {most}" in (
        capsys.readouterr().err.replace("\n", " ")
    )


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own(dataset: Dataset) -> None:
    prompts = opened(dataset)
    n = len(prompts)
    epochs = [[prompts.drawn(i).number for i in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [list(range(n)), *epochs]}) == 4
    again, other = opened(dataset), opened(dataset, seed=1)
    assert [again.drawn(i).number for i in range(3 * n)] == list(itertools.chain(*epochs))
    assert [other.drawn(i).number for i in range(n)] != epochs[0]
    assert again.fingerprint == prompts.fingerprint != other.fingerprint


def test_folders_are_drawn_by_their_weights(tmp_path: Path, dataset: Dataset) -> None:
    few = prepared(tmp_path / "few", problems(8, 100), validation_fraction=0.0)
    mixed = opened(dataclasses.replace(dataset, weight=3.0), few)
    drawn = [mixed.drawn(n).record["answer"] for n in range(64)]
    from_few = [answer for answer in drawn if int(answer) >= 200]
    assert len(from_few) == 16 and set(Counter(from_few).values()) == {2}  # an epoch of its own
    assert len(mixed) == len(opened(dataset)) + 8 and mixed[len(mixed) - 1].record["answer"] == "214"
    # Held out is the first folder's alone; of the second there is nothing.
    assert len(opened(dataset, few, split=Split.VALIDATION)) == len(opened(dataset, split=Split.VALIDATION))
    assert open_prompts(DataConfig(datasets=(few,)), Split.VALIDATION) is None


def test_only_prompts_are_prompts(tmp_path: Path, dataset: Dataset) -> None:
    file = write(tmp_path / "sft.jsonl", [{"messages": [USER, ASSISTANT]}])
    sft = PrepareConfig(documents=Conversations(paths=(str(file),)), tokenizer=ByteTokenizer(), workers=1)
    prepare(sft, tmp_path / "sft")
    other = Dataset(path=str(tmp_path / "sft"))
    with pytest.raises(UserError, match="sft: prepared for something else, and the task reads prompts"):
        open_prompts(DataConfig(datasets=(other,)), Split.TRAIN)
    assert len(opened(other, dataset)) == len(opened(dataset))
    for purpose in (None, Purpose.SFT):
        with pytest.raises(UserError, match=r"data: was prepared as prompts, of which nothing can be learned .* = sft"):
            open_batches(DataConfig(datasets=(dataset,)), batch_size=1, seq_len=8, split=Split.TRAIN, purpose=purpose)
    with pytest.raises(UserError, match="missing: holds no finished data set"):
        open_prompts(DataConfig(datasets=(Dataset(path=str(tmp_path / "missing")),)), Split.TRAIN)


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    """One that says another answer would reward what is wrong."""
    dataset = prepared(tmp_path / "data", problems(9))
    file = tmp_path / "data" / "train-00000.records"
    was = file.read_bytes()
    file.write_bytes(was.replace(b'"answer": "2"', b'"answer": "3"'))
    assert file.read_bytes() != was
    with pytest.raises(UserError, match=r"train-00000\.records: has changed: .*, but SHA-256"):
        opened(dataset)
    file.write_bytes(was[:-1])
    with pytest.raises(UserError, match=rf"train-00000\.records: {len(was) - 1} bytes, dataset\.json says {len(was)}"):
        opened(dataset)
    unverified = DataConfig(datasets=(dataset,), verify=False)
    for content, why in ((was.replace(b"\n", b" ", 1), "has .* lines, .* expected"), (b"[" + was[1:], "no object of")):
        file.write_bytes(content)
        prompts = open_prompts(unverified, Split.TRAIN)
        assert prompts is not None
        with pytest.raises(UserError, match=rf"train-00000\.records.*{why}"):
            prompts[0]


def test_the_folder_is_the_same_however_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two workers, and killed on its way, with blocks of one document each."""
    config = config_of(write(tmp_path / "p.jsonl", problems(40)))
    monkeypatch.setattr(dealing, "_BLOCK_DOCUMENTS", 1)
    prepare(config, tmp_path / "one")
    prepare(dataclasses.replace(config, workers=2), tmp_path / "two")
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(serialize.to_dict(config)))
    program = f"""
import maxlm.data.dealing as dealing, maxlm.data.prepare as module, os, signal
from pathlib import Path
from maxlm.config import PrepareConfig, serialize
dealing._BLOCK_DOCUMENTS, module._SECONDS_BETWEEN_RECORDS = 1, 0.0
state, seen = dealing.Splitter.state, []
def killed(self, documents, digest):
    found = state(self, documents, digest)
    seen.append(0)
    if len(seen) > 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
dealing.Splitter.state = killed
module.prepare(serialize.load(PrepareConfig, Path({str(saved)!r})), Path({str(tmp_path / "three")!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "three" / RECORD).exists()
    prepare(config, tmp_path / "three")
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if path.is_file())
    assert {Path(name).suffix for name in names} == {".json", ".tokens", ".offsets", ".counts", ".texts", ".records"}
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name
