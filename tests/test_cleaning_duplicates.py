"""Documents and spans that are there twice, documents that mean the same; and of all such steps, that nothing but the
order of the documents decides what stays."""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cleaning_helpers import PagesInParts, findings, in_parts, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maxlm.config import UserError
from maxlm.config.cleaning.duplicate_steps import (
    ExactDocuments,
    ExactSpans,
    ExactSubstrings,
    Ignoring,
    KeepLongest,
    NearDuplicates,
    SemanticDuplicates,
    SpanUnit,
)
from maxlm.data.cleaning import sorted_files
from maxlm.data.cleaning.exact_duplicates import ExactDocumentDropper, SpanCutter, comparable, pieces
from maxlm.data.cleaning.findings import Page, broken
from maxlm.data.cleaning.semantic import SemanticDropper, copies_of, spherical_k_means, unit
from maxlm.data.cleaning.similar_documents import NearDuplicateDropper
from maxlm.data.cleaning.sorted_files import ArrayFiles
from maxlm.data.cleaning.stages import ComparingStep
from maxlm.data.cleaning.substrings import SubstringCutter


def pages_of(texts: Sequence[str]) -> list[Page]:
    return [Page(f"f{i}", text) for i, text in enumerate(texts)]


# What counts as equal, and where text is cut.


@pytest.mark.parametrize(
    ("ignoring", "text", "shape"),
    [
        (None, " A  b!\n", "A  b!"),
        (Ignoring(), " Él 42\n\tx_y-z! ", "el 00 xyz"),
        (Ignoring(case=False), "Él 4", "El 0"),
        (Ignoring(accents=False), "Él 4", "él 0"),
        (Ignoring(digits=False), "Él 4", "el 4"),
        (Ignoring(punctuation=False), "Él, 4", "el, 0"),
        (Ignoring(spaces=False), "Él  4 ", "el  0"),
        (Ignoring(), "...", ""),
        (Ignoring(), "\u0915\u093e, \u0915\u0940!", "\u0915\u093e \u0915\u0940"),
    ],
)
def test_differences_that_do_not_count(ignoring: Ignoring | None, text: str, shape: str) -> None:
    assert comparable(ignoring, text) == shape


@pytest.mark.parametrize(
    ("unit", "text", "parts"),
    [
        (SpanUnit.LINE, "a\n\nb", ["a\n", "\n", "b"]),
        (SpanUnit.PARAGRAPH, "a\nb\n \n\nc\n", ["a\nb\n \n\n", "c\n"]),
        (SpanUnit.SENTENCE, 'A b. "C?" d\ne 1.5 f... G', ["A b. ", '"C?" ', "d\n", "e 1.5 f... ", "G"]),
        (SpanUnit.SENTENCE, "好。吗？ 是", ["好。", "吗？ ", "是"]),  # noqa: RUF001
        (SpanUnit.LINE, "", []),
    ],
)
def test_pieces(unit: SpanUnit, text: str, parts: list[str]) -> None:
    assert list(pieces(text, unit)) == parts


@given(st.text(alphabet="aé.!?\"'。」 \n\t\r", max_size=60), st.sampled_from(SpanUnit))
def test_pieces_are_the_text(text: str, unit: SpanUnit) -> None:
    assert "".join(pieces(text, unit)) == text


# Exact duplicates.


@pytest.mark.parametrize(
    ("ignoring", "kept"), [(None, ["f0", "f1", "f2", "f5"]), (Ignoring(), ["f0", "f2"]), (Ignoring(case=False), None)]
)
def test_the_first_of_equal_documents_stays(ignoring: Ignoring | None, kept: list[str] | None, tmp_path: Path) -> None:
    pages = pages_of(["One, two", "one two", "three", "One, two", " three\n", "one  TWO", "", "", "?!", "!!"])
    step = ExactDocumentDropper(ExactDocuments(ignoring=ignoring))
    left = outcome(step, in_parts(pages, 4, tmp_path))
    expected = kept or ["f0", "f1", "f2", "f5"]
    assert list(left) == (expected if ignoring else [*expected, "f8", "f9"]) + (["f8", "f9"] if ignoring else [])
    found = findings(step, in_parts(pages, 2, tmp_path / "b"))
    assert (found["f3"].values, found["f3"].seen) == ((1.0,), "f0 is kept (similarity 1.00)")


