"""Several sources of rewards as one number: each against what it is made of, and what is wrong in one line."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import initial_parameters, plainly, run_decoder, small_model, small_run

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import (
    BadReward,
    ExactReward,
    FormatReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    LmHead,
    ModelConfig,
    ModelReward,
    NumberReward,
    ObserveConfig,
    PatternReward,
    Pretrain,
    ProgramReward,
    Reward,
    RewardSource,
    RunConfig,
    ScalarHead,
    SchemaReward,
    ShardingConfig,
    UserError,
    serialize,
)
from maxlm.config.cli import load_config, parse, parse_run
from maxlm.config.fields import Changes, NotEmpty, config
from maxlm.data.chat import save_chat_template
from maxlm.data.chat_templates import choose_template
from maxlm.data.conversations import encode
from maxlm.data.prompts import Prompt
from maxlm.data.tokenizers import Bytes
from maxlm.hub.models import load_run
from maxlm.inference.request import Finish
from maxlm.models import Tokens, bind
from maxlm.recipes.completions import Completion
from maxlm.recipes.judge import question
from maxlm.recipes.rewards import RewardSum, source_hash

TOKENIZER = Bytes()


def completion(text: str, number: int = 0, said: str = "Ask", **record: Any) -> Completion:
    ids = tuple(TOKENIZER.encode(said))
    prompt = Prompt(number, ids, [{"role": "user", "content": said}], record)
    return Completion(prompt, text, tuple(TOKENIZER.encode(text)), Finish.STOP)


def opened(
    *sources: RewardSource, on_bad: BadReward = BadReward.STOP, tokenizer: str = "", **functions: Any
) -> RewardSum:
    tokenizer = tokenizer or TOKENIZER.fingerprint
    return RewardSum(sources, on_bad, tokenizer=tokenizer, sharding=ShardingConfig(data=1), functions=functions)


def judge(source: RewardSource, *completions: Completion, **functions: Any) -> list[float]:
    """What one source says."""
    rewards = opened(source, **functions)
    [part] = rewards(completions).parts.values()
    return part.tolist()


def complaint(source: RewardSource, one: Completion, **functions: Any) -> str:
    with pytest.raises(UserError) as caught:
        judge(source, one, **functions)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# One number of several


def test_a_sum_of_parts_with_weights() -> None:
    rewards = opened(
        NumberReward(weight=2.0),
        FormatReward(weight=0.5),
        LengthReward(at_most=8, buffer=4, weight=3.0),
        NumberReward(),
    )
    texts = ["<think>1</think>2", "2", "3"]
    judged = rewards([completion(text, answer=2) for text in texts])
    assert list(judged.parts) == list(rewards.names) == ["number", "format", "length", "number_2"]
    length = [-1.0, 0.0, 0.0]  # 17 tokens, and 1
    np.testing.assert_array_equal(judged.parts["length"], length)
    np.testing.assert_allclose(judged.total, [2 + 0.5 - 3 + 1, 2 + 1, 0], rtol=1e-15)
    assert judged.total.dtype == np.float64 and judged.usable.all()


def test_nothing_is_judged_as_nothing() -> None:
    judged = opened(NumberReward(), FormatReward())([])
    assert judged.total.shape == judged.usable.shape == (0,)


def test_what_a_record_asks_for() -> None:
    one = completion("<think>1</think>The answer: 72.", answer="#### 72")
    assert judge(NumberReward(), one) == [1.0]
    assert judge(NumberReward(after="</think>"), one, completion("72", answer=72)) == [1.0, 0.0]
    assert judge(NumberReward(key="n", tolerance=0.5), completion("2", n=2.5), completion("2", n=2.51)) == [1.0, 0.0]
    assert judge(ExactReward(), completion(" yes\n", answer=["no", "yes"]), completion("Yes", answer="yes")) == [1, 0]
    assert judge(ExactReward(normalized=True), completion("The Yes.", answer="yes")) == [1.0]
    assert judge(PatternReward(pattern="a+"), completion("aa"), completion("b")) == [1.0, 0.0]
    assert judge(PatternReward(key="p"), completion("aa", p="b"), completion("b", p="b")) == [0.0, 1.0]
    numbers = {"type": "array", "items": {"type": "integer"}}
    same = [completion("[1, 2]", s=numbers), completion("[1.5]", s=json.dumps(numbers)), completion("[1", s=True)]
    assert judge(SchemaReward(key="s"), *same) == [1.0, 0.0, 0.0]


def test_a_schema_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["a"]}))
    source = SchemaReward(path=str(file))
    assert judge(source, completion('{"a": 1}'), completion("{}")) == [1.0, 0.0]
    before = opened(source).fingerprint
    file.write_text(json.dumps({"type": "object", "required": ["b"]}))
    assert opened(source).fingerprint != before
    file.write_text(json.dumps({"typ": "object"}))
    with pytest.raises(UserError, match=r"task\.rewards\.0 = SchemaReward: .*schema\.json/typ: this keyword"):
        opened(source)


@pytest.mark.parametrize(
    ("source", "record", "words"),
    [
        (NumberReward(), {"question": "x"}, "its record has no key 'answer'; it has question"),
        (NumberReward(), {"answer": "seven"}, "which has no number"),
        (NumberReward(), {"answer": True}, "must be a text or a number"),
        (NumberReward(), {"answer": math.nan}, "which has no number"),
        (NumberReward(), {"answer": math.inf}, "which has no number"),
        (ExactReward(), {"answer": {"a": 1}}, "must be a text or a number"),
        (PatternReward(key="p"), {"p": "("}, "is no regular expression"),
        (PatternReward(pattern="(x+x+)+y", timeout_s=0.1), {}, r"took more than 0\.1 s"),
        (SchemaReward(key="s"), {"s": "{"}, "Expecting"),
        (SchemaReward(key="s"), {"s": {"typ": 1}}, "this keyword is not known"),
    ],
)
def test_a_record_that_cannot_be_judged_by_is_named(source: RewardSource, record: Any, words: str) -> None:
    message = complaint(source, completion("x" * 40, number=17, **record))
    assert message.startswith("task.rewards.0: ") and "of prompt 17 and the completion 'xxxx" in message
    assert "task.on_bad_reward = skip" in message
    assert words.replace("\\", "") in message


def test_programs_and_their_tests() -> None:
    try:
        rewards = opened(ProgramReward(timeout_s=10.0), on_bad=BadReward.SKIP)
    except UserError as error:
        if "machine" not in str(error):
            raise
        pytest.skip(str(error))
    tests = ["assert f(2) == 4", "assert f(3) == 9"]
    texts = [
        "```\ndef f(x): return x * x\n```",
        "def f(x): return 4",
        "",
        "def f(x): return x * x",
        "import sys; sys.exit(0)",
    ]
    records: list[Any] = [
        {"tests": tests},
        {"tests": "\n".join(tests)},
        {"tests": tests},
        {"tests": "assert ("},
        {"tests": ""},
    ]
    judged = rewards([completion(text, **record) for text, record in zip(texts, records, strict=True)])
    np.testing.assert_array_equal(judged.total, [1, 0, 0, math.nan, math.nan])


# Functions


def correct(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    return float(completion == record["answer"]) + (prompt == "Ask") / 2


def test_a_function_of_the_config_file() -> None:
    ones = [completion("a", answer="a"), completion("b", said="Other", answer="a")]
    assert judge(FunctionReward(name="correct"), *ones, correct=correct) == [1.5, 0.0]
    kinds = [True, np.float32(0.5), np.int64(3), np.bool_(True), 2]
    asked = [completion(str(i)) for i in range(len(kinds))]
    assert judge(FunctionReward(name="f"), *asked, f=lambda p, c, r: kinds[int(c)]) == [1, 0.5, 3, 1, 2]


def raises(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    return 1 / (len(completion) - len(completion))


def leaves(*_: Any) -> float:
    raise SystemExit(0)


def changes_the_record(prompt: str, completion: str, record: Any) -> float:
    record["answer"] = completion
    return 1.0


def hangs(*_: Any) -> float:
    while True:
        time.sleep(0.001)


def hangs_in_c(*_: Any) -> float:
    return float(re.fullmatch(r"(a+)+", "a" * 60 + "b") is not None)


BAD = [
    (raises, f"raises ZeroDivisionError: division by zero (test_rewards.py:{raises.__code__.co_firstlineno + 1})"),
    (leaves, "raises SystemExit"),
    (changes_the_record, "raises TypeError"),
    (lambda p, c, r: math.nan, "gives nan, must give a finite number"),
    (lambda p, c, r: -math.inf, "gives -inf, must give a finite number"),
    (lambda p, c, r: 10**400, "too large"),
    (lambda p, c, r: None, "gives None, must give a number"),
    (lambda p, c, r: "1.0", "gives '1.0', must give a number"),
    (lambda p, c, r: [1.0], "gives [1.0], must give a number"),
    (lambda p, c, r: 1j, "gives 1j, must give a number"),
    (lambda p, c: 1.0, "raises TypeError"),
    (hangs, "took more than 0.2 s"),
    (hangs_in_c, "took more than 0.2 s"),
]


@pytest.mark.parametrize(("function", "words"), BAD)
def test_a_function_that_goes_wrong_is_named_or_counted(function: Any, words: str) -> None:
    source, bad = FunctionReward(name="mine", timeout_s=0.2), completion("xyz", number=5)
    message = complaint(source, bad, mine=function)
    assert message.startswith("task.rewards.0: mine, of prompt 5 and the completion 'xyz': ")
    assert words in message

    def sometimes(prompt: str, text: str, record: Mapping[str, Any]) -> Any:
        return function(prompt, text, record) if text == "xyz" else 2.0

    rewards = opened(source, LengthReward(at_most=9, buffer=1), on_bad=BadReward.SKIP, mine=sometimes)
    judged = rewards([completion("good"), bad, completion("good")])
    np.testing.assert_array_equal(judged.usable, [True, False, True])
    np.testing.assert_array_equal(judged.total, [2.0, math.nan, 2.0])
    np.testing.assert_array_equal(judged.parts["length"], [0.0, 0.0, 0.0])


def test_ctrl_c_is_no_bad_reward() -> None:
    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(FunctionReward(name="f"), completion("x"), f=interrupted)


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"task\.rewards\.0 = FunctionReward: name = 'f': there is no such .*correct"):
        opened(FunctionReward(name="f"), correct=correct)
    with pytest.raises(UserError, match=r"a saved config\.json has none; give --config the \.py file"):
        opened(FunctionReward(name="f"))


def test_another_source_text_is_another_fingerprint() -> None:
    def same(*_: Any) -> float:
        return 1.0

    first = opened(FunctionReward(name="f"), f=same).fingerprint

    def same(*_: Any) -> float:  # type: ignore[no-redef]
        return 2.0

    assert opened(FunctionReward(name="f"), f=same).fingerprint != first
    assert opened(FunctionReward(name="f"), NumberReward(), f=correct).fingerprint != first
    made = [{}, {}, {}]
    for space, text in zip(made, ("f = lambda: 1", "f = lambda: 2", "f = lambda: 1"), strict=True):
        exec(text, space)  # without a source text
    hashes = [source_hash(space["f"]) for space in made]
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


CONFIG = """
from maxlm.config import DataConfig, Dataset, RunConfig, TrainConfig, llama
from math import dist

