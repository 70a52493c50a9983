"""`python -m maxlm.compare`: a table and a page of several runs, and what they answer to the same prompts."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_run
from run_folder import BYTE_MODEL, parameters_of

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.compare import main
from maxlm.config import (
    ByteTokenizer,
    CheckpointConfig,
    Conversations,
    ObserveConfig,
    PrepareConfig,
    Purpose,
    Reward,
    SamplingConfig,
    ScalarHead,
    Sft,
    UserError,
    serialize,
)
from maxlm.data.chat import save_chat_template
from maxlm.data.chat_templates import choose_template
from maxlm.data.prepare import prepare
from maxlm.data.tokenizers import Bytes
from maxlm.evaluation.marking import proportion
from maxlm.evaluation.side_by_side import Said, answers, read_questions
from maxlm.hub.models import load_run
from maxlm.quantize import main as quantize

pytestmark = pytest.mark.usefixtures("programs_kept")


class Tables(HTMLParser):
    """The cells of each table of a page, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.right: list[str] = []
        self._class: str | None = None
        self._inside = False
        """Whether a cell is being read."""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        match tag:
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "th" | "td":
                self.tables[-1][-1].append("")
                self._class, self._inside = dict(attrs).get("class"), True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td") and self._class == "right":
            self.right.append(self.tables[-1][-1][-1])
        if tag in ("th", "td"):
            self._class, self._inside = None, False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data.strip("\n")


def write(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were not trained: of text, of conversations from it, the same in int8, and a reward model."""
    folder = tmp_path_factory.mktemp("compare")
    template = choose_template("plain", Bytes(), None)

    def made(name: str, seed: int, **changes: Any) -> Path:
        base = small_run(model=BYTE_MODEL)
        config = dataclasses.replace(base, run_dir=str(folder / name), **changes)
        Bytes().save(folder / name / "tokenizer")
        serialize.save(config, folder / name / "config.json")
        with Checkpointer(folder / name / "checkpoints", config.checkpoint) as checkpointer:
            meta = {"tokenizer": Bytes().fingerprint}
            checkpointer.save(1, params=parameters_of(config, seed), optimizer={}, meta=meta)
        return folder / name

    made("text", 1)
    begun = CheckpointConfig(init_from=str(folder / "text"))
    taught = made("taught", 2, task=Sft(), checkpoint=begun)
    save_chat_template(template, taught / "chat", [Bytes.eos_id])
    rows = ({"step": n, "loss": 3.0 / n, "tokens": 500 * n, "step_time_s": n and 2.0} for n in (1, 30, 60))
    write(taught / "metrics.jsonl", *rows)
    write(taught / "evals.jsonl", {"step": 60, "tokens": 30_000, "eval_loss": 0.25, "eval_perplexity": 1.284})
    quantize(["--run", str(taught), "--method", "int8", "--out", str(folder / "int8"), "--speed_tokens", "0"])
    head = dataclasses.replace(BYTE_MODEL, head=ScalarHead())
    made("reward", 3, model=head, task=Reward(), observe=ObserveConfig(sample_tokens=0))
    return folder


ASKED = ("1+1=", "2+1=", [{"role": "user", "content": "3+1="}], "<b>4</b>")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, list[Said]]:
    """What each run answers."""
    questions = read_questions(write(folder / "asked.jsonl", *({"prompt": one} for one in ASKED)))
    return {name: answers(load_run(folder / name), questions, 8) for name in ("text", "taught", "int8")}


def test_every_run_has_a_row_and_answers(
    folder: Path, said: dict[str, list[Said]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what one run says some is called right, and the shares are counted from that. The judge's figures are of the
    reward of each conversation, one by one."""
    names, out = ["text", "taught", "int8", "reward"], tmp_path / "new" / "page.html"
    texts = {name: [one.text for one in given] for name, given in said.items()}
    right = [f" {texts['taught'][0]} ", ["?", texts["taught"][1]], 17, None]
    records = ({"prompt": one, "answer": answer} for one, answer in zip(ASKED, right, strict=True))
    asked = ["--prompts", write(tmp_path / "exam.jsonl", *records), "--max_new_tokens", "8"]
    main([*(str(folder / name) for name in names), *asked, "--judge", str(folder / "reward"), "--out", str(out)])
    page = out.read_text()
    assert not re.search(r"(src|href)=|<script|https?://", page)  # needs nothing else
    found = Tables(page)
    runs, shown = found.tables
    assert shown[0] == ["asked", "text", "taught", "int8"]
    assert [row[0] for row in shown[1:]] == ["1+1=", "2+1=", "3+1=", "<b>4</b>"]
    for n, given in enumerate(texts.values(), start=1):
        assert [" ".join(row[n].split()) for row in shown[1:]] == [" ".join(text.split()) for text in given]
    rows = {row[0]: dict(zip(runs[0], row, strict=True)) for row in runs[1:]}
    assert list(rows) == names
    assert [rows[name]["learned by"] for name in names] == ["Pretrain", "Sft", "quantised, int8", "Reward"]
    assert rows["taught"]["from"] == str(folder / "text") and rows["int8"]["from"] == str(folder / "taught")
    assert (rows["taught"]["steps"], rows["taught"]["tokens"], rows["taught"]["minutes"]) == ("60", "30.0k", "2.0")
    assert rows["taught"]["held-out"] == "loss 0.25, perplexity 1.284"
    assert rows["int8"]["steps"] == rows["reward"]["exam"] == "-"
    assert 2 * float(rows["int8"]["weights, MB"]) < float(rows["taught"]["weights, MB"])
    for name in ("text", "taught", "int8"):
        share = proportion(sum(map(str.__eq__, texts[name][:2], texts["taught"])), 3)
        assert rows[name]["exam"] == f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
    assert rows["taught"]["exam"] == "67% (21% to 94%)" and len(found.right) >= 2
    judge, rewards = load_run(folder / "reward"), dict[str, list[float]]()
    for name, spoken in said.items():
        ids = [np.array([[*one.ids, *one.tokens]]) for one in spoken]
        rewards[name] = [judge.model.last(one, np.array([one.size])).item() for one in ids]
        assert float(rows[name]["reward"]) == pytest.approx(np.mean(rewards[name]), abs=1e-3)
    better = [float(a > b) for a, b in zip(rewards["taught"], rewards["text"], strict=True)]
    assert rows["taught"]["wins against text"].startswith(f"{np.mean(better):.0%} (")
    assert rows["text"]["wins against text"] == "-"
    commands = page[page.index("To talk to one") :]
    assert "--run " + str(folder / "int8") in commands and str(folder / "text") not in commands  # it knows no turns
    assert "taught: loss" in page and "67%" in capsys.readouterr().out


def test_prompts_held_out_in_a_prepared_folder_are_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", *({"prompt": f"{a}+1=", "answer": a + 1} for a in range(40)))
    documents = Conversations(paths=(file,), purpose=Purpose.PROMPTS)
    prepare(PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.3), tmp_path / "data")
    held_out = [json.loads(line) for line in (tmp_path / "data" / "validation-00000.records").read_text().splitlines()]
    asked = read_questions(str(tmp_path / "data"))
    assert [(one.text, one.answers) for one in asked] == [(one["prompt"], (str(one["answer"]),)) for one in held_out]
    assert len(held_out) > 3 and read_questions(str(tmp_path / "data"), limit=2) == asked[:2]


