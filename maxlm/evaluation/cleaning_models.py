"""Runs as the models that steps of data cleaning ask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.evaluation.scoring import RunExaminee
from maxlm.inference.bases import RunBase
from maxlm.inference.load import load_run


def exact_run(run: str) -> tuple[str, str]:
    """The checkpoint that is meant by RUN_DIR, its newest, as RUN_DIR/checkpoints/STEP; and its fingerprint.

    Raises:
        UserError: there is none.
    """
    base = RunBase(run)
    return base.place, base.fingerprint()


class RunModel:
    """A `Scorer` and an `TextEmbedder` of one run."""

    def __init__(self, run: str, fingerprint: str | None = None) -> None:
        """
        Args:
            run: RUN_DIR, or RUN_DIR/checkpoints/STEP.
            fingerprint: as of `exact_run`; None: any.

        Raises:
            UserError: it cannot be loaded, or is another.
        """
        base = RunBase(run)
        if fingerprint is not None and base.fingerprint() != fingerprint:
            raise UserError(f"{run}: has other weights than when a classifier was trained with it; train it again")
        self._examinee = RunExaminee(load_run(base.folder, step=base.step))

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Bits per byte of each text [n], of its beginning as documents have it; 0 of an empty one."""
        found = self._examinee.scores([self._examinee.split("", text) for text in texts])
        sizes = [max(1, len(text.encode())) for text in texts]
        return np.array([-one.total / size / math.log(2) for one, size in zip(found, sizes, strict=True)])

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The mean hidden state of each text [n, D], of its end if it is too long."""
        return self._examinee.embeddings(texts).astype(np.float32)