BONUS = 2.0

def right(prompt, completion, record):
    return BONUS * _helper(completion, record)

def _helper(completion, record):
    return completion == record["answer"]

def get_config():
    return RunConfig(
        model=llama(vocab_size=256, d_model=64, n_layers=2, n_heads=4, d_ff=96, max_seq_len=64),
        data=DataConfig(datasets=(Dataset(path="data/x"),)),
        train=TrainConfig(steps=10, batch_size=2, seq_len=64),
    )
"""


def test_functions_come_with_the_config_file_and_not_with_a_saved_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONFIG)
    asked = parse_run(["--config", str(tmp_path / "mine.py"), "--train.steps=3"], prog="x", description="")
    assert asked.config.train.steps == 3
    assert "right" in asked.functions and not {"get_config", "_helper", "BONUS", "RunConfig"} & set(asked.functions)
    assert judge(FunctionReward(name="right"), completion("a", answer="a"), **asked.functions) == [2.0]
    serialize.save(asked.config, tmp_path / "config.json")
    saved = parse_run(["--config", str(tmp_path / "config.json")], prog="x", description="")
    assert not saved.functions and saved.config == asked.config
    assert isinstance(load_config(tmp_path / "mine.py"), RunConfig)


# Configs


@config("task.", changes=Changes.IDENTITY)
class SomeTask:
    """As those that have rewards."""

    rewards: NotEmpty[tuple[RewardSource, ...]]
    """Of each class."""


SOURCES: tuple[RewardSource, ...] = (
    ModelReward(run="runs/reward"),
    NumberReward(),
    ExactReward(),
    PatternReward(pattern="a"),
    SchemaReward(key="schema"),
    ProgramReward(),
    LengthReward(at_most=10, buffer=2),
    FormatReward(tags=("think", "answer")),
    JudgeReward(judge="http://x/v1", rules=("Is it?",), model="m"),
    FunctionReward(name="f"),
)


def test_configs_are_saved_and_changed_like_all_others() -> None:
    task = SomeTask(rewards=SOURCES)
    assert serialize.from_dict(SomeTask, json.loads(json.dumps(serialize.to_dict(task)))) == task
    changed = parse(SomeTask, ["--rewards.1.weight=0.5"], prog="x", description="", default=task)
    assert changed.rewards[1] == NumberReward(weight=0.5) and changed.rewards[2:] == task.rewards[2:]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PatternReward(pattern="("), "is no regular expression"),
        (lambda: LengthReward(at_most=10, buffer=11), "buffer = 11 must be at most at_most = 10"),
        (lambda: FormatReward(tags=("think", "think")), "names a tag twice"),
        (lambda: FormatReward(tags=("<think>",)), "names have no <"),
        (lambda: FormatReward(tags=()), "not be empty"),
        (lambda: JudgeReward(judge="runs/x", rules=("a",), model="m"), "is of a server"),
        (lambda: JudgeReward(judge="runs/x", rules=(" ",)), "write questions"),
        (lambda: NumberReward(weight=math.nan), "weight = nan must be at least 0"),
        (lambda: NumberReward(weight=-1), "weight = -1 must be at least 0"),
        (lambda: FunctionReward(name="f", timeout_s=0.0), r"timeout_s = 0\.0 must be"),
    ],
)
def test_nonsense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        make()
    assert str(caught.value).startswith("task.rewards[].")


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
