"""What tests of steps need: their findings for pages, parts of documents, a model that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maxlm.data.cleaning.findings import DocumentStep, Finding, Page
from maxlm.data.cleaning.stages import ComparingStep, StepWorkspace


def before_of(folder: Path, parts: Sequence[Sequence[Page]], *, write: bool = True) -> StepWorkspace:
    """The documents in parts; `write`: make the folder."""
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    return StepWorkspace(len(parts), folder, lambda part: iter(parts[part]))


def through(
    step: DocumentStep | ComparingStep, pages: Sequence[Page], before: StepWorkspace | None = None, part: int = 0
) -> list[Finding]:
    """What a step finds of the documents of a part, its stages done from the last task to the first."""
    if isinstance(step, ComparingStep):
        assert before is not None
        for stage in step.stages(before):
            for task in reversed(range(stage.tasks)):
                stage.work(task)
        step = step.step(before, part)
    return [step(page) for page in pages]


class OneModel:
    """Its vectors count letters, its bits per byte are what the text says."""

    def __init__(self) -> None:
        self.largest = 0
        """Texts that it was given at once, at most."""

    def scorer(self, run: str) -> OneModel:
        return self

    def embedder(self, run: str, fingerprint: str | None = None) -> OneModel.Vectors:
        assert fingerprint in (None, f"of {run}")
        return OneModel.Vectors(self)

    def exact(self, run: str) -> tuple[str, str]:
        return f"{run}/checkpoints/7", f"of {run}/checkpoints/7"

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        return np.array([float(text) for text in texts])

    class Vectors:
        """Shares of the letters from a to z, [n, 26]."""

        def __init__(self, model: OneModel) -> None:
            self._model = model

        def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            self._model.largest = max(self._model.largest, len(texts))
            rows = [[text.count(chr(97 + i)) / max(1, len(text)) for i in range(26)] for text in texts]
            return np.array(rows, np.float32)
