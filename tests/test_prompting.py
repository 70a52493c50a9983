"""Which demonstrations, in which order, which reasoning and which votes: against the papers' formulas, and with a model
whose every word is known."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.config import UserError, serialize
from maxlm.evaluation.confidence import auroc, calibration_error, contextual, selective
from maxlm.evaluation.demonstrations import (
    contexts,
    entropy,
    marginal_relevance,
    most_useful,
    nearest,
    order_entropies,
    some_orders,
    without_answer,
)
from maxlm.evaluation.examining import Asking, examine
from maxlm.evaluation.exams import ChoiceExam, ChoiceQuestion, ChoiceSettings, OpenExam, OpenQuestion
from maxlm.evaluation.prompting import (
    AutoChain,
    BestLast,
    ChainOfThought,
    CodeLengthOrder,
    Confidence,
    Direct,
    DiverseDemonstrations,
    EntropyKind,
    EntropyOrder,
    LeastToMost,
    NearestDemonstrations,
    OwnDemonstrations,
    Prompting,
    RandomDemonstrations,
    UsefulDemonstrations,
    VoteWeight,
    Voting,
    ZeroShotChain,
)
from maxlm.evaluation.reasoning import after, answers, k_means, steps, tally
from maxlm.evaluation.scoring import GREEDY, Likelihood, Pair

NO = lambda *_: 0.0


class Scripted:
    """Says what functions of prompts say, and keeps what it was asked."""

    def __init__(
        self,
        *,
        score: Callable[[str, str], float] = NO,
        write: Callable[[str, int], str] = lambda prompt, seed: "",
        vectors: dict[str, Sequence[float]] | None = None,
    ) -> None:
        self._score, self._write, self._vectors = score, write, vectors or {}
        self.scored: list[tuple[str, str]] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return [0, *map(ord, context)], list(map(ord, continuation))

    def scores(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        texts = [("".join(map(chr, a[1:])), "".join(map(chr, b))) for a, b in pairs]
        self.scored += texts
        return [Likelihood(np.full(max(1, len(b)), self._score(a, b) / max(1, len(b))), False) for a, b in texts]

    def texts(self, prompts: Sequence[str], **how: Any) -> list[str]:
        self.asked += [(prompt, how) for prompt in prompts]
        stop = "|".join(map(re.escape, how["stop"]))
        return [re.split(stop, self._write(prompt, how["seed"]))[0] for prompt in prompts]

    def embeddings(self, texts: Sequence[str]) -> Any:
        return np.array([self._vectors[text] for text in texts])


def yes_or_no(*answers: int, **settings: Any) -> ChoiceExam:
    questions = [
        ChoiceQuestion(prompt=f"Q{i}?", choices=(" yes", " no"), answer=answer) for i, answer in enumerate(answers)
    ]
    return ChoiceExam(name="yes or no", questions=tuple(questions), settings=ChoiceSettings(**settings))


def open_exam(n: int = 3, reasoning: Callable[[int], str] = lambda i: "") -> OpenExam:
    questions = [OpenQuestion(prompt=f"Q{i}?", answers=(f"A{i}",), reasoning=reasoning(i)) for i in range(n)]
    return OpenExam(name="open", questions=tuple(questions))


# Which demonstrations


def test_all_questions_have_the_same_demonstrations_but_themselves() -> None:
    exam = yes_or_no(0, 1, 0, 1, 0, 1)
    found = contexts(Scripted(), exam, None, RandomDemonstrations(count=3), BestLast(), seed=1)
    shown = [found(i).removesuffix("\n\n").split("\n\n") for i in range(6)]
    solved = ["Q0? yes", "Q1? no", "Q2? yes", "Q3? no", "Q4? yes", "Q5? no"]
    usual = max(shown, key=shown.count)
    for i, texts in enumerate(shown):
        assert len(set(texts)) == 3 and set(texts) <= set(solved) - {solved[i]}
        assert texts == usual or solved[i] in usual
    again = contexts(Scripted(), exam, None, RandomDemonstrations(count=3), BestLast(), seed=1)
    other = contexts(Scripted(), exam, None, RandomDemonstrations(count=3), BestLast(), seed=2)
    assert [again(i) for i in range(6)] == [found(i) for i in range(6)] != [other(i) for i in range(6)]
    pool = yes_or_no(1, 1)
    of_pool = contexts(Scripted(), exam, pool, RandomDemonstrations(count=2), BestLast(), seed=0)
    assert {of_pool(i) for i in range(6)} <= {"Q0? no\n\nQ1? no\n\n", "Q1? no\n\nQ0? no\n\n"}
    assert contexts(Scripted(), exam, None, None, BestLast(), seed=0)(0) == ""
    with pytest.raises(UserError, match=r"demonstrations.count = 6 is more than the 5 other questions"):
        contexts(Scripted(), exam, None, RandomDemonstrations(count=6), BestLast(), seed=0)


def test_near_and_diverse_ones_by_their_formulas() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((9, 4))
    exam = yes_or_no(*[0] * 9)
    directions = vectors - vectors.mean(0)
    directions /= np.sqrt((directions**2).sum(1, keepdims=True))
    model = Scripted(vectors={f"Q{i}?": vectors[i] for i in range(9)})

    def shown(how: Any) -> list[list[int]]:
        found = contexts(model, exam, None, how, BestLast(), seed=0)
        return [[int(text[1]) for text in found(i).removesuffix("\n\n").split("\n\n")] for i in range(9)]

    near = shown(NearestDemonstrations(count=4))
    diverse = shown(DiverseDemonstrations(count=4, relevance=0.3))
    assert shown(DiverseDemonstrations(count=4, relevance=1.0)) == near != diverse
    for i in range(9):
        by_cosine = sorted(set(range(9)) - {i}, key=lambda j: directions[i] @ directions[j])
        assert near[i] == by_cosine[-4:]  # the nearest one last
        chosen: list[int] = []
        for _ in range(4):
            worth = {
                j: 0.3 * directions[i] @ directions[j]
                - 0.7 * (max(directions[j] @ directions[one] for one in chosen) if chosen else 0)
                for j in set(range(9)) - {i, *chosen}
            }
            chosen.append(max(worth, key=worth.__getitem__))
        assert diverse[i] == chosen[::-1]
    ties = np.array([0.5, 0.9, 0.5])
    assert nearest(ties, [2, 0, 1], 2) == [1, 2]
    assert marginal_relevance(ties, np.eye(3), [0, 1, 2], 3, 0.0) == [0, 1, 2]


def test_useful_ones_are_those_that_helped_with_similar_questions() -> None:
    """Q3 before a question makes its answer likelier by 2, Q1 by 1, all others less likely."""
    exam = yes_or_no(0, 1, 0, 1, 0)
    gain = {"Q3": 2.0, "Q1": 1.0}
    score = lambda context, _: -5.0 + (gain.get(context[:2], -1.0) if "\n\n" in context else 0.0)
    model = Scripted(score=score, vectors={f"Q{i}?": [math.cos(i), math.sin(i)] for i in range(5)})
    how = UsefulDemonstrations(count=2, neighbours=2, candidates=4)
    found = contexts(model, exam, None, how, BestLast(), seed=0)
    assert found(0) == "Q1? no\n\nQ3? no\n\n"
    # What is asked about is never scored itself: its answer is not known.
    near = [context.split("\n\n")[-1] for context, _ in model.scored]
    assert "Q0?" not in near and len(set(near)) == 2 and len(model.scored) == 2 * (1 + 4)
    assert all(
        answer == (" no" if int(q[1]) % 2 else " yes") for q, (_, answer) in zip(near, model.scored, strict=True)
    )
    sim = np.array([0.0, 0.1, 0.2, 0.3])
    assert most_useful([{1: 1.0, 2: -3.0}, {2: 1.0}], [0, 1, 2, 3], sim, 4) == [1, 2, 3, 0]


def test_questions_that_the_model_writes_itself() -> None:
    exam = yes_or_no(0, 1)
    model = Scripted(write=lambda prompt, seed: f" R{seed} after {prompt[-3:]}\nmore")
    found = contexts(model, exam, None, OwnDemonstrations(count=3), BestLast(), seed=7)
    assert found(1) == "R7 after es: yes\n\nR8 after no: no\n\nR9 after es: yes\n\n"
    assert model.asked[1][0] == "Example: Q1?\nAnother example, with the answer yes:"
    assert model.asked[1][1]["sampling"].temperature == 0.5
    mixed = ChoiceExam(name="mixed", questions=(*exam.questions, ChoiceQuestion(prompt="", choices=("a",), answer=0)))
    with pytest.raises(UserError, match="mixed: this order or selection wants the same choices"):
        contexts(model, mixed, None, OwnDemonstrations(), BestLast(), seed=0)


# In which order


def test_entropies_of_orders() -> None:
    assert entropy(np.array([0.5, 0.25, 0.25, 0.0])) == pytest.approx(1.5 * math.log(2))
    table = np.array([[[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.1, 0.9]]])  # [orders, probes, choices]
    assert order_entropies(table, EntropyKind.GLOBAL) == pytest.approx([0, math.log(2)])
    local = [np.mean([-p * math.log(p) - (1 - p) * math.log(1 - p) for p in ps]) for ps in ((0.9, 0.8), (0.6, 0.1))]
    assert order_entropies(table, EntropyKind.LOCAL) == pytest.approx(local)
    assert some_orders([3, 1], 24, 0) == [(3, 1), (1, 3)]
    drawn = some_orders(range(6), 24, 0)
    assert len(set(drawn)) == 24 and all(sorted(one) == list(range(6)) for one in drawn)
    assert without_answer("is it? yes", (" yes", " no")) == "is it?" and without_answer("is it?", (" yes",)) == "is it?"


@pytest.mark.parametrize("kind", EntropyKind)
@pytest.mark.parametrize("clear", ["Q0", "Q1"])
def test_the_order_with_the_highest_entropy(kind: EntropyKind, clear: str) -> None:
    """Where `clear` stands last the model always says yes; elsewhere it is undecided."""

    def score(context: str, choice: str) -> float:
        *before, probe = context.split("\n\n")
        undecided = not before[-1].startswith(clear)
        says = " no" if undecided and "odd" in probe else " yes"
        return (0.1 if undecided else 3.0) * (choice == says)

    model = Scripted(score=score, write=lambda prompt, seed: f"{'odd' if seed % 2 else 'even'}? yes\n\nQ9? no")
    exam, pool, how = yes_or_no(0, 1, 0, 1), yes_or_no(0, 1), RandomDemonstrations(count=2)
    found = contexts(model, exam, pool, how, EntropyOrder(entropy=kind, probes=2), seed=0)
    best = {"Q0": "Q0? yes\n\nQ1? no\n\n", "Q1": "Q1? no\n\nQ0? yes\n\n"}[clear]
    assert [found(i) for i in range(4)] == [best] * 4
    assert len(model.asked) == 4  # once for all: two orders, two probes each
    assert {context.split("\n\n")[-1] for context, _ in model.scored} == {"odd?", "even?"}


def test_the_order_with_the_shortest_code() -> None:
    """A question of an even number is clear after Q0, of an odd one after Q1."""
    exam = yes_or_no(0, 1, 0, 1)

    def score(context: str, choice: str) -> float:
        *before, question = context.split("\n\n")
        clear = int(before[-1][1]) == int(question[1]) % 2
        return (4.0 if clear else 0.2) * (choice == " yes")

    found = contexts(
        Scripted(score=score), exam, yes_or_no(0, 1), RandomDemonstrations(count=2), CodeLengthOrder(), seed=0
    )
    assert [found(i).split("\n\n")[-2][:2] for i in range(4)] == ["Q0", "Q1", "Q0", "Q1"]
    with pytest.raises(UserError, match="open: the order of CodeLengthOrder is of choices"):
        contexts(Scripted(), open_exam(), None, RandomDemonstrations(count=2), CodeLengthOrder(), seed=0)(0)


# How sure


def test_confidence_by_its_formulas() -> None:
    rng = np.random.default_rng(1)
    sure, right = np.round(rng.uniform(0.3, 1, 200), 2), (rng.random(200) < 0.6).astype(float)
    want = 0.0
    for k in range(10):
        inside = (sure > k / 10) & (sure <= (k + 1) / 10)
        if inside.any():
            want += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert calibration_error(sure, right, 10) == pytest.approx(want)
    pairs = [(a > b) + (a == b) / 2 for a in sure[right > 0] for b in sure[right == 0]]
    assert auroc(sure, right) == pytest.approx(np.mean(pairs)) and auroc(sure, np.ones(200)) is None
    found = selective(sure, right, 0.8)
    assert found is not None
    given = sure >= found.threshold
    assert given[right > 0].mean() >= 0.8 > (sure > found.threshold)[right > 0].mean()
    assert found[1:] == pytest.approx((given.mean(), right[given].mean(), given[right == 0].mean()))
    assert selective(sure, np.zeros(200)) is None and calibration_error(np.ones(3), np.ones(3)) == 0
    assert contextual(np.array([0.7, 0.3]), np.array([[0.9, 0.1], [0.7, 0.3]])) == pytest.approx(
        np.array([0.7 / 0.8, 0.3 / 0.2]) / (0.7 / 0.8 + 0.3 / 0.2)
    )


def test_a_bias_is_taken_away_and_confidence_is_told() -> None:
    """The model likes `yes` better by 2 whatever is asked, and knows the answer by 1."""
    exam = yes_or_no(0, 1, 1, 0, 1, content_free=("N/A?", "?"))
    knows = lambda question, choice: choice == (" no" if question[1:2] in "124" and question[0] == "Q" else " yes")
    score = lambda context, choice: (
        2.0 * (choice == " yes") + (float(knows(context, choice)) if context.startswith("Q") else 0.0)
    )
    model = Scripted(score=score)
    how = Prompting(calibrate=True, confidence=Confidence(kept=1.0))
    result = examine(model, exam, Asking(prompting=how))
    marks = {one.measure: one.value for one in result.measures}
    assert marks["acc"] == pytest.approx(2 / 5) and marks["acc_calibrated"] == 1
    # After calibration the odds are those of what it knows: e to 1 for either answer.
    sure = math.e / (1 + math.e)
    assert [max(record["probabilities"]) for record in result.records] == pytest.approx([sure] * 5)
    assert marks["ece"] == pytest.approx(1 - sure) and marks["acc@1"] == marks["coverage@1"] == 1
    assert "auroc" not in marks  # nothing is wrong
    raw = {
        one.measure: one for one in examine(model, exam, Asking(prompting=Prompting(confidence=Confidence()))).measures
    }
    assert raw["auroc"].chance == 0.5 and raw["auroc"].value == 1  # e^3 to 1 where it is right, e^1 to 1 where not
    with pytest.raises(UserError, match="yes or no: calibrate wants content_free prompts"):
        examine(model, yes_or_no(0), Asking(prompting=Prompting(calibrate=True)))
    with pytest.raises(UserError, match="reasoning and samples are of answers that are written"):
        examine(model, exam, Asking(prompting=Prompting(reasoning=ZeroShotChain())))
    with pytest.raises(UserError, match="open: calibrate and confidence are of choices"):
        examine(model, open_exam(), Asking(prompting=Prompting(calibrate=True)))


def test_probabilities_of_an_ensemble_are_averaged() -> None:
    exam, pool = yes_or_no(0), yes_or_no(0, 1)
    favour = {"Q0? yes\n\nQ0?": 3.0, "Q1? no\n\nQ0?": -1.0}
    model = Scripted(score=lambda context, choice: favour[context] * (choice == " yes"))
    how = Prompting(demonstrations=RandomDemonstrations(count=1), voting=Voting(prompts=6))
    (record,) = examine(model, exam, Asking(prompting=how, pool=pool)).records
    asked = [context for context, choice in model.scored if choice == " yes"]
    assert len(set(asked)) == 2 and len(asked) == 6
    yes = np.mean([1 / (1 + math.exp(-favour[context])) for context in asked])
    assert record["probabilities"] == pytest.approx([yes, 1 - yes])
    with pytest.raises(UserError, match="open: demonstrations must be of the kind of yes or no"):
        examine(model, exam, Asking(prompting=how, pool=open_exam()))


# Reasoning and votes


def said(model: Scripted, exam: OpenExam, how: Prompting, **more: Any) -> list[str]:
    return [one.text for one in answers(model, exam, more.pop("pool", None), how, seed=more.pop("seed", 0), **more)]


def test_reasoning_in_two_rounds() -> None:
    def write(prompt: str, seed: int) -> str:
        if prompt.endswith("Let's think step by step."):
            return f" It is {prompt[1]}.\n\nQ8?"
        return f" A{prompt[1]}.\nQ9?"

    model = Scripted(write=write)
    assert said(model, open_exam(2), Prompting(reasoning=ZeroShotChain())) == ["A0", "A1"]
    first = "Q1? Let's think step by step."
    assert [prompt for prompt, _ in model.asked] == [
        "Q0? Let's think step by step.", first,
        "Q0? Let's think step by step. It is 0.\nTherefore, the answer is",
        f"{first} It is 1.\nTherefore, the answer is",
    ]  # fmt: skip
    assert [how["max_new_tokens"] for _, how in model.asked] == [256, 256, 32, 32]
    assert all(how["sampling"] == GREEDY for _, how in model.asked)


def test_chains_of_thought_that_are_shown() -> None:
    exam = open_exam(3, lambda i: "\n".join(f"Step {k}." for k in range(i + 1)))
    model = Scripted(
        write=lambda prompt, seed: " Step 7. The answer is seven. The answer is 8.\nThe end\n\nQ9? The answer is 9."
    )
    how = Prompting(demonstrations=RandomDemonstrations(count=1), reasoning=ChainOfThought())
    pool = open_exam(1, lambda i: "First. ")
    assert said(model, exam, how, pool=pool) == ["8"] * 3
    assert model.asked[2][0] == "Q0? First. The answer is A0.\n\nQ2?"
    # Those with the most steps, the longest last; never the question itself.
    model.asked.clear()
    how = Prompting(demonstrations=RandomDemonstrations(count=1), reasoning=ChainOfThought(complex=True))
    said(model, exam, how)
    longest = "Step 0.\nStep 1.\nStep 2. The answer is A2."
    assert [prompt for prompt, _ in model.asked] == [
        f"Q2? {longest}\n\nQ0?", f"Q2? {longest}\n\nQ1?", "Q1? Step 0.\nStep 1. The answer is A1.\n\nQ2?",
    ]  # fmt: skip
    with pytest.raises(UserError, match='open: ChainOfThought wants demonstrations, with "reasoning" in every'):
        said(model, open_exam(), how)
    assert after("no trigger", "The answer is") == "no trigger" and after("", "x") == ""
    assert steps("a\n\n b\n") == 2


def test_chains_that_the_model_writes_for_each_cluster() -> None:
    """Q0 to Q2 are one cluster, with Q1 in its middle; Q3, Q4 another. Q1's chain is too long."""
    vectors = {"Q0?": [0.0, 0.2], "Q1?": [0.0, 0.0], "Q2?": [0.0, -0.3], "Q3?": [9.0, 0.0], "Q4?": [9.0, 0.1]}

    def write(prompt: str, seed: int) -> str:
        if "Q1?" in prompt and prompt.endswith("step."):
            return " a\nb\nc\nd"
        return " a" if prompt.endswith("step.") else f" A{prompt[1]}"

    model = Scripted(write=write, vectors=vectors)
    how = AutoChain(clusters=2, zero_shot=ZeroShotChain(phrase="step."), most_steps=3)
    said(model, open_exam(5), Prompting(reasoning=how))
    shown = "Q0? step. a\nTherefore, the answer is A0"
    last = [prompt for prompt, _ in model.asked][-5:]
    other = last[0].split("\n\n")[0]
    assert other[:2] in ("Q3", "Q4") and other.endswith(f"step. a\nTherefore, the answer is A{other[1]}")
    assert set(last[1].split("\n\n")) == {shown, other, "Q1? step."}
    assert shown not in last[0] and last[0].endswith("\n\nQ0? step.")


