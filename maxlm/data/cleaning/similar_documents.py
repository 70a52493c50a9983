"""Near duplicates in three stages: signatures of each part, pairs of each range of band hashes, clusters of all.

Whatever the parts are, the same documents stay. On the disk a document takes 4 bytes for each hash of its signature, 16
for each band and 16 for each pair. In memory are: of a part, that; then the bands of one range of hashes, about as many
as a part has, and where candidates are compared their signatures; then 8 bytes for each document of all, the pairs of
one range, and about 100 bytes for each document that has a near duplicate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config.cleaning.duplicate_steps import KeepBest, KeepFirst, KeepLongest, KeptCopy, NearDuplicates
from maxlm.data.cleaning.duplicate_verdicts import COPY, CopyDropper, copy_dropper
from maxlm.data.cleaning.findings import Page
from maxlm.data.cleaning.minhash import band_keys, shingles, signatures, similarities
from maxlm.data.cleaning.sorted_files import (
    ArrayFiles,
    IdFiles,
    group_begins,
    in_part,
    number_of,
    of_part,
    ranges,
    sorted_by,
)
from maxlm.data.cleaning.stages import CleaningStage, StepWorkspace
from maxlm.data.cleaning.union_find import SmallestMembers

_BAND = np.dtype([("hash", "<u8"), ("document", "<u8")])
_PAIR = np.dtype([("first", "<u8"), ("other", "<u8")])
_LEADERS = 10_000
"""Documents that share a band and are unlike one another, to which the others that share it are compared: a band of
more is boilerplate, and time would grow with their square."""
_AT_ONCE = 1 << 20
"""Shingles of which signatures are made together."""


class NearDuplicateDropper:
    """See `NearDuplicates`."""

    def __init__(self, config: NearDuplicates) -> None:
        self._config = config

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        """Signatures, pairs, clusters."""
        files = _Files(before)
        return (
            CleaningStage("signatures", before.tasks, lambda part: self._sign(before, part)),
            CleaningStage("pairs", ranges(before.tasks), lambda number: self._pair(files, number)),
            CleaningStage("clusters", 1, lambda _: _choose(files)),
        )

    def step(self, before: StepWorkspace, task: int) -> CopyDropper:
        """Drops all of a cluster but one."""
        files = _Files(before)
        return copy_dropper(files.copies, files.ids, task)

    def _sign(self, before: StepWorkspace, part: int) -> None:
        config, files = self._config, _Files(before)
        ids: list[str] = []
        values: list[float] = []
        batch: list[npt.NDArray[np.uint64]] = []
        signed = [np.empty((0, config.bands * config.rows), np.uint32)]
        wordy: list[bool] = []
        size = 0
        for page in before.pages(part):
            ids.append(page.id)
            values.append(value_of(page, config.keep))
            batch.append(shingles(page.text, config.words))
            wordy.append(len(batch[-1]) > 0)
            size += len(batch[-1])
            if size >= _AT_ONCE:
                signed.append(signatures(batch, config.bands * config.rows, config.seed))
                batch, size = [], 0
        signed.append(signatures(batch, config.bands * config.rows, config.seed))
        rows = np.concatenate(signed)
        with_words = np.flatnonzero(np.array(wordy, bool))
        bands = np.empty((len(with_words), config.bands), _BAND)
        bands["hash"] = band_keys(rows[with_words], config.bands)
        bands["document"] = number_of(part, with_words)[:, None]
        files.ids.write(part, ids)
        files.values.write(part, np.array(values))
        files.signatures.write(part, rows)
        files.bands.write(part, sorted_by(bands.reshape(-1), "hash"))

    def _pair(self, files: _Files, number: int) -> None:
        bands = sorted_by(files.bands.in_range("hash", number), "hash", "document")
        begins = group_begins(bands["hash"])
        sizes = np.diff(begins, append=len(bands))
        found = [np.empty(0, _PAIR)]
        if self._config.least_similarity == 0:
            pairs = np.empty(len(bands), _PAIR)
            pairs["first"], pairs["other"] = np.repeat(bands["document"][begins], sizes), bands["document"]
            found.append(pairs[pairs["first"] != pairs["other"]])
        else:
            shared = bands["document"][np.repeat(sizes > 1, sizes)]
            documents, place = np.unique(shared, return_inverse=True)
            signed = files.signatures.rows(documents)
            for some in np.split(place, np.cumsum(sizes[sizes > 1])[:-1]):
                found.extend(self._similar(documents[some], signed[some]))
        files.pairs.write(number, np.unique(np.concatenate(found)))

    def _similar(
        self, documents: npt.NDArray[np.uint64], signed: npt.NDArray[np.uint32]
    ) -> Iterator[npt.NDArray[np.void]]:
        """Pairs among documents that share a band: each is joined with the first one before it that is like it and like
        no earlier one itself, if that is among the first `_LEADERS` of those."""
        for _ in range(_LEADERS):
            if len(documents) < 2:
                return
            like = similarities(signed[1:], signed[:1]) >= self._config.least_similarity
            pairs = np.empty(np.count_nonzero(like), _PAIR)
            pairs["first"], pairs["other"] = documents[0], documents[1:][like]
            yield pairs
            documents, signed = documents[1:][~like], signed[1:][~like]


class _Files:
    """What the stages write."""

    def __init__(self, before: StepWorkspace) -> None:
        self.ids = IdFiles(before.folder, before.tasks)
        self.values = ArrayFiles(before.folder / "values", before.tasks)
        self.signatures = ArrayFiles(before.folder / "signatures", before.tasks)
        self.bands = ArrayFiles(before.folder / "bands", before.tasks)
        self.pairs = ArrayFiles(before.folder / "pairs", ranges(before.tasks))
        self.copies = ArrayFiles(before.folder / "copies", 1)


def value_of(page: Page, keep: KeptCopy) -> float:
    """The document of a cluster with the greatest value is kept."""
    match keep:
        case KeepFirst():
            return 0.0
        case KeepLongest():
            return float(len(page.text))
        case KeepBest(tag=tag):
            value = page.tags.get(tag)
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max:  # not so for NaN
                return float(value)
            return -math.inf
        case _:
            assert_never(keep)


def _choose(files: _Files) -> None:
    """Of each cluster, write which documents are dropped for which one."""
    starts = files.ids.starts()
    clusters = SmallestMembers(int(starts[-1]))
    for number in range(files.pairs.tasks):
        pairs = files.pairs.read(number)
        clusters.join(_dense(pairs["first"], starts), _dense(pairs["other"], starts))
    members = clusters.together()
    part = np.searchsorted(starts, members, side="right") - 1
    documents = number_of(part, members - starts[part])
    roots, values = clusters.of(members), files.values.rows(documents)
    best_first = np.lexsort([members, -values, roots])
    roots = roots[best_first]
    begins = group_begins(roots)
    copies = np.empty(len(members), COPY)
    copies["document"] = documents[best_first]
    copies["kept"] = np.repeat(copies["document"][begins], np.diff(begins, append=len(members)))
    copies = sorted_by(copies[copies["document"] != copies["kept"]], "document")
    for some in np.array_split(np.arange(len(copies)), len(copies) // _AT_ONCE + 1):
        one, other = (files.signatures.rows(copies[field][some]) for field in ("document", "kept"))
        copies["similarity"][some] = similarities(one, other) if len(some) else 0
    files.copies.write(0, copies)


def _dense(documents: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Numbers without gaps, in the same order."""
    return starts[of_part(documents).astype(np.int64)] + in_part(documents).astype(np.int64)