def spans_left(texts: list[list[str]], span: int) -> list[list[str]]:
    """By the rule as it is said: of lines that are not blank, runs that stood together earlier go."""
    left = []
    for number, lines in enumerate(texts):
        gone: set[int] = set()
        shown = [i for i, line in enumerate(lines) if line.strip()]
        for at in range(len(shown) - span + 1):
            here = [lines[i].strip() for i in shown[at : at + span]]
            for earlier, others in enumerate(texts[: number + 1]):
                those = [line.strip() for line in others if line.strip()]
                last = at - span if earlier == number else len(those)
                if any(those[j : j + span] == here for j in range(min(last + 1, len(those)))):
                    gone.update(shown[at : at + span])
        left.append([line for i, line in enumerate(lines) if i not in gone])
    return left


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.sampled_from(["a\n", "b\n", "\n", " a\n", "c\n"]), max_size=9), min_size=1, max_size=4),
    span=st.integers(1, 3),
    parts=st.integers(1, 3),
)
def test_spans_that_stood_earlier_go(
    texts: list[list[str]], span: int, parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    step = SpanCutter(ExactSpans(unit=SpanUnit.LINE, span=span, least_words=0))
    pages = pages_of(["".join(lines) for lines in texts])
    left = outcome(step, in_parts(pages, parts, tmp_path_factory.mktemp("work")))
    expected = ["".join(lines) for lines in spans_left(texts, span)]
    assert [left.get(page.id, "") for page in pages] == [text if text.strip() else "" for text in expected]


def test_short_spans_stay(tmp_path: Path) -> None:
    pages = pages_of(["}\nlong line\n", "}\nlong line\n}\nlong one\n"])
    for least, text in ((9, "}\n}\nlong one\n"), (10, pages[1].text)):
        step = SpanCutter(ExactSpans(unit=SpanUnit.LINE, least_characters=least))
        assert outcome(step, in_parts(pages, 2, tmp_path / str(least)))["f1"] == text


@pytest.mark.parametrize(
    ("share", "words", "rule"),
    [
        (0.5, 2, None),
        (0.51, 2, "share of the text left"),
        (0.49, 2, None),
        (0.5, 3, "words left"),
        (0.5, 1, None),
    ],
)
def test_documents_of_which_too_little_is_left_go(share: float, words: int, rule: str | None, tmp_path: Path) -> None:
    pages = pages_of(["a aa\n", "a aa\nb bb\n", "x"])  # of 10 characters 5, in two words, are left; the last is not cut
    step = SpanCutter(ExactSpans(unit=SpanUnit.LINE, least_share=share, least_words=words))
    before = in_parts(pages, 2, tmp_path)
    found = findings(step, before)
    limit = broken(step.step(before, 0).limits, found["f1"])
    assert (limit and limit.rule) == rule
    assert found["f1"].changes == {"line seen earlier": 1}
    assert (found["f0"].text, found["f0"].values, found["f2"].text, found["f2"].values) == (None, (), None, ())


# Documents that mean the same.


class Directions:
    """Words as directions; a text is where the sum of its words points to."""

    def __init__(self, dims: int = 16) -> None:
        self._dims = dims
        self.largest = 0

    def __call__(self, texts: Sequence[str]) -> Any:
        self.largest = max(self.largest, len(texts))
        return np.array([self._vector(text) for text in texts], np.float32).reshape(len(texts), self._dims)

    def _vector(self, text: str) -> Any:
        seeds = [list(word.encode(errors="replace")) for word in text[:1000].split()]
        draws = [np.random.default_rng(seed).normal(size=self._dims) for seed in seeds]
        return np.sum(draws, axis=0) if draws else np.zeros(self._dims)


def semantic(**changes: Any) -> SemanticDropper:
    return SemanticDropper(SemanticDuplicates(embedder="runs/embed", **changes), Directions())


def kept_by_definition(vectors: Any, centre: Any, epsilon: float) -> list[int]:
    """Farthest from the centre first, each stays if no one that stays is nearer than epsilon."""
    kept: list[int] = []
    for i in sorted(range(len(vectors)), key=lambda i: (float(vectors[i] @ centre), i)):
        if all(float(vectors[i] @ vectors[j]) <= 1 - epsilon for j in kept):
            kept.append(i)
    return sorted(kept)


@pytest.mark.parametrize("epsilon", [0.02, 0.2, 0.6])
def test_in_a_cluster_those_near_to_a_kept_one_go(epsilon: float, tmp_path: Path) -> None:
    chance = random.Random(1)
    pages = pages_of([" ".join(chance.choices("abcdefgh", k=6)) for _ in range(80)])
    step = semantic(clusters=1, epsilon=epsilon, batch=7)
    left = outcome(step, in_parts(pages, 3, tmp_path))
    vectors = unit(Directions()([page.text for page in pages])).astype(np.float64)
    total = vectors.sum(axis=0)
    kept = kept_by_definition(vectors, total / np.linalg.norm(total), epsilon)
    assert list(left) == [f"f{i}" for i in kept] and 1 < len(kept) < 80


def test_planted_groups_are_found_over_clusters(tmp_path: Path) -> None:
    chance = random.Random(2)
    groups = [" ".join(f"w{chance.randrange(1000)}" for _ in range(8)) for _ in range(30)]
    texts = [" ".join(chance.sample(group.split(), 8)) for group in groups for _ in range(3)]
    left = outcome(semantic(clusters=10, epsilon=0.01), in_parts(pages_of(texts), 4, tmp_path))
    assert sorted(" ".join(sorted(text.split())) for text in left.values()) == sorted(
        " ".join(sorted(group.split())) for group in groups
    )


def test_a_round_of_k_means_by_its_formula() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(2500, 4)).astype(np.float32))
    centres = vectors[:3]
    for _ in range(2):
        nearest = [max(range(3), key=lambda k: float(row @ centres[k])) for row in vectors.astype(np.float64)]
        sums = np.array(
            [np.sum([v for v, k in zip(vectors, nearest, strict=True) if k == c], axis=0) for c in range(3)]
        )
        centres = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_allclose(spherical_k_means(vectors, vectors[:3], 2), centres, atol=1e-5)
    far = np.concatenate([centres, [-vectors[0]]]).astype(np.float32)
    alone = spherical_k_means(vectors[:1], far, 1)
    assert np.array_equal(alone[3], far[3])  # nothing is near it


