"""STaR (Zelikman et al. 2022, arXiv:2203.14465): a model's own chains of thought that reach the right answer, to be
learned; where none does, it is told the answer and thinks again ("rationalization", section 3.3)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maxlm.data.conversation_formats import Turn
from maxlm.inference.request import Finish, nth_seed
from maxlm.recipes.completions import Completion
from maxlm.recipes.responding import Inquiry, Respondent, Worth

Hint = Callable[[Inquiry], str | None]
"""What is written below a question to tell its answer; None: nobody knows it."""


def star(
    questions: Sequence[Inquiry],
    respondent: Respondent,
    judge: Worth,
    tally: Counter[str],
    *,
    tries: int,
    every: bool = False,
    threshold: float = 1.0,
    hint: Hint | None = None,
    examples: Sequence[Turn] = (),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Conversations to be learned, each with `rationalized`: whether the model was told the answer.

    Neither the hint nor the examples are in what is learned. A chain is judged as an answer to the question without the
    hint, which nobody is asked in the end.

    Args:
        questions: asked together.
        respondent: the model.
        judge: what tells a right answer.
        tally: counts questions, and how they ended.
        tries: chains for each question, and again with the hint.
        every: keep all right chains of a question that differ, not the first alone.
        threshold: the reward from which on an answer is right.
        hint: see above; None: questions without a right answer are left out.
        examples: turns before each question that show how one thinks (section 3.1).
        seed: of all. A chain's own is a function of it, the question's number and the try.
    """
    tally["prompts"] += len(questions)
    plain = [_shown(one, examples, None) for one in questions]
    found = _right(questions, plain, respondent, judge, tally, 0, tries, threshold, seed)
    told = {n: hint(one) for n, one in enumerate(questions) if not found[n]} if hint is not None else {}
    missed = [n for n, text in told.items() if text is not None]
    hinted = [_shown(questions[n], examples, told[n]) for n in missed]
    again = _right([questions[n] for n in missed], hinted, respondent, judge, tally, 1, tries, threshold, seed)
    by_hint = dict(zip(missed, again, strict=True))
    for n, one in enumerate(questions):
        texts = found[n] or by_hint.get(n, [])
        tally["solved" if found[n] else "rationalized" if texts else "unsolved"] += 1
        for text in texts if every else texts[:1]:
            yield {**one.answered(text), "rationalized": not found[n]}


def _right(
    questions: Sequence[Inquiry],
    asked: Sequence[Inquiry],
    respondent: Respondent,
    judge: Worth,
    tally: Counter[str],
    turn: int,
    tries: int,
    threshold: float,
    seed: int,
) -> list[list[str]]:
    """Of each question the right chains that differ and came to their end, in the order in which they were drawn."""
    if not questions:
        return []
    seeds = [nth_seed(seed, (2 * one.number + turn) * tries + k) for one in questions for k in range(tries)]
    said = respondent([one for one in asked for _ in range(tries)], seeds)
    places = [n for n in range(len(questions)) for _ in range(tries)]
    there = [(n, _without(questions[n], sample)) for n, sample in zip(places, said, strict=True) if sample is not None]
    tally["too long to be asked"] += len(said) - len(there)
    judged = judge([sample for _, sample in there])
    right = judged.usable & (np.nan_to_num(judged.total, nan=-np.inf) >= threshold)
    found: list[list[str]] = [[] for _ in questions]
    for (n, sample), good in zip(there, right, strict=True):
        text = sample.text.strip()
        if good and sample.finish is Finish.STOP and text and text not in found[n]:
            found[n].append(text)
    return found


def _without(asked: Inquiry, sample: Completion) -> Completion:
    """The answer, as one to the bare question."""
    return sample._replace(prompt=sample.prompt._replace(turns=asked.turns))


def _shown(asked: Inquiry, examples: Sequence[Turn], hint: str | None) -> Inquiry:
    """The question after the examples, with a hint below it."""
    turns = copy.deepcopy(asked.turns)
    if hint is not None:
        turns[-1]["content"] += f"\n\n{hint}"
    own = turns[:1] if turns[0]["role"] == "system" else []
    return asked._replace(turns=[*own, *examples, *turns[len(own) :]])
