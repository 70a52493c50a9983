"""Documents of every ending and encoding, and what may be wrong with them, prepared by the real command."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from faults.case import Case
from faults.tools import ROOT, Ended, command, small_disk, variables

TEXTS = ("first text", "zweiter Text: ü", "a third\nof two lines")
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
GOOD = {"good.jsonl": b'{"text": "a good one"}\n{"text": "another good one"}\n'}
GOOD_TEXTS = ("a good one", "another good one")
Run = Callable[..., Ended]
"""`faults.tools.command`, or the same in this process."""
READ, PARTLY, MISTAKE, FAILURE = 0, 3, 2, 1
BIG = b"7" * 5000
LONG = "y" * 200_000
DEEP = b"[" * 100_000 + b"]" * 100_000


def _long_window(body: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # does not record the size
    return packer.compress(body) + packer.flush()


@dataclass(frozen=True, kw_only=True)
class Given:
    """A folder of files that is prepared, and what must come of it."""

    name: str
    files: Mapping[str, bytes | Callable[[Path], object]]
    """Contents, or what makes the file."""
    texts: tuple[str, ...] = TEXTS
    code: int = READ
    says: tuple[str, ...] = ()
    """Parts of the lines that it prints."""
    words: tuple[str, ...] = ()
    """More of the command line."""
    paths: tuple[str, ...] = ("in",)
    short: bool = False


def _read(name: str, ending: str, body: bytes, **more: object) -> Given:
    return Given(name=name, files={f"docs{ending}": body}, **more)  # type: ignore[arg-type]


def _beside_good(name: str, file: str, body: bytes | Callable[[Path], object], *says: str, **more: object) -> Given:
    """Something bad beside something good, which must be kept."""
    values = {"texts": GOOD_TEXTS, "code": PARTLY, **more}
    return Given(name=name, files={**GOOD, file: body}, says=(f"{file}", *says), **values)  # type: ignore[arg-type]


CSV = "title,text\r\n" + "".join(f'x,"{text}"\r\n' for text in TEXTS)
ARRAY = json.dumps([{"text": text} for text in TEXTS])

GIVEN = (
    _read("JSON lines named .ndjson", ".ndjson", LINES),
    _read("JSON lines named .JSONL", ".JSONL", LINES),
    _read("JSON lines named .json", ".json", LINES),
    _read("a JSON list", ".json", ARRAY.encode(), short=True),
    _read("a JSON list on many lines", ".json", json.dumps(json.loads(ARRAY), indent=2).encode()),
    _read("a JSON object on many lines", ".json", b'{\n  "text":\n  "alone here"\n}\n', texts=("alone here",)),
    _read("objects one after the other", ".json", b'{"text":\n"one"}{"text": "two"}\n', texts=("one", "two")),
    _read("JSON lines in gzip", ".jsonl.gz", gzip.compress(LINES)),
    _read("JSON lines in gzip, capitals", ".JSONL.GZ", gzip.compress(LINES)),
    _read("JSON lines in zstd", ".ndjson.zst", zstandard.compress(LINES)),
    _read("JSON lines in bzip2", ".jsonl.bz2", bz2.compress(LINES)),
    _read("JSON lines in xz", ".json.xz", lzma.compress(LINES)),
    _read("zstd with a window of 2 GiB", ".jsonl.zst", _long_window(LINES), short=True),
    _read("a byte order mark before JSON lines", ".jsonl", b"\xef\xbb\xbf" + LINES),
    _read("a byte order mark before a JSON list", ".json", b"\xef\xbb\xbf" + ARRAY.encode()),
    _read("CRLF in JSON lines", ".jsonl", LINES.replace(b"\n", b"\r\n")),
    _read("no newline at the end", ".jsonl", LINES.rstrip()),
    _read("CSV", ".csv", CSV.encode()),
    _read("CSV with a byte order mark, in gzip", ".csv.gz", gzip.compress(b"\xef\xbb\xbf" + CSV.encode())),
    _read("TSV", ".tsv", b"text\tn\none\t1\ntwo\t2\n", texts=("one", "two")),
    _read(
        "a long cell of CSV",
        ".csv",
        b"text\n" + b"y" * 200_000 + b"\n" + b"z" * 200_000,
        texts=("y" * 200_000, "z" * 200_000),
    ),
    _read(
        "an integer of 5000 digits", ".jsonl", b'{"n": ' + BIG + b', "text": "kept"}\n' + LINES, texts=("kept", *TEXTS)
    ),
    Given(
        name="text: byte order mark, CRLF, gzip, zstd",
        files={
            "a.txt": b"\xef\xbb\xbfmarked",
            "b.md": b"two\r\nlines\r\n",
            "c.txt.gz": gzip.compress(b"packed"),
            "d.TXT.ZST": zstandard.compress("gepäckt".encode()),
            "e.txt.gz": gzip.compress(b"\xef\xbb\xbfboth"),
        },
        texts=("marked", "two\r\nlines\r\n", "packed", "gepäckt", "both"),
    ),
    Given(
        name="empty files",
        files={
            "a.txt": b"",
            "b.jsonl": b"",
            "c.json": b"",
            "d.txt.gz": gzip.compress(b""),
            "e.txt.gz": b"",
            **GOOD,
            "f.jsonl.zst": b"",
            "g.txt": b"\xef\xbb\xbf",
        },
        texts=GOOD_TEXTS,
    ),
    _beside_good("an empty CSV", "a.csv", b"", "has no column 'text'"),
    _beside_good("UTF-16", "a.txt", "schön".encode("utf-16"), "UTF-16, must be UTF-8", "iconv"),
    _beside_good(
        "UTF-16, big end first", "a.jsonl", b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "UTF-16", "iconv"
    ),
    _beside_good("UTF-32", "a.csv", CSV.encode("utf-32"), "UTF-32"),
    _beside_good("UTF-16 without its mark", "a.txt", "hello".encode("utf-16-le"), ":1: holds NUL bytes"),
    _beside_good("Latin-1", "a.txt", b"one\nsch\xf6n\n", "a.txt:2: not UTF-8 (byte 0xf6)", "iconv"),
    _beside_good("Latin-1 in CSV", "a.csv", b"text\nsch\xf6n\n", "a.csv:2: 'text' holds byte 0xf6"),
    _beside_good("deep nesting", "a.jsonl", DEEP + b"\n", "a.jsonl:1: not JSON (nested too deep)"),
    _beside_good("deep nesting in .json", "a.json", DEEP, "nested too deep"),
    _beside_good("half a surrogate pair", "a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
    _beside_good(
        "no such key", "a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: has no key 'text', only ['body']; set text_key"
    ),
    _beside_good("a number for a text", "a.json", b'[{"text": 5}]', "a.json:1: 'text' holds a number, not text"),
    _beside_good(
        "a list that breaks off", "a.json", ARRAY.encode()[:-30], "a.json:1: not JSON", texts=(*TEXTS[:2], *GOOD_TEXTS)
    ),
    _beside_good(
        "a bad line between good ones",
        "a.jsonl",
        b'{"text": "1"}\n{"text"\n{"text": "3"}\n',
        "a.jsonl:2: not JSON",
        texts=("1", "3", *GOOD_TEXTS),
        short=True,
    ),
    _beside_good("no such column", "a.csv", b"title,body\n1,2\n", "has no column 'text', only ['title', 'body']"),
    _beside_good("a short row", "a.csv", b"n,text\n1\n2,two\n", "a.csv:2: has 1 columns", texts=("two", *GOOD_TEXTS)),
    _beside_good(
        "a quote without end", "a.csv", b'text\nfine\n"no end\nx\n', "a.csv:3: not a row", texts=("fine", *GOOD_TEXTS)
    ),
    _beside_good("gzip cut short", "a.txt.gz", gzip.compress(b"x" * 999)[:-9], "damaged or cut short"),
    _beside_good("gzip by name alone", "a.jsonl.gz", LINES, "damaged or cut short here (Not a gzipped file"),
    _beside_good("bzip2 by name alone", "a.txt.bz2", LINES, "damaged or cut short"),
    _beside_good("xz by name alone", "a.txt.xz", LINES, "damaged or cut short"),
    _beside_good("zstd by name alone", "a.txt.zst", LINES, "damaged or cut short"),
    _beside_good("gzip without its ending", "a.txt", gzip.compress(b"x"), "gzip; let its name end in .gz"),
    _beside_good("a picture", "a.png", b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
    _beside_good("a PDF", "a.pdf", b"%PDF-1.4 all in ASCII", "a PDF"),
    _beside_good("a zip archive", "a.zip", b"PK\x03\x04\0\0", "a zip archive"),
    _beside_good("bytes", "a.bin", bytes(range(256)), "holds NUL bytes"),
    _beside_good("no parquet", "a.parquet", b"PAR1 not really", "not a whole parquet file"),
    _beside_good("a named pipe", "a.txt", os.mkfifo, "a named pipe, not a file", short=True),
    _beside_good("a named pipe of JSON", "a.jsonl.gz", os.mkfifo, "a named pipe, not a file"),
    _beside_good(
        "a socket", "a.txt", lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "a socket, not a file"
    ),
    _beside_good("a device", "a.txt", lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    _beside_good("a link to nothing", "a.txt", lambda path: path.symlink_to("nothing"), "cannot be read (No such file"),
    _beside_good(
        "a link to itself", "a.txt", lambda path: path.symlink_to(path.name), "cannot be read (Too many levels"
    ),
    _beside_good(
        "a link to a file that is read",
        "z.jsonl",
        lambda path: path.symlink_to("good.jsonl"),
        "the same file as",
        code=READ,
    ),
    _beside_good(
        "a hard link to a file that is read",
        "z.jsonl",
        lambda path: path.hardlink_to(path.parent / "good.jsonl"),
        "the same file as",
        code=READ,
    ),
    _beside_good(
        "a link to the folder itself", "loop", lambda path: path.symlink_to("."), "a link to a folder", code=READ
    ),
    Given(
        name="a folder behind a link",
        files={**GOOD, "linked": lambda path: path.symlink_to(_elsewhere(path))},
        texts=("elsewhere", *GOOD_TEXTS),
    ),
    Given(
        name="a file and its folder",
        files=GOOD,
        texts=GOOD_TEXTS,
        paths=("in", "in/good.jsonl"),
        says=("the same file as",),
    ),
    Given(
        name="nothing that can be read",
        files={"a.png": b"\x89PNG\r\n"},
        texts=(),
        code=MISTAKE,
        says=("holds no text",),
    ),
    Given(
        name="strict",
        files={**GOOD, "z.jsonl": b"{\n"},
        texts=(),
        code=MISTAKE,
        words=("--strict",),
        says=("z.jsonl:1",),
    ),
)


def _elsewhere(path: Path) -> Path:
    there = path.parent.parent / "elsewhere"
    there.mkdir()
    (there / "a.txt").write_text("elsewhere")
    return there


def fill(place: Path, files: Mapping[str, bytes | Callable[[Path], object]]) -> None:
    place.mkdir()
    for name, content in files.items():
        path = place / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)


def prepare(
    place: Path,
    *words: str,
    paths: tuple[str, ...] = ("in",),
    tokenizer: str = "bytes",
    prefix: tuple[str, ...] = (),
    run: Run = command,
) -> Ended:
    """`prepare in --out out` with bytes for tokens."""
    fixed = ("prepare", *paths, "--out", "out", "--tokenizer", tokenizer)
    return run("maxlm.data", *fixed, *words, folder=place, timeout=60, prefix=prefix)


def documents(out: Path) -> list[str]:
    """All documents of a folder that was prepared with bytes for tokens."""
    found = []
    for file in sorted(out.glob("*.tokens")):
        ids = np.fromfile(file, "<u2")
        for one in np.split(ids, np.fromfile(file.with_suffix(".offsets"), "<i8")[1:]):
            found.append(bytes(one[1:-1].astype(np.uint8)).decode())
    return found


def check_given(given: Given, place: Path, run: Run = command) -> str:
    fill(place / "in", given.files)
    ended = prepare(place, "--workers", "1", *given.words, paths=given.paths, run=run)
    assert ended.code == given.code, f"exit code {ended.code}: {ended.err}"
    for part in given.says:
        assert part in ended.err, f"does not say {part!r}: {ended.err}"
    assert "Traceback" not in ended.err, ended.err
    found = documents(place / "out") if given.texts else []
    if len(given.texts) == 1:  # it is cut, and its end held out
        found = ["".join(found)]
    assert sorted(found) == sorted(given.texts), f"{found} and not {given.texts}"
    return f"exit code {ended.code}, {len(found)} documents"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What happens to a file of a finished folder of prepared data, and what is said of it by whoever opens it."""

    name: str
    file: str
    change: Callable[[Path], object]
    says: tuple[str, ...]
    short: bool = False


