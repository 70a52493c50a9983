"""Cleaning as a whole: the same bytes however the work is done, nothing lost, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maxlm.config import UserError, cleaning
from maxlm.config.cleaning.cleaning_job import CleaningJob, KeptOfRemoved
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.cleaning_recipes import RECIPES, cleaning_recipe
from maxlm.config.cleaning.duplicate_steps import ExactDocuments
from maxlm.config.cleaning.rule_steps import CodeQuality, GopherQuality, Languages, WordList
from maxlm.config.cleaning.text_steps import C4Lines, NormaliseUnicode, UnicodeForm
from maxlm.config.data import Files
from maxlm.config.errors import MachineFailure
from maxlm.data import clean
from maxlm.data.claimed import claimed
from maxlm.data.cleaning import cleaning_work, local_pool
from maxlm.data.cleaning.cleaning_work import READ_BY_STEPS, CleaningWork, finished, plan_cleaning
from maxlm.data.cleaning.findings import Finding, Limit, Page, broken, measured
from maxlm.data.cleaning.local_pool import run_locally
from maxlm.data.cleaning.stages import CleaningStage, StepWorkspace
from maxlm.data.documents import Unreadable
from maxlm.data.sources import iterate_documents

WORDS = ["the", "of", "and", "a", "ship", "sails", "over", "every", "sea", "where", "wind", "weather", "to", "go", "on"]


class NoModels:
    """No step here asks one."""

    def scorer(self, run: str) -> Any:
        raise AssertionError(run)

    embedder = scorer


class AtLeastWords:
    """Drops short documents."""

    limits = (Limit("words", least=5), Limit("longest word", most=20))

    def __call__(self, page: Page) -> Finding:
        words = page.text.split()
        return Finding(measured(self.limits, (v for v in (len(words), max(map(len, words), default=0)))))


class WithoutDigits:
    """Changes documents, and says what it took."""

    limits: tuple[Limit, ...] = ()

    def __call__(self, page: Page) -> Finding:
        text, count = re.subn(r"\d", "", page.text)
        return Finding(text=text, changes={"digits": count}, tags={"digits": count}) if count else Finding()


class FirstOfEachLength:
    """Of all documents with equally many words the first one stays."""

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        def note(task: int) -> None:
            lengths = {len(page.text.split()): page.id for page in reversed(list(before.pages(task)))}
            (before.folder / f"{task}.json").write_text(json.dumps(lengths))

        def merge(task: int) -> None:
            first: dict[str, str] = {}
            for task in range(before.tasks):
                for length, id in json.loads((before.folder / f"{task}.json").read_text()).items():
                    first.setdefault(length, id)
            (before.folder / "first.json").write_text(json.dumps(sorted(first.values())))

        return CleaningStage("note", before.tasks, note), CleaningStage("merge", 1, merge)

    def step(self, before: StepWorkspace, task: int) -> Any:
        first = set(json.loads((before.folder / "first.json").read_text()))

        class Step:
            limits = (Limit("others as long before it", most=0),)

            def __call__(self, page: Page) -> Finding:
                return Finding((float(page.id not in first),), seen="some")

        return Step()


STEPS: list[Callable[[], Any]] = [AtLeastWords, WithoutDigits, FirstOfEachLength, AtLeastWords]


@pytest.fixture
def own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(STEPS * 1000)
    monkeypatch.setattr(cleaning_work, "make_step", lambda config, models: next(made)())


def pipeline(n: int = len(STEPS)) -> CleaningPipeline:
    return CleaningPipeline(steps=(NormaliseUnicode(),) * n)


def texts(seed: int, n: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices([*WORDS, "12", "x" * 30], [3] * len(WORDS) + [2, 1], k=draw.randrange(40)))
        for _ in range(n)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Lines of JSON with more keys, plain texts, a compressed file."""
    data = tmp_path / "input"
    (data / "inner").mkdir(parents=True)
    for i in range(4):
        lines = [json.dumps({"id": n, "text": text, "url": f"http://x/{n}"}) for n, text in enumerate(texts(i, 50))]
        (data / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    for i, text in enumerate(texts(9, 20)):
        (data / "inner" / f"{i}.txt").write_text(text)
    with gzip.open(data / "z.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts(10, 30)))
    return data


def job(data: Path, part_bytes: int = 4000, **changes: Any) -> CleaningJob:
    return CleaningJob(pipeline=pipeline(), documents=Files(paths=(str(data),)), part_bytes=part_bytes, **changes)


def begun(job: CleaningJob, out: Path) -> CleaningWork:
    out.mkdir(exist_ok=True)
    plan = plan_cleaning(job, out, Unreadable())
    plan.put_down()
    return CleaningWork(out, job, plan.parts, NoModels())


def do_all(work: CleaningWork, seed: int | None = None) -> None:
    """All tasks, within a stage in an order drawn by the seed."""
    for number, stage in enumerate(work.stages):
        tasks = list(range(stage.tasks))
        if seed is not None:
            random.Random(seed).shuffle(tasks)
        for task in tasks:
            work.do(number, task)


def written(out: Path) -> dict[str, bytes]:
    """All documents and all verdicts, by file."""
    files = [*(out / "documents").rglob("*.jsonl"), *(out / "removed").rglob("*.jsonl")]
    assert files
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def records(out: Path, below: str) -> Iterator[dict[str, Any]]:
    for file in sorted((out / below).rglob("*.jsonl")):
        yield from map(json.loads, file.read_text().splitlines())


def without_seconds(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    for step in report["steps"]:
        assert step.pop("seconds") >= 0
    return report


# What comes out


def test_every_document_is_kept_or_written_down_with_its_reason(folder: Path, tmp_path: Path, own_steps: None) -> None:
    work = begun(job(folder), tmp_path / "out")
    do_all(work)
    kept, removed = list(records(work.out, "documents")), list(records(work.out, "removed"))
    dropped = [one for one in removed if "rule" in one]
    changed = [one for one in removed if "changes" in one]
    report = json.loads((work.out / "report.json").read_text())
    read = 4 * 50 + 20 + 30
    empty = sum(not text.strip() for text in texts(9, 20))  # plain files without a word are no documents
    blank = sum(not text for i in (0, 1, 2, 3, 10) for text in texts(i, 50 if i < 9 else 30))
    assert report["read"]["documents"] == len(kept) + len(dropped) + report["blank"] == read
    assert 0 < report["blank"] <= empty + blank
    assert len({one["id"] for one in kept + dropped}) == len(kept) + len(dropped)
    assert report["kept"]["documents"] == len(kept) > 5
    assert report["kept"]["bytes"] == sum(len(one["text"].encode()) for one in kept)
    assert {one["rule"] for one in dropped} >= {"words", "longest word", "others as long before it"}
    for one in dropped:
        if one["rule"] == "words":
            assert one["value"] < 5 == one["least"] and len(one["text"].split()) == one["value"]
    assert all(sum(one["changes"].values()) == len(re.findall(r"\d", one["text"])) for one in changed) and changed
    assert not any(re.search(r"\d", one["text"]) for one in kept)
    lengths = [len(one["text"].split()) for one in kept]
    assert len(lengths) == len(set(lengths)) and min(lengths) >= 5
    assert any(one.get("url", "").startswith("http://x/") and one["source_id"] >= 0 for one in kept)
    steps = report["steps"]
    assert steps[0]["seen"] == report["read"]["documents"] - report["blank"]
    for before, after in itertools.pairwise(steps):
        assert after["seen"] == before["seen"] - sum(before["dropped"].values())
    assert sum(steps[0]["values"]["words"].values()) == steps[0]["seen"]


@pytest.mark.parametrize("part_bytes", [1, 1 << 30])
def test_documents_are_the_same_for_any_parts_and_any_order_of_tasks(
    part_bytes: int, folder: Path, tmp_path: Path, own_steps: None
) -> None:
    one, other = begun(job(folder), tmp_path / "one"), begun(job(folder, part_bytes), tmp_path / "other")
    do_all(one)
    do_all(other, seed=3)
    assert len(one.parts) != len(other.parts)
    for below in ("documents", "removed"):
        key = lambda record: (record["id"], record.get("step", ""))
        assert sorted(records(one.out, below), key=key) == sorted(records(other.out, below), key=key)
    mine, theirs = without_seconds(one.out), without_seconds(other.out)
    assert mine.pop("job") != theirs.pop("job")
    assert mine == theirs


def test_what_was_interrupted_anywhere_ends_the_same(
    folder: Path, tmp_path: Path, own_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begun(job(folder), tmp_path / "whole")
    do_all(whole)
    out = tmp_path / "cut"
    real, countdown = Path.replace, [0]

    def replace(self: Path, target: Path) -> Path:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt
        return real(self, target)

    for at in range(1, 200, 7):  # before the file number `at` gets its name
        work = begun(job(folder), out)
        if finished(out):
            break
        monkeypatch.setattr(Path, "replace", replace)
        countdown[0] = at
        try:
            do_all(work, seed=at)
        except KeyboardInterrupt:
            assert list(out.rglob("*.partial"))
        finally:
            monkeypatch.setattr(Path, "replace", real)
    assert finished(out) and written(out) == written(whole.out)
    assert without_seconds(out) == without_seconds(whole.out)


def test_each_document_has_an_id_of_its_own(tmp_path: Path) -> None:
    data = tmp_path / "input"
    data.mkdir()
    (data / "a.json").write_text(json.dumps([{"text": f"{word} ship"} for word in WORDS]))
    for name in (b"a\xff.txt", b"a\xfe.txt"):
        Path(os.fsdecode(os.fsencode(data) + b"/" + name)).write_text(f"the ship of {name!r}")
    exact = CleaningPipeline(steps=(ExactDocuments(),))
    work = begun(CleaningJob(pipeline=exact, documents=Files(paths=(str(data),))), tmp_path / "out")
    do_all(work)
    kept = list(records(work.out, "documents"))
    assert len(kept) == len({one["id"] for one in kept}) == len(WORDS) + 2
    assert [one["id"].rpartition("/")[2] for one in kept if "json" in one["id"]][:2] == ["a.json:1", "a.json:1.2"]


def test_what_was_cleaned_is_read_without_what_was_dropped(folder: Path, tmp_path: Path, own_steps: None) -> None:
    work = begun(job(folder), tmp_path / "out")
    files, unreadable = Files(paths=(str(tmp_path),), pattern="*.jsonl*"), Unreadable()
    before = [one.file for one in iterate_documents(files, unreadable)]
    assert before and not any("/out/" in file for file in before)
    do_all(work)
    kept = [one.text for one in iterate_documents(Files(paths=(str(work.out),)), unreadable)]
    assert kept == [one["text"] for one in records(work.out, "documents")]
    assert unreadable.left_out_examples[-1] == f"{work.out}: data that was cleaned: of it documents/ is read"


def test_numbers_that_json_does_not_have_are_none(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a ship", "a": NaN, "b": 1e400, "c": [Infinity, 1.5], "d": ' + "9" * 5000 + "}\n")
    work = begun(CleaningJob(pipeline=pipeline(1), documents=Files(paths=(str(data),))), tmp_path / "out")
    do_all(work)
    (kept,) = records(work.out, "documents")
    assert kept == {"id": f"{data}:1", "text": "a ship", "a": None, "b": None, "c": [None, 1.5], "d": None}


def test_a_records_own_id_and_text_stay(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    record = {"body": "a ship", "text": "its title", "id": 7, "source_id": "x", "deep": {"a": [1]}}
    data.write_text(json.dumps(record) + "\n")
    documents = Files(paths=(str(data),), text_key="body")
    work = begun(CleaningJob(pipeline=pipeline(1), documents=documents), tmp_path / "out")
    do_all(work)
    (kept,) = records(work.out, "documents")
    own = {"source_text": "its title", "source_source_id": 7, "source_id": "x", "deep": {"a": [1]}}
    assert kept == {"id": f"{data}:1", "text": "a ship", **own}


@pytest.mark.parametrize(
    "steps",
    [
        (C4Lines(lorem_ipsum=False, curly_bracket=False, least_sentences=0), CodeQuality(generated=True)),
        (Languages(languages=(), least=0.0),),
        (GopherQuality(least_words=0, most_words=10**9, least_alphabetic_words=0.0, least_stop_words=0),),
    ],
)
def test_the_report_takes_rules_without_a_limit(steps: tuple[Any, ...], folder: Path, tmp_path: Path) -> None:
    of = CleaningJob(pipeline=CleaningPipeline(steps=steps), documents=Files(paths=(str(folder),)))
    work = begun(of, tmp_path / "out")
    do_all(work)
    assert (work.out / "report.html").read_text().count("<figure") == sum(
        bool(step["values"].get(limit["rule"]))
        for step in without_seconds(work.out)["steps"]
        for limit in step["limits"]
    )


# Mistakes


def run(argv: list[str]) -> int:
    return clean.main(argv, NoModels())


def pipeline_file(tmp_path: Path, body: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(
        "from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline\n"
        "from maxlm.config.cleaning.rule_steps import GopherQuality\n"
        "from maxlm.config.cleaning.text_steps import C4Lines, NormaliseUnicode, UnicodeForm\n\n"
        f"def get_pipeline():\n    {body}\n"
    )
    return str(file)


GOOD = "return CleaningPipeline(steps=(NormaliseUnicode(form=UnicodeForm.NFKC),))"


def test_the_command_cleans_and_says_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "0.txt").write_text("ﬁne\r\nday")
    out = tmp_path / "out"
    argv = [str(folder), "--out", str(out), "--pipeline", pipeline_file(tmp_path, GOOD), "--workers", "2"]
    assert run([*argv, "--part_bytes", "9000"]) == 0
    said = capsys.readouterr().out
    assert "00-NormaliseUnicode" in said and str(out / "documents") in said
    assert next(one for one in records(out, "documents") if one["id"].endswith("/0.txt"))["text"] == "fine\nday"
    assert sorted(path.name for path in out.iterdir()) == [
        *("documents", "input.json", "job.json", "removed", "report.html", "report.json")
    ]
    before = written(out)
    assert run([*argv, "--part_bytes", "9000"]) == 0  # nothing is done again
    assert written(out) == before and capsys.readouterr().out == said
    with pytest.raises(UserError, match=r"was begun with part_bytes = 9000 there and 8000 now"):
        run([*argv, "--part_bytes", "8000"])


def test_a_changed_pipeline_is_refused_with_the_difference(folder: Path, tmp_path: Path) -> None:
    begun(job(folder), tmp_path / "out")
    changed = CleaningPipeline(steps=(NormaliseUnicode(form=UnicodeForm.NFKC), *pipeline().steps[1:]))
    with pytest.raises(UserError, match=r"pipeline\.steps\.0\.form = 'NFC' there and 'NFKC' now; name another folder"):
        begun(CleaningJob(pipeline=changed, documents=job(folder).documents, part_bytes=4000), tmp_path / "out")


def test_changed_input_is_refused(folder: Path, tmp_path: Path) -> None:
    begun(job(folder), tmp_path / "out")
    (folder / "0.jsonl").write_text('{"text": "other"}')
    with pytest.raises(UserError, match=r"has changed since it was begun: .*0\.jsonl = \["):
        begun(job(folder), tmp_path / "out")


def test_what_was_not_put_down_whole_is_put_down_again(folder: Path, tmp_path: Path, own_steps: None) -> None:
    out = tmp_path / "out"
    begun(job(folder), out)
    (out / "job.json").unlink()  # a kill before the last file
    do_all(begun(job(folder), out))
    assert finished(out)


def test_a_finished_folder_does_not_answer_for_other_input(folder: Path, tmp_path: Path) -> None:
    argv = [str(folder), "--out", str(tmp_path / "out"), "--pipeline", pipeline_file(tmp_path, GOOD), "--workers", "1"]
    assert run(argv) == 0
    (folder / "new.txt").write_text("a ship")
    with pytest.raises(UserError, match=r"new\.txt = None there and \[6, "):
        run(argv)


def test_what_was_refused_may_be_changed(folder: Path, tmp_path: Path) -> None:
    nothing = "return CleaningPipeline(steps=(GopherQuality(least_words=10**6, most_words=10**7),))"
    file = pipeline_file(tmp_path, nothing)
    argv = [str(folder), "--out", str(tmp_path / "out"), "--pipeline", file, "--workers", "1"]
    with pytest.raises(UserError, match=r"none of the first \d+ documents is kept; dropped by 00-GopherQuality"):
        run(argv)
    pipeline_file(tmp_path, GOOD)
    assert run(argv) == 0


def test_names_of_files_take_one_line_and_move_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "in"
    data.mkdir()
    (data / "a\n\x1b[31mb.txt").write_bytes(b"\xff")
    (data / "good.txt").write_text("a ship")
    argv = [str(data), "--out", str(tmp_path / "out"), "--pipeline", pipeline_file(tmp_path, GOOD), "--workers", "1"]
    assert run(argv) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "1 documents could not be read:" and len(told) == 2
    assert told[1].startswith(f"{data}/a\\n\\x1b[31mb.txt:1: not UTF-8")


def test_a_folder_that_lost_or_damaged_its_records_is_told_from_one_without_room(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [str(folder), "--out", str(out), "--pipeline", pipeline_file(tmp_path, GOOD), "--workers", "1"]
    out.write_text("mine")
    with pytest.raises(UserError, match=r"^--out .*out: is a file; name a folder$"):
        run(argv)
    assert out.read_text() == "mine"
    out.unlink()
    assert run(argv) == 0
    report = (out / "report.json").read_bytes()
    (out / "report.json").write_bytes(report[:100])
    with pytest.raises(UserError, match=r"report\.json: not JSON"):
        run(argv)
    (out / "report.json").write_bytes(report)
    (out / "input.json").unlink()
    with pytest.raises(UserError, match=r"out: has lost its input\.json"):
        run(argv)


def test_a_changed_list_is_refused(folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("wind\n")
    mine = CleaningJob(
        pipeline=CleaningPipeline(steps=(WordList(file=str(words)),)), documents=Files(paths=(str(folder),))
    )
    begun(mine, tmp_path / "out")
    begun(mine, tmp_path / "out")
    words.write_text("weather\n")
    with pytest.raises(UserError, match="its input, a file that the pipeline names, or a package has changed"):
        begun(mine, tmp_path / "out")


def test_every_file_that_a_step_reads_is_known() -> None:
    found = set()
    for name in (path.stem for path in Path(cleaning.__path__[0]).glob("*_steps.py")):
        for cls in vars(importlib.import_module(f"{cleaning.__name__}.{name}")).values():
            if dataclasses.is_dataclass(cls):
                source = inspect.get_annotations(cls)
                found |= {field for field, annotation in source.items() if "PathName" in str(annotation)}
    assert found - {"report"} == READ_BY_STEPS  # `report` is written


def test_a_folder_with_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis\.tex\)"):
        begun(job(folder), tmp_path / "out")


def test_what_would_drop_everything_is_seen_first(folder: Path, tmp_path: Path, own_steps: None) -> None:
    for file in [*folder.rglob("*.jsonl"), *folder.rglob("*.gz")]:
        file.write_bytes(b'{"text": "too short"}\n') if file.suffix == ".jsonl" else file.unlink()
    for file in folder.rglob("*.txt"):
        file.write_text("x" * 30 + " ship" * 10)
    told = begun(job(folder), tmp_path / "out").try_first()
    assert told == ("none of the first 24 documents is kept; dropped by 00-NormaliseUnicode: 24 (longest word, words)")


def test_what_cannot_be_read_is_counted_and_the_rest_is_cleaned(tmp_path: Path, own_steps: None) -> None:
    data = tmp_path / "input"
    data.mkdir()
    good = " ".join(WORDS)
    (data / "a.txt").write_text(good)
    (data / "b.txt").write_bytes(b"caf\xe9 " + good.encode())
    (data / "c.bin").write_bytes(b"\0\1\2" * 100)
    (data / "d.jsonl").write_text('{"text": "' + good + ' again"}\n{"text": 3}\n{"txt": "a"}\nnot JSON\n[1]\n')
    whole = gzip.compress((json.dumps({"text": good + " on and on"}) + "\n").encode() * 5000)
    (data / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (data / "f.txt").write_text("")
    work = begun(job(data, 1), tmp_path / "out")
    do_all(work)
    report = json.loads((work.out / "report.json").read_text())
    assert report["unreadable"]["count"] == 7, report["unreadable"]
    assert {Path(one.partition(":")[0]).name for one in report["unreadable"]["examples"]} == {
        "b.txt",
        "c.bin",
        "d.jsonl",
    }
    assert {one["id"].rpartition("/")[2] for one in records(work.out, "documents")} >= {"a.txt", "d.jsonl:1"}


@pytest.mark.parametrize(
    "body, told",
    [
        ("return 3", r"mine\.py:5: get_pipeline\(\) must return a CleaningPipeline, it returns int"),
        ("return CleaningPipeline(steps=())", r"mine\.py:6: steps = \(\) must not be empty"),
        ("return CleaningPipeline(steps=(NormalizeUnicode(),))", "did you mean NormaliseUnicode"),
    ],
)
def test_a_wrong_pipeline_is_told_with_its_place(body: str, told: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        run([str(folder), "--out", str(tmp_path / "out"), "--pipeline", pipeline_file(tmp_path, body)])


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--recipe", "fine_web"], "--recipe fine_web: must be one of .*; did you mean fineweb"),
        ([], "say --recipe with one of .*, or --pipeline FILE"),
        (["--pipeline", "nowhere.py"], "--pipeline nowhere.py: no such file"),
        (["--recipe", "fineweb", "--engine", "slurm"], "--engine slurm needs --slurm.partition"),
    ],
)
def test_a_wrong_option_is_one_line(argv: list[str], told: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        run([str(folder), "--out", str(tmp_path / "out"), *argv])


# Steps and limits


def test_values_are_asked_for_up_to_the_first_that_is_beyond_its_limit() -> None:
    asked = []

    def values() -> Iterator[float]:
        for value in (1.0, 7.0, 3.0):
            asked.append(value)
            yield value

    limits = Limit("a", most=1), Limit("b", most=5), Limit("c", least=9)
    found = measured(limits, values())
    assert found == (1.0, 7.0) == tuple(asked)
    assert broken(limits, Finding(found)) == limits[1]
    assert broken(limits, Finding((1.0, 5.0, 9.0))) is None
    assert not Limit("a").allows(float("nan"))


def test_verdicts_may_do_without_texts(folder: Path, tmp_path: Path, own_steps: None) -> None:
    work = begun(job(folder, removed=KeptOfRemoved.VERDICTS), tmp_path / "out")
    do_all(work)
    assert all("text" not in one and "id" in one for one in records(work.out, "removed"))


# Engines and processes


def real_job(data: Path, **changes: Any) -> CleaningJob:
    return CleaningJob(
        pipeline=cleaning_recipe("code"), documents=Files(paths=(str(data),)), part_bytes=4000, **changes
    )


@pytest.mark.slow
def test_a_command_killed_anywhere_goes_on_to_the_same_end(folder: Path, tmp_path: Path) -> None:
    """The whole command and its processes, by SIGKILL."""
    argv = [sys.executable, "-m", "maxlm.data", "clean", str(folder), "--recipe", "code", "--part_bytes", "4000"]
    argv += ["--workers", "2", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*argv, str(whole)], capture_output=True, check=False).returncode == 0
    for marks in (1, 6, 12):
        process = subprocess.Popen([*argv, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((out / "work").glob("marks/*/*"))) < marks:
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert not finished(out)
    done = subprocess.run([*argv, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert written(out) == written(whole)


def test_a_process_that_dies_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_pool, "worker_command", lambda out: [sys.executable, "-c", "import os; os._exit(9)"])
    work = begun(real_job(folder), tmp_path / "out")
    told = r"a cleaning process died \(exit code 9\).*run the same command again"
    with claimed(work.out, "cleans") as lock, pytest.raises(MachineFailure, match=told):
        run_locally(work, 3, lambda stage, done, tasks: None, lock)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_each_recipe_runs_in_any_order_of_tasks(name: str, folder: Path, tmp_path: Path) -> None:
    of = CleaningJob(pipeline=cleaning_recipe(name), documents=Files(paths=(str(folder),)), part_bytes=4000)
    one, other = begun(of, tmp_path / "one"), begun(of, tmp_path / "other")
    do_all(one)
    do_all(other, seed=5)
    assert without_seconds(one.out) == without_seconds(other.out)
    assert list(records(one.out, "removed")) == list(records(other.out, "removed"))