def test_clusters_are_those_of_lloyd() -> None:
    rng = np.random.default_rng(0)
    middles = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = np.concatenate([middle + rng.standard_normal((20, 2)) for middle in middles])
    centres, member = k_means(vectors, 3, seed=1)
    assert sorted(map(tuple, np.round(centres / 10).tolist())) == [(0, 0), (0, 1), (1, 0)]
    for k in range(3):
        assert centres[k] == pytest.approx(vectors[member == k].mean(0)) and (member == k).sum() == 20
    assert k_means(np.zeros((3, 2)), 2, seed=0)[0].shape == (2, 2)  # all in one place


def test_simpler_questions_come_first() -> None:
    def write(prompt: str, seed: int) -> str:
        if prompt.endswith("\n1."):
            return " How many?\n2. And then?" if prompt.startswith("Q0") else " Which?\n\nQ7?"
        return {"How many? ": " 2\nx", "And then? ": " 3", "Which? ": " it"}.get(prompt.splitlines()[-1] + " ", " done")

    model = Scripted(write=lambda prompt, seed: write(prompt.rstrip(" "), seed))
    assert said(model, open_exam(2), Prompting(reasoning=LeastToMost())) == [" done", " done"]
    prompts = [prompt for prompt, _ in model.asked]
    assert prompts[-2:] == ["Q0?\nHow many? 2\nAnd then? 3\nQ0?", "Q1?\nWhich? it\nQ1?"]
    assert len(prompts) == 2 + 2 + 1 + 2


