"""From an exam and a model to marks: what is asked, and what is said of the answers."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import SamplingConfig, UserError
from maxlm.evaluation import marking
from maxlm.evaluation.confidence import Selective, auroc, calibration_error, contextual, selective
from maxlm.evaluation.demonstrations import choice_probabilities, contexts
from maxlm.evaluation.exams import ChoiceExam, Exam, OpenExam, ProgramExam
from maxlm.evaluation.prompting import Direct, Prompting
from maxlm.evaluation.reasoning import Verifier, answers
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

    prompting: Prompting = Prompting()
    pool: Exam | None = None
    """Where demonstrations come from; None: the exam's other questions."""
    verifier: Verifier | None = None
    """Weighs the votes for answers that the model writes, in place of `prompting.voting.weight`."""
    samples: int = 1
    """Programs written for each question; one alone is the likeliest."""
    ks: tuple[int, ...] = (1,)
    """Of pass@k."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95)
    """How several programs are drawn."""
    seed: int = 0
    judge: Judge | None = None
    """Runs programs; None: they are not to be run."""


def check(exam: Exam, asking: Asking) -> None:
    """What can be said before there is a model.

    Raises:
        UserError: such an exam cannot be put so, or programs are to be run and may not.
    """
    how = asking.prompting
    match exam:
        case ChoiceExam():
            if not isinstance(how.reasoning, Direct) or how.voting.samples > 1:
                raise UserError(
                    f"{exam.name}: reasoning and samples are of answers that are written; here the model chooses"
                )
            if how.calibrate and not exam.settings.content_free:
                raise UserError(f"{exam.name}: calibrate wants content_free prompts in the exam's first line")
            _same_kind(exam, asking.pool)
        case OpenExam():
            if how.calibrate or how.confidence is not None:
                raise UserError(f"{exam.name}: calibrate and confidence are of choices; here the model writes")
            _same_kind(exam, asking.pool)
        case ProgramExam():
            if asking.judge is None:
                raise UserError(f"{exam.name}: runs programs that the model writes; allow it with --allow_code")
            if max(asking.ks) > asking.samples:
                most = max(asking.ks)
                raise UserError(f"{exam.name}: pass@{most} needs as many samples; use --samples {most}, or more")
            if how != Prompting():
                raise UserError(f"{exam.name}: demonstrations, reasoning and votes are of other exams than programs")
        case _:
            assert_never(exam)


def examine(examinee: Examinee, exam: Exam, asking: Asking) -> Examined:
    """Ask every question, and mark the answers.

    Raises:
        UserError: as `check`, or the model cannot be asked so.
    """
    check(exam, asking)
    match exam:
        case ChoiceExam():
            return _choose(examinee, exam, asking)
        case OpenExam():
            return _write(examinee, exam, asking)
        case ProgramExam():
            return _program(examinee, exam, asking)
        case _:
            assert_never(exam)


_NORMS = ("acc", "acc_per_token", "acc_per_byte")
"""Of the likeliest choice, of the likeliest for its tokens, for its bytes."""


def _choose(examinee: Examinee, exam: ChoiceExam, asking: Asking) -> Examined:
    """Accuracies of the likeliest choice; of several prompts the probabilities are averaged."""
    how, questions = asking.prompting, exam.questions
    pool = _same_kind(exam, asking.pool)
    scores = [np.zeros((len(_NORMS), how.voting.prompts, len(one.choices))) for one in questions]
    biases = [np.empty((0, len(one.choices))) for one in questions]
    for prompt in range(how.voting.prompts):
        context = contexts(examinee, exam, pool, how.demonstrations, how.order, asking.seed + prompt)
        pairs = [
            examinee.split(context(i) + one.prompt, choice) for i, one in enumerate(questions) for choice in one.choices
        ]
        found = iter(zip(examinee.scores(pairs), pairs, strict=True))
        for table, question in zip(scores, questions, strict=True):
            for place, choice in enumerate(question.choices):
                score, (_, continuation) = next(found)
                sizes = 1, max(1, len(continuation)), len(choice.encode())
                table[:, prompt, place] = [score.total / size for size in sizes]
        if how.calibrate:
            frees = exam.settings.content_free
            asked = [(context(i) + free, one.choices) for i, one in enumerate(questions) for free in frees]
            distinct = list(dict.fromkeys(asked))
            known = dict(zip(distinct, choice_probabilities(examinee, distinct), strict=True))
            for i in range(len(questions)):
                mine = asked[i * len(frees) : (i + 1) * len(frees)]
                biases[i] = np.concatenate([biases[i], [known[one] for one in mine]])
    records = [
        _choice_record(table, bias, question.answer, how)
        for table, bias, question in zip(scores, biases, questions, strict=True)
    ]
    names = (*_NORMS, "acc_calibrated") if how.calibrate else _NORMS
    result = _examined(exam.name, records, names, exam.chance, asking)
    if how.confidence is None:
        return result
    return dataclasses.replace(result, measures=(*result.measures, *_confidence(exam.name, records, how, asking)))


def _choice_record(
    scores: npt.NDArray[np.float64], biases: npt.NDArray[np.float64], answer: int, how: Prompting
) -> dict[str, Any]:
    """Of scores [norms, prompts, choices] and probabilities after prompts without content [prompts, choices]."""
    mean = np.exp(marking.log_softmax(scores)).mean(1)
    record: dict[str, Any] = {
        name: float(np.argmax(values) == answer) for name, values in zip(_NORMS, mean, strict=True)
    }
    temperature = 1.0 if how.confidence is None else how.confidence.temperature
    probabilities = np.exp(marking.log_softmax(scores[0] / temperature)).mean(0)
    if how.calibrate:
        calibrated = contextual(mean[0], biases)
        probabilities = calibrated ** (1 / temperature) / (calibrated ** (1 / temperature)).sum()
        record["acc_calibrated"] = float(np.argmax(calibrated) == answer)
    return record | {
        "log_probs": scores[0].mean(0).tolist(),
        "log_probs_per_byte": scores[2].mean(0).tolist(),
        "probabilities": probabilities.tolist(),
        "answer": answer,
        "right": float(np.argmax(probabilities) == answer),
    }


def _confidence(exam: str, records: Sequence[dict[str, Any]], how: Prompting, asking: Asking) -> Iterator[Measured]:
    assert how.confidence is not None
    bins, kept = how.confidence.bins, how.confidence.kept
    sure = np.array([max(record["probabilities"]) for record in records])
    right = np.array([record["right"] for record in records])
    choose: Callable[[npt.NDArray[np.int64]], Selective | None] = lambda at: selective(sure[at], right[at], kept)
    figures: dict[str, tuple[float | None, Callable[[npt.NDArray[np.int64]], float | None]]] = {
        "ece": (0.0, lambda at: calibration_error(sure[at], right[at], bins)),
        "auroc": (0.5, lambda at: auroc(sure[at], right[at])),
        f"wrong_kept@{kept:g}": (kept, lambda at: None if (one := choose(at)) is None else one.wrong_kept),
        f"coverage@{kept:g}": (None, lambda at: None if (one := choose(at)) is None else one.coverage),
        f"acc@{kept:g}": (None, lambda at: None if (one := choose(at)) is None else one.accuracy),
    }
    for name, (chance, statistic) in figures.items():
        if (found := marking.bootstrap_of(statistic, len(records), seed=asking.seed)) is not None:
            value, low, high = found
            chance = None if name == "ece" else chance
            yield Measured(
                exam=exam, measure=name, value=value, low=low, high=high, chance=chance, questions=len(records)
            )


def _write(examinee: Examinee, exam: OpenExam, asking: Asking) -> Examined:
    found = answers(
        examinee,
        exam,
        _same_kind(exam, asking.pool),
        asking.prompting,
        seed=asking.seed,
        verifier=asking.verifier,
    )
    records = [
        {
            "exact_match": marking.exact_match(answer.text, question.answers),
            "normalized_match": marking.normalized_match(answer.text, question.answers),
            "token_f1": marking.token_f1(answer.text, question.answers),
            "text": answer.text,
            "share": answer.share,
            "written": [one.text for one in answer.written],
        }
        for question, answer in zip(exam.questions, found, strict=True)
    ]
    return _examined(exam.name, records, ("exact_match", "normalized_match", "token_f1"), exam.chance, asking)


E = TypeVar("E", ChoiceExam, OpenExam)


def _same_kind(exam: E, pool: Exam | None) -> E | None:
    """
    Raises:
        UserError: the pool is of another kind.
    """
    if pool is None or isinstance(pool, type(exam)):
        return pool
    raise UserError(f"{pool.name}: demonstrations must be of the kind of {exam.name}; name an exam file of that kind")


def _program(examinee: Examinee, exam: ProgramExam, asking: Asking) -> Examined:
    """pass@k, and where there are several samples, whether the one that the model finds likeliest passes."""
    assert asking.judge is not None, "looked at before"
    settings, one = exam.settings, asking.samples == 1
    prompts = [question.prompt for question in exam.questions]
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
        found = marking.mean([record[name] for record in records], seed=asking.seed)
        measures.append(
            Measured(
                exam=exam,
                measure=name,
                value=found.value,
                low=found.low,
                high=found.high,
                chance=None if name == "token_f1" else chance,
                questions=len(records),
            )
        )
    return Examined(measures=tuple(measures), records=tuple(records))
