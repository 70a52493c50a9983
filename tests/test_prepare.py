"""Preparing data: sources, splits, the same bytes whatever happens, and damage that is noticed."""

import errno
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from maxlm.config import (
    ByteTokenizer,
    Conversations,
    DataConfig,
    Dataset,
    Documents,
    Files,
    HuggingFaceDataset,
    PrepareConfig,
    StandardLibrary,
    TrainSentencePiece,
    UserError,
)
from maxlm.data import dealing
from maxlm.data.__main__ import main
from maxlm.data.documents import Unreadable
from maxlm.data.encoders import text_hash
from maxlm.data.prepare import ensure_prepared, prepare
from maxlm.data.shards import Split, open_prepared, token_dtype
from maxlm.data.sources import iterate_documents
from maxlm.data.workers import DocumentBlock, tokenise_blocks

TEXTS = [f"document {i}: " + "lorem ipsum dolor " * (i * 7 % 40) + "\n" for i in range(300)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def byte_config(*paths: Path, **changes: object) -> PrepareConfig:
    values: dict[str, object] = {"shard_tokens": 20_000, "workers": 1, "validation_fraction": 0.1, **changes}
    return PrepareConfig(documents=Files(paths=tuple(map(str, paths))), tokenizer=ByteTokenizer(), **values)  # type: ignore[arg-type]


def texts_of(folder: Path, split: Split) -> list[str]:
    """The documents of a prepared folder, read with numpy alone."""
    info = json.loads((folder / "dataset.json").read_text())
    texts = []
    for number in range(len(info[split.value])):
        tokens = np.fromfile(folder / f"{split.value}-{number:05d}.tokens", info["dtype"])
        offsets = np.fromfile(folder / f"{split.value}-{number:05d}.offsets", "<i8")
        for ids in np.split(tokens, offsets[1:]):
            assert (ids[0], ids[-1]) == (256, 257)
            texts.append(bytes(ids[1:-1].astype(np.uint8)).decode())
    return texts


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read(documents: Documents) -> tuple[list[str], Unreadable]:
    unreadable = Unreadable()
    return [document.text for document in iterate_documents(documents, unreadable)], unreadable


# Sources


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "zwei ü", "three\nlines\n"]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    lines = plain.read_bytes().splitlines(keepends=True)
    frames = [zstandard.compress(lines[0]), zstandard.compress(b"".join(lines[1:]))]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))  # two frames, as parallel compressors write
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name, text in zip(("a.txt", "deep/b.txt", "deep/c"), texts, strict=True):
        (folder / name).write_text(text)
    (folder / ".hidden").write_text("no")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder"):
        assert read(Files(paths=(str(tmp_path / name),)))[0] == texts, name
    assert read(Files(paths=(str(folder),), pattern="*.txt"))[0] == texts[:2]


def test_large_zst_files_are_read_whole(tmp_path: Path) -> None:
    texts = [os.urandom(300).hex() for _ in range(2000)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes().splitlines(keepends=True)
    packed = b"".join(zstandard.compress(b"".join(lines[i : i + 300])) for i in range(0, 2000, 300))
    (tmp_path / "b.jsonl.zst").write_bytes(packed)
    assert read(Files(paths=(str(tmp_path / "b.jsonl.zst"),)))[0] == texts
    (tmp_path / "b.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    some, unreadable = read(Files(paths=(str(tmp_path / "b.jsonl.zst"),)))
    assert some == texts[: len(some)]
    assert "cut short" in unreadable.examples[0]


def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "\\ud800"}',
    ]
    file.write_bytes(b"\n".join([*lines, b'{"text": "\xff"}', b"", b'["text"]', b'{"text": "last"}']))
    (tmp_path / "bad.txt").write_bytes(b"fine\nthen \xe9\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9])
    texts, unreadable = read(
        Files(paths=tuple(str(tmp_path / name) for name in ("bad.jsonl", "bad.txt", "cut.jsonl.gz")))
    )
    assert texts[:2] == ["good", "last"]
    assert unreadable.count == 7 + 1 + 1
    assert [example.split(": ")[0] for example in unreadable.examples] == [f"{file}:{row}" for row in (2, 3, 4, 5, 6)]
    with pytest.raises(UserError, match=r"bad\.txt:2: not UTF-8 \(byte 0xe9\)"):
        list(iterate_documents(Files(paths=(str(tmp_path / "bad.txt"),)), Unreadable(strict=True)))


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no such file"):
        read(Files(paths=(str(tmp_path / "missing"),)))
    with pytest.raises(UserError, match=r"holds no file named like '\*\.py'"):
        read(Files(paths=(str(tmp_path),), pattern="*.py"))


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"holds no file named like '\*'; .*: cannot be read \(Permission denied\)"):
        read(Files(paths=(str(tmp_path),), pattern="*"))


