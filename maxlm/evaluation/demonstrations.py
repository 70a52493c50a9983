"""Solved questions before a question: which ones, and in which order."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import SamplingConfig, UserError
from maxlm.evaluation.exams import ChoiceExam, Exam, OpenExam, ProgramExam
from maxlm.evaluation.marking import log_softmax
from maxlm.evaluation.prompting import (
    BestLast,
    CodeLengthOrder,
    DiverseDemonstrations,
    EntropyKind,
    EntropyOrder,
    NearestDemonstrations,
    Order,
    OwnDemonstrations,
    RandomDemonstrations,
    Selection,
    UsefulDemonstrations,
)
from maxlm.evaluation.scoring import Examinee

SEPARATOR = "\n\n"
"""Between questions."""

Before = Callable[[int], str]
"""What stands before question `i` of an exam."""


def solutions(exam: Exam) -> list[tuple[str, str]]:
    """Each question's prompt, and the text of its answer.

    Raises:
        UserError: the exam has no answers to show.
    """
    match exam:
        case ChoiceExam():
            return [(one.prompt, one.choices[one.answer]) for one in exam.questions]
        case OpenExam():
            return [(one.prompt, exam.settings.before + one.answers[0]) for one in exam.questions]
        case ProgramExam():
            raise UserError(f"{exam.name}: has no solutions to show; leave out demonstrations")
        case _:
            assert_never(exam)


def joined(texts: Sequence[str]) -> str:
    """Demonstrations as they stand before a question."""
    return "".join(f"{text.strip()}{SEPARATOR}" for text in texts)


def contexts(
    examinee: Examinee, exam: Exam, pool: Exam | None, selection: Selection | None, order: Order, seed: int
) -> Before:
    """What stands before each question.

    Args:
        examinee: the model, for selections and orders that ask it.
        exam: the questions.
        pool: where demonstrations come from; None: the exam's other questions.
        selection: which; None: none.
        order: in which order.
        seed: of what is drawn.

    Raises:
        UserError: the exam has no answers to show, too few questions, or not the same choices everywhere where an order
            or a selection wants them.
    """
    match selection:
        case None:
            return lambda i: ""
        case OwnDemonstrations():
            return _own(examinee, exam, selection, seed)
        case _:
            choose = _chooser(examinee, exam, pool, selection, seed)
    shown = ["".join(one) for one in solutions(exam if pool is None else pool)]
    arrange = _arranger(examinee, exam, shown, order, seed)
    return functools.cache(lambda i: joined([shown[j] for j in arrange(i, choose(i))]))


def _chooser(
    examinee: Examinee, exam: Exam, pool: Exam | None, selection: Selection, seed: int
) -> Callable[[int], list[int]]:
    """For each question, places in the pool, the first choice first."""
    solved = solutions(exam if pool is None else pool)
    others = lambda i: [j for j in range(len(solved)) if pool is not None or j != i]
    if selection.count > len(others(0)):
        raise UserError(
            f"{exam.name}: demonstrations.count = {selection.count} is more than the {len(others(0))} other questions"
        )
    if isinstance(selection, RandomDemonstrations):
        drawn = Random(f"{seed} demonstrations").sample(range(len(solved)), len(solved))
        return lambda i: [j for j in drawn if pool is not None or j != i][: selection.count]
    keys = _directions(examinee.embeddings([prompt for prompt, _ in solved]))
    asked = keys if pool is None else _directions(examinee.embeddings([one.prompt for one in exam.questions]))
    near = lambda i: asked[i] @ keys.T
    match selection:
        case NearestDemonstrations():
            return lambda i: nearest(near(i), others(i), selection.count)
        case DiverseDemonstrations():
            return lambda i: marginal_relevance(near(i), keys @ keys.T, others(i), selection.count, selection.relevance)
        case UsefulDemonstrations():
            gains = _gains(examinee, solved, keys, selection)
            return lambda i: most_useful(
                gains(nearest(near(i), others(i), selection.neighbours)), others(i), near(i), selection.count
            )
        case RandomDemonstrations() | OwnDemonstrations():
            raise AssertionError("known above")
        case _:
            assert_never(selection)


def _directions(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of length 1, around the mean of all, which hidden states have in common."""
    centred = vectors - vectors.mean(0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def nearest(similarity: npt.NDArray[np.float64], among: Sequence[int], count: int) -> list[int]:
    """The `count` places of `among` with the highest similarity, the highest first; of equals, the first."""
    return sorted(among, key=lambda j: -similarity[j])[:count]


def marginal_relevance(
    similarity: npt.NDArray[np.float64],
    between: npt.NDArray[np.float64],
    among: Sequence[int],
    count: int,
    relevance: float,
) -> list[int]:
    """One after the other, the place j of `among` with the highest
    `relevance` similarity[j] - (1 - `relevance`) max over those chosen of between[j]."""
    chosen: list[int] = []
    for _ in range(count):
        worth = lambda j: (
            relevance * similarity[j] - (1 - relevance) * max((between[j, one] for one in chosen), default=0.0)
        )
        chosen.append(max((j for j in among if j not in chosen), key=worth))
    return chosen


Gains = dict[int, float]
"""Place in the pool -> nats that it adds to the log-probability of an answer."""


def _gains(
    examinee: Examinee, solved: Sequence[tuple[str, str]], keys: npt.NDArray[np.float64], how: UsefulDemonstrations
) -> Callable[[Sequence[int]], list[Gains]]:
    """Of solved questions: what each candidate before one adds to the log-probability of its answer."""
    known: dict[int, Gains] = {}

    def gains(questions: Sequence[int]) -> list[Gains]:
        pairs, places = [], []
        for question in dict.fromkeys(questions):
            if question not in known:
                prompt, answer = solved[question]
                others = [j for j in range(len(solved)) if j != question]
                tried = nearest(keys[question] @ keys.T, others, how.candidates)
                pairs += [examinee.split(prompt, answer)]
                pairs += [examinee.split(joined(["".join(solved[j])]) + prompt, answer) for j in tried]
                places.append((question, tried))
        totals = iter([one.total for one in examinee.scores(pairs)]) if pairs else iter(())
        for question, tried in places:
            alone = next(totals)
            known[question] = {j: next(totals) - alone for j in tried}
        return [known[question] for question in questions]

    return gains


def most_useful(
    gains: Sequence[Gains], among: Sequence[int], similarity: npt.NDArray[np.float64], count: int
) -> list[int]:
    """Those of `among` with the highest mean of the gains that are known of them, then the nearest of the others."""
    of = lambda j: [one[j] for one in gains if j in one]
    known = [j for j in among if of(j)]
    ranked = sorted(known, key=lambda j: -float(np.mean(of(j))))
    return [*ranked, *nearest(similarity, [j for j in among if j not in known], count)][:count]


def shared_choices(exam: Exam) -> tuple[str, ...]:
    """The choices that every question has.

    Raises:
        UserError: they differ, or the exam has none.
    """
    if isinstance(exam, ChoiceExam):
        first = exam.questions[0].choices
        if all(one.choices == first for one in exam.questions):
            return first
    raise UserError(f"{exam.name}: this order or selection wants the same choices for every question; use another one")


def _own(examinee: Examinee, exam: Exam, how: OwnDemonstrations, seed: int) -> Before:
    """Questions that the model writes for each question, one for each choice in turn."""
    choices = shared_choices(exam)
    wanted = [choices[n % len(choices)] for n in range(how.count)]
    rounds = []
    for n, choice in enumerate(wanted):
        prompts = [
            how.ask.replace("{answer}", choice).replace("{prompt}", question.prompt) for question in exam.questions
        ]
        rounds.append(
            examinee.texts(
                prompts,
                max_new_tokens=how.max_new_tokens,
                stop=("\n",),
                sampling=SamplingConfig(temperature=how.temperature),
                seed=seed + n,
            )
        )
    return lambda i: joined([f"{texts[i].strip()}{choice}" for texts, choice in zip(rounds, wanted, strict=True)])


def _arranger(
    examinee: Examinee, exam: Exam, shown: Sequence[str], order: Order, seed: int
) -> Callable[[int, list[int]], Sequence[int]]:
    """For a question and its demonstrations, the first choice first, those in their order."""
    match order:
        case BestLast():
            return lambda i, chosen: chosen[::-1]
        case EntropyOrder():
            choices, known = shared_choices(exam), dict[tuple[int, ...], Sequence[int]]()

            def by_entropy(i: int, chosen: list[int]) -> Sequence[int]:
                key = tuple(chosen)
                if key not in known:
                    known[key] = _by_entropy(
                        examinee, choices, shown, some_orders(chosen, order.orders, seed), order, seed
                    )
                return known[key]

            return by_entropy
        case CodeLengthOrder():
            if not isinstance(exam, ChoiceExam):
                raise UserError(f"{exam.name}: the order of CodeLengthOrder is of choices; use another one")
            return lambda i, chosen: _by_code_length(
                examinee,
                exam.questions[i].prompt,
                exam.questions[i].choices,
                shown,
                some_orders(chosen, order.orders, seed),
            )
        case _:
            assert_never(order)


def some_orders(chosen: Sequence[int], count: int, seed: int) -> list[tuple[int, ...]]:
    """All orders, or `count` different ones of them, drawn."""
    if math.factorial(len(chosen)) <= count:
        return list(itertools.permutations(chosen))
    rng, found = Random(f"{seed} orders"), dict[tuple[int, ...], None]()
    while len(found) < count:
        found[tuple(rng.sample(list(chosen), len(chosen)))] = None
    return list(found)


def entropy(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """In nats, along the last axis; 0 log 0 is 0."""
    found = np.asarray(probabilities, np.float64)
    terms: npt.NDArray[np.float64] = -np.sum(found * np.log(np.where(found > 0, found, 1.0)), -1)
    return terms


def choice_probabilities(
    examinee: Examinee, asked: Sequence[tuple[str, Sequence[str]]]
) -> list[npt.NDArray[np.float64]]:
    """Of each prompt's choices, among them."""
    pairs = [examinee.split(prompt, choice) for prompt, choices in asked for choice in choices]
    totals = iter(examinee.scores(pairs))
    return [np.exp(log_softmax([next(totals).total for _ in choices])) for _, choices in asked]


def _by_entropy(
    examinee: Examinee,
    choices: Sequence[str],
    shown: Sequence[str],
    orders: Sequence[tuple[int, ...]],
    how: EntropyOrder,
    seed: int,
) -> Sequence[int]:
    before = [joined([shown[j] for j in order]) for order in orders]
    probes = []
    for n in range(how.probes):
        written = examinee.texts(
            before, max_new_tokens=how.max_new_tokens, stop=(SEPARATOR,), sampling=SamplingConfig(), seed=seed + n
        )
        probes += [without_answer(text, choices) for text in written]
    found = choice_probabilities(examinee, [(text + probe, choices) for text in before for probe in probes])
    table = np.array(found).reshape(len(orders), len(probes), len(choices))
    return orders[int(np.argmax(order_entropies(table, how.entropy)))]


def order_entropies(table: npt.NDArray[np.float64], kind: EntropyKind) -> npt.NDArray[np.float64]:
    """Of each order [O], from the probabilities of choices [O, probes, choices] (arXiv:2104.08786, equations 2, 4)."""
    match kind:
        case EntropyKind.GLOBAL:
            predicted = table.argmax(-1)[..., None] == np.arange(table.shape[-1])
            return entropy(predicted.mean(1))
        case EntropyKind.LOCAL:
            return entropy(table).mean(-1)
        case _:
            assert_never(kind)


def without_answer(text: str, choices: Sequence[str]) -> str:
    """A written question up to the last of the choices that comes in it, which is its answer."""
    ends = [place for choice in choices if (place := text.rfind(choice)) > 0]
    return text[: max(ends, default=None)]


def _by_code_length(
    examinee: Examinee,
    prompt: str,
    choices: Sequence[str],
    shown: Sequence[str],
    orders: Sequence[tuple[int, ...]],
) -> Sequence[int]:
    asked = [(joined([shown[j] for j in order]) + prompt, choices) for order in orders]
    return orders[int(np.argmin(entropy(np.array(choice_probabilities(examinee, asked)))))]
