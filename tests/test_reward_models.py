"""Answers judged by models: a reward model is asked as it was trained, a judge by the words of its template."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import initial_parameters, plainly, run_decoder, small_model, small_run
from test_rewards import TOKENIZER, completion, judge, opened

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import (
    JudgeReward,
    LmHead,
    ModelConfig,
    ModelReward,
    ObserveConfig,
    Pretrain,
    Reward,
    RunConfig,
    ScalarHead,
    UserError,
    serialize,
)
from maxlm.data.chat import save_chat_template
from maxlm.data.chat_templates import choose_template
from maxlm.data.conversations import encode
from maxlm.hub.models import load_run
from maxlm.models import Tokens, bind
from maxlm.recipes.judge import question

# Reward models


def make_run(folder: Path, head: Any = ScalarHead(), template: str | None = "plain") -> RunConfig:
    """A run folder without training, and in it how the model is asked."""
    task = Reward() if isinstance(head, ScalarHead) else Pretrain()
    found = dataclasses.replace(
        small_run(small_model(vocab_size=264, head=head, n_layers=1, max_seq_len=256), seq_len=128),
        task=task,
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(folder),
    )
    folder.mkdir()
    TOKENIZER.save(folder / "tokenizer")
    serialize.save(found, folder / "config.json")
    if template is not None:
        save_chat_template(choose_template(template, TOKENIZER), folder / "chat", [TOKENIZER.eos_id])
    with Checkpointer(folder / "checkpoints", found.checkpoint) as checkpointer:
        for step in (1, 2):
            params = initial_parameters(found.model, step)
            checkpointer.save(
                step, params=params, optimizer={"count": jax.numpy.zeros(())}, meta={"tokenizer": TOKENIZER.fingerprint}
            )
    return found


NO_TURN: dict[str, Any] = {"add_generation_prompt": False}


@functools.cache
def forward(model: ModelConfig, step: int) -> Any:
    """Of ids [256] the numbers of all positions, by the forward pass of training."""
    parameters = initial_parameters(model, step)

    @jax.jit
    def scalars(ids: jax.Array) -> jax.Array:
        hidden = run_decoder(
            model, parameters, plainly(), ids[None], Tokens(np.arange(256, dtype=np.int32)[None])
        ).hidden
        return bind(model, parameters).scalars(hidden)[0]

    return scalars


def last_of(found: RunConfig, step: int, ids: Sequence[int]) -> float:
    """Of the last of some ids; what is behind them no id sees."""
    return float(forward(found.model, step)(np.array([*ids, *[7] * (256 - len(ids))], np.int32))[len(ids) - 1])


def test_a_reward_model_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    """By its template, at the last token of the conversation, whatever the others of the batch are."""
    found = make_run(tmp_path / "run")
    ones = [completion("b" * n, said="Why?") for n in (1, 60, 0, 3)]
    newest = opened(ModelReward(run=str(tmp_path / "run"), mean=0.5, std=2.0))
    judged = newest(ones)
    template = choose_template("plain", TOKENIZER)
    for one, value in zip(ones, judged.parts["model"], strict=True):
        said = [*one.prompt.turns, {"role": "assistant", "content": one.text}]
        if one.text:
            [text] = encode({"messages": said}, template, TOKENIZER)  # the ids of the data
            ids = list(text.ids)
        else:
            ids = template.encode(TOKENIZER, said, **NO_TURN).ids
        assert value == pytest.approx((last_of(found, 2, ids) - 0.5) / 2, abs=1e-5)
    earlier = opened(ModelReward(run=str(tmp_path / "run/checkpoints/1")))
    assert earlier.fingerprint != newest.fingerprint
    ids = template.encode(TOKENIZER, [*ones[0].prompt.turns, {"role": "assistant", "content": "b"}], **NO_TURN).ids
    assert earlier(ones[:1]).total[0] == pytest.approx(last_of(found, 1, ids), abs=1e-5)


def test_without_a_template_the_policys_ids_are_taken_if_it_has_its_tokenizer(tmp_path: Path) -> None:
    found = make_run(tmp_path / "run", template=None)
    source, one = ModelReward(run=str(tmp_path / "run")), completion("right", said="Why?")
    ids = [*one.prompt.ids, *one.tokens]
    assert opened(source)([one]).total[0] == pytest.approx(last_of(found, 2, ids), abs=1e-5)
    with pytest.raises(UserError, match=r"task\.rewards\.0 = ModelReward: .*no chat template"):
        opened(source, tokenizer="another")
    with pytest.raises(
        UserError,
        match=r"task\.rewards\.0: model, of prompt 0 .* 303 tokens do not fit the model that judges, which takes 256",
    ):
        opened(source)([completion("x" * 300)])


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", head=LmHead())
    with pytest.raises(UserError, match="LmHead gives no reward; name a run of task = Reward"):
        opened(ModelReward(run=str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"nowhere: not a run folder"):
        opened(ModelReward(run=str(tmp_path / "nowhere")))


# Judges


def test_a_judge_in_memory_says_how_likely_yes_is(tmp_path: Path) -> None:
    """By hand: of the next byte after the question, those that begin yes and Yes against those that begin no and No."""
    found = make_run(tmp_path / "run", head=LmHead())
    rules = ("Is it short?", "Is it?")
    one = completion("b", said="Why?")
    [value] = judge(JudgeReward(judge=str(tmp_path / "run"), rules=rules), one)
    run = load_run(tmp_path / "run")
    chances = []
    for rule in rules:
        text = question(one, rule)
        assert rule in text and "Why?" in text
        ids = run.chat.encode(TOKENIZER, [{"role": "user", "content": text}]).ids
        if len(ids) > found.model.max_seq_len:
            pytest.fail("the question is too long for the model")
        logits = np.asarray(run.model.logits(ids), np.float64)[-1]
        yes, no = (np.exp(logits[[TOKENIZER.encode(c)[0] for c in both]]).sum() for both in ("yY", "nN"))
        chances.append(yes / (yes + no))
    assert value == pytest.approx(np.mean(chances), abs=1e-5) and chances[0] != chances[1]


class Stub(http.server.BaseHTTPRequestHandler):
    """As a server that speaks OpenAI's chat completions: each answer is what `script` says next."""

    script: list[Any]
    asked: list[Any]

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        found = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(found, int):
            return self.send_error(found, "told to")
        if found == "late":
            time.sleep(1.0)
            return None
        if isinstance(found, dict):
            top = [{"token": token, "logprob": value} for token, value in found.items()]
            found = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
        self._answer(found)

    def _answer(self, found: Any) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Stub]]]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("maxlm.recipes.judge._FIRST_WAIT_S", 0.01)
    handler = type("Scripted", (Stub,), {"script": [], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/v1", handler
        found.shutdown()


def log(x: float) -> float:
    return math.log(x)


def test_a_server_is_asked_each_question(server: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, stub = server
    monkeypatch.setenv("JUDGE_KEY", "secret")
    stub.script[:] = [{"Yes": log(0.5), " yes": log(0.1), "No": log(0.2), "Maybe": log(0.1), "": log(0.05)}]
    source = JudgeReward(judge=f"{url}/", rules=("Is it polite?",), api_key="JUDGE_KEY")
    assert judge(source, completion("Thanks")) == [pytest.approx(0.6 / 0.8)]
    [(path, key, body)] = stub.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "first")
    assert "Is it polite?" in body["messages"][0]["content"] and "Thanks" in body["messages"][0]["content"]
    assert body["max_tokens"] == 1 and body["logprobs"] is True and body["top_logprobs"] == 20


def test_rules_of_a_server_are_averaged(server: tuple[str, type[Stub]]) -> None:
    url, stub = server
    stub.script[:] = [{"y": log(0.3), "N": log(0.1)}, {"No": -0.1}, 429, {"YES": -5.0, "x": 0.0}]
    source = JudgeReward(judge=url, rules=("a?",), model="m")
    rewards = opened(source)
    assert [rewards([completion("x")]).total[0] for _ in range(3)] == [pytest.approx(0.75), 0.0, 1.0]
    stub.script[:], stub.asked[:] = [{"Yes": 0.0}], []
    many = opened(JudgeReward(judge=url, rules=("a?", "b?"), model="m"))([completion(str(i)) for i in range(20)])
    np.testing.assert_array_equal(many.total, np.ones(20))
    assert len(stub.asked) == 40


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([{"Perhaps": -0.1, "": -1.0}], "finds neither Yes nor No among the 20"),
        ([500], "says 500 .*asked 2 times"),
        ([400], "the server of the judge says 400"),
        (["late"], "does not answer"),
        ([{"Yes": math.nan}], "finds neither"),
        ([["nothing"]], "log-probabilities"),
    ],
)
def test_a_server_that_does_not_judge(server: tuple[str, type[Stub]], script: list[Any], words: str) -> None:
    url, stub = server
    stub.script[:] = script
    source = JudgeReward(judge=url, rules=("a?",), model="m", timeout_s=0.2, retries=1)
    with pytest.raises(UserError, match=words) as caught:
        judge(source, completion("x"))
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlm.recipes.judge._FIRST_WAIT_S", 0.01)
    with pytest.raises(UserError, match=r"JudgeReward: http://127\.0\.0\.1:9/v1/models: .* does not answer .*3 times"):
        opened(JudgeReward(judge="http://127.0.0.1:9/v1", rules=("a?",)))
    with pytest.raises(UserError, match=r"NO_SUCH_KEY.*is not set"):
        opened(JudgeReward(judge="http://127.0.0.1:9/v1", rules=("a?",), model="m", api_key="NO_SUCH_KEY"))
