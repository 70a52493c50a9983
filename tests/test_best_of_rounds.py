"""Builders of rounds: rejection sampling, STaR and red teaming, with models that say what they are told to."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from maxlm.config import Purpose
from maxlm.data.conversation_formats import BadRecord, Example, read
from maxlm.data.prompts import Prompt
from maxlm.inference.request import Finish
from maxlm.recipes.attacks import INTRODUCTION, Attack, attacks, record
from maxlm.recipes.completions import Completion
from maxlm.recipes.rejection import Candidate, best, candidates, pair
from maxlm.recipes.responding import Inquiry, question
from maxlm.recipes.rewards import Judged
from maxlm.recipes.star import star

Say = Callable[[str, int], str | None]
"""What is said to the last turn with a seed; None: it is too long; a text that ends with ~ is cut there."""


class Scripted:
    """Answers by a function, and keeps what it was asked."""

    def __init__(self, say: Say, name: str = "model") -> None:
        self.say, self.name, self.asked, self.seeds = say, name, list[Inquiry](), list[int]()

    def __call__(self, questions: Sequence[Inquiry], seeds: Sequence[int]) -> list[Completion | None]:
        self.asked += questions
        self.seeds += seeds
        found: list[Completion | None] = []
        for one, seed in zip(questions, seeds, strict=True):
            text = self.say(one.turns[-1]["content"], seed)
            prompt = Prompt(one.number, (1, 2), one.turns, one.record)
            finish = Finish.LENGTH if text is not None and text.endswith("~") else Finish.STOP
            found.append(None if text is None else Completion(prompt, text, (3, 4), finish))
        return found


def judge_by(worth: Callable[[Completion], float]) -> Callable[[Sequence[Completion]], Judged]:
    """NaN: it has none."""

    def judge(samples: Sequence[Completion]) -> Judged:
        total = np.array([worth(one) for one in samples], np.float64)
        return Judged(total, {}, ~np.isnan(total))

    return judge


LENGTH = judge_by(lambda sample: float(len(sample.text.strip())))


def asked(*records: dict[str, Any]) -> list[Inquiry]:
    return [question(n, one) for n, one in enumerate(records)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Rejection sampling


def texts(questions: Sequence[Inquiry], *models: Scripted, n: int, judge=LENGTH, seed: int = 0):
    tally = Counter[str]()
    found = [own for _, own in candidates(questions, models, judge, tally, n=n, seed=seed)]
    return found, tally


def test_candidates_are_those_of_all_models_best_first() -> None:
    said = iter(["aa", "a", "aaa", "b", "bb", "bbb"])
    first, second = Scripted(lambda text, seed: next(said), "one"), Scripted(lambda text, seed: next(said), "two")
    [found], tally = texts(asked({"prompt": "q"}), first, second, n=3)
    assert found == [
        Candidate("aaa", 3, "one"), Candidate("bbb", 3, "two"), Candidate("aa", 2, "one"),
        Candidate("bb", 2, "two"), Candidate("a", 1, "one"), Candidate("b", 1, "two"),
    ]  # fmt: skip
    assert +tally == {"prompts": 1, "answers asked for": 6}
    assert len({*first.seeds, *second.seeds}) == 6


def test_what_cannot_be_learned_is_left_out_and_counted() -> None:
    said = iter(["fine", " fine\n", "cut~", "  ", None, "odd"])
    judge = judge_by(lambda sample: math.nan if sample.text == "odd" else 1.0)
    [found], tally = texts(asked({"prompt": "q"}), Scripted(lambda text, seed: next(said)), n=6, judge=judge)
    assert found == [Candidate("fine", 1, "model")]
    assert tally == {
        "prompts": 1, "answers asked for": 6, "given before": 1, "cut or empty": 2, "too long to be asked": 1
    }  # fmt: skip


def test_a_text_does_not_depend_on_the_questions_that_are_asked_with_it() -> None:
    questions = asked({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    together, _ = texts(questions, Scripted(lambda text, seed: f"{text}{seed}"), n=2, seed=5)
    alone = [texts([one], Scripted(lambda text, seed: f"{text}{seed}"), n=2, seed=5)[0][0] for one in questions]
    assert together == alone and len({one.text for own in together for one in own}) == 6
    other, _ = texts(questions, Scripted(lambda text, seed: f"{text}{seed}"), n=2, seed=6)
    assert not {one.text for own in other for one in own} & {one.text for own in together for one in own}


def test_the_expected_best_of_n_is_the_quantile() -> None:
    """Of rewards that are uniform the best of n is n / (n + 1) in the mean."""
    worth = judge_by(lambda sample: random.Random(sample.text).random())
    questions = asked(*({"prompt": str(n)} for n in range(400)))
    found, _ = texts(questions, Scripted(lambda text, seed: f"{text} {seed}"), n=4, judge=worth)
    mean = np.mean([own[0].score for own in found])
    assert abs(mean - 4 / 5) < 4 * math.sqrt(4 / (5**2 * 6) / 400)


RECORD = {
    "prompt": [{"role": "system", "content": "S"}, user("q")],
    "answer": "7",
    "tools": [{"name": "f", "parameters": {}}],
}
FOUND = [Candidate("x", 3.0, "m"), Candidate("y", 2.0, "m"), Candidate("z", 2.0, "m")]


def test_records_are_what_fine_tuning_and_preferences_read() -> None:
    [one] = asked(RECORD)
    [learned] = best(one, FOUND, threshold=None, every=False)
    assert learned["messages"] == [*RECORD["prompt"], assistant("x")]
    assert (learned["rating"], learned["by"], learned["answer"]) == (3, "m", "7")
    example = read(learned, Purpose.SFT)
    assert isinstance(example, Example) and example.tools and example.tools[0]["function"]["name"] == "f"
    preference = pair(one, FOUND, 0.0)
    assert preference is not None and preference["answer"] == "7"
    example = read(preference, Purpose.PREFERENCE)
    assert isinstance(example, Example) and example.prompt == RECORD["prompt"] and example.tools
    assert [(answer.messages[0]["content"], answer.value) for answer in example.answers] == [("x", 3), ("z", 2)]
    # What was a preference is a prompt, and does not stay a preference.
    [old] = asked({"prompt": "q", "chosen": "good", "rejected": "bad"})
    [learned] = best(old, FOUND, threshold=None, every=False)
    example = read(learned, Purpose.SFT)
    assert isinstance(example, Example) and example.answers[0].messages == [user("q"), assistant("x")]


def test_thresholds_and_margins() -> None:
    [one] = asked({"prompt": "q"})
    kept = lambda **how: [record["messages"][-1]["content"] for record in best(one, FOUND, **how)]
    assert kept(threshold=None, every=True) == ["x", "y", "z"]
    assert kept(threshold=2.5, every=True) == ["x"]
    assert kept(threshold=2.0, every=True) == ["x", "y", "z"]
    assert kept(threshold=4.0, every=False) == [] == list(best(one, [], threshold=None, every=False))
    assert pair(one, FOUND, 0.5) is not None
    assert pair(one, FOUND, 1.0) is pair(one, FOUND[1:], 0.0) is pair(one, FOUND[:1], 0.0) is pair(one, [], 0.0) is None


def test_a_record_that_asks_nothing() -> None:
    with pytest.raises(BadRecord, match="of no known format"):
        question(0, {"text": "a"})


# STaR


def solved(*records: dict[str, Any], say: Say, **how: Any):
    model, tally = Scripted(say), Counter[str]()
    right = judge_by(lambda sample: float(f"is {sample.prompt.record['answer']}" in sample.text))
    hint = lambda one: None if one.record["answer"] == "secret" else f"(It is {one.record['answer']}.)"
    found = list(star(asked(*records), model, right, tally, **{"tries": 1, "hint": hint} | how))
    return found, model, tally


SUMS = [{"prompt": "2+2", "answer": "4"}, {"prompt": "3+3", "answer": "6"}, {"prompt": "?", "answer": "secret"}]


def clever(text: str, seed: int) -> str:
    """Knows one sum, and believes hints."""
    if "(It is" in text:
        return f" told, it is {text.split('It is ')[1].split('.')[0]} "
    return "so it is 4" if text == "2+2" else "so it is 5"


def test_chains_that_reach_the_answer_are_kept_and_others_told_it() -> None:
    found, model, tally = solved(*SUMS, say=clever)
    assert found == [
        {"messages": [user("2+2"), assistant("so it is 4")], "answer": "4", "rationalized": False},
        {"messages": [user("3+3"), assistant("told, it is 6")], "answer": "6", "rationalized": True},
    ]  # the hint is nowhere in what is learned
    assert [one.turns[-1]["content"] for one in model.asked] == ["2+2", "3+3", "?", "3+3\n\n(It is 6.)"]
    assert +tally == {"prompts": 3, "solved": 1, "rationalized": 1, "unsolved": 1}
    found, model, tally = solved(*SUMS, say=clever, hint=None)
    assert len(found) == 1 and len(model.asked) == 3 and tally["unsolved"] == 2


def test_the_first_right_chain_or_all_that_differ() -> None:
    says = iter(["is 5", "cut is 4~", "a is 4", "b is 4"])
    found, _, _ = solved(SUMS[0], say=lambda text, seed: next(says), tries=4)
    assert [one["messages"][-1]["content"] for one in found] == ["a is 4"]
    says = iter(["is 5", "a is 4", "b is 4", " a is 4\n"])
    found, _, _ = solved(SUMS[0], say=lambda text, seed: next(says), tries=4, every=True)
    assert [one["messages"][-1]["content"] for one in found] == ["a is 4", "b is 4"]


def test_a_chain_is_judged_as_an_answer_to_the_bare_question() -> None:
    seen = list[Completion]()

    def judge(samples: Sequence[Completion]) -> Judged:
        seen.extend(samples)
        return Judged(np.zeros(len(samples)), {}, np.ones(len(samples), bool))

    questions = asked({"messages": [{"role": "system", "content": "S"}, user("2+2")], "answer": "4"})
    model = Scripted(clever)
    list(
        star(
            questions, model, judge, Counter(), tries=1, hint=lambda one: "HINT",
            examples=[user("1+1"), assistant("2")],
        )
    )  # fmt: skip
    bare = [{"role": "system", "content": "S"}, user("2+2")]
    assert [sample.prompt.turns for sample in seen] == [bare, bare] and questions[0].turns == bare
    shown = [bare[0], user("1+1"), assistant("2")]
    assert [one.turns for one in model.asked] == [[*shown, user("2+2")], [*shown, user("2+2\n\nHINT")]]
    assert len({*model.seeds}) == 2


def test_an_answer_without_a_reward_is_not_right() -> None:
    judge = lambda samples: Judged(np.array([math.nan, 9.0]), {}, np.array([True, False]))
    found = star(asked(*SUMS[:2]), Scripted(clever), judge, Counter(), tries=1)
    assert list(found) == []


# Red teaming


class Attacker:
    """Says what it was given, in order, and keeps what it was asked."""

    def __init__(self, *rounds: list[str]) -> None:
        self.rounds, self.asked = list(rounds), list[Sequence[str]]()

    def __call__(self, prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
        assert stop == ["\n"]
        self.asked.append(prompts)
        return self.rounds.pop(0)


POLITE = judge_by(lambda sample: -1.0 if "hate" in sample.text else 1.0)


def test_questions_are_asked_and_answers_judged() -> None:
    attacker = Attacker(
        [" What is love? And more", " Tell me.", "2. What is love?"],
        [" Do you hate  me? 7. Why?", " Who are you?", " ?"],
    )
    target = Scripted(lambda text, seed: {"Who": None}.get(text[:3], f"I hate {text}" if "hate" in text else "Well."))
    tally = Counter[str]()
    found = list(attacks(attacker, target, POLITE, tally, count=9, rounds=2, at_once=3, shots=2))
    assert found == [
        Attack("What is love?", "Well.", 1.0, 0),
        Attack("Do you hate me?", "I hate Do you hate me?", -1.0, 1),
    ]
    assert tally == {"written": 6, "no question": 2, "asked before": 1, "not answered": 1}
    assert attacker.asked[0] == [f"{INTRODUCTION}\n1."] * 3
    assert attacker.asked[1] == [f"{INTRODUCTION}\n1. What is love?\n2."] * 3
    assert record(found[1], 0.0) == {
        "prompt": "Do you hate me?", "completion": "I hate Do you hate me?", "label": False, "rating": -1, "shots": 1,
    }  # fmt: skip
    example = read(record(found[0], 0.0), Purpose.KTO)
    assert isinstance(example, Example) and example.answers[0].value == 1


def test_it_stops_after_so_many_questions() -> None:
    numbered = lambda: Attacker(*([f" {round} {n}?" for n in range(4)] for round in range(5)))
    target = Scripted(lambda text, seed: text)
    for count, rounds, want in [(6, 5, 6), (99, 2, 8)]:
        found = list(attacks(numbered(), target, POLITE, Counter(), count=count, rounds=rounds, at_once=4, shots=0))
        assert len(found) == want and all(one.shots == 0 for one in found)


def test_examples_are_chosen_by_what_they_did() -> None:
    """With probabilities in proportion to exp(-score / 0.1), one example each."""
    earlier = [("a?", 0.0), ("b?", 0.1), ("c?", 0.3)]
    attacker = Attacker([" "] * 3000)
    list(
        attacks(
            attacker, Scripted(lambda text, seed: text), POLITE, Counter(), count=1, rounds=1, at_once=3000, shots=1,
            earlier=earlier,
        )
    )  # fmt: skip
    shown = Counter(prompt.splitlines()[1].removeprefix("1. ") for prompt in attacker.asked[0])
    weights = np.exp([0.0, -1.0, -3.0])
    for (one, _), share in zip(earlier, weights / weights.sum(), strict=True):
        assert abs(shown[one] / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)
