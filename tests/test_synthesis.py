"""Builders that ask a model: self-instruct, Toolformer's calls, near duplicates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from maxlm.config import UserError
from maxlm.data.near_duplicates import Novelty, rouge_l, words
from maxlm.recipes.answering import answered
from maxlm.recipes.self_instruct import WrittenTask, self_instruct
from maxlm.recipes.toolformer import UsefulCall, calculator, useful_calls, weighted_loss, with_calls
from maxlm.synthesize import main


def longest(one: list[str], other: list[str]) -> int:
    """By the definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest(one[:-1], other[:-1])
    return max(longest(one[:-1], other), longest(one, other[:-1]))


def test_rouge_l_is_that_of_its_definition() -> None:
    draw = random.Random(0)
    for _ in range(60):
        one, other = ([draw.choice("abc") for _ in range(draw.randint(0, 7))] for _ in range(2))
        want = 2 * longest(one, other) / (len(one) + len(other)) if one and other else 0
        assert rouge_l(one, other) == want
    assert rouge_l(words("Police killed the gunman"), words("police kill the gunman")) == 0.75  # Lin's example


def test_novelty_is_rouge_l_with_all() -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choice("abcde") for _ in range(6)) for _ in range(120)]
    kept, novelty = list[str](), Novelty(0.7)
    for text in texts:
        new = all(rouge_l(words(text), words(other)) < 0.7 for other in kept)
        assert novelty.add(text) == new
        kept += [text] * new
    assert 5 < len(kept) < 115


THINGS = ["apples", "rivers", "iron", "poetry", "knots"]
SEEDS = [WrittenTask(f"Tell me {word} things about {word}.", "", word) for word in THINGS]


