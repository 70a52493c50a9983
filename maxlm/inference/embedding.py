"""Texts as vectors, by the states that the last layer leaves."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from maxlm.inference.language_model import LanguageModel

_ROWS = 8
_SHORTEST = 16


class Embedder:
    """One program for each length, rounded up to a power of two; compiled when such a text first comes."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._lock = model, threading.Lock()

    def __call__(self, texts: Sequence[Sequence[int]], pooling: str) -> list[list[float]]:
        """Vectors of unit length.

        Args:
            texts: token ids, none empty, none longer than the model is meant for.
            pooling: `mean` of the states of all tokens; or that of the `last`.
        """
        vectors: dict[int, list[float]] = {}
        by_length: dict[int, list[int]] = {}
        limit = self._model.config.max_seq_len
        for i, text in enumerate(texts):
            by_length.setdefault(min(max(_SHORTEST, 1 << (len(text) - 1).bit_length()), limit), []).append(i)
        for length, places in by_length.items():
            for start in range(0, len(places), _ROWS):
                some = places[start : start + _ROWS]
                ids = np.zeros((_ROWS, length), np.int32)  # no token sees the padding behind it
                for row, i in enumerate(some):
                    ids[row, : len(texts[i])] = texts[i]
                with self._lock:
                    states = np.asarray(self._model.hidden(ids), np.float32)
                for row, i in enumerate(some):
                    n = len(texts[i])
                    vector = states[row, :n].mean(0) if pooling == "mean" else states[row, n - 1]
                    vectors[i] = (vector / max(float(np.linalg.norm(vector)), 1e-12)).tolist()
        return [vectors[i] for i in range(len(texts))]
