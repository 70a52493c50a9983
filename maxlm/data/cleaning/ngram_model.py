"""An n-gram language model, read from mapped files: how likely a text is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.cleaning.score_steps import PerplexityFilter, PerplexityThird
from maxlm.config.json_file import read_object
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.cleaning.hashed_words import Hashes, Punctuation, runs, words
from maxlm.data.cleaning.key_tables import KeyTable, mapped

FORMAT = 2
INFO, _THIRDS = "ngram_model.json", "perplexity_thirds.json"
_SLICE = 1 << 15  # words at a time: a huge document takes no huge arrays
BEGIN = np.uint64(0)
"""The word before a document; no word has this hash."""


def model_words(text: str) -> Hashes:
    """What the model sees of a text: words and punctuation in small letters, all digits alike, as CCNet has it."""
    return words(text, Punctuation.WORDS, one_digit=True).hashes


class _Bits(NamedTuple):
    """A number of bits for each of some keys."""

    table: KeyTable
    bits: npt.NDArray[np.float32]


class NgramModel:
    """Probabilities of words after words."""

    def __init__(self, order: int, unseen_bits: float, ngrams: Sequence[_Bits], contexts: Sequence[_Bits]) -> None:
        self.order, self._unseen, self._ngrams, self._contexts = order, unseen_bits, ngrams, contexts

    @classmethod
    def open(cls, folder: Path) -> NgramModel:
        """
        Raises:
            UserError: the folder holds no such model.
        """
        info = read_object(folder / INFO, "an n-gram model that maxlm wrote")
        if info.get("format") != FORMAT:
            raise UserError(f"{folder}: is of format {info.get('format')!r}, must be of {FORMAT}; train it again")
        read = lambda name: _Bits(KeyTable.mapped(folder, name), mapped(folder / f"{name}.bits.npy"))
        order = info["order"]
        try:
            ngrams = [read(f"ngrams{length}") for length in range(1, order + 1)]
            contexts = [read(f"contexts{length}") for length in range(2, order + 1)]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: is not a whole n-gram model ({error}); train it again") from error
        return cls(order, info["unseen_bits"], ngrams, contexts)

    def bits(self, text: str) -> npt.NDArray[np.float64]:
        """[n]; -log2 of the probability of each word of a text, after those before it."""
        found = model_words(text)
        stream = np.concatenate([np.full(self.order - 1, BEGIN), found])
        starts = range(0, max(1, len(found)), _SLICE)
        return np.concatenate([self._bits(stream[i : i + _SLICE + self.order - 1]) for i in starts])

    def _bits(self, stream: Hashes) -> npt.NDArray[np.float64]:
        """Of the words of a stream but the first `order - 1`."""
        bits = np.zeros(len(stream) - self.order + 1)
        open_ = np.arange(len(bits))
        for length in range(self.order, 0, -1):
            first = open_ + self.order - length  # of the n-gram, in `stream`
            table, values = self._ngrams[length - 1]
            at = table.find(runs(stream, length)[first])
            hit = at >= 0
            bits[open_[hit]] += values[at[hit]]
            open_, first = open_[~hit], first[~hit]
            if not len(open_):
                return bits
            if length > 1:  # the longer context passes its share on
                table, values = self._contexts[length - 2]
                at = table.find(runs(stream, length - 1)[first])
                bits[open_] += np.where(at >= 0, values[at], 0)
        bits[open_] += self._unseen
        return bits

    def score(self, text: str) -> tuple[float, int]:
        """Bits of a whole text, and its words."""
        bits = self.bits(text)
        return float(bits.sum()), len(bits)

    def perplexity(self, text: str) -> float:
        """2 to the bits a word; infinite for a text without words."""
        bits, count = self.score(text)
        return 2 ** min(bits / count, 1000.0) if count else math.inf


def write_thirds(folder: Path, perplexities: Sequence[float]) -> tuple[float, float] | None:
    """Write the two perplexities between the thirds; without documents there are none."""
    finite = [one for one in perplexities if one < math.inf]
    if not finite:
        return None
    head, middle = (float(one) for one in np.quantile(finite, (1 / 3, 2 / 3)))
    values = {"head": head, "middle": middle, "documents": len(finite)}
    (folder / _THIRDS).write_text(json.dumps(values) + "\n")
    return head, middle


class PerplexityJudge:
    """See `PerplexityFilter`."""

    def __init__(self, config: PerplexityFilter) -> None:
        """
        Raises:
            UserError: the model cannot be read, or its thirds are not known.
        """
        folder = Path(config.model)
        self._model = NgramModel.open(folder)
        if not (folder / _THIRDS).exists():
            raise UserError(f"{folder}: has no {_THIRDS}, as no document was held out; measure the thirds first")
        thirds = read_object(folder / _THIRDS)
        self._head, self._middle = thirds["head"], thirds["middle"]
        most = {
            PerplexityThird.HEAD: self._head,
            PerplexityThird.MIDDLE: self._middle,
            PerplexityThird.TAIL: math.inf,
        }[config.worst]
        self.limits = (
            Limit("perplexity", most=most if config.most is None else min(most, config.most), unit="a word"),
        )

    def __call__(self, page: Page) -> Finding:
        value = self._model.perplexity(page.text)
        third = (
            PerplexityThird.HEAD
            if value <= self._head
            else PerplexityThird.MIDDLE
            if value <= self._middle
            else PerplexityThird.TAIL
        )
        tags = {"perplexity": round(value, 2) if value < math.inf else None, "perplexity_third": third.value}
        return Finding(measured(self.limits, [value]), seen=third.value, tags=tags)
