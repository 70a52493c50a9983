"""`python -m maxlm.synthesize best | star | attacks` with tiny models that draw from few letters."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_run
from run_folder import BYTE_MODEL, make_run, parameters_of

from maxlm.config import ClassHead, Classify, LmHead, ModelConfig, ShardingConfig, UserError, serialize
from maxlm.data.chat import save_chat_template
from maxlm.data.chat_templates import choose_template
from maxlm.data.encoders import ends_of_answers
from maxlm.data.prompts import Prompt
from maxlm.data.shards import CHAT
from maxlm.data.tokenizers import Bytes
from maxlm.hub import models
from maxlm.hub.models import load_run
from maxlm.inference.request import Finish
from maxlm.recipes.class_judge import ClassJudge
from maxlm.recipes.completions import Completion
from maxlm.synthesize import main

pytestmark = pytest.mark.usefixtures("programs_kept")

WRITER = dataclasses.replace(BYTE_MODEL, n_layers=1, max_seq_len=128, head=LmHead(bias=True))
CLASSIFIER = dataclasses.replace(WRITER, head=ClassHead(n_classes=3))


def run_of(folder: Path, model: ModelConfig, likely: str = "") -> str:
    """A run that is asked by the template `plain`, and draws, if any, these letters and the end of its turn."""
    folder.mkdir()
    config = small_run(model=model)
    parameters: dict[str, Any] = parameters_of(config)
    template, tokenizer = choose_template("plain", Bytes()), Bytes()
    ends = ends_of_answers(template, tokenizer)
    if likely:
        bias = np.full(model.vocab_size, -100, np.float32)
        np.maximum.at(bias, ends, 0)
        np.logaddexp.at(bias, tokenizer.encode(likely), 0)
        parameters |= {"unembed_bias": jnp.asarray(bias), "unembed": 0.02 * parameters["unembed"]}
    made = make_run(folder, parameters, model=model)
    save_chat_template(template, Path(made.run_dir) / CHAT, ends)
    if isinstance(model.head, ClassHead):
        observe = dataclasses.replace(made.observe, sample_tokens=0)
        serialize.save(dataclasses.replace(made, task=Classify(), observe=observe), Path(made.run_dir) / "config.json")
    return made.run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Each is read once, and its engine made once."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_chosen", functools.cache(models.load_chosen))
        yield {
            "writer": run_of(folder / "writer", WRITER, "ab"),
            "asker": run_of(folder / "asker", WRITER, "abcdefgh????"),
            "classifier": run_of(folder / "classifier", CLASSIFIER),
        }


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    asked = [{"prompt": f"q{n}", "answer": "ab"[n % 2]} for n in range(6)]
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    return str(file)


def written(*words: str, out: Path) -> list[dict[str, Any]]:
    out.unlink(missing_ok=True)
    main([*words, "--max_new_tokens=12", "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def said(record: dict[str, Any]) -> str:
    return record["messages"][-1]["content"]


def test_best_of_several(runs: dict[str, str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs["writer"], other)
    asked = ["best", prompts, "--run", runs["writer"], "--exact=answer"]
    found = written(
        *asked, "--n=2", "--also", str(other), "--temperatures", "0.5", "1.5", "--every", out=tmp_path / "out.jsonl"
    )
    assert {"rating", "by", "answer", "messages"} == set(found[0])
    assert {one["by"] for one in found} == {f"{place} at {t}" for place in (runs["writer"], other) for t in (0.5, 1.5)}
    assert all(one["rating"] == (said(one) == one["answer"]) for one in found)
    assert {one["rating"] for one in found} == {0.0, 1.0}
    told = capsys.readouterr().out
    assert "6 prompts, 48 answers asked for, " in told and f"{len(found)} records" in told
    pairs = written(*asked, "--n=6", "--pairs", "--margin=0.5", out=tmp_path / "out.jsonl")
    assert pairs and all(one["chosen"][0]["content"] == one["answer"] for one in pairs)
    assert all(one["rejected"][0]["content"] != one["answer"] for one in pairs)
    assert all(one["messages"][-1]["role"] == "user" for one in pairs)


def test_rewards_of_a_config_file(runs: dict[str, str], prompts: str, tmp_path: Path) -> None:
    """With its functions."""
    file = tmp_path / "short.py"
    file.write_text(
        "import dataclasses\n"
        "from configs.grpo_sort import get_config as grpo\n"
        "from maxlm.config import FunctionReward\n"
        "def short(prompt, completion, record):\n"
        "    return int(prompt[1:]) - 0.5 * len(completion)\n"
        "def get_config():\n"
        "    base = grpo()\n"
        "    task = dataclasses.replace(base.task, rewards=(FunctionReward(name='short', weight=2.0),))\n"
        "    return dataclasses.replace(base, task=task)\n"
    )
    found = written("best", prompts, "--run", runs["writer"], "--rewards", str(file), out=tmp_path / "out.jsonl")
    assert found and all(one["rating"] == 2 * int(one["messages"][0]["content"][1:]) - len(said(one)) for one in found)


def test_chains_that_reach_the_answer(runs: dict[str, str], prompts: str, tmp_path: Path) -> None:
    found = written("star", prompts, "--run", runs["writer"], "--exact=answer", "--tries=2", out=tmp_path / "out.jsonl")
    assert {one["rationalized"] for one in found} == {False, True}
    for one in found:
        assert said(one) == one["answer"] and len(one["messages"]) == 2 and "Hint" not in one["messages"][0]["content"]


def test_attacks(runs: dict[str, str], tmp_path: Path) -> None:
    asked = [
        "attacks", "--run", runs["asker"], "--classifier", runs["classifier"], "--harmful", "0", "2", "--count=12",
        "--at_once=8", "--rounds=4", "--shots=2",
    ]  # fmt: skip
    found = written(*asked, "--everything", out=tmp_path / "out.jsonl")
    assert 5 < len(found) <= 12 and len({one["prompt"] for one in found}) == len(found)
    assert all(one["prompt"].endswith("?") for one in found) and {one["shots"] for one in found} > {0}
    tokenizer, classifier = Bytes(), load_run(runs["classifier"])
    classes = np.asarray(classifier.parameters["classes"], np.float64)
    for one in found:
        state = np.asarray(classifier.model.hidden(tokenizer.document_ids(tokenizer.encode(one["completion"]))))[-1]
        p = np.exp(classes @ state) / np.exp(classes @ state).sum()
        assert one["rating"] == pytest.approx(p[1], rel=1e-4) and one["label"] == (one["rating"] >= 0.5)
    threshold = float(np.median([one["rating"] for one in found]))
    more = written(
        *asked, "--threshold", str(threshold), "--earlier", str(tmp_path / "out.jsonl"), out=tmp_path / "more.jsonl"
    )
    assert not {one["prompt"] for one in more} & {one["prompt"] for one in found}
    assert more and all(one["rating"] < threshold and not one["label"] for one in more)


def test_a_classifier_may_read_the_question_too(runs: dict[str, str]) -> None:
    prompt = lambda text: Prompt(0, (), [{"role": "user", "content": text}], {})
    asked = [Completion(prompt(text), "a", (), Finish.STOP) for text in ("b", "c")]
    alone, both = (
        ClassJudge(runs["classifier"], [1], ShardingConfig(data=1), conversations=which)(asked)
        for which in (False, True)
    )
    assert alone.total[0] == alone.total[1] and both.total[0] != both.total[1]
    run = load_run(runs["classifier"])
    assert run.chat is not None
    ids = run.chat.encode(
        Bytes(), [*asked[1].prompt.turns, {"role": "assistant", "content": "a"}], add_generation_prompt=False
    ).ids
    logits = np.asarray(run.parameters["classes"], np.float64) @ np.asarray(run.model.hidden(ids))[-1]
    assert both.total[1] == pytest.approx(1 - np.exp(logits[1]) / np.exp(logits).sum(), rel=1e-4)


def test_what_is_wrong_is_one_line(runs: dict[str, str], prompts: str, tmp_path: Path) -> None:
    empty, odd = tmp_path / "empty.jsonl", tmp_path / "odd.jsonl"
    empty.write_text("")
    odd.write_text('{"text": "a"}\n')
    model, few = ["--run", runs["writer"], "--out", str(tmp_path / "out.jsonl")], "--max_new_tokens=12"
    for command, message in [
        (["best", prompts, *model], "nothing says what an answer is worth; name --rewards, "),
        (["best", str(odd), *model, "--exact=answer"], "record 1 has the keys 'text', of no known format"),
        (["best", str(empty), *model, "--exact=answer"], "has no records; write prompts"),
        (["best", prompts, *model, "--exact=a", "--pairs", "--every"], "--pairs writes the best and the worst"),
        (["best", prompts, *model, "--exact=a", "--margin=1"], "--margin 1.0 is of preferences; add --pairs"),
        (["best", prompts, *model, "--judge=x"], "--judge and --rule go together"),
        (["best", prompts, *model, "--rewards=configs/tiny.py"], "its task, Pretrain, has no rewards"),
        (["best", prompts, *model, "--exact=a", "--also=none"], "none: not a run folder"),
        (["best", prompts, *model, "--reward_run", runs["writer"]], "gives no reward; name a run of task = Reward"),
        (["best", prompts, *model, "--exact=a", "--max_new_tokens=127"], "no prompt has room for --max_new_tokens"),
        (["best", prompts, *model, "--exact=a", few], "answers has a reward; --on_bad_reward stop says why"),
        (
            ["best", prompts, *model, "--exact=a", few, "--on_bad_reward=stop"],
            "its record has no key 'a'; it has prompt, ",
        ),
        (["star", prompts, *model, "--exact=answer", "--hint=told"], "has no {answer}, where the answer comes"),
        (["attacks", *model, "--classifier", runs["writer"]], "its LmHead tells no classes"),
        (["attacks", *model, "--classifier", runs["classifier"], "--harmful=3"], "classes from 0 to 2, and no 3"),
        (["attacks", *model, "--exact=a", "--earlier", prompts], "record 1 has no prompt and rating"),
        (["attacks", *model, "--exact=a", "--attacker=hf:none"], "none: "),
    ]:
        with pytest.raises(UserError) as caught:
            main(command)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()