def test_copies_by_definition_beyond_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(3).normal(size=(200, 3)).astype(np.float32))
    monkeypatch.setattr("maxlm.data.cleaning.semantic._BLOCK", 16)
    kept, cosine = copies_of(vectors, 0.9)
    for i in range(200):
        near = [j for j in range(i) if kept[j] < 0 and vectors[j] @ vectors[i] > 0.9]
        assert kept[i] == (near[0] if near else -1)
        assert cosine[i] == (pytest.approx(vectors[near[0]] @ vectors[i], abs=1e-6) if near else 0)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def broken_model(texts: Sequence[str]) -> Any:
        return np.array([[1.0, np.nan if text == "bad" else 2.0] for text in texts], np.float32)

    step = SemanticDropper(SemanticDuplicates(embedder="runs/x"), broken_model)
    with pytest.raises(UserError, match=r"^f1: its embedding is not finite; .* steps\[\]\.embedder = runs/x$"):
        findings(step, PagesInParts([pages_of(["good", "bad"])], tmp_path))


def test_the_model_is_given_no_more_than_a_batch(tmp_path: Path) -> None:
    model = Directions()
    step = SemanticDropper(SemanticDuplicates(embedder="x", batch=3), model)
    findings(step, in_parts(pages_of(list("abcdefgh")), 1, tmp_path))
    assert model.largest == 3


