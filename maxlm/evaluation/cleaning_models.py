"""Runs as the models that steps of data cleaning ask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maxlm.evaluation.scoring import RunExaminee
from maxlm.inference.load import load_run


class RunModel:
    """A `Scorer` and an `TextEmbedder` of one run."""

    def __init__(self, run: str) -> None:
        """Raises:
        UserError: it cannot be loaded.
        """
        self._examinee = RunExaminee(load_run(Path(run)))

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Bits per byte of each text [n], of its beginning as documents have it; 0 of an empty one."""
        found = self._examinee.scores([self._examinee.split("", text) for text in texts])
        sizes = [max(1, len(text.encode())) for text in texts]
        return np.array([-one.total / size / math.log(2) for one, size in zip(found, sizes, strict=True)])

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The mean hidden state of each text [n, D], of its end if it is too long."""
        return self._examinee.embeddings(texts).astype(np.float32)
