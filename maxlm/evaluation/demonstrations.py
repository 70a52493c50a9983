"""Solved questions before a question: which ones, and in which order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from random import Random
from typing import assert_never

from maxlm.config import UserError
from maxlm.evaluation.exams import ChoiceExam, Exam, OpenExam, ProgramExam

SEPARATOR = "\n\n"
"""Between questions."""


def solved(exam: Exam) -> list[str]:
    """Each question with its answer, as a demonstration shows it.

    Raises:
        UserError: the exam has no answers to show.
    """
    match exam:
        case ChoiceExam():
            return [one.prompt + one.choices[one.answer] for one in exam.questions]
        case OpenExam():
            return [f"{one.prompt}{exam.settings.before}{one.answers[0]}" for one in exam.questions]
        case ProgramExam():
            raise UserError(f"{exam.name}: has no solutions to show; leave out demonstrations")
        case _:
            assert_never(exam)


def before_each(exam: Exam, count: int, seed: int) -> Callable[[int], str]:
    """For each question, `count` others of the exam drawn at random, with their answers.

    Raises:
        UserError: the exam has no answers to show, or too few questions.
    """
    if not count:
        return lambda i: ""
    shown = solved(exam)
    if count >= len(shown):
        raise UserError(f"{exam.name}: {count} demonstrations need more than its {len(shown)} questions")

    @functools.cache
    def before(i: int) -> str:
        others = Random(f"{seed} {i}").sample([j for j in range(len(shown)) if j != i], count)
        return "".join(f"{shown[j].strip()}{SEPARATOR}" for j in others)

    return before