# Of all steps.

STEPS: dict[str, Callable[[], ComparingStep]] = {
    "documents": lambda: ExactDocumentDropper(ExactDocuments(ignoring=Ignoring())),
    "lines": lambda: SpanCutter(ExactSpans(unit=SpanUnit.LINE)),
    "sentences": lambda: SpanCutter(ExactSpans(unit=SpanUnit.SENTENCE, span=3)),
    "near": lambda: NearDuplicateDropper(NearDuplicates(keep=KeepLongest())),
    "similar": lambda: NearDuplicateDropper(NearDuplicates(bands=40, rows=2, least_similarity=0.5)),
    "substrings": lambda: SubstringCutter(ExactSubstrings(least_bytes=40)),
    "semantic": lambda: semantic(clusters=5, sample=4, epsilon=0.1),
}
SOME = ["documents", "lines", "near", "substrings", "semantic"]


def corpus(n: int = 120) -> list[Page]:
    """Lines and sentences, many of them in several documents, documents that are nearly equal, or empty."""
    chance = random.Random(0)
    vocabulary = [f"{chance.choice('bdfgklmnprst')}{chance.choice('aeiou')}{i}" for i in range(60)]
    pool = [" ".join(chance.choices(vocabulary, k=chance.randrange(3, 15))) + "." for _ in range(150)]
    texts: list[str] = ["", "one", "Ünïcode 世界 \ud800"]
    while len(texts) < n:
        if chance.random() < 0.3:
            some = chance.choice(texts).split()
            texts.append(" ".join(some[: max(1, len(some) - chance.randrange(3))]))
        else:
            texts.append("".join(one + chance.choice(" \n") for one in chance.choices(pool, k=chance.randrange(1, 12))))
    return pages_of(texts)


@pytest.mark.parametrize("name", STEPS)
def test_neither_parts_nor_the_order_of_tasks_matter(name: str, tmp_path: Path) -> None:
    pages = corpus()
    whole = findings(STEPS[name](), in_parts(pages, 1, tmp_path / "1"))
    assert any(finding.text is not None or finding.values == (1,) for finding in whole.values())
    for parts in (3, 8):
        cut = in_parts(pages, parts, tmp_path / str(parts))
        assert findings(STEPS[name](), cut, random.Random(parts)) == whole


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_drops_does_not_change(name: str, tmp_path: Path) -> None:
    """And one that cuts leaves characters of the text in their order."""
    pages = corpus(60)
    for id, finding in findings(STEPS[name](), in_parts(pages, 2, tmp_path)).items():
        if name in ("documents", "near", "similar", "semantic"):
            assert finding.text is None and not finding.changes
        elif finding.text is not None:
            rest = iter(pages[int(id[1:])].text)
            assert all(character in rest for character in finding.text)


