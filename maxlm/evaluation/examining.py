"""From an exam and a model to marks: what is asked, and what is said of the answers."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, assert_never

import numpy as np

from maxlm.config import SamplingConfig, UserError
from maxlm.evaluation import marking
from maxlm.evaluation.exams import ChoiceExam, Exam, OpenExam, ProgramExam
from maxlm.evaluation.scoring import GREEDY, Examinee


class Judge(Protocol):
    """Runs programs."""

    def __call__(self, program: str, seconds: float) -> str | None:
        """None where the program ends well in so many seconds, else why it failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One figure of an exam."""

    exam: str
    measure: str
    value: float
    low: float
    high: float
    """Between them lie 95 % of the means of resampled questions."""
    chance: float | None
    """What guessing gives; None: it is not known."""
    questions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examined:
    """All that an exam gave."""

    measures: tuple[Measured, ...]
    records: tuple[dict[str, Any], ...]
    """For each question: its marks, and what the model said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How the questions are put."""

    context: Callable[[int], str] = lambda i: ""
    """What stands before question `i`: demonstrations, say."""
    samples: int = 1
    """Programs written for each question; one alone is the likeliest."""
    ks: tuple[int, ...] = (1,)
    """Of pass@k."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95)
    """How several programs are drawn."""
    seed: int = 0
    judge: Judge | None = None
    """Runs programs; None: they are not to be run."""


def examine(examinee: Examinee, exam: Exam, asking: Asking) -> Examined:
    """Ask every question, and mark the answers.

    Raises:
        UserError: the model cannot be asked so, or programs are to be run and may not.
    """
    match exam:
        case ChoiceExam():
            return _choose(examinee, exam, asking)
        case OpenExam():
            return _write(examinee, exam, asking)
        case ProgramExam():
            return _program(examinee, exam, asking)
        case _:
            assert_never(exam)


def _choose(examinee: Examinee, exam: ChoiceExam, asking: Asking) -> Examined:
    """Accuracy of the likeliest continuation, and of the likeliest for its tokens and for its bytes."""
    pairs = [
        examinee.split(asking.context(i) + question.prompt, choice)
        for i, question in enumerate(exam.questions)
        for choice in question.choices
    ]
    scores = iter(zip(examinee.scores(pairs), pairs, strict=True))
    records = []
    for question in exam.questions:
        found = [next(scores) for _ in question.choices]
        totals = np.array([score.total for score, _ in found])
        tokens = np.array([max(1, len(continuation)) for _, (_, continuation) in found])
        sizes = np.array([len(choice.encode()) for choice in question.choices])
        right = lambda values: float(np.argmax(values) == question.answer)  # noqa: B023
        records.append(
            {
                "acc": right(totals),
                "acc_per_token": right(totals / tokens),
                "acc_per_byte": right(totals / sizes),
                "log_probs": totals.tolist(),
                "answer": question.answer,
            }
        )
    return _examined(exam.name, records, ("acc", "acc_per_token", "acc_per_byte"), exam.chance, asking)


def _write(examinee: Examinee, exam: OpenExam, asking: Asking) -> Examined:
    settings = exam.settings
    prompts = [asking.context(i) + question.prompt for i, question in enumerate(exam.questions)]
    texts = examinee.texts(
        prompts, max_new_tokens=settings.max_new_tokens, stop=settings.stop, sampling=GREEDY, seed=asking.seed
    )
    return marked(exam, texts, asking)


def marked(exam: OpenExam, texts: Sequence[str], asking: Asking) -> Examined:
    """Of one answer to each question."""
    records = [
        {
            "exact_match": marking.exact_match(text, question.answers),
            "normalized_match": marking.normalized_match(text, question.answers),
            "token_f1": marking.token_f1(text, question.answers),
            "text": text,
        }
        for question, text in zip(exam.questions, texts, strict=True)
    ]
    return _examined(exam.name, records, ("exact_match", "normalized_match", "token_f1"), exam.chance, asking)


def _program(examinee: Examinee, exam: ProgramExam, asking: Asking) -> Examined:
    """pass@k, and where there are several samples, whether the one that the model finds likeliest passes."""
    if asking.judge is None:
        raise UserError(f"{exam.name}: runs programs that the model writes; allow it with --allow_code")
    if max(asking.ks) > asking.samples:
        raise UserError(f"pass@{max(asking.ks)} needs as many samples; use --samples {max(asking.ks)}, or more")
    settings, one = exam.settings, asking.samples == 1
    prompts = [asking.context(i) + question.prompt for i, question in enumerate(exam.questions)]
    drawn = [
        examinee.texts(
            prompts,
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            sampling=GREEDY if one else asking.sampling,
            seed=asking.seed + sample,
        )
        for sample in range(asking.samples)
    ]
    written = [[sample[i] for sample in drawn] for i in range(len(prompts))]
    programs = [
        f"{question.prompt}{text}\n\n{question.test}\n"
        for question, texts in zip(exam.questions, written, strict=True)
        for text in texts
    ]
    judge = functools.partial(asking.judge, seconds=settings.timeout_s)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        verdicts = iter(list(pool.map(judge, programs)))
    records = []
    for prompt, texts in zip(prompts, written, strict=True):
        failures = [next(verdicts) for _ in texts]
        passed = [failure is None for failure in failures]
        record: dict[str, Any] = {
            f"pass@{k}": marking.pass_at_k(asking.samples, sum(passed), k) for k in sorted(asking.ks)
        }
        if not one:
            scores = examinee.scores([examinee.split(prompt, text) for text in texts])
            ranks = [score.log_probs.mean() if len(score.log_probs) else -np.inf for score in scores]
            record[f"1@{asking.samples}"] = marking.passes_at(passed, ranks, 1)
        records.append(record | {"texts": texts, "failures": failures})
    names = tuple(key for key in records[0] if "@" in key)
    return _examined(exam.name, records, names, 0.0, asking)


def _examined(
    exam: str, records: Sequence[dict[str, Any]], names: Sequence[str], chance: float | None, asking: Asking
) -> Examined:
    """The means of the marks, with their intervals."""
    measures = []
    for name in names:
        found = marking.bootstrap([record[name] for record in records], seed=asking.seed)
        measures.append(
            Measured(
                exam=exam,
                measure=name,
                value=found.mean,
                low=found.low,
                high=found.high,
                chance=None if name == "token_f1" else chance,
                questions=len(records),
            )
        )
    return Examined(measures=tuple(measures), records=tuple(records))
