"""How sure a model is of its choices, and whether rightly: calibration, and whom to answer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


def contextual(
    probabilities: npt.NDArray[np.float64], content_free: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Probabilities [choices] divided by the mean of those after prompts without content [prompts, choices], made to
    sum to 1: the softmax is left out of arXiv:2102.09690, section 5, as it changes no order."""
    divided = probabilities / content_free.mean(0)
    scaled: npt.NDArray[np.float64] = divided / divided.sum()
    return scaled


def calibration_error(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.float64], bins: int = 15) -> float:
    """Expected calibration error: over bins of equal width in (0, 1], the mean distance between accuracy and
    confidence, weighted by the questions in a bin (arXiv:1706.04599, equation 3)."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.abs(np.bincount(place, right, bins) - np.bincount(place, confidence, bins))
    return float(gap.sum() / count.sum())


def auroc(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float | None:
    """The chance that a right choice has more confidence than a wrong one, ties as a half; None where all are right, or
    all wrong."""
    good, bad = confidence[right > 0], np.sort(confidence[right == 0])
    if not len(good) or not len(bad):
        return None
    below = np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")
    return float(below.mean() / 2 / len(bad))


class Selective(NamedTuple):
    """What comes of answering only from a threshold on."""

    threshold: float
    coverage: float
    """Share of questions that are answered."""
    accuracy: float
    """Among them."""
    wrong_kept: float | None
    """Share of wrong choices that are still given: the false positive rate; None where all are right."""


def selective(
    confidence: npt.NDArray[np.float64], right: npt.NDArray[np.float64], kept: float = 0.95
) -> Selective | None:
    """The highest threshold that keeps a share `kept` of the right choices (arXiv:1706.02690, section 4.2: the false
    positive rate at 95 % true positive rate); None where none is right."""
    good = np.sort(confidence[right > 0])[::-1]
    if not len(good):
        return None
    threshold = float(good[int(np.ceil(kept * len(good))) - 1])
    given, wrong = confidence >= threshold, right == 0
    return Selective(
        threshold,
        float(given.mean()),
        float(right[given].mean()),
        float(given[wrong].mean()) if wrong.any() else None,
    )
