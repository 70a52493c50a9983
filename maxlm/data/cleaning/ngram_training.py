"""Train an n-gram language model: interpolated modified Kneser-Ney over words, all counts in memory.

Chen & Goodman 1998 (TR-10-98, section 3) found modified Kneser-Ney the best smoothing throughout; Heafield et al. 2013
(ACL, "Scalable Modified Kneser-Ney Language Model Estimation", sections 2 and 3) say how it is estimated, with pruning.
Over words and not bytes: a word costs one chain of lookups instead of six, and four words see as far as 24 bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.cleaning.score_steps import NgramTraining
from maxlm.data.cleaning.drawn import drawn
from maxlm.data.cleaning.hashed_words import Hashes, runs
from maxlm.data.cleaning.key_tables import KeyTable
from maxlm.data.cleaning.ngram_model import BEGIN, FORMAT, INFO, NgramModel, model_words, write_thirds

_Floats = npt.NDArray[np.float64]
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where a corpus is too small to tell them, as KenLM has them (lmplz --discount_fallback)."""


class NgramSummary(NamedTuple):
    """What was trained."""

    words: int
    """Of the text."""
    ngrams: tuple[int, ...]
    """Of one word, of two, ..., in the model."""
    nbytes: int
    """Of its files."""
    held_out: int
    """Documents that were not trained on."""
    perplexity: float
    """Of all held-out words; NaN if there are none."""

    def __str__(self) -> str:
        told = f"{self.words:,} words, {', '.join(f'{n:,}' for n in self.ngrams)} n-grams of 1, 2, ... words, "
        told += f"{self.nbytes:,} bytes"
        if self.held_out:
            told += f"; perplexity {self.perplexity:,.1f} a word on {self.held_out:,} documents held out"
        return told


class NgramOrder(NamedTuple):
    """N-grams of one length with their probabilities, and of their contexts what is left for others."""

    keys: Hashes
    """[m], sorted; the hash of each n-gram."""
    probability: _Floats
    """[m]; of its last word after the others, all interpolated."""
    contexts: Hashes
    """[c], sorted; hashes of the n - 1 words before. Of one word there is one context, which has no key."""
    rest: _Floats
    """[c]; the share of shorter n-grams."""


def train_ngram_model(texts: Iterable[str], config: NgramTraining, out: Path) -> NgramSummary:
    """Train on the texts in their order, and write the folder `out`: `NgramModel.open` reads it.

    Raises:
        UserError: `out` is there already, or there is no word.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; name a new folder")
    held_out: list[str] = []
    documents: list[Hashes] = []
    count = 0
    for text in texts:
        if drawn(text) < config.held_out:
            held_out.append(text)
            continue
        found = model_words(text)[: config.max_words - count]
        if len(found):
            documents += [np.full(config.order - 1, BEGIN), found]
            count += len(found)
        if count >= config.max_words:
            break
    if not count:
        raise UserError("an n-gram model needs text, and there is no word to train on; name other documents")
    orders = estimate(np.concatenate(documents), config.order, config.least_count)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(orders, partial)
    nbytes = sum(file.stat().st_size for file in partial.iterdir())
    model = NgramModel.open(partial)
    scores = [model.score(text) for text in held_out]
    write_thirds(partial, [model.perplexity(text) for text in held_out])
    partial.rename(out)
    bits, number = (sum(values) for values in zip(*scores, strict=True)) if scores else (0.0, 0)
    perplexity = 2 ** (bits / number) if number else float("nan")
    return NgramSummary(count, tuple(len(one.keys) for one in orders), nbytes, len(held_out), perplexity)


def measure_thirds(model: Path, texts: Iterable[str]) -> tuple[float, float]:
    """Set the model's thirds by these documents, a sample of what is to be cleaned, and return the two limits.

    Raises:
        UserError: the folder is no model, or there is no document with words.
    """
    opened = NgramModel.open(model)
    limits = write_thirds(model, [opened.perplexity(text) for text in texts])
    if limits is None:
        raise UserError(f"{model}: no document has a word, so there are no thirds; name other documents")
    return limits


def discounts(counts: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """What is taken from counts of 1, of 2, and of 3 and more (Chen & Goodman 1998, equation 26).

    Args:
        counts: of all n-grams of a length.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == n)) for n in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 <= one <= n for n, one in enumerate(found, 1)) else FALLBACK


def estimate(stream: Hashes, order: int, least_count: int) -> list[NgramOrder]:
    """The model of a stream of words, in which `order - 1` BEGINs stand before each document.

    Counts of the longest n-grams are those of the text; of a shorter one it is how many words it is seen after
    (Heafield et al. 2013, section 3.2; BEGIN is such a word). What is left of a context is 1 less what its n-grams in
    the model keep: with none left out that is equation 4 of section 2.
    """
    ends = np.flatnonzero(stream != BEGIN)
    place = ends  # in `stream`, of the last word of an n-gram of the length above, each n-gram once
    raw: list[tuple[_Floats, Hashes, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]] = []
    for length in range(order, 0, -1):
        hashes = runs(stream, length)
        keys, first, counts = np.unique(hashes[place - length + 1], return_index=True, return_counts=True)
        place = place[first]
        kept = np.ones(len(keys), bool)
        if length > 2 and least_count > 1:
            kept = _seen(keys, hashes[ends - length + 1]) >= least_count
        levels = np.array([0.0, *discounts(counts)])
        after = counts - levels[np.minimum(counts, 3)]
        raw.append((np.where(kept, after, 0.0), keys, place, counts, kept))
    model: list[NgramOrder] = []
    for length, (after, keys, place, counts, kept) in enumerate(reversed(raw), start=1):
        before = runs(stream, length - 1)[place - length + 1] if length > 1 else np.zeros(len(keys), np.uint64)
        contexts, which = np.unique(before, return_inverse=True)
        total = np.bincount(which, counts)
        rest = 1 - np.bincount(which, after) / total
        if length == 1:
            lower: _Floats | float = 1 / (len(keys) + 1)  # of all words, and those never seen
        else:
            shorter = runs(stream, length - 1)[place - length + 2][kept]
            lower = model[-1].probability[np.searchsorted(model[-1].keys, shorter)]
        probability = (after / total[which])[kept] + rest[which][kept] * lower
        model.append(NgramOrder(keys[kept], probability, contexts, rest))
    return model


def _seen(keys: Hashes, text: Hashes) -> npt.NDArray[np.int64]:
    """How often each key, sorted and all of the text's, is in the text."""
    return np.bincount(np.searchsorted(keys, text), minlength=len(keys))


def _write(orders: list[NgramOrder], folder: Path) -> None:
    for length, one in enumerate(orders, start=1):
        KeyTable.of(one.keys).save(folder, f"ngrams{length}")
        np.save(folder / f"ngrams{length}.bits.npy", -np.log2(one.probability).astype(np.float32), allow_pickle=False)
        if length > 1:
            KeyTable.of(one.contexts).save(folder, f"contexts{length}")
            # Nothing may be left where least_count is 1 and discounts are 0: then no shorter n-gram is of use.
            rest = np.maximum(one.rest, np.finfo(np.float32).tiny)
            np.save(folder / f"contexts{length}.bits.npy", -np.log2(rest).astype(np.float32), allow_pickle=False)
    unseen = float(-np.log2(orders[0].rest[0] / (len(orders[0].keys) + 1)))
    info = {"format": FORMAT, "order": len(orders), "unseen_bits": unseen}
    (folder / INFO).write_text(json.dumps(info) + "\n")
