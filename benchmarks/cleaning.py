"""Megabytes a second and core of each step of cleaning, memory and cost as text grows, and datatrove on the same text.

    python -m benchmarks.cleaning --recipe fineweb --megabytes 50 200 800 --out benchmarks/results/cleaning.json

The text is what lies below --roots (default: this Python's library and packages, /usr/share/doc), without copies.
Each size is a process of its own with one worker, so that its memory is its own; times are of the processor. datatrove
(extra `cluster`, and spacy) takes the first --sample megabytes through its filters of the same names, if it is there.
`python -m benchmarks.cleaning --document 8` measures instead what memory each step takes for one document of 8 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.steps import cpu_name
from maxlm.config.cleaning.private_steps import PersonalData
from maxlm.config.cleaning.rule_steps import CodeQuality, FineWebQuality, GopherQuality, GopherRepetition, Languages
from maxlm.config.cleaning.text_steps import C4Lines, NormaliseUnicode, RepairUnicode, WebLines
from maxlm.data.cleaning.findings import Page
from maxlm.data.cleaning.making import make_step

_MB = 1_000_000
_ROOTS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc")
_SHARD = 16 * _MB
_STEPS = (
    *(RepairUnicode, NormaliseUnicode, Languages, GopherRepetition, GopherQuality),
    *(C4Lines, FineWebQuality, WebLines, CodeQuality, PersonalData),
)
_ENDINGS = (".py", ".pyi", ".rst", ".md", ".txt", ".html", ".js", ".c", ".h", ".json", ".xml", "copyright", ".gz")


def texts(roots: list[str]) -> Iterator[str]:
    """Files of text below the roots in order of their names, each text once, of 200 bytes and more."""
    seen = set()
    for root in roots:
        for folder, inner, names in os.walk(root):
            inner.sort()
            for name in sorted(names):
                file = Path(folder, name)
                if not name.endswith(_ENDINGS) or file.is_symlink():
                    continue
                with contextlib.suppress(OSError, UnicodeDecodeError, EOFError):
                    content = gzip.decompress(file.read_bytes()) if name.endswith(".gz") else file.read_bytes()
                    key = hashlib.blake2b(content, digest_size=16).digest()
                    if len(content) >= 200 and b"\0" not in content and key not in seen:
                        seen.add(key)
                        yield content.decode()


def write_corpus(out: Path, size: int, roots: list[str], longest: float) -> int:
    """Lines of JSON in files of 16 MB; how many bytes of text they have, `size` at most, each at most `longest`."""
    out.mkdir(parents=True)
    written, file, left = 0, 0, 0
    stream = None
    for text in texts(roots):
        if (bytes_ := len(text.encode())) > longest:
            continue
        if written + bytes_ > size:
            break
        if left <= 0:
            if stream:
                stream.close()
            stream, left, file = (out / f"{file:05}.jsonl").open("w"), _SHARD, file + 1
        assert stream is not None
        stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        written, left = written + bytes_, left - bytes_
    if stream:
        stream.close()
    return written


def clean(corpus: Path, recipe: str, out: Path) -> dict[str, Any]:
    """The command with one worker: seconds of the processor, memory at its peak, and its report."""
    script = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "r = resource.getrusage(resource.RUSAGE_CHILDREN); print(code, r.ru_utime + r.ru_stime, r.ru_maxrss)"
    )
    command = ["-m", "maxlm.data", "clean", str(corpus), "--recipe", recipe, "--out", str(out), "--workers", "1"]
    began = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-c", script, sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    code, seconds, kilobytes = said.split()[-3:]
    assert int(code) == 0, said
    report = json.loads((out / "report.json").read_text())
    size = report["read"]["bytes"]
    return {
        "bytes": size,
        "documents": report["read"]["documents"],
        "kept_bytes": report["kept"]["bytes"],
        "kept_documents": report["kept"]["documents"],
        "processor_s": float(seconds),
        "wall_s": time.perf_counter() - began,
        "mb_per_processor_s": size / _MB / float(seconds),
        "peak_mb": int(kilobytes) / 1000,
        "steps": {
            one["name"]: {
                "mb_per_processor_s": one["seen_bytes"] / _MB / max(1e-9, one["seconds"]),
                "dropped": sum(one["dropped"].values()),
                "seen": one["seen"],
            }
            for one in report["steps"]
        },
    }


def memory_of_steps(size: int) -> dict[str, float]:
    """Bytes of memory that each step takes at its peak for each byte of one document of English letters: what the most
    of a process that has looked at a short one is above what it was."""
    draw = random.Random(1)
    frequent = ["the", "of", "and", "to", "that", "have", "with", "be"]
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))) for _ in range(20_000)]
    lines = (" ".join(draw.choices(frequent, k=4) + draw.choices(words, k=8)).capitalize() for _ in range(size // 70))
    page = Page(id="one", text=".\n".join(lines))
    found = {}
    for make in _STEPS:
        step = make_step(make(), None)  # type: ignore[arg-type]
        step(page._replace(text=page.text[:100_000]))  # type: ignore[operator]
        found[make.__name__] = _peak_of(lambda step=step: step(page)) / len(page.text)  # type: ignore[misc]
    return found


def _peak_of(work: Callable[[], Any]) -> int:
    """Bytes, in a process of its own (Linux)."""
    reads, writes = os.pipe()
    if not (child := os.fork()):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        work()
        os.write(writes, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writes)
    with os.fdopen(reads) as said:
        return int(said.read())


def resident(name: str) -> int:
    """Bytes of this process, by its name in /proc."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def beside_datatrove(corpus: Path, size: int) -> dict[str, float]:
    """MB a second of the processor of datatrove's filters, on the first `size` bytes."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.hashing import HashConfig

    documents, total = [], 0
    for file in sorted(corpus.glob("*.jsonl")):
        for line in file.open():
            if total < size:
                documents.append(json.loads(line)["text"])
                total += len(documents[-1].encode())
    found = {}
    made: dict[str, Callable[[], Any]] = {
        "GopherRepetition": GopherRepetitionFilter,
        "GopherQuality": GopherQualityFilter,
        "C4Quality": lambda: C4QualityFilter(filter_no_terminal_punct=False),
        "FineWebQuality": FineWebQualityFilter,
    }
    for name, make in made.items():
        step = make()
        fresh = [Document(text, str(i)) for i, text in enumerate(documents)]
        began = time.process_time()
        for document in fresh:
            step.filter(document)
        found[name] = total / _MB / (time.process_time() - began)
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1"))
    with tempfile.TemporaryDirectory() as folder:
        signature = MinhashDedupSignature(folder, config)
        fresh = [Document(text, str(i)) for i, text in enumerate(documents)]
        began = time.process_time()
        signature.run(fresh)
        found["MinHash signatures"] = total / _MB / (time.process_time() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fineweb")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--sample", type=int, default=20, help="0: without datatrove")
    parser.add_argument("--roots", nargs="+", default=[*_ROOTS])
    parser.add_argument("--longest", type=float, default=math.inf, help="megabytes of a document; longer: left out")
    parser.add_argument("--document", type=int, help="megabytes of the one whose memory is measured")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "cleaning",
        "command": " ".join(["python -m benchmarks.cleaning", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "python": platform.python_version(),
    }
    if asked.document:
        result["bytes_a_byte"] = memory_of_steps(asked.document * _MB)
    else:
        result |= of_sizes(asked)
    line = json.dumps(result)
    print(line)
    if asked.out:
        asked.out.write_text(line + "\n")


def of_sizes(asked: argparse.Namespace) -> dict[str, Any]:
    """A recipe on each size of text, and datatrove on the first megabytes."""
    result: dict[str, Any] = {"recipe": asked.recipe, "sizes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for size in asked.megabytes:
            corpus = Path(scratch, f"corpus{size}")
            write_corpus(corpus, size * _MB, asked.roots, asked.longest * _MB)
            result["sizes"][size] = clean(corpus, asked.recipe, Path(scratch, f"out{size}"))
        if asked.sample:
            with contextlib.suppress(ImportError):
                result["datatrove"] = beside_datatrove(corpus, asked.sample * _MB)
                result["datatrove_version"] = importlib.metadata.version("datatrove")
    return result | {"own_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


if __name__ == "__main__":
    main()
