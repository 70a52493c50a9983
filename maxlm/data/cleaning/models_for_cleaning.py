"""What steps ask of models, which the command line brings: this room knows none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Scorer(Protocol):
    """How well a language model foretells texts."""

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Bits per byte of each text."""


class TextEmbedder(Protocol):
    """Where texts lie in the space of a model."""

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """A vector [d] of each text."""


class CleaningModels(Protocol):
    """Models by the folders of their runs."""

    def scorer(self, run: str) -> Scorer: ...

    def embedder(self, run: str, fingerprint: str | None = None) -> TextEmbedder:
        """Refuses to work if the model's fingerprint is another."""

    def exact(self, run: str) -> tuple[str, str]:
        """The checkpoint that is read now, which the run may add to, as RUN_DIR/checkpoints/STEP, and its fingerprint.

        Raises:
            UserError: there is none.
        """