def test_hugging_face_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> Iterator[dict[str, object]]:
        asked.append((args, kwargs))
        return iter([{"text": "one"}, {"text": None}, {"text": "two"}])

    library = types.SimpleNamespace(load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=KeyError))
    monkeypatch.setitem(sys.modules, "datasets", library)
    texts, unreadable = read(HuggingFaceDataset(name="some/thing", subset="en"))
    assert texts == ["one", "two"]
    assert unreadable.examples == ["some/thing/en[train]:2: 'text' holds null, not text"]
    assert asked == [(("some/thing", "en"), {"split": "train", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'maxlm\[hub\]'"):
        read(HuggingFaceDataset(name="some/thing"))


def test_the_standard_library_has_no_tests_and_a_fixed_order() -> None:
    files = [document.file for document in iterate_documents(StandardLibrary(), Unreadable())]
    assert len(files) > 300
    assert any(file.endswith("/argparse.py") for file in files)
    assert not any("/test/" in file or "/site-packages/" in file for file in files)
    assert files == [document.file for document in iterate_documents(StandardLibrary(), Unreadable())]


# Splits and layout


def test_documents_come_out_as_they_went_in(corpus: Path, tmp_path: Path) -> None:
    info = prepare(byte_config(corpus), tmp_path / "out")
    train, held_out = (texts_of(tmp_path / "out", split) for split in Split)
    below = int(0.1 * 2**64)
    assert train == [text for text in TEXTS if text_hash(text.encode()) >= below]
    assert held_out == [text for text in TEXTS if text_hash(text.encode()) < below]
    assert 10 < len(held_out) < 60
    assert info.documents(Split.TRAIN) == len(train)
    assert info.text_bytes(Split.TRAIN) == sum(len(text.encode()) for text in train)
    assert info.tokens(Split.TRAIN) == info.text_bytes(Split.TRAIN) + 2 * len(train)
    assert len(info.train) > 3
    assert all(20_000 <= shard.tokens < 21_000 for shard in info.train[:-1])
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix not in (".tokens", ".offsets")) == [
        "dataset.json",
        "tokenizer",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_validation_is_never_empty(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "_BLOCK_DOCUMENTS", 4)  # the smallest hash wanders from block to block
    corpus = write_jsonl(tmp_path / "c.jsonl", TEXTS[:count])
    prepare(byte_config(corpus, validation_fraction=1e-6), tmp_path / "out")
    train, held_out = (texts_of(tmp_path / "out", split) for split in Split)
    assert sorted(train + held_out) == sorted(TEXTS[:count])
    smallest = min(TEXTS[:count], key=lambda text: text_hash(text.encode()))
    assert held_out == ([] if count == 1 else [smallest])


def test_nothing_held_out_on_request(corpus: Path, tmp_path: Path) -> None:
    assert prepare(byte_config(corpus, validation_fraction=0.0), tmp_path / "out").validation == ()
    assert texts_of(tmp_path / "out", Split.TRAIN) == TEXTS


def test_wide_vocabularies_take_wide_tokens() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32


# The same bytes, whatever happens


def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealing, "_BLOCK_DOCUMENTS", 7)
    tokenizer = TrainSentencePiece(vocab_size=320)
    for workers in (1, 3):
        documents = Files(paths=(str(corpus),))
        prepare(
            PrepareConfig(documents=documents, tokenizer=tokenizer, workers=workers, shard_tokens=5_000),
            tmp_path / str(workers),
        )
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3")


_KILLED = """
import os, pathlib, signal, sys
from maxlm.config import ByteTokenizer, Files, PrepareConfig
from maxlm.data import dealing, encoders, prepare
corpus, out, fraction, events = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
dealing._BLOCK_DOCUMENTS = 5
prepare._SECONDS_BETWEEN_RECORDS = 0.0

def mortal(function):
    def call(*arguments):
        global events
        events -= 1
        if events == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

encoders.tokenise = mortal(encoders.tokenise)
os.fsync = mortal(os.fsync)
pathlib.Path.replace = mortal(pathlib.Path.replace)
documents = Files(paths=(corpus,))
prepare.prepare(
    PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), shard_tokens=20_000, workers=1,
                  validation_fraction=fraction),
    out,
)
"""


def start(corpus: Path, out: Path, fraction: str, events: int = -1) -> subprocess.Popen[str]:
    """`prepare` in a process that kills itself at its nth block tokenised, file synced or file renamed."""
    command = [sys.executable, "-c", _KILLED, str(corpus), str(out), fraction, str(events)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("fraction", ["0.1", "1e-6"])
def test_killed_and_run_again_it_writes_the_same_bytes(corpus: Path, tmp_path: Path, fraction: str) -> None:
    assert start(corpus, tmp_path / "whole", fraction).wait() == 0
    seen = [0]
    for events in (2, 4, 37, 50, 51, 52, 53):
        assert start(corpus, tmp_path / "killed", fraction, events).wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "dataset.json").exists()
        progress = tmp_path / "killed" / "progress.json"
        seen.append(json.loads(progress.read_text())["documents"] if progress.exists() else 0)
    assert seen == sorted(seen)
    assert 0 < seen[3] < seen[-1] < len(TEXTS)  # each run went on from where the last one was
    assert start(corpus, tmp_path / "killed", fraction).wait() == 0
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_an_input_that_changed_after_the_interruption_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealing, "_BLOCK_DOCUMENTS", 5)
    monkeypatch.setattr("maxlm.data.prepare._SECONDS_BETWEEN_RECORDS", 0.0)
    write_jsonl(corpus, [*TEXTS[:100], *["\ud800"], *TEXTS[100:]])
    with pytest.raises(UserError, match=r"corpus\.jsonl:101: .* surrogate"):
        prepare(byte_config(corpus, strict=True), tmp_path / "out")
    write_jsonl(corpus, ["another beginning", *TEXTS[1:]])
    with pytest.raises(UserError, match="has changed since this folder was begun, within the first 100 documents"):
        prepare(byte_config(corpus), tmp_path / "out")
    write_jsonl(corpus, TEXTS)  # mended
    prepare(byte_config(corpus), tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out", Split.TRAIN) + texts_of(tmp_path / "out", Split.VALIDATION)) == sorted(
        TEXTS
    )


def test_a_finished_folder_stays_and_another_config_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = prepare(byte_config(corpus), out)
    before = folder_bytes(out)
    assert prepare(byte_config(corpus, workers=2), out) == info
    assert folder_bytes(out) == before
    with pytest.raises(UserError, match=r"shard_tokens = 20000 there and 9000 now"):
        prepare(byte_config(corpus, shard_tokens=9_000), out)
    with pytest.raises(UserError, match="is not empty"):
        prepare(byte_config(corpus), tmp_path)


def test_one_process_at_a_time_writes_a_folder(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [start(corpus, out, "0.1") for _ in range(2)]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == f"waiting for another process that prepares {out}\n"
    assert [process.wait() for process in both] == [0, 0]
    open_prepared(out, verify=True)


# Mistakes


def test_empty_and_unreadable_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["", ""])
    with pytest.raises(UserError, match="holds no text"):
        prepare(byte_config(corpus), tmp_path / "out")
    corpus.write_text('{"text": "a"}\nbroken\n{"text": ""}\n{"text": "b"}\n')
    info = prepare(byte_config(corpus), tmp_path / "out")  # the same folder: nothing had been written
    assert (info.unreadable, info.empty, info.documents(Split.TRAIN)) == (1, 1, 1)
    assert f"{corpus}:2: not JSON" in capsys.readouterr().err
    with pytest.raises(UserError, match="leaves none of 2 documents to train on"):
        prepare(byte_config(corpus, validation_fraction=0.999999), tmp_path / "other")


def test_a_full_disk_is_one_line_and_the_run_continues(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            prepare(byte_config(corpus), tmp_path / "out")
    prepare(byte_config(corpus), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        prepare(byte_config(corpus), tmp_path / "file" / "out")


def test_a_disk_that_fills_while_records_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever write: one line, no data set, and the same command makes the one that there would have been."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(40)))
    documents = Conversations(paths=(str(file),), template="plain")
    config = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.2, workers=1)
    prepare(config, tmp_path / "fresh")
    sync, calls, failed = os.fsync, 0, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failed:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    prepare(config, tmp_path / "counted")
    assert calls > 5
    for failed in range(1, calls + 1):
        out, calls = tmp_path / f"out{failed}", 0
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            prepare(config, out)
        with pytest.raises(UserError, match="holds no finished data set"):
            open_prepared(out, verify=True)
        prepare(config, out)
        assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")


def test_a_dead_worker_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a tokenising process died \(exit code 1\)"):
        list(tokenise_blocks(tmp_path / "no tokenizer here", [DocumentBlock(0, [b"x"], "", b"x", [("x", 1)])], 2))


@pytest.mark.parametrize("name", ["train-00001.tokens", "train-00000.offsets", "validation-00000.tokens"])
def test_damage_is_noticed(corpus: Path, tmp_path: Path, name: str) -> None:
    prepare(byte_config(corpus), tmp_path / "out")
    file = tmp_path / "out" / name
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    open_prepared(tmp_path / "out", verify=False)
    with pytest.raises(UserError, match=f"{name}: has changed"):
        open_prepared(tmp_path / "out", verify=True)
    file.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=f"{name}: {len(whole) - 8} bytes, dataset.json says {len(whole)}"):
        open_prepared(tmp_path / "out", verify=False)
    file.unlink()
    with pytest.raises(UserError, match=f"{name}: cannot be read .*, {len(whole)} bytes expected"):
        open_prepared(tmp_path / "out", verify=False)


def test_missing_data_is_made_or_asked_for(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=f"python -m maxlm.data prepare PATH... --out {out}"):
        ensure_prepared(DataConfig(datasets=(Dataset(path=out),)))
    config = DataConfig(datasets=(Dataset(path=out, prepare=byte_config(corpus)),))
    ensure_prepared(config)
    ensure_prepared(config)
    assert capsys.readouterr().out == f"preparing {out} from {corpus}\n"


# Command line


def test_the_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    main(["prepare", str(corpus), "--out", out, "--tokenizer", "bytes", "--workers", "1"])
    info = open_prepared(Path(out), verify=True).info
    said = capsys.readouterr().out
    for split in Split:
        assert f"{info.documents(split)} documents" in said
        assert f"{info.tokens(split):,} tokens" in said
    main(["tokenizer", "train", str(corpus), "--out", str(tmp_path / "t"), "--vocab_size", "320"])
    assert "bytes/token" in capsys.readouterr().out
    main(["prepare", str(corpus), "--out", str(tmp_path / "p"), "--tokenizer", str(tmp_path / "t"), "--workers", "1"])
    capsys.readouterr()
    main(["tokenizer", "report", str(corpus), "--tokenizer", str(tmp_path / "p" / "tokenizer")])
    assert open_prepared(tmp_path / "p", verify=True).tokenizer.fingerprint in capsys.readouterr().out
    with pytest.raises(UserError, match="--out is missing"):
        main(["prepare", str(corpus)])
    with pytest.raises(UserError, match="three different sources"):
        main(["prepare", str(corpus), "--stdlib", "--out", out])
    with pytest.raises(UserError, match="unknown command 'tokenize'"):
        main(["tokenize"])


def test_help_is_instant_and_workers_are_light() -> None:
    for code in (
        "import maxlm.data.__main__ as m; m.main([])",
        "import maxlm.data.workers, maxlm.data.prepare, maxlm.data.train_tokenizer",
    ):
        subprocess.run([sys.executable, "-c", f"{code}\nimport sys; assert 'jax' not in sys.modules"], check=True)
