"""A linear classifier of texts: shares of hashed words, or a model's vectors, through a matrix and a softmax."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.cleaning.score_steps import HashedWords, RunEmbeddings
from maxlm.config.json_file import read_object
from maxlm.data.cleaning.hashed_words import Punctuation, runs, words
from maxlm.data.cleaning.key_tables import mapped
from maxlm.data.cleaning.models_for_cleaning import TextEmbedder

FORMAT = 2
INFO = "classifier.json"


class Sparse(NamedTuple):
    """The few features that a text has."""

    buckets: npt.NDArray[np.int64]
    """[k], sorted, each once."""
    values: npt.NDArray[np.float64]
    """[k]; shares that add up to 1."""


def hashed_features(text: str, config: HashedWords) -> Sparse:
    """Of words and runs of them; a text without words has none."""
    found = words(text, Punctuation.WORDS).hashes
    shift = np.uint64(64 - config.bucket_bits)
    buckets = np.concatenate([runs(found, length) >> shift for length in range(1, config.longest + 1)])
    kinds, counts = np.unique(buckets.astype(np.int64), return_counts=True)
    return Sparse(kinds, counts / max(1, len(buckets)))


class Classifier:
    """Probabilities of classes."""

    def __init__(
        self,
        classes: tuple[str, ...],
        features: HashedWords | RunEmbeddings,
        weights: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        fingerprint: str | None = None,
    ) -> None:
        """
        Args:
            classes: at least two names.
            features: what `weights` are of.
            weights: [features, classes].
            bias: [classes].
            fingerprint: of the model whose vectors are the features.
        """
        self.classes, self.features, self._weights, self._bias = classes, features, weights, bias
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, folder: Path) -> Classifier:
        """What `save` wrote; its weights are mapped.

        Raises:
            UserError: the folder holds no classifier.
        """
        info = read_object(folder / INFO, "a classifier that maxlm wrote")
        if info.get("format") != FORMAT:
            raise UserError(f"{folder}: is of format {info.get('format')!r}, must be of {FORMAT}; train it again")
        kind = {"HashedWords": HashedWords, "RunEmbeddings": RunEmbeddings}[info["features"].pop("kind")]
        try:
            weights, bias = mapped(folder / "weights.npy"), mapped(folder / "bias.npy")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: is not a whole classifier ({error}); train it again") from error
        return cls(tuple(info["classes"]), kind(**info["features"]), weights, bias, info.get("fingerprint"))

    def save(self, folder: Path) -> None:
        """Into a folder that is there."""
        features = {"kind": type(self.features).__name__, **vars(self.features)}
        info = {"format": FORMAT, "classes": self.classes, "features": features, "fingerprint": self.fingerprint}
        (folder / INFO).write_text(json.dumps(info, indent=2) + "\n")
        np.save(folder / "weights.npy", self._weights, allow_pickle=False)
        np.save(folder / "bias.npy", self._bias, allow_pickle=False)

    def index(self, name: str, folder: Path) -> int:
        """The place of a class.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.classes:
            raise UserError(f"good = {name!r} must be a class of {folder}: {', '.join(self.classes)}")
        return self.classes.index(name)

    def of_text(self, text: str) -> npt.NDArray[np.float64]:
        """[classes]; the probabilities, from hashed words."""
        assert isinstance(self.features, HashedWords)
        buckets, values = hashed_features(text, self.features)
        return softmax(values @ self._weights[buckets].astype(np.float64) + self._bias)

    def of_vectors(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """[n, classes]; the probabilities, from embeddings [n, d]."""
        return softmax(vectors.astype(np.float64) @ self._weights + self._bias)

    def of_texts(self, embedder: TextEmbedder) -> Callable[[Sequence[str]], npt.NDArray[np.float64]]:
        """What gives the probabilities [n, classes] of n texts through a model."""
        return lambda texts: self.of_vectors(embedder(texts))


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)