def _json(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _replace(old: bytes, new: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _drop_a_shard(path: Path) -> None:
    _json(lambda record: record["train"].pop())(path)
    for file in sorted(path.parent.glob("train-*"))[-2:]:
        file.unlink()


RECORD, DESCRIPTOR = "dataset.json", "tokenizer/config.json"

DAMAGE = (
    Damage(name="the record is empty", file=RECORD, change=_write(b""), says=("dataset.json: not JSON",)),
    Damage(name="the record is a list", file=RECORD, change=_write(b"[1]"), says=("dataset.json: holds list",)),
    Damage(name="the record is a named pipe", file=RECORD, change=_pipe, says=("dataset.json", "a named pipe")),
    Damage(
        name="the record is nested deep",
        file=RECORD,
        change=_write(b'{"a": ' + DEEP + b"}"),
        says=("dataset.json", "deep"),
    ),
    Damage(
        name="the record has an integer of 5000 digits",
        file=RECORD,
        change=_replace(b'"unreadable": 0', b'"unreadable": ' + BIG),
        says=("dataset.json: unreadable is an integer of 5,000 digits",),
        short=True,
    ),
    Damage(
        name="a key stands twice in the record",
        file=RECORD,
        change=_replace(b"{", b'{"empty": 0,'),
        says=("dataset.json", "'empty' stands twice"),
    ),
    Damage(
        name="a count is text",
        file=RECORD,
        change=_json(lambda record: record["train"][0].update(tokens="5")),
        says=("dataset.json", "tokens = '5' must be"),
    ),
    Damage(
        name="a count is negative",
        file=RECORD,
        change=_json(lambda record: record.update(unreadable=-1)),
        says=("dataset.json", "unreadable = -1 must be"),
    ),
    Damage(
        name="a key is missing",
        file=RECORD,
        change=_json(lambda record: record.pop("empty")),
        says=("dataset.json", "empty"),
    ),
    Damage(
        name="a shard is dropped from the record",
        file=RECORD,
        change=_json(lambda record: record["train"].pop()),
        says=("dataset.json: names", "train-0000", "is there"),
        short=True,
    ),
    Damage(
        name="a shard is dropped, and its files",
        file=RECORD,
        change=_drop_a_shard,
        says=("dataset.json: tokens_in_all", "the shards that it names have"),
    ),
    Damage(
        name="the descriptor is cut",
        file=DESCRIPTOR,
        change=_write(b'{"kind": "by'),
        says=("tokenizer/config.json: not JSON",),
    ),
    Damage(
        name="the descriptor names another kind",
        file=DESCRIPTOR,
        change=_json(lambda descriptor: descriptor.update(kind="os.system")),
        says=("tokenizer/config.json", "kind = 'os.system' must be one of"),
    ),
    Damage(
        name="the descriptor is a named pipe",
        file=DESCRIPTOR,
        change=_pipe,
        says=("tokenizer/config.json", "a named pipe"),
    ),
    Damage(
        name="a shard is cut",
        file="train-00000.tokens",
        change=lambda path: os.truncate(path, 10),
        says=("train-00000.tokens: 10 bytes",),
    ),
)


def check_damage(damage: Damage, place: Path, run: Run = command) -> str:
    fill(place / "in", {"a.jsonl": LINES * 5})
    words = ("--workers", "1", "--shard_tokens", "40")
    ended = prepare(place, *words, run=run)
    assert ended.code == READ, ended.err
    damage.change(place / "out" / damage.file)
    ended = prepare(place, *words, run=run)
    assert ended.code == MISTAKE, f"exit code {ended.code}: {ended.err}"
    assert len(ended.errors) == 1, ended.err
    for part in damage.says:
        assert part in ended.errors[0], f"does not say {part!r}: {ended.errors[0]}"
    return ended.errors[0][:80]


def out_inside_the_input(place: Path, run: Run = command) -> str:
    fill(place / "in", GOOD)
    words = ("prepare", "in", "--tokenizer", "bytes", "--workers", "1", "--out")
    for out in ("in/data/first", "in/data/second"):
        ended = run("maxlm.data", *words, out, folder=place)
        assert ended.code == READ, ended.err
        assert sorted(documents(place / out)) == sorted(GOOD_TEXTS)
    assert "first: prepared data, not documents" in ended.err, ended.err
    assert "second: the folder that is being written" in ended.err, ended.err
    return "left out, and said"


BOMB = 600 << 20
"""Bytes when decompressed: more than a document may have."""


def _bomb(name: str, pack: Callable[[bytes], bytes], place: Path) -> str:
    fill(place / "in", {**GOOD, name: pack(b" " * BOMB)})
    ended = prepare(place, "--workers", "1", prefix=("prlimit", f"--data={3 << 30}"))
    assert ended.code == PARTLY, f"exit code {ended.code}: {ended.err}"
    assert name in ended.err, ended.err
    assert "more than 256 MiB" in ended.err, ended.err
    assert sorted(documents(place / "out")) == sorted(GOOD_TEXTS)
    return "refused within 3 GiB of memory"


def _a_worker(what: signal.Signals, place: Path) -> str:
    """One of two tokenising processes is stopped or killed."""
    fill(place / "in", {f"{i}.txt": b"some words " * 100_000 for i in range(20)})
    words = ["prepare", "in", "--out", "out", "--tokenizer", "bytes", "--workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "maxlm.data", *words], cwd=place, env=variables(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            serves = lambda pid: b"maxlm.data.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()
            until = time.monotonic() + 60
            # Before it is that program, Popen itself waits for it.
            while not ((there := children.read_text().split()) and serves(there[0])) and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(int(there[0]), what)
            _, err = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == FAILURE, f"exit code {process.returncode}: {err}"
    assert err.startswith("error: a tokenising process "), err
    assert not any(Path(f"/proc/{pid}").exists() for pid in there), "a worker is left"
    again = prepare(place, "--workers", "1")
    assert again.code == READ, again.err
    return err.strip()[:80]


def _letter_tokenizer(path: Path, *special: str, pattern: str | None = None) -> None:
    """A tokenizer.json of single letters, with special tokens, and a regular expression that cuts the text."""
    names = [*(chr(i) for i in range(97, 123)), " ", *special]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": names.index(one), "content": one, "special": True, **plain} for one in special]
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []}
    pre_tokenizer = cut if pattern else None
    path.write_text(
        json.dumps({"version": "1.0", "added_tokens": added, "pre_tokenizer": pre_tokenizer, "model": model})
    )


def _regex(workers: str, place: Path) -> str:
    fill(place / "in", {"a.txt": b"fine", "b.txt": b"a" * 40 + b"b"})
    _letter_tokenizer(place / "tokenizer.json", "</s>", pattern=r"(?=(a+)+$)(a+)+")
    ended = prepare(place, "--workers", workers, tokenizer="tokenizer.json")
    assert ended.code == MISTAKE, f"exit code {ended.code}: {ended.err}"
    assert ended.err.startswith("error: out/tokenizer/tokenizer.json: the tokenizers library breaks"), ended.err
    assert len(ended.err.splitlines()) == 1, ended.err
    return ended.errors[0][:80]


DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
ODD, OTHER = "<odd end>", "<other>"
ENDS = (
    ("known by name", (DEEPSEEK,), None, (), DEEPSEEK),
    ("named on the command line", (ODD, OTHER), None, ("--eos", ODD), ODD),
    ("named beside the file", (ODD, OTHER), {"eos_token": {"content": OTHER}}, (), OTHER),
    ("not known", (ODD, OTHER), {"eos_token": None}, (), None),
    ("no token", (ODD, OTHER), None, ("--eos", "</s>"), None),
)
"""Case, special tokens, tokenizer_config.json, words, the end of documents."""


def check_end(
    special: tuple[str, ...],
    beside: object,
    words: tuple[str, ...],
    end: str | None,
    place: Path,
    run: Run = command,
) -> str:
    fill(place / "in", {"a.txt": b"one", "b.txt": b"two"})
    _letter_tokenizer(place / "tokenizer.json", *special)
    if beside is not None:
        (place / "tokenizer_config.json").write_text(json.dumps(beside))
    ended = prepare(place, "--workers", "1", *words, tokenizer="tokenizer.json", run=run)
    if end is None:
        assert ended.code == MISTAKE, f"exit code {ended.code}: {ended.err}"
        assert "eos" in ended.errors[0], ended.err
        assert "'<odd end>', '<other>'" in ended.errors[0], ended.err
        return ended.errors[0][:80]
    assert ended.code == READ, ended.err
    ids = np.concatenate([np.fromfile(file, "<u2") for file in sorted((place / "out").glob("*.tokens"))])
    assert np.count_nonzero(ids == 27 + special.index(end)) == 2, ids
    return f"{end} ends both documents"


SMALL = {
    "data.datasets.0.prepare": "None",
    "data.datasets.0.path": "out",
    "train.steps": "2",
    "train.batch_size": "8",
    "train.seq_len": "64",
    "model.d_model": "64",
    "model.n_layers": "1",
    "observe.sample_tokens": "0",
    "run_dir": "run",
}


def train(place: Path, **changes: str) -> Ended:
    words = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    config = str(ROOT / "configs" / "tiny.py")
    options = [f"--{key}={value}" for key, value in words.items()]
    return command("maxlm.train", "--config", config, *options, folder=place, timeout=300)


def _one_book(place: Path) -> str:
    fill(place / "in", {"book.txt": b"".join(b"Line %d of a book.\n" % i for i in range(2000))})
    assert prepare(place).code == READ
    ended = train(place)
    assert ended.code == READ, ended.err
    assert "held-out loss" in ended.out + ended.err
    too_long = train(place, train__seq_len="480", run_dir="other")
    assert too_long.code == MISTAKE, too_long.err
    fraction = too_long.errors[0].partition("prepare.validation_fraction = ")[2].split(",")[0]
    again = ("prepare", "in", "--out", "more", "--tokenizer", "bytes", "--validation_fraction", fraction)
    assert command("maxlm.data", *again, folder=place).code == READ
    works = train(place, train__seq_len="480", run_dir="other", data__datasets__0__path="more")
    assert works.code == READ, works.err
    return "a held-out loss, and advice that works"


def _foreign_ids(place: Path) -> str:
    fill(place / "in", {"book.txt": b"words of a book\n" * 2000})
    assert prepare(place).code == READ
    file = place / "out" / "train-00000.tokens"
    np.full(file.stat().st_size // 2, 300, "<u2").tofile(file)
    ended = train(place, data__verify="False")
    assert ended.code == MISTAKE, f"exit code {ended.code}: {ended.err}"
    assert "train-00000.tokens: holds the id 300" in ended.errors[0], ended.err
    return ended.errors[0][:80]


def _full_disk(place: Path) -> str:
    """Records are prepared and built on a disk that has no room for them; then there is room."""
    lines = [json.dumps({"prompt": f"What is {n}?", "completion": f"{n}!", "label": n % 3 == 0}) for n in range(3000)]
    (place / "records.jsonl").write_text("\n".join(lines))
    ways = ("--purpose", "binary", "--tokenizer", "bytes", "--template", "plain")
    with small_disk(place / "disk", 64 << 10) as disk:
        for words in (("prepare", *ways, "--out", "disk/out"), ("build", "tags", "--out", "disk/o")):
            ended = command("maxlm.data", *words, "records.jsonl", folder=place)
            assert ended.code == MISTAKE and len(ended.errors) == 1, f"exit code {ended.code}: {ended.err}"
            assert "cannot be written (No space left on device)" in ended.errors[0], ended.err
        assert not list(disk.glob("o*.partial")) and not (disk / "o").exists(), "half of a file"
        early = train(place, data__datasets__0__path="disk/out")
        assert early.code == MISTAKE and "disk/out" in early.errors[0], early.err
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        for out in ("disk/out", "fresh"):
            again = command("maxlm.data", "prepare", *ways, "--out", out, "records.jsonl", folder=place)
            assert again.code == READ, again.err
        for one in (place / "fresh").rglob("*"):
            assert one.is_dir() or one.read_bytes() == (disk / "out" / one.relative_to(place / "fresh")).read_bytes()
    return ended.errors[0][:80]


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, compresslevel=1)


BOMBS: tuple[tuple[str, str, Callable[[bytes], bytes]], ...] = (
    ("a gzip bomb as text", "a.txt.gz", _gzip),
    ("a gzip bomb as one line", "a.jsonl.gz", _gzip),
    ("a zstd bomb as text", "a.txt.zst", zstandard.compress),
    ("a zstd bomb as JSON", "a.json.zst", zstandard.compress),
    ("a zstd bomb as CSV", "a.csv.zst", lambda body: zstandard.compress(b"text\n" + body)),
)
SPECIAL: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    ("--out inside the input", "left out", out_inside_the_input),
    ("a tokenising process is stopped", "a line, no hang", functools.partial(_a_worker, signal.SIGSTOP)),
    ("a tokenising process is killed", "a line", functools.partial(_a_worker, signal.SIGKILL)),
    ("a regular expression that backtracks", "a line", functools.partial(_regex, "1")),
    ("a regular expression that backtracks, in a worker", "a line", functools.partial(_regex, "2")),
    ("a single book", "a held-out loss", _one_book),
    ("records on a full disk", "a line; the same command goes on", _full_disk),
    ("ids beyond the vocabulary, unverified", "refused as they are read", _foreign_ids),
)


def cases() -> Iterator[Case]:
    for given in GIVEN:
        promise = {READ: "read", PARTLY: "named, the rest read", MISTAKE: "refused"}[given.code]
        check = functools.partial(check_given, given)
        yield Case(name=f"documents: {given.name}", expected=promise, check=check, short=given.short)
    for name, file, pack in BOMBS:
        check = functools.partial(_bomb, file, pack)
        yield Case(name=f"documents: {name}", expected="refused in bounded memory", check=check)
    for damage in DAMAGE:
        check = functools.partial(check_damage, damage)
        yield Case(name=f"prepared data: {damage.name}", expected="refused, named", check=check, short=damage.short)
    for name, special, beside, words, end in ENDS:
        check = functools.partial(check_end, special, beside, words, end)
        yield Case(name=f"end of a document: {name}", expected="found" if end else "names the key", check=check)
    for name, promise, check_special in SPECIAL:
        yield Case(name=f"documents: {name}", expected=promise, check=check_special)
