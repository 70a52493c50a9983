"""Marks of single answers, and what they say together: means with intervals, pass@k."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """In small letters, without punctuation and articles, with single blanks (SQuAD, arXiv:1606.05250); what would then
    be empty keeps its articles (`A` is a choice), or its punctuation."""
    small = " ".join(text.lower().translate(_NO_PUNCTUATION).split())
    return " ".join(_ARTICLES.sub(" ", small).split()) or small or text.strip()


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where the text is one of the answers, both stripped of blanks; else 0."""
    return float(text.strip() in [answer.strip() for answer in answers])


def normalized_match(text: str, answers: Sequence[str]) -> float:
    """As `exact_match`, of what `normalized` leaves."""
    return float(normalized(text) in map(normalized, answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """The largest F1 of the words of the text and those of an answer, as bags (SQuAD, arXiv:1606.05250)."""
    return max(_f1(normalized(text).split(), normalized(answer).split()) for answer in answers)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of `k` samples passes, from `samples` of which `passed` do, without bias.

    1 - C(n - c, k) / C(n, k) as a product of ratios, which no factorial overflows (arXiv:2107.03374, equation 1).

    Raises:
        ValueError: k is more than the samples, or less than 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} must be from 1 to {samples}, the samples that there are")
    if samples - passed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - passed + 1, samples + 1)))


def passes_at(passed: Sequence[bool], ranks: Sequence[float], n: int) -> float:
    """n@k: 1 where one of the `n` samples with the highest ranks passes, of all k (arXiv:2203.07814); else 0."""
    best = np.argsort(-np.asarray(ranks, np.float64), kind="stable")[:n]
    return float(any(passed[i] for i in best))


class Estimate(NamedTuple):
    """A figure, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> Estimate:
    """The mean of the values, one in [0, 1] for each question.

    Of zeros and ones it is a proportion, with Wilson's interval, which has a width also where all are alike; else with
    the percentile interval of resampled questions.
    """
    found = np.asarray(values, np.float64)
    if np.isin(found, (0, 1)).all():
        return proportion(int(found.sum()), len(found))
    interval = bootstrap_of(lambda places: float(found[places].mean()), len(found), seed=seed, resamples=resamples)
    assert interval is not None
    return interval


def proportion(right: int, questions: int) -> Estimate:
    """right / questions, with the score interval, without a correction for continuity (Wilson 1927, "Probable
    inference, the law of succession, and statistical inference")."""
    z, share = 1.959963984540054, right / questions  # 97.5 % of a normal distribution lie below z
    middle = (share + z**2 / (2 * questions)) / (1 + z**2 / questions)
    half = z * math.sqrt(share * (1 - share) / questions + (z / (2 * questions)) ** 2) / (1 + z**2 / questions)
    return Estimate(share, 0.0 if right == 0 else middle - half, 1.0 if right == questions else middle + half)


def bootstrap_of(
    statistic: Callable[[npt.NDArray[np.int64]], float | None], questions: int, *, seed: int = 0, resamples: int = 1000
) -> Estimate | None:
    """Any figure, with its percentile interval (Efron 1979). That is a point where every draw has the same figure.

    Args:
        statistic: the figure of the questions at these places, or None where it has none.
        questions: how many there are.
        seed: of the draws with replacement.
        resamples: how many draws.

    Returns:
        None where all questions have no figure.
    """
    rng, value = np.random.default_rng(seed), statistic(np.arange(questions))
    if value is None:
        return None
    drawn = (statistic(rng.integers(questions, size=questions)) for _ in range(resamples))
    low, high = np.quantile([one for one in drawn if one is not None], [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def log_softmax(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Along the last axis."""
    found = np.asarray(values, np.float64)
    found = found - found.max(-1, keepdims=True)
    shifted: npt.NDArray[np.float64] = found - np.log(np.exp(found).sum(-1, keepdims=True))
    return shifted