def test_votes() -> None:
    assert tally(["A.", "b", "a"], [1, 1, 1]) == ("A.", pytest.approx(2 / 3))
    assert tally(["x", "y"], [1.0, 1.5]) == ("y", 0.6) and tally(["x", "y"], [0, 0]) == ("x", 0.0)
    assert tally(["?", "!"], [1, 2])[0] == "!"  # nothing is left of them when normalized, and they are not the same
    texts = {0: " a\n", 1: " b\n", 2: " b\n", 3: " c\n", 4: " c\n"}
    model = Scripted(write=lambda prompt, seed: texts[seed])
    how = Prompting(voting=Voting(samples=5))
    assert said(model, open_exam(1), how) == [" b"] and model.asked[0][1]["sampling"].temperature == 0.7
    assert said(model, open_exam(1), how, verifier=lambda one: {" a": 9.0}.get(one.text, 1.0)) == [" a"]
    # The model's own probability: geometric mean over tokens; e^-1 for c, e^-3 for the others.
    by_itself = Scripted(
        write=lambda p, seed: texts[seed], score=lambda _, text: len(text) * (-1.0 if "c" in text else -3.0)
    )
    weighed = Prompting(voting=Voting(samples=5, weight=VoteWeight.PROBABILITY))
    (found,) = answers(by_itself, open_exam(1), None, weighed, seed=0)
    shares = 2 * math.exp(-1) / (2 * math.exp(-1) + 3 * math.exp(-3))
    assert found.text == " c" and found.share == pytest.approx(shares) and len(found.written) == 5


