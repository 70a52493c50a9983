"""Rejection sampling: of several answers to a prompt those that rewards find best, to be learned (Llama 2,
arXiv:2307.09288, section 3.2.3; Llama 3, arXiv:2407.21783, section 4.2.2); or the best and the worst, to be preferred
to each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from maxlm.inference.request import Finish, nth_seed
from maxlm.recipes.responding import Inquiry, Respondent, Worth


class Candidate(NamedTuple):
    """An answer that may be kept."""

    text: str
    score: float
    by: str
    """Who wrote it."""


def candidates(
    questions: Sequence[Inquiry],
    respondents: Sequence[Respondent],
    judge: Worth,
    tally: Counter[str],
    *,
    n: int,
    seed: int = 0,
) -> Iterator[tuple[Inquiry, list[Candidate]]]:
    """Each question with its answers, best first; of equally good ones that which was written first.

    An answer is left out that is empty, was cut at its greatest length, has been given before, or has no reward. A
    text's seed is a function of `seed`, the question's number, the respondent and the number of the sample, so that
    questions may be asked in any company.

    Args:
        questions: asked together.
        respondents: each of them answers.
        judge: what answers are worth.
        tally: counts what was asked, and what was left out, and why.
        n: answers of each respondent to each question.
        seed: of all.
    """
    each = len(respondents) * n
    tally["prompts"] += len(questions)
    tally["answers asked for"] += each * len(questions)
    found: list[list[Candidate]] = [[] for _ in questions]
    for r, respondent in enumerate(respondents):
        asked = [(i, one) for i, one in enumerate(questions) for _ in range(n)]
        seeds = [nth_seed(seed, one.number * each + r * n + k) for one in questions for k in range(n)]
        said = respondent([one for _, one in asked], seeds)
        there = [(i, sample) for (i, _), sample in zip(asked, said, strict=True) if sample is not None]
        whole = [(i, sample) for i, sample in there if sample.finish is Finish.STOP and sample.text.strip()]
        tally["too long to be asked"] += len(said) - len(there)
        tally["cut or empty"] += len(there) - len(whole)
        judged = judge([sample for _, sample in whole])
        for (i, sample), score, usable in zip(whole, judged.total, judged.usable, strict=True):
            if sample.text.strip() in (one.text for one in found[i]):
                tally["given before"] += 1
            elif usable:
                found[i].append(Candidate(sample.text.strip(), float(score), respondent.name))
    for one, own in zip(questions, found, strict=True):
        yield one, sorted(own, key=lambda candidate: -candidate.score)


def best(
    asked: Inquiry, found: Sequence[Candidate], *, threshold: float | None, every: bool
) -> Iterator[dict[str, Any]]:
    """Conversations to be learned, each with its `rating` and who wrote it.

    Args:
        asked: the question.
        found: its answers, best first.
        threshold: the least score; None: any.
        every: all of them, not the best alone.
    """
    good = [one for one in found if threshold is None or one.score >= threshold]
    for one in good if every else good[:1]:
        yield {**asked.answered(one.text), "rating": one.score, "by": one.by}


def pair(asked: Inquiry, found: Sequence[Candidate], margin: float) -> dict[str, Any] | None:
    """The best answer and the worst, to be preferred to each other; None: they are not more than `margin` apart."""
    if not found or not found[0].score - found[-1].score > margin:
        return None
    chosen, rejected = found[0], found[-1]
    said = lambda one: [{"role": "assistant", "content": one.text}]
    return {
        "messages": asked.turns,
        "chosen": said(chosen),
        "rejected": said(rejected),
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        **asked.others,
    }
