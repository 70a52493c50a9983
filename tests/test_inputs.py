"""The table of tests/faults/documents.py in this process, and what takes looking inside."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults.documents import DAMAGE, ENDS, GIVEN, Damage, Given, check_damage, check_end, check_given
from faults.documents import out_inside_the_input as check_out_inside
from faults.tools import Ended

from maxlm.config import (
    ByteTokenizer,
    DataConfig,
    Dataset,
    Files,
    HuggingFaceTokenizer,
    PrepareConfig,
    UserError,
    serialize,
)
from maxlm.config.json_file import MAX_DEPTH, parse_object, read_object
from maxlm.data import documents, workers
from maxlm.data.__main__ import main
from maxlm.data.dealing import last_part
from maxlm.data.documents import Unreadable
from maxlm.data.loader import open_batches
from maxlm.data.prepare import prepare
from maxlm.data.shards import UNFINISHED, Split, open_prepared, read_info
from maxlm.data.sources import iterate_documents
from maxlm.data.tokenizers import load_tokenizer, open_tokenizer

Run = Callable[..., Ended]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Commands of `maxlm.data` in this process."""

    def run(module: str, *words: str, folder: Path, **_: object) -> Ended:
        assert module == "maxlm.data"
        monkeypatch.chdir(folder)
        capfd.readouterr()
        mistake = ""
        try:
            code = main(list(words))
        except UserError as error:
            code, mistake = error.exit_code, f"error: {error}\n"
        out, err = capfd.readouterr()
        return Ended(code=code, out=out, err=err + mistake, seconds=0.0)

    return run


@pytest.mark.parametrize("given", [pytest.param(given, id=given.name) for given in GIVEN])
def test_each_ending_and_encoding_is_read_or_refused(given: Given, tmp_path: Path, here: Run) -> None:
    check_given(given, tmp_path, here)


@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.name) for damage in DAMAGE])
def test_damaged_records_are_refused_by_file_and_key(damage: Damage, tmp_path: Path, here: Run) -> None:
    check_damage(damage, tmp_path, here)


@pytest.mark.parametrize(("name", "special", "beside", "words", "end"), ENDS)
def test_the_end_of_a_document_is_found_or_named(
    name: str,
    special: tuple[str, ...],
    beside: object,
    words: tuple[str, ...],
    end: str | None,
    tmp_path: Path,
    here: Run,
) -> None:
    check_end(special, beside, words, end, tmp_path, here)


def test_the_folder_that_is_written_is_not_read(tmp_path: Path, here: Run) -> None:
    check_out_inside(tmp_path, here)