def test_a_page_of_files_alone_loads_no_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlm.recipes.compared.load_run", lambda *_: pytest.fail("a model is loaded"))
    main([str(folder / "text"), str(folder / "taught"), "--out", str(tmp_path / "page.html")])
    [runs] = Tables((tmp_path / "page.html").read_text()).tables
    assert [row[0] for row in runs[1:]] == ["text", "taught"]


def test_a_model_is_asked_as_it_was_taught(folder: Path, said: dict[str, list[Said]]) -> None:
    """In the words of its template; one without goes on with the text. Both are what the generator says to that."""
    for name, prompt in (("taught", "User: 1+1=\n\nAssistant:"), ("text", "1+1=")):
        greedy = load_run(folder / name).generate(prompt, max_new_tokens=8, sampling=SamplingConfig(temperature=0))
        assert said[name][0].text == greedy.text.strip() and list(said[name][0].tokens) == greedy.tokens


def test_what_does_not_fit_is_one_line(folder: Path, tmp_path: Path) -> None:
    taught, page = str(folder / "taught"), ["--out", str(tmp_path / "page.html")]
    with pytest.raises(UserError, match="is named twice"):
        main([taught, taught, *page])
    with pytest.raises(UserError, match="--judge x scores answers; name what is asked"):
        main([taught, *page, "--judge", "x"])
    with pytest.raises(UserError, match=r"is no run folder, it has no config\.json"):
        main([str(tmp_path), *page])
    for records, why in (
        ([], "none.jsonl: has no prompts"),
        ([{"a": 1}], "none.jsonl:1: has the keys 'a'"),
        ([{"prompt": "a", "answer": {}}], r"none.jsonl:1: answer = \{\}: must be text"),
        ([{"prompt": "a" * 500}], r"taught: .*max_seq_len"),
    ):
        file = write(tmp_path / "none.jsonl", *records)
        with pytest.raises(UserError, match=why):
            main([taught, *page, "--prompts", file])
    assert not (tmp_path / "page.html").exists()
    assert len(read_questions(write(tmp_path / "q.jsonl", {"prompt": "a"}, {"prompt": "b"}), limit=1)) == 1
