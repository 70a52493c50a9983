"""Several sources of rewards as one number: each against what it is made of, and what is wrong in one line."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.config import (
    BadReward,
    ExactReward,
    FormatReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    ModelReward,
    NumberReward,
    PatternReward,
    ProgramReward,
    RewardSource,
    RunConfig,
    SchemaReward,
    ShardingConfig,
    UserError,
    serialize,
)
from maxlm.config.cli import load_config, parse, parse_run
from maxlm.config.fields import Changes, NotEmpty, config
from maxlm.data.prompts import Prompt
from maxlm.data.tokenizers import Bytes
from maxlm.inference.request import Finish
from maxlm.recipes.completions import Completion
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
