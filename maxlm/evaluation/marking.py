"""Marks of single answers, and what they say together: means with intervals, pass@k."""

from __future__ import annotations

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


class Resampled(NamedTuple):
    """A figure, and where 95 % of those of resampled questions lie."""

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> Resampled:
    """The mean of the values, one for each question, with its percentile interval (Efron 1979)."""
    found = np.asarray(values, np.float64)
    interval = bootstrap_of(lambda places: float(found[places].mean()), len(found), seed=seed, resamples=resamples)
    assert interval is not None
    return interval


def bootstrap_of(
    statistic: Callable[[npt.NDArray[np.int64]], float | None], questions: int, *, seed: int = 0, resamples: int = 1000
) -> Resampled | None:
    """As `bootstrap`, of any figure.

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
    return Resampled(value, float(low), float(high))


def log_softmax(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Along the last axis."""
    found = np.asarray(values, np.float64)
    found = found - found.max(-1, keepdims=True)
    shifted: npt.NDArray[np.float64] = found - np.log(np.exp(found).sum(-1, keepdims=True))
    return shifted
