"""Runs of words that evaluations and training have in common: planted ones are found, reported, dropped and cut."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cleaning_scores_helpers import OneModel, before_of, through

from maxlm.config import UserError
from maxlm.config.cleaning.decontamination_steps import (
    CutTraining,
    Decontaminate,
    DropTraining,
    EvaluationSet,
    KeepTraining,
    OverlapMeasure,
)
from maxlm.data import clean
from maxlm.data.cleaning.decontamination import Decontaminator
from maxlm.data.cleaning.evaluation_runs import EvaluationIndex, covered, read_set, stretches
from maxlm.data.cleaning.findings import Finding, Page, broken

LEXICON = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("ner", "lot", "mik", "ras")]


def prose(words: int, seed: int) -> str:
    """Sentences of made-up words: two of them have no run of 8 in common."""
    chosen = random.Random(seed).choices(LEXICON, k=words)
    lines = [" ".join(chosen[i : i + 10]).capitalize() + "." for i in range(0, words, 10)]
    return "\n".join(lines)


def disguised(text: str) -> str:
    """The same words with other capitals, punctuation and blanks."""
    words = re.sub(r"[.,]", "", text).split()
    dresses = [str.upper, lambda word: f"“{word}”", lambda word: f"{word[:2]}-{word[2:]}"]
    return "".join(dresses[n % 3](word) + (",\n" if n % 4 else "  ") for n, word in enumerate(words))


def part_of(text: str, first: int, stop: int) -> str:
    return " ".join(re.sub(r"\.", "", text).split()[first:stop])


QUESTIONS = {f"q{n}": prose(40, 100 + n) for n in range(5)}


@pytest.fixture
def sets(tmp_path: Path) -> tuple[EvaluationSet, ...]:
    """An exam of five items, and a text with one more."""
    with (tmp_path / "exam.jsonl").open("w") as file:
        for name, text in QUESTIONS.items():
            words = text.split()
            choices = {"text": [" ".join(words[20:30]), " ".join(words[30:])], "label": ["A", "B"]}
            file.write(
                json.dumps({"id": name, "question": " ".join(words[:20]), "choices": choices, "answer": 1}) + "\n"
            )
    (tmp_path / "passage.txt").write_text(prose(60, 200))
    exam = EvaluationSet(name="exam", paths=(str(tmp_path / "exam.jsonl"),), keys=("question", "choices.text"))
    return exam, EvaluationSet(name="passage", paths=(str(tmp_path / "passage.txt"),))


class Job:
    """A step over documents in parts, and its report."""

    def __init__(self, folder: Path, sets: tuple[EvaluationSet, ...], parts: list[list[Page]], **changes: Any) -> None:
        file = folder / "reports" / f"{len(list(folder.iterdir()))}.json"
        self.step = Decontaminator(Decontaminate(sets=sets, report=str(file), **changes))
        self.before = before_of(folder / f"work{len(list(folder.iterdir()))}", parts)
        self.findings = {
            page.id: finding
            for part, pages in enumerate(parts)
            for page, finding in zip(pages, through(self.step, pages, self.before, part), strict=True)
        }
        self.report = json.loads(file.read_text())
        self.items = {row["id"].rpartition(":")[2]: row for row in self.report["sets"][0]["overlapping_items"]}

    def kept(self, id: str) -> bool:
        return broken(self.step.step(self.before, 0).limits, self.findings[id]) is None


def planted(run: str, before: int = 100, after: int = 100, seed: int = 1) -> str:
    return f"{prose(before, seed)}\n{run}\n{prose(after, seed + 1)}"


def test_a_run_is_found_from_thirteen_words_on_whatever_its_dress(tmp_path: Path, sets: Any) -> None:
    q = QUESTIONS["q2"]
    pages = [
        Page("clean", prose(300, 7)),
        Page("twelve", planted(part_of(q, 5, 17))),
        Page("thirteen", planted(part_of(q, 5, 18))),
        Page("dressed", planted(disguised(part_of(q, 5, 25)))),
        Page("passage", planted(prose(60, 200))),
        Page("empty", ""),
        Page("word", "a"),
    ]
    job = Job(tmp_path, sets, [pages[:3], [], pages[3:]], training=DropTraining())
    assert [page.id for page in pages if not job.kept(page.id)] == ["thirteen", "dressed", "passage"]
    assert [job.findings[id].values[0] for id in ("twelve", "thirteen", "dressed", "passage")] == [0, 13, 20, 60]
    assert job.findings["thirteen"].seen == part_of(q, 5, 18)
    assert job.findings["dressed"].seen.split() == disguised(part_of(q, 5, 25)).strip(" ,“”\n").split()
    assert all(finding.text is None for finding in job.findings.values())
    exam, passage = job.report["sets"]
    assert (exam["items"], exam["contaminated"], exam["too_short"], exam["words_in_a_run"]) == (5, 1, 0, 13)
    (row,) = exam["overlapping_items"]
    assert row == {
        "id": f"{tmp_path}/exam.jsonl:3",
        "contaminated": True,
        "share_of_words": 20 / 40,
        "share_of_runs": round(8 / 28, 4),
        "longest": 20,
        "most_documents": 2,
        "documents": ["thirteen", "dressed"],
    }
    assert passage["overlapping_items"][0]["share_of_words"] == 1.0
    assert passage["overlapping_items"][0]["documents"] == ["passage"]


def test_words_that_a_document_may_have(tmp_path: Path, sets: Any) -> None:
    pages = [Page("x", planted(part_of(QUESTIONS["q0"], 0, 20)))]
    for most, kept in ((19, False), (20, True), (21, True)):
        assert Job(tmp_path, sets, [pages], training=DropTraining(most=most)).kept("x") == kept


def brute_force(text: str, run: str, around: int, least: int) -> str:
    at = text.index(run)
    pieces = [text[: max(0, at - around)], text[at + len(run) + around :]]
    return "\n\n".join(piece for piece in pieces if len(piece) >= least)


@pytest.mark.parametrize(("around", "least"), [(200, 200), (0, 1), (50, 10**6)])
def test_a_run_is_cut_with_what_is_around_it(tmp_path: Path, sets: Any, around: int, least: int) -> None:
    """Characters are counted, not bytes; and letters whose small ones are two do not move the place."""
    run = part_of(QUESTIONS["q1"], 3, 20)
    for text in (planted(run), "İé中“" * 300 + " " + planted(run)):
        job = Job(tmp_path, sets, [[Page("x", text)]], training=CutTraining(around=around, least_piece=least))
        finding = job.findings["x"]
        assert finding == Finding((2,), run, brute_force(text, run, around, least), {"cut evaluations": 1})
        assert finding.text is not None and run not in finding.text and job.kept("x")


@pytest.mark.parametrize("length", [199, 200, 201])
def test_a_piece_of_two_hundred_characters_stays(tmp_path: Path, sets: Any, length: int) -> None:
    text = "x" * (length - 1) + "." + "\n" * 200 + part_of(QUESTIONS["q1"], 0, 13)
    finding = Job(tmp_path, sets, [[Page("x", text)]]).findings["x"]
    assert finding.text == (text[:length] if length >= 200 else "")


@pytest.mark.parametrize("runs", [8, 9, 10])
def test_documents_of_more_than_ten_pieces_go(tmp_path: Path, sets: Any, runs: int) -> None:
    """So many runs make one piece more."""
    cuts = [part_of(QUESTIONS[f"q{n % 5}"], n % 3, 20) for n in range(runs)]
    text = "".join(prose(80, n) + "\n" + cut + "\n" for n, cut in enumerate(cuts)) + prose(80, 99)
    job = Job(tmp_path, sets, [[Page("x", text)]])
    assert job.findings["x"].values == (runs + 1,)
    assert job.kept("x") == (runs + 1 <= 10)


def test_cutting_again_finds_nothing(tmp_path: Path, sets: Any) -> None:
    text = planted(part_of(QUESTIONS["q1"], 3, 20)) + planted(disguised(QUESTIONS["q4"]), seed=5)
    once = Job(tmp_path, sets, [[Page("x", text)]]).findings["x"].text
    assert once
    again = Job(tmp_path, sets, [[Page("x", once)]])
    assert again.findings["x"] == Finding((1,)) and not again.items


@pytest.mark.parametrize("copies", [9, 10, 11])
def test_what_is_in_more_than_ten_documents_is_a_phrase(tmp_path: Path, sets: Any, copies: int) -> None:
    """For documents, over all parts; the report has it all the same. A document counts once."""
    run = part_of(QUESTIONS["q3"], 0, 15)
    pages = [Page(f"{n}", planted(run + "\n" + prose(30, 50 + n) + "\n" + run, seed=2 * n)) for n in range(copies)]
    job = Job(tmp_path, sets, [pages[:6], pages[6:]], training=DropTraining())
    assert {job.kept(page.id) for page in pages} == {copies > 10}
    assert job.items["4"]["most_documents"] == copies and job.items["4"]["documents"] == ["0", "1", "2"]
    assert not Job(tmp_path, sets, [pages], training=DropTraining(), common=None).kept("0")


def test_keeping_all_reports_and_changes_nothing(tmp_path: Path, sets: Any) -> None:
    pages = [Page("x", planted(QUESTIONS["q0"]))]
    job = Job(tmp_path, sets, [pages], training=KeepTraining())
    assert job.findings["x"] == Finding() and job.kept("x")
    assert job.items["1"]["share_of_words"] == 1.0


@pytest.mark.parametrize(("measure", "share"), [(OverlapMeasure.WORDS, 20 / 40), (OverlapMeasure.RUNS, 13 / 33)])
def test_an_item_is_contaminated_from_the_share_on(
    tmp_path: Path, sets: Any, measure: OverlapMeasure, share: float
) -> None:
    """With 8 words in a run, of 40 words 20 are seen: 13 runs of 33."""
    pages = [Page("x", planted(part_of(QUESTIONS["q0"], 0, 20)))]
    for least, contaminated in ((share - 1e-6, True), (share, True), (share + 1e-6, False)):
        job = Job(tmp_path, sets, [pages], words=8, measure=measure, least=least, training=KeepTraining())
        assert job.items["1"]["contaminated"] is contaminated
        assert job.report["sets"][0]["contaminated"] == contaminated


@pytest.mark.parametrize(("bridge", "words", "longest"), [(0, 30, 20), (2, 30, 20), (3, 33, 33), (4, 33, 33)])
def test_a_bridge_joins_runs_with_other_words_between(
    tmp_path: Path, sets: Any, bridge: int, words: int, longest: int
) -> None:
    q = QUESTIONS["q0"]
    copy = f"{part_of(q, 0, 10)} three other words {part_of(q, 13, 33)}"
    job = Job(tmp_path, sets, [[Page("x", planted(copy))]], words=10, bridge=bridge, training=KeepTraining())
    row = job.items["1"]
    assert (row["share_of_words"], row["longest"]) == (pytest.approx(words / 40), longest)


def test_covered_words_are_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    for length in (1, 2, 5):
        for bridge in (0, 1, 3):
            found = generator.random(60) < 0.15
            expected = [any(found[max(0, i - length + 1) : i + 1]) for i in range(60 + length - 1)]
            for i in [i for i in range(len(expected)) if not expected[i]]:
                left = next((i - j for j in range(1, 9) if i - j >= 0 and expected[i - j] == 1), None)
                right = next((i + j for j in range(1, 9) if i + j < len(expected) and expected[i + j] == 1), None)
                if left is not None and right is not None and right - left - 1 <= bridge:
                    expected[i] = 2  # type: ignore[call-overload]
            inside = covered(found, length, bridge)
            assert inside.tolist() == list(map(bool, expected))
            assert [i for a, b in stretches(inside) for i in range(a, b)] == np.flatnonzero(inside).tolist()


def test_the_result_is_the_same_for_any_parts_and_order(tmp_path: Path, sets: Any) -> None:
    pages = [Page(f"{n}", planted(disguised(QUESTIONS[f"q{n % 5}"]), seed=3 * n)) for n in range(9)]
    whole, cut = (Job(tmp_path, sets, parts) for parts in ([pages], [pages[:2], [], pages[2:7], pages[7:]]))
    assert whole.findings == cut.findings and whole.report == cut.report


def test_a_set_may_choose_its_words_as_gpt3_does(tmp_path: Path) -> None:
    """The 5th percentile of the lengths, between 8 and 13, for each set; short items are counted."""
    lengths = {"long": [50] * 20, "middle": [10] * 20, "short": [3] * 10 + [20] * 10}
    for name, items in lengths.items():
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": prose(n, 1000 + i)}) + "\n" for i, n in enumerate(items))
    sets = tuple(EvaluationSet(name=name, paths=(str(tmp_path / f"{name}.jsonl"),)) for name in lengths)
    assert [read_set(one, None).length for one in sets] == [13, 10, 8]
    run = part_of(prose(10, 1003), 0, 10)
    job = Job(tmp_path, sets, [[Page("x", planted(run))]], words=None, training=DropTraining())
    found = {one["name"]: (one["contaminated"], one["too_short"]) for one in job.report["sets"]}
    assert found == {"long": (0, 0), "middle": (1, 0), "short": (0, 10)}
    assert not job.kept("x")


def test_without_keys_an_item_is_all_text_of_its_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"n": 3, "q": "one two", "more": {"a": ["three", None, "four"]}}) + "\n"
    )
    (tmp_path / "b.csv").write_text("q,a\nfive six,seven\n")
    texts = {
        "a.jsonl": ((), "one two three four"),
        "b.csv": (("a", "q"), "seven five six"),
    }
    for name, (keys, text) in texts.items():
        (item,) = read_set(EvaluationSet(name="x", paths=(str(tmp_path / name),), keys=keys), 2).items
        (tmp_path / "c.txt").write_text(text)
        (expected,) = read_set(EvaluationSet(name="x", paths=(str(tmp_path / "c.txt"),)), 2).items
        assert item.hashes.tolist() == expected.hashes.tolist()
        assert item.id == f"{tmp_path}/{name}:{2 if name == 'b.csv' else 1}"


def test_memory_of_an_index_is_as_stated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(3000, 5))
    index = EvaluationIndex(8, [read_set(EvaluationSet(name="a", paths=(str(tmp_path / "a.txt"),)), 8)])
    assert index.size == 2993 and 8 * index.size < index.nbytes <= 136 * index.size


def mistakes(tmp_path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    (tmp_path / "a.jsonl").write_text('{"q": "x"}\n')
    (tmp_path / "bad.jsonl").write_text('{"q": "x"\n')
    path = str(tmp_path / "a.jsonl")
    yield (
        {"paths": (path,), "keys": ("question",)},
        "a.jsonl:1: has no key 'question' (has ['q']); set keys of the evaluation",
    )
    yield (
        {"paths": (path,), "keys": ("q.text",)},
        "a.jsonl:1: has no key 'q.text' (there is no object before text); set keys",
    )
    yield {"paths": (path,)}, "exam: has 1 items, and none of 13 words; set words = 8, or name other files"
    yield {"paths": (str(tmp_path / "none"),)}, "none: no such file or folder"
    yield {"paths": (str(tmp_path / "bad.jsonl"),)}, "bad.jsonl:1: not JSON"


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    for values, words in mistakes(tmp_path):
        with pytest.raises(UserError) as caught:
            Decontaminator(Decontaminate(sets=(EvaluationSet(name="exam", **values),), report=str(tmp_path / "r")))
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_two_sets_have_two_names() -> None:
    one = EvaluationSet(name="exam", paths=("a",))
    with pytest.raises(UserError, match=r"steps\[\]\.sets: 'exam' names two, which the report could not tell apart"):
        Decontaminate(sets=(one, dataclasses.replace(one, paths=("b",))), report="r")


PIPELINE = """
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.decontamination_steps import CutTraining, Decontaminate, EvaluationSet
from maxlm.config.cleaning.private_steps import PersonalData


