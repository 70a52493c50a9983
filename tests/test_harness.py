"""lm-eval asks our adapter what it asked its own for Hugging Face models, of the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import harnessed
import pytest
from harnessed import GENERATION, LIKELIHOODS, LONG, ROLLING

from maxlm import evaluate
from maxlm.config import SamplingConfig, ShardingConfig, UserError
from maxlm.evaluation import harness
from maxlm.evaluation.harness import HarnessModel
from maxlm.evaluation.scoring import GREEDY, RunExaminee
from maxlm.hub.models import KINDS, load_published

pytestmark = pytest.mark.usefixtures("programs_kept")


@pytest.fixture(scope="module", autouse=True)
def private_cache() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    yield
    patch.undo()


@pytest.fixture(scope="module", params=["plain", "bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, HarnessModel]:
    folder = tmp_path_factory.mktemp(request.param)
    harnessed.write_folder(folder, bos=request.param == "bos")
    run = load_published(KINDS["hf"](folder), sharding=ShardingConfig(data=1))
    return request.param, HarnessModel(RunExaminee(run))


def stored(name: str, kind: str) -> Any:
    return json.loads(harnessed.ANSWERS.read_text())[name][kind]


def test_continuations_score_as_with_their_adapter(model: tuple[str, HarnessModel]) -> None:
    name, ours = model
    found = ours.loglikelihood(harnessed.requests(LIKELIHOODS))
    for case, (total, greedy), (want, wanted) in zip(LIKELIHOODS, found, stored(name, "loglikelihood"), strict=True):
        assert total == pytest.approx(want, abs=1e-4) and greedy is wanted, case


def test_texts_score_as_with_their_adapter(model: tuple[str, HarnessModel]) -> None:
    """Theirs also scores a beginning of texts that the tokenizer writes, given the same (their issue 3333)."""
    name, ours = model
    found = ours.loglikelihood_rolling(harnessed.requests([(text,) for text in ROLLING]))
    if name == "plain":
        assert found == pytest.approx(stored(name, "rolling"), abs=1e-4)
        return
    # The beginning stands before the first token in both kinds; only whether the tokenizer writes it differs.
    assert found == pytest.approx(stored("plain", "rolling"), abs=1e-4)
    assert found[0] != pytest.approx(stored("bos", "rolling")[0], abs=0.1)


@pytest.mark.nightly
def test_texts_are_continued_as_with_their_adapter(model: tuple[str, HarnessModel]) -> None:
    """Where a prompt is too long, theirs also loses the beginning of texts."""
    name, ours = model
    cases = [i for i, (prompt, _) in enumerate(GENERATION) if name == "plain" or prompt != LONG]
    found = ours.generate_until(harnessed.requests([GENERATION[i] for i in cases]))
    assert found == [stored(name, "generate")[i] for i in cases]


def test_what_their_adapter_does_not_take(model: tuple[str, HarnessModel]) -> None:
    _, ours = model
    nothing, blank, joined = ours.loglikelihood(harnessed.requests([("the", ""), (" ", "the"), ("t", "he")]))
    assert nothing == (0.0, True)
    assert blank == ours.loglikelihood(harnessed.requests([("", " the")]))[0]
    assert joined == ours.loglikelihood(harnessed.requests([("", "the")]))[0]  # `th` is one token
    # Longer than the model takes: their adapter fails at it.
    (long,) = ours.loglikelihood(harnessed.requests([("", LONG)]))
    assert long[0] == pytest.approx(ours.loglikelihood_rolling(harnessed.requests([(LONG,)]))[0])
    assert ours.loglikelihood(harnessed.requests([("", "")])) == [(0.0, True)]
    with pytest.raises(UserError, match="num_beams of the task cannot be followed"):
        ours.generate_until(harnessed.requests([("a", {"num_beams": 4})]))


class Listener:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], dict[str, Any]]] = []

    def texts(self, prompts: list[str], **how: Any) -> list[str]:
        self.asked.append((prompts, how))
        return [f"after {prompt}" for prompt in prompts]


def test_what_a_task_says_of_generation() -> None:
    """Requests with the same words are asked together, and answers come in the order of the requests."""
    listener = Listener()
    short, drawn = {"until": ["x"], "max_gen_toks": 4}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    cases = [("a", short), ("b", drawn), ("c", dict(short)), ("d", {"until": "y", "temperature": 0.0})]
    ours = HarnessModel(listener, seed=3)
    assert ours.generate_until(harnessed.requests(cases)) == ["after a", "after b", "after c", "after d"]
    found = {tuple(prompts): (how["max_new_tokens"], how["stop"], how["sampling"]) for prompts, how in listener.asked}
    assert found == {
        ("a", "c"): (4, ["x"], GREEDY),
        ("b",): (256, [], SamplingConfig(temperature=0.5, top_p=0.9)),
        ("d",): (256, ["y"], GREEDY),
    }
    assert all(how["seed"] == 3 for _, how in listener.asked)


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    harnessed.write_folder(tmp_path, bos=True)
    file = tmp_path / "tokenizer_config.json"
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    run = load_published(KINDS["hf"](tmp_path), sharding=ShardingConfig(data=1))
    examinee = RunExaminee(run, chat=True)
    ours = HarnessModel(examinee)
    text = ours.apply_chat_template([{"role": "user", "content": "a"}])
    assert text == "<bos>a<eos>" and ours.chat_template(True) == template
    assert examinee.split(text, "b") == ([0, 2, 1], [3])  # each name one token, and <bos> once
    assert RunExaminee(run).split("a", "b") == ([0, 2], [3])
    with pytest.raises(UserError, match="a task that begins the model's answer"):
        ours.apply_chat_template([], add_generation_prompt=False)
    with pytest.raises(UserError, match="the model has no chat template"):
        RunExaminee(dataclasses.replace(run, chat=None), chat=True)


YAML = """task: capitals
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_of_ones_own_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harnessed.write_folder(tmp_path / "hf", bos=False)
    questions = [{"question": f"{i} is", "choices": ["one", "two"], "answer": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "capitals.yaml").write_text(YAML.replace("DATA", str(tmp_path / "data.jsonl")))
    ours = tmp_path / "exam.jsonl"
    shown = ({"prompt": one["question"], "choices": [" one", " two"], "answer": one["answer"]} for one in questions)
    ours.write_text("\n".join(['{"exam": "choices"}', *map(json.dumps, shown)]))
    words = ["--hf", str(tmp_path / "hf"), "--tasks", "lm_eval:capitals", str(ours)]
    evaluate.main([*words, "--include_path", str(tmp_path), "--json", "--out", str(tmp_path / "out")])
    theirs, same, *_ = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (theirs["exam"], theirs["measure"], theirs["questions"]) == ("capitals", "acc", 6)
    assert theirs["value"] == same["value"] and theirs["low"] < theirs["value"] < theirs["high"]
    assert len((tmp_path / "out/capitals.jsonl").read_text().splitlines()) == 6


@pytest.mark.nightly
def test_a_task_that_nobody_knows(model: tuple[str, HarnessModel]) -> None:
    """It takes seconds to look through lm-eval's own."""
    with pytest.raises(
        UserError, match=r"--tasks nothing: no .jsonl file, not of the suite, and lm-eval knows no such"
    ):
        harness.run_tasks(model[1].examinee, ["nothing"], limit=1, few_shot=None, seed=0, include_path=None)