def test_only_the_longest_chains_vote() -> None:
    exam = open_exam(1)
    chains = {
        0: "One. The answer is 1.",
        1: "One. The answer is 1.",
        2: "A.\nB.\nThe answer is 2.",
        3: "A.\nThe answer is 2.",
    }
    pool = open_exam(1, lambda i: "So.")
    of = lambda most: Prompting(
        demonstrations=RandomDemonstrations(count=1),
        reasoning=ChainOfThought(),
        voting=Voting(samples=4, most_complex=most),
    )
    write = lambda prompt, seed: chains[seed]
    assert said(Scripted(write=write), exam, of(None), pool=pool) == ["1"]  # of equals the first
    assert said(Scripted(write=write), exam, of(2), pool=pool) == ["2"]


def test_prompts_of_an_ensemble_differ_and_vote() -> None:
    exam, pool = open_exam(1), open_exam(6)
    model = Scripted(write=lambda prompt, seed: " rare\n" if prompt.startswith("Q0") else " usual\n")
    how = Prompting(demonstrations=RandomDemonstrations(count=2), voting=Voting(prompts=5))
    assert said(model, exam, how, pool=pool) == [" usual"]
    assert len({prompt for prompt, _ in model.asked}) > 2
    assert all(how["sampling"] == GREEDY for _, how in model.asked)


# As a file


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    orders = (BestLast(), EntropyOrder(entropy=EntropyKind.LOCAL), CodeLengthOrder())
    selections = (
        RandomDemonstrations(), NearestDemonstrations(), DiverseDemonstrations(), UsefulDemonstrations(),
        OwnDemonstrations(), None,
    )  # fmt: skip
    reasonings = (Direct(), ChainOfThought(), ZeroShotChain(), AutoChain(), LeastToMost())
    for order, selection, reasoning in zip(itertools.cycle(orders), selections, (*reasonings, Direct()), strict=False):
        how = Prompting(order=order, demonstrations=selection, reasoning=reasoning, confidence=Confidence(bins=3))
        serialize.save(how, tmp_path / "how.json")
        assert serialize.load(Prompting, tmp_path / "how.json") == how
    (tmp_path / "how.json").write_text(json.dumps({"reasoning": {"kind": "Magic"}}))
    with pytest.raises(UserError, match="must be one of Direct, ChainOfThought"):
        serialize.load(Prompting, tmp_path / "how.json")
