"""MinHash signatures: short arrays that agree in as many places, on average, as two documents have n-grams in common.

Signatures are those of Fast Similarity Sketching (arXiv:1704.04370), as `rensa` makes them: each place agrees with
probability J, the Jaccard similarity of the two sets, and the share of places that agree varies no more than if the
places were independent: its standard deviation is at most sqrt(J (1 - J) / places).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maxlm.data.cleaning.hashed_words import mixed, runs
from maxlm.data.cleaning.word_splitting import WordForm, split_words
from maxlm.data.input_files import missing_extra

_WORDS_KEPT = 1 << 20
_LONGEST_KEPT = 64


class _WordHashes(dict[str, int]):
    """64-bit hashes of words. Those of short words are kept, of at most 2^20 words, about 150 MB."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        if len(word) <= _LONGEST_KEPT:
            if len(self) >= _WORDS_KEPT:
                self.clear()
            self[word] = value
        return value


_HASH_OF = _WordHashes().__getitem__


def shingles(text: str, words: int) -> npt.NDArray[np.uint64]:
    """Hashes [n] of the n-grams of so many words, in their order; case and what stands between words do not count.
    A text of fewer words is one n-gram, without words it has none."""
    hashes = np.fromiter(map(_HASH_OF, split_words(text.lower(), WordForm.LETTERS)), np.uint64)
    return runs(hashes, min(words, len(hashes))) if len(hashes) else hashes


def signatures(sets: Sequence[npt.NDArray[np.uint64]], places: int, seed: int) -> npt.NDArray[np.uint32]:
    """Signatures [n, places] of sets of hashes; a document's depends on its own set alone.

    Raises:
        UserError: `rensa` is missing.
    """
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise missing_extra("rensa", "NearDuplicates", "clean") from error
    ends = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    flat = np.concatenate([*sets, np.empty(0, np.uint64)])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, places, seed).to_rows()
    return np.array(rows, np.uint32).reshape(len(sets), places)


def band_keys(signed: npt.NDArray[np.uint32], bands: int) -> npt.NDArray[np.uint64]:
    """A hash [n, bands] of each band of signatures [n, bands * rows] and of its number, spread evenly over 64 bits.
    About (n * bands)^2 / 2^65 pairs of n documents share one without a band: one pair of 4 * 10^8 documents."""
    rows = signed.reshape(len(signed), bands, signed.shape[1] // bands).astype(np.uint64)
    value = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), rows.shape[:2])
    for i in range(rows.shape[2]):
        value = mixed(value) ^ rows[:, :, i]
    return mixed(value)


def similarities(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """The share [n] of places in which signatures [n, places] agree: an estimate of Jaccard's similarity."""
    return (a == b).mean(axis=1, dtype=np.float32)