def get_pipeline() -> CleaningPipeline:
    sets = (EvaluationSet(name="exam", paths=("{folder}/exam.jsonl",), keys=("question", "choices.text")),)
    return CleaningPipeline(steps=(PersonalData(), Decontaminate(sets=sets, report="{folder}/contaminated.json")))
"""


@pytest.mark.usefixtures("sets")
def test_the_command_masks_cuts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report is there when the folder for work is gone; the step before it has masked already."""
    (tmp_path / "pipeline.py").write_text(PIPELINE.format(folder=tmp_path))
    (tmp_path / "text").mkdir()
    for n in range(3):
        text = planted(QUESTIONS[f"q{n}"], seed=n) + " Write to me@site.com."
        (tmp_path / "text" / f"{n}.txt").write_text(text)
    argv = [str(tmp_path / "text"), "--pipeline", str(tmp_path / "pipeline.py"), "--out", str(tmp_path / "out")]
    assert clean.main([*argv, "--workers", "1", "--part_bytes", "3000"], OneModel()) == 0
    kept = [json.loads(line) for file in sorted((tmp_path / "out/documents").iterdir()) for line in file.open()]
    assert len(kept) == 3
    for n, record in enumerate(kept):
        assert "<EMAIL>" in record["text"] and part_of(QUESTIONS[f"q{n}"], 0, 13) not in record["text"]
    (report,) = json.loads((tmp_path / "contaminated.json").read_text())["sets"]
    assert [row["documents"] for row in report["overlapping_items"]] == [[f"{tmp_path}/text/{n}.txt"] for n in range(3)]
    assert "Decontaminate" in capsys.readouterr().out
