"""Answers that the model writes: at once or after reasoning, and one of several by votes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import SamplingConfig, UserError
from maxlm.evaluation.demonstrations import SEPARATOR, Before, contexts, joined
from maxlm.evaluation.exams import OpenExam, OpenQuestion
from maxlm.evaluation.marking import normalized
from maxlm.evaluation.prompting import (
    AutoChain,
    ChainOfThought,
    Direct,
    LeastToMost,
    Prompting,
    VoteWeight,
    Voting,
    ZeroShotChain,
)
from maxlm.evaluation.scoring import GREEDY, Examinee

_NUMBERED = re.compile(r"^\s*(?:\d+[.)]|[-*])?\s*")


class WrittenAnswer(NamedTuple):
    """What the model wrote for one question in one go."""

    prompt: str
    """What it went on with, in the first round."""
    text: str
    """All that it wrote."""
    answer: str
    """The part that is its answer."""


Verifier = Callable[[WrittenAnswer], float]
"""What a vote for this answer counts, such as how right a verifier finds it (arXiv:2206.02336)."""


class VotedAnswer(NamedTuple):
    """What the votes gave."""

    text: str
    share: float
    """Of all votes."""
    written: tuple[WrittenAnswer, ...]


def answers(
    examinee: Examinee,
    exam: OpenExam,
    pool: OpenExam | None,
    how: Prompting,
    *,
    seed: int,
    verifier: Verifier | None = None,
) -> list[VotedAnswer]:
    """One for each question.

    Args:
        examinee: the model.
        exam: the questions.
        pool: where demonstrations come from; None: the exam's other questions.
        how: how they are put.
        seed: of what is drawn.
        verifier: weighs votes, in place of `how.voting.weight`.

    Raises:
        UserError: the exam has not what the reasoning or the demonstrations want.
    """
    voting, rounds = how.voting, list[list[WrittenAnswer]]()
    sampling = GREEDY if voting.samples == 1 else voting.sampling
    for prompt in range(voting.prompts):
        context = _context(examinee, exam, pool, how, seed + prompt)
        for sample in range(voting.samples):
            draw = _Draw(examinee, exam, context, sampling, seed + prompt * voting.samples + sample)
            rounds.append(_ways(draw, how))
    found = []
    for i in range(len(exam.questions)):
        written = [texts[i] for texts in rounds]
        weights = [1.0] * len(written) if len(written) == 1 else _weights(examinee, written, voting, verifier)
        text, share = tally([one.answer for one in written], weights)
        found.append(VotedAnswer(text, share, tuple(written)))
    return found


class _Draw(NamedTuple):
    """One round of answers to every question."""

    examinee: Examinee
    exam: OpenExam
    context: Before
    sampling: SamplingConfig
    seed: int

    def __call__(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        return self.examinee.texts(
            prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=self.sampling, seed=self.seed
        )

    @property
    def prompts(self) -> list[str]:
        return [self.context(i) + question.prompt for i, question in enumerate(self.exam.questions)]


def _ways(draw: _Draw, how: Prompting) -> list[WrittenAnswer]:
    settings, prompts = draw.exam.settings, draw.prompts
    match how.reasoning:
        case Direct():
            texts = draw(prompts, settings.max_new_tokens, settings.stop)
            return [WrittenAnswer(prompt, text, text) for prompt, text in zip(prompts, texts, strict=True)]
        case ChainOfThought(trigger=trigger, max_new_tokens=most):
            texts = draw(prompts, most, (SEPARATOR,))
            return [WrittenAnswer(p, text, after(text, trigger)) for p, text in zip(prompts, texts, strict=True)]
        case ZeroShotChain() as chain:
            return _zero_shot(draw, chain, prompts)
        case AutoChain(zero_shot=chain):
            begun = [f"{prompt}{settings.before}{chain.phrase}" for prompt in prompts]
            texts = draw(begun, chain.max_new_tokens, (SEPARATOR,))
            return [WrittenAnswer(p, text, after(text, chain.trigger)) for p, text in zip(begun, texts, strict=True)]
        case LeastToMost() as steps:
            return _least_to_most(draw, steps, prompts)
        case _:
            assert_never(how.reasoning)


def after(text: str, trigger: str) -> str:
    """The line after the last `trigger`, without the stop at its end; all of the text where there is none."""
    _, _, rest = text.rpartition(trigger)
    lines = rest.strip().splitlines()
    return lines[0].strip().removesuffix(".") if lines else ""


def _zero_shot(draw: _Draw, how: ZeroShotChain, prompts: Sequence[str]) -> list[WrittenAnswer]:
    settings = draw.exam.settings
    begun = [f"{prompt}{settings.before}{how.phrase}" for prompt in prompts]
    chains = draw(begun, how.max_new_tokens, (SEPARATOR,))
    asked = [f"{start}{chain}\n{how.trigger}" for start, chain in zip(begun, chains, strict=True)]
    said = draw(asked, settings.max_new_tokens, settings.stop)
    return [
        WrittenAnswer(start, f"{chain}\n{how.trigger}{text}", text.strip().removesuffix("."))
        for start, chain, text in zip(begun, chains, said, strict=True)
    ]


def _least_to_most(draw: _Draw, how: LeastToMost, prompts: Sequence[str]) -> list[WrittenAnswer]:
    settings = draw.exam.settings
    begun = [f"{prompt}\n{how.split}" for prompt in prompts]
    lists = draw(begun, how.max_new_tokens, (SEPARATOR,))
    simpler = [[_NUMBERED.sub("", line) for line in text.splitlines() if line.strip()][: how.most] for text in lists]
    done = [f"{prompt}\n" for prompt in prompts]
    for step in range(max(map(len, simpler), default=0)):
        places = [i for i, questions in enumerate(simpler) if step < len(questions)]
        asked = [f"{done[i]}{simpler[i][step]}{settings.before}" for i in places]
        for i, prompt, text in zip(places, asked, draw(asked, how.max_new_tokens, ("\n",)), strict=True):
            done[i] = f"{prompt.rstrip()} {text.strip()}\n"
    last = [f"{text}{question.prompt}" for text, question in zip(done, draw.exam.questions, strict=True)]
    said = draw(last, settings.max_new_tokens, settings.stop)
    return [
        WrittenAnswer(prompt, whole[len(prompt) :] + text, text)
        for prompt, whole, text in zip(prompts, last, said, strict=True)
    ]


def _context(examinee: Examinee, exam: OpenExam, pool: OpenExam | None, how: Prompting, seed: int) -> Before:
    """What stands before each question, as the reasoning wants it."""
    match how.reasoning:
        case ChainOfThought() as chain:
            return _with_reasoning(examinee, exam, pool, how, chain, seed)
        case AutoChain() as auto:
            return _own_chains(examinee, exam, pool, auto, seed)
        case Direct() | ZeroShotChain() | LeastToMost():
            return contexts(examinee, exam, pool, how.demonstrations, how.order, seed)
        case _:
            assert_never(how.reasoning)


def _with_reasoning(
    examinee: Examinee, exam: OpenExam, pool: OpenExam | None, how: Prompting, chain: ChainOfThought, seed: int
) -> Before:
    source = exam if pool is None else pool
    if how.demonstrations is None or not all(one.reasoning.strip() for one in source.questions):
        raise UserError(
            f'{source.name}: ChainOfThought wants demonstrations, with "reasoning" in every question that may be one'
        )
    show = lambda one: f"{one.reasoning.strip()} {chain.trigger} {one.answers[0]}."
    if not chain.complex:
        shown = _replaced(source, [show(one) for one in source.questions])
        return contexts(
            examinee, exam if pool is not None else shown, pool and shown, how.demonstrations, how.order, seed
        )
    ranked = sorted(range(len(source.questions)), key=lambda j: -steps(source.questions[j].reasoning))
    texts = [f"{one.prompt}{source.settings.before}{show(one)}" for one in source.questions]
    count = how.demonstrations.count
    chosen = lambda i: [j for j in ranked if pool is not None or j != i][:count][::-1]
    return lambda i: joined([texts[j] for j in chosen(i)])


def _replaced(exam: OpenExam, shown: Sequence[str]) -> OpenExam:
    """The exam with other texts as its answers."""
    questions = [
        OpenQuestion(prompt=one.prompt, answers=(text,)) for one, text in zip(exam.questions, shown, strict=True)
    ]
    return OpenExam(name=exam.name, settings=exam.settings, questions=tuple(questions))


def _own_chains(examinee: Examinee, exam: OpenExam, pool: OpenExam | None, how: AutoChain, seed: int) -> Before:
    """A chain for the question nearest to the middle of each cluster whose chain has few enough steps."""
    source, chain = exam if pool is None else pool, how.zero_shot
    vectors = examinee.embeddings([one.prompt for one in source.questions])
    centres, member = k_means(vectors, min(how.clusters, len(vectors)), seed)
    written = _zero_shot(
        _Draw(examinee, source, lambda i: "", GREEDY, seed), chain, [one.prompt for one in source.questions]
    )
    texts: dict[int, str] = {}
    for cluster, centre in enumerate(centres):
        members = sorted(np.flatnonzero(member == cluster), key=lambda j: float(np.linalg.norm(vectors[j] - centre)))
        good = [j for j in members if steps(written[j].text) <= how.most_steps and written[j].answer]
        for j in (good or members)[:1]:
            texts[int(j)] = written[j].prompt + written[j].text
    return lambda i: joined([text for j, text in texts.items() if pool is not None or j != i])


def k_means(
    vectors: npt.NDArray[np.float64], clusters: int, seed: int, rounds: int = 50
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Centres [clusters, D] and the cluster of each vector, by Lloyd's rounds from centres drawn as k-means++ draws."""
    rng = Random(f"{seed} clusters")
    centres = vectors[[rng.randrange(len(vectors))]]
    distances = lambda: ((vectors[:, None] - centres) ** 2).sum(-1)
    while len(centres) < clusters:
        far = distances().min(1)
        chosen = rng.choices(range(len(vectors)), far)[0] if far.any() else rng.randrange(len(vectors))
        centres = np.concatenate([centres, vectors[[chosen]]])
    for _ in range(rounds):
        member = distances().argmin(1)
        moved = np.array([vectors[member == k].mean(0) if (member == k).any() else centres[k] for k in range(clusters)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres, distances().argmin(1)


def steps(text: str) -> int:
    """Of a chain of thought: its lines that are not blank (arXiv:2210.00720, section 3)."""
    return sum(bool(line.strip()) for line in text.splitlines())


def _weights(
    examinee: Examinee, written: Sequence[WrittenAnswer], voting: Voting, verifier: Verifier | None
) -> list[float]:
    match voting.weight:
        case _ if verifier is not None:
            weights = [verifier(one) for one in written]
        case VoteWeight.ONE:
            weights = [1.0] * len(written)
        case VoteWeight.PROBABILITY:
            scores = examinee.scores([examinee.split(one.prompt, one.text) for one in written])
            weights = [math.exp(one.log_probs.mean()) if len(one.log_probs) else 0.0 for one in scores]
        case _:
            assert_never(voting.weight)
    if voting.most_complex is not None:
        best = sorted(range(len(written)), key=lambda i: -steps(written[i].text))[: voting.most_complex]
        weights = [weight if i in best else 0.0 for i, weight in enumerate(weights)]
    return weights


def tally(answers: Sequence[str], weights: Sequence[float]) -> tuple[str, float]:
    """The answer with the largest sum of weights, and its share of all; of equals, the first that was given.

    Answers are the same where `normalized` makes them so.
    """
    votes, spelt = dict[str, float](), dict[str, str]()
    for answer, weight in zip(answers, weights, strict=True):
        key = normalized(answer)
        votes[key] = votes.get(key, 0.0) + weight
        spelt.setdefault(key, answer)
    best = max(votes, key=lambda key: votes[key])
    total = sum(votes.values())
    return spelt[best], votes[best] / total if total else 0.0