@pytest.mark.parametrize("name", STEPS)
def test_documents_without_text_and_no_documents_at_all(name: str, tmp_path: Path) -> None:
    assert outcome(STEPS[name](), PagesInParts([[], []], tmp_path / "none")) == {}
    assert outcome(STEPS[name](), PagesInParts([[], pages_of(["", "word", ""])], tmp_path / "few")) == {"f1": "word"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", SOME)
def test_a_task_done_again_writes_the_same_files(name: str, tmp_path: Path) -> None:
    before = in_parts(corpus(40), 3, tmp_path)
    for stage in STEPS[name]().stages(before):
        for task in range(stage.tasks):
            stage.work(task)
            written = contents(tmp_path)
            stage.work(task)
            assert contents(tmp_path) == written
    assert not [name for name in written if not name.endswith(".npy")]


@pytest.mark.filterwarnings("ignore:os.fork")  # the child computes with numpy alone, and is killed
@pytest.mark.parametrize("name", SOME)
def test_a_process_killed_while_it_writes_leaves_no_half_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = corpus(40)
    expected = findings(STEPS[name](), in_parts(pages, 2, tmp_path / "expected"))
    before = in_parts(pages, 2, tmp_path / "killed")
    save = np.save

    def killed_in(number: int) -> Callable[..., None]:
        calls = collections.Counter[str]()

        def half(stream: Any, values: Any, **options: Any) -> None:
            save(stream, values, **options)
            calls["save"] += 1
            if calls["save"] == number:
                stream.truncate(stream.tell() // 2)
                stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        return half

    for stage in STEPS[name]().stages(before):
        for number in (1, 2, 3):
            if (child := os.fork()) == 0:
                monkeypatch.setattr(sorted_files.np, "save", killed_in(number))
                stage.work(0)
                os._exit(0)
            os.waitpid(child, 0)
            for file in (tmp_path / "killed").rglob("*.npy"):
                np.load(file, allow_pickle=False)
        for task in range(stage.tasks):
            stage.work(task)
    assert findings(STEPS[name](), before) == expected


def test_rows_between_values_are_those_of_a_search(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    files = ArrayFiles(tmp_path, 5)
    keys = [np.sort(chance.integers(0, 2**64, n, np.uint64)) for n in (0, 1, 50, 3, 20)]
    for task, some in enumerate(keys):
        files.write(task, np.array([(key,) for key in some.tolist()], [("key", "<u8")]))
    found = [files.in_range("key", number)["key"].tolist() for number in range(5)]
    assert sorted(key for some in found for key in some) == sorted(np.concatenate(keys).tolist())
    assert all(key * 5 >> 64 == number for number, some in enumerate(found) for key in some)


@pytest.mark.nightly
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("line", ["q" * 20_000_000, "ab. " * 5_000_000, " " * 20_000_000, "«" * 10_000_000])
def test_a_line_of_twenty_megabytes(name: str, line: str, tmp_path: Path) -> None:
    """No step takes quadratic time, or more memory than a part may."""
    left = outcome(STEPS[name](), PagesInParts([pages_of([line, "else"]), pages_of([])], tmp_path))
    assert left["f1"] == "else"


PIPELINE = """
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.duplicate_steps import (
    ExactDocuments, ExactSpans, ExactSubstrings, Ignoring, KeepLongest, NearDuplicates, SpanUnit,
)


def get_pipeline():
    return CleaningPipeline(steps=(
        ExactDocuments(ignoring=Ignoring()),
        NearDuplicates(keep=KeepLongest()),
        ExactSpans(unit=SpanUnit.LINE),
        ExactSubstrings(least_bytes=60),
    ))
"""


@pytest.mark.nightly
def test_one_three_and_eight_processes_write_the_same_bytes(tmp_path: Path) -> None:
    data, pipeline = tmp_path / "input", tmp_path / "pipeline.py"
    data.mkdir()
    pipeline.write_text(PIPELINE)
    for page in corpus(300):
        (data / f"{page.id}.txt").write_text(page.text, errors="replace")
    results = []
    for workers in (1, 3, 8):
        out = tmp_path / str(workers)
        options = ["--pipeline", str(pipeline), "--out", str(out), "--part_bytes", "5000", "--workers", str(workers)]
        subprocess.run([sys.executable, "-m", "maxlm.data", "clean", str(data), *options], check=True)
        results.append({name: of for name, of in contents(out).items() if name.startswith(("documents", "removed"))})
    assert results[0] == results[1] == results[2]
    steps = {name.split("/")[1] for name in results[0] if name.startswith("removed")}
    assert steps == {"00-ExactDocuments", "01-NearDuplicates", "02-ExactSpans", "03-ExactSubstrings"}