def read(*paths: Path) -> tuple[list[str], Unreadable]:
    unreadable = Unreadable()
    files = Files(paths=tuple(map(str, paths)))
    return [document.text for document in iterate_documents(files, unreadable)], unreadable


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.jsonl.gz", "a.json.gz", "a.csv.gz"]
)
def test_nothing_larger_than_the_limit_is_held(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what follows a line that is too long is read."""
    for module in ("documents", "records", "sources"):
        monkeypatch.setattr(f"maxlm.data.{module}.MAX_DOCUMENT_BYTES", 1 << 20)
    large = "x" * (3 << 20)
    bodies = {
        "txt": large,
        "jsonl": json.dumps({"text": large}) + '\n{"text": "next"}\n',
        "json": json.dumps([{"text": large}]),
        "csv": f"text\nfirst\n{large}\nnext\n",
    }
    body = bodies[name.split(".")[1]].encode()
    (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    texts, unreadable = read(tmp_path / name)
    assert texts == {"jsonl": ["next"], "csv": ["first", "next"]}.get(name.split(".")[1], [])
    assert unreadable.count == 1
    assert "more than 1 MiB" in unreadable.examples[0]


def test_a_file_that_vanishes_is_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    unreadable = Unreadable()
    found = iterate_documents(Files(paths=(str(tmp_path),)), unreadable)
    texts = [next(found).text]
    (tmp_path / "b.txt").unlink()
    texts += [document.text for document in found]
    assert texts == ["a.txt", "c.txt"]
    assert unreadable.examples == [f"{tmp_path / 'b.txt'}: cannot be read (No such file or directory)"]


def test_a_disk_that_fails_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("maxlm.data.sources.opened", broken)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Input/output error\)") as caught:
        read(tmp_path / "a.txt")
    assert caught.value.exit_code == 1


# A single document


def book(folder: Path, **changes: object) -> PrepareConfig:
    text = "".join(f"Line {i} of a book, ä.\n" for i in range(3000))
    (folder / "book.txt").write_text(text)
    values: dict[str, object] = {"workers": 1, **changes}
    return PrepareConfig(documents=Files(paths=(str(folder / "book.txt"),)), tokenizer=ByteTokenizer(), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.999])
def test_the_end_of_a_single_document_is_held_out(fraction: float, tmp_path: Path) -> None:
    """Whatever its hash says, for 0.999 is above it."""
    info = prepare(book(tmp_path, validation_fraction=fraction), tmp_path / "out")
    train, held_out = (
        bytes(np.fromfile(tmp_path / "out" / f"{split.value}-00000.tokens", "<u2")[1:-1].astype(np.uint8))
        for split in Split
    )
    whole = (tmp_path / "book.txt").read_bytes()
    assert train + held_out == whole
    assert train.endswith(b"\n")
    assert fraction <= len(held_out) / len(whole) < fraction * 1.25 + 0.001
    assert (info.cut_document, info.documents(Split.TRAIN), info.documents(Split.VALIDATION)) == (0, 1, 1)
    assert info.text_bytes(Split.VALIDATION) == len(held_out)
    assert read_info(tmp_path / "out") == info


def test_a_single_document_is_cut_after_an_interruption_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlm.data.prepare._SECONDS_BETWEEN_RECORDS", 0.0)
    config = book(tmp_path)
    whole = prepare(config, tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("maxlm.data.dealing.Splitter.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["reserve"] == 0
    assert prepare(config, tmp_path / "out") == whole
    for file in (tmp_path / "whole").glob("*.*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_book_among_notes_is_never_held_out_whole(tmp_path: Path) -> None:
    """Whichever of them has the smallest hash."""
    (tmp_path / "notes").mkdir()
    cut = set()
    for i in range(6):
        (tmp_path / "notes" / f"{i}.txt").write_text(f"note {i}")
        config = book(tmp_path)
        files = Files(paths=(str(tmp_path / "notes"), str(tmp_path / "book.txt")))
        info = prepare(dataclasses.replace(config, documents=files), tmp_path / f"out{i}")
        assert info.tokens(Split.TRAIN) > 60_000
        assert info.tokens(Split.VALIDATION) > 0
        cut.add(info.cut_document)
    assert None in cut


def test_where_a_text_is_cut() -> None:
    assert last_part(b"short", 0.5) == 0
    assert last_part("ä".encode() * 100, 0.5) == 100
    assert last_part("ä".encode() * 101, 0.5) == 100  # not inside a character
    lines = b"0123456789\n" * 20
    assert last_part(lines, 0.5) == 110
    assert last_part(lines, 0.49) == 110


# Reading shards


def prepared(folder: Path) -> Dataset:
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i} " * 20)
    config = PrepareConfig(
        documents=Files(paths=(str(folder),), pattern="*.txt"), tokenizer=ByteTokenizer(), workers=1, shard_tokens=2000
    )
    prepare(config, folder / "out")
    return Dataset(path=str(folder / "out"))


def all_windows(dataset: Dataset, before: Callable[[], object] = lambda: None) -> None:
    config = DataConfig(datasets=(dataset,), verify=False)
    batches = open_batches(config, batch_size=4, seq_len=16, split=Split.TRAIN)
    before()
    for step in range(400):
        batches[step]


@pytest.mark.parametrize("name", ["train-00001.tokens", "train-00001.offsets"])
def test_a_shard_cut_while_in_use_is_named(name: str, tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    with pytest.raises(UserError, match=f"{name}: was cut while in use: 16 bytes are left"):
        all_windows(dataset, lambda: os.truncate(Path(dataset.path, name), 16))


def test_ids_beyond_the_vocabulary_are_refused_as_they_are_read(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    file = Path(dataset.path, "train-00001.tokens")
    ids = np.fromfile(file, "<u2")
    ids[7] = 258
    ids.tofile(file)
    with pytest.raises(UserError, match=r"train-00001\.tokens: holds the id 258 .* has 258 ids"):
        all_windows(dataset)


def test_offsets_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    file = Path(dataset.path, "train-00000.offsets")
    np.fromfile(file, "<i8")[::-1].tofile(file)
    with pytest.raises(UserError, match=r"train-00000\.offsets: its offsets do not rise"):
        all_windows(dataset)


def test_offsets_are_found_between_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepared(tmp_path)
    config = DataConfig(datasets=(dataset,))
    stream = open_batches(config, batch_size=1, seq_len=16, split=Split.TRAIN)
    expected = [stream[i]["segment_ids"] for i in range(200)]
    for stride in (1, 2, 3, 7):
        monkeypatch.setattr("maxlm.data.shards._STRIDE", stride)
        again = open_batches(config, batch_size=1, seq_len=16, split=Split.TRAIN)
        for i, wanted in enumerate(expected):
            np.testing.assert_array_equal(again[i]["segment_ids"], wanted)
        tokens = open_prepared(Path(dataset.path), verify=False).stream(Split.TRAIN)
        for begins, ends in itertools.pairwise(tokens.starts().tolist()):
            assert tokens.document(begins) == tokens.document(ends - 1) == (begins, ends)


# Workers


def test_a_stopped_worker_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_STOPPED_PATIENCE", 2)
    open_tokenizer(ByteTokenizer()).save(tmp_path / "tokenizer")
    started: list[subprocess.Popen[bytes]] = []

    class Noted(workers._Worker):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            started.append(self._process)

    monkeypatch.setattr(workers, "_Worker", Noted)
    made_with = PrepareConfig(documents=Files(paths=("texts",)), tokenizer=ByteTokenizer())
    (tmp_path / UNFINISHED).write_text(json.dumps(serialize.to_dict(made_with)))
    blocks = (workers.DocumentBlock(i, [b"text"], "", b"text", [("texts", i)]) for i in range(100))
    answers = workers.tokenise_blocks(tmp_path, blocks, 2)
    next(answers)
    for process in started:
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"a tokenising process is stopped \(SIGSTOP\)") as caught:
        list(answers)
    assert caught.value.exit_code == 1
    assert all(process.poll() is not None for process in started)


# Tokenizers


def test_an_end_of_its_own_is_saved_and_changes_the_fingerprint(tmp_path: Path) -> None:
    names = {"a": 0, "</s>": 1, "<end>": 2, "<begin>": 3}
    file = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": names, "merges": []}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    path = str(file)
    usual = open_tokenizer(HuggingFaceTokenizer(path=path))
    assert (usual.eos_id, usual.bos_id) == (1, None)
    assert usual.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()  # as ever
    assert open_tokenizer(HuggingFaceTokenizer(path=path, eos="</s>")).fingerprint == usual.fingerprint
    named = open_tokenizer(HuggingFaceTokenizer(path=path, eos="<end>", bos="<begin>"))
    assert named.document_ids([0]) == [3, 0, 2]
    assert named.fingerprint != usual.fingerprint
    for tokenizer in (usual, named):
        tokenizer.save(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved")
        for key in ("eos_id", "bos_id", "fingerprint"):
            assert getattr(again, key) == getattr(tokenizer, key)
    with pytest.raises(UserError, match=r"prepare\.tokenizer\.bos = 'x' is not one of its tokens"):
        open_tokenizer(HuggingFaceTokenizer(path=path, bos="x"))


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"(?=(a+)+$)(a+)+"}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}))
    code = (
        "import sys; from pathlib import Path; from maxlm.config import UserError\n"
        "from maxlm.data.tokenizers import HuggingFace\n"
        "tokenizer = HuggingFace(Path(sys.argv[1])); tokenizer.encode('aa'); print('kept', file=sys.stderr)\n"
        "try: tokenizer.encode('a' * 40 + 'b')\n"
        "except UserError as error: print(error, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    kept, line = done.stderr.splitlines()
    assert kept == "kept"
    assert line.startswith(f"{file}: the tokenizers library breaks on a text that begins 'aaaa")


# JSON of ours


def test_json_of_ours_has_limits(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    deep = b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1)
    for content, words in (
        (b"\xef\xbb\xbf{}", None),
        (b'{"a": {"b": 1}}', None),
        (b"", "config.json: not JSON"),
        (b"5", "config.json: holds int, must be a JSON object"),
        (b"\xff", "config.json: not JSON"),
        (b'{"a": {"b": [0, ' + b"1" * 5000 + b"]}}", r"config\.json: a\.b\.1 is an integer of 5,000 digits"),
        (b'{"a": 1, "a": 2}', "config.json: not JSON .*'a' stands twice"),
        (b"[" * 100_000, "config.json: .* nested more than 64 deep"),
        (deep, r"config\.json: .*a\.a.* nested more than 64 deep"),
    ):
        file.write_bytes(content)
        if words is None:
            assert read_object(file) == json.loads(content.decode("utf-8-sig"))
        else:
            with pytest.raises(UserError, match=words):
                parse_object(content, file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(a named pipe, not a file\)"):
        read_object(file)


def test_the_limit_is_in_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    assert f"{documents.MAX_DOCUMENT_BYTES >> 20} MiB" in text