class Scripted:
    """Says what it was given, and keeps what it was asked."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), list[Sequence[str]]()

    def __call__(self, prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
        self.asked.append(prompts)
        found = self.answers.pop(0)
        assert len(found) == len(prompts)
        return found


class TestSelfInstruct:
    """Tasks by a model."""

    def test_tasks_are_filtered_and_solved(self) -> None:
        model = Scripted(
            [
                " Name three rivers of Europe.\nTask 7: Tell me apples things about  apples.\nTask 8: Go\n"
                "Task 9: Draw a cat",
                " Describe the picture of a cat.\nTask 7: Sort these words by length.\nTask 8: Say how the",
            ],
            [" (none)\nOutput: Rhine, Loire, Po", " fig, tomato\nOutput: fig, tomato\nmore"],
            ["x", "y"],
            [" Translate the word into French.", " Sort these words by their length."],
            [" cat\nOutput: cat"],
        )
        found = list(self_instruct(SEEDS, model, count=9, rounds=3, at_once=2))
        assert found == [
            WrittenTask("Name three rivers of Europe.", "", "Rhine, Loire, Po"),
            WrittenTask("Sort these words by length.", "fig, tomato", "fig, tomato\nmore"),
        ]  # the last one repeats its input
        shown = model.asked[0][0]
        assert shown.count("Task ") == 6 and shown.endswith("\nTask 6:") and shown != model.asked[0][1]
        assert "Name three rivers" in model.asked[3][0] or "Sort these words" in model.asked[3][0]
        assert model.asked[1][0].endswith("Task: Name three rivers of Europe.\nInput:")
        assert model.asked[1][0].count("Input: (none)\nOutput: ") == 4

    def test_it_ends_and_is_the_same_again(self) -> None:
        def model(prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
            if prompts[0].startswith("Come"):
                return [
                    f" {random.Random(seed + n).randrange(10**9)} is which number in letters."
                    for n in range(len(prompts))
                ]
            return [f" (none)\nOutput: {seed % 97}" for _ in prompts]

        runs = [list(self_instruct(SEEDS, model, count=7, rounds=50, threshold=0.95, seed=3)) for _ in range(2)]
        assert len(runs[0]) == 7 and runs[0] == runs[1]
        assert len(list(self_instruct(SEEDS, model, count=99, rounds=2, at_once=3, threshold=0.95))) == 6


@pytest.mark.parametrize(
    "argument, result",
    [
        ("400 / 1400", "0.29"), ("2+3*4", "14"), ("(2+3)*-4", "-20"), ("10-3-2", "5"), ("8/2/2", "2"), ("1.5", "1.5"),
        ("1/0", None), ("2**3", None), ("", None), ("(1", None), ("1)", None), ("__import__('os')", None),
        ("9" * 400 + "*9", None), ("(" * 99 + "1" + ")" * 99, None), ("1 2", None),
    ],
)  # fmt: skip
def test_calculator(argument: str, result: str | None) -> None:
    assert calculator(argument) == result


def test_the_weights_are_those_of_the_paper() -> None:
    raw = [max(0.0, 1 - 0.2 * t) for t in range(9)]
    log_probs = [-1.0, -3.0, -0.5, -2.0, -7.0, -100.0, -100.0, 0.0, -1.0]
    want = -sum(weight / sum(raw) * one for weight, one in zip(raw, log_probs, strict=True))
    assert weighted_loss(log_probs) == pytest.approx(want, rel=1e-12)


class Reader:
    """A model to which the result of a call is what helps."""

    def __init__(self, helped: float, bare: float = 0.0) -> None:
        self.helped, self.bare, self.prompts = helped, bare, list[str]()

    def log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Sequence[float]]:
        found: list[Sequence[float]] = []
        for context, continuation in pairs:
            if continuation == " [":
                found.append([math.log(0.5 if context.endswith(("is", "has")) else 0.01)])
            else:
                told = context.startswith("[Calculator(9/3) -> 3]") and continuation.startswith(" 3")
                called = context.startswith("[Calculator(9/3)]")
                found.append([-4.0 + self.helped * told + self.bare * called] * 8)
        return found

    def texts(self, prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
        self.prompts += prompts
        calls = ["Calculator(9/3)", "Calculator(9/3)", "Search(x)", "Calculator(nine)"]
        return [calls[n % 4] for n in range(len(prompts))]


class TestToolformer:
    """Calls that help stay."""

    TEXT = "A third of 9 is 3 and she has 4."

    def calls(self, model: Reader, threshold: float) -> list[UsefulCall]:
        return useful_calls(
            self.TEXT, model, {"Calculator": calculator}, "Input: {text}\nOutput: ", samples=4,
            filter_threshold=threshold,
        )  # fmt: skip

    def test_a_call_stays_if_its_result_helps_enough(self) -> None:
        model = Reader(helped=1.5)
        [call] = self.calls(model, 1.5 - 1e-9)
        assert call.place == self.TEXT.index(" 3") and call.gain == pytest.approx(1.5)
        assert with_calls(self.TEXT, [call]) == "A third of 9 is [Calculator(9/3) -> 3] 3 and she has 4."
        assert model.prompts[0] == f"Input: {self.TEXT}\nOutput: A third of 9 is ["
        assert len(model.prompts) == 8  # two places are likely
        assert self.calls(model, 1.5 + 1e-9) == []

    def test_the_better_of_no_call_and_no_result_is_what_it_is_held_against(self) -> None:
        assert self.calls(Reader(helped=1.5, bare=1.0), 0.6) == []
        assert len(self.calls(Reader(helped=1.5, bare=1.0), 0.4)) == 1
        assert len(self.calls(Reader(helped=1.5, bare=-9.0), 1.4)) == 1

    def test_several_calls_are_put_in_at_their_places(self) -> None:
        assert with_calls("a b c", [UsefulCall(1, "[x]", 1), UsefulCall(3, "[y]", 1)]) == "a [x] b [y] c"


def test_conversations_are_answered_anew_turn_by_turn() -> None:
    user, system = (lambda text: {"role": "user", "content": text}), {"role": "system", "content": "S"}
    old = {"role": "assistant", "content": "old"}
    talks = [[user("a"), old, user("b"), old], [system, user("c"), old], [user("d"), old, user("e"), old]]
    asked = list[list[dict[str, str]]]()

    def reply(conversations: Sequence[list[dict[str, str]]], seed: int) -> list[str]:
        asked.extend(conversations)
        return [" " if turns[-1]["content"] == "d" else f" {turns[-1]['content']}{seed} " for turns in conversations]

    new = lambda text: {"role": "assistant", "content": text}
    assert answered(talks, reply, "C", seed=5) == [
        [user("a"), new("a5"), user("b"), new("b6")], [system, user("c"), new("c5")], None
    ]  # fmt: skip
    told = {"role": "system", "content": "C"}
    assert asked[0] == [told, user("a")] and asked[3] == [told, user("a"), new("a5"), user("b")]
    assert asked[1] == [{"role": "system", "content": "C\n\nS"}, user("c")] and len(asked) == 4
    asked.clear()
    answered(talks[:1], reply)
    assert asked[0] == [user("a")]


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"instruction": "a"}\n')
    out = ["--run", "none", "--out", str(tmp_path / "out")]
    for command, message in [
        (["poems"], "unknown kind 'poems'; use instructions, answers, calls, best, star or attacks"),
        (["instructions", str(seeds), *out], "record 1 has no instruction and output"),
        (["answers", str(seeds), *out], "record 1 has the keys 'instruction', and neither messages nor"),
        (["answers", str(seeds), "--run", "none", "--out", str(seeds)], "is there already"),
        (["calls", str(seeds), *out, "--prompt", str(seeds)], "has no {text}, where the text comes"),
        (["calls", str(seeds), *out, "--prompt", "none"], "--prompt none: cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            main(command)
    assert not (tmp_path / "out").exists()
