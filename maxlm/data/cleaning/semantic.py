"""Documents that mean the same: embeddings, their clusters, and cosines within each cluster.

On the disk a document takes 4 bytes for each dim of its embedding. In memory are: the embeddings of a part; then those
of the sample; then those of a cluster. The result depends on neither the parts nor the workers; on another kind of
processor products may differ in their last bits, and with them what is near a limit.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from maxlm.config.cleaning.duplicate_steps import SemanticDuplicates
from maxlm.config.errors import UserError
from maxlm.data.cleaning.duplicate_verdicts import COPY, CopyDropper, copy_dropper
from maxlm.data.cleaning.models_for_cleaning import TextEmbedder
from maxlm.data.cleaning.sorted_files import ArrayFiles, IdFiles, group_begins, number_of, ranges, sorted_by
from maxlm.data.cleaning.stages import CleaningStage, StepWorkspace

Embeddings = npt.NDArray[np.float32]

_MEMBER = np.dtype([("cluster", "<u8"), ("cosine", "<f4"), ("document", "<u8")])
_BLOCK = 1024
"""Rows of each product with the centres, also of the last one: the sums of a row depend on how many there are."""


class SemanticDropper:
    """See `SemanticDuplicates`."""

    def __init__(self, config: SemanticDuplicates, embedder: TextEmbedder) -> None:
        """`embedder`: its vector of a text must not depend on the texts beside it."""
        self._config, self._embedder = config, embedder

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        """Embeddings, centres, members of clusters, copies within them."""
        files = _Files(before)
        return (
            CleaningStage("embeddings", before.tasks, lambda part: self._embed(before, part)),
            CleaningStage("centres", 1, lambda _: self._learn(files)),
            CleaningStage("members", before.tasks, lambda part: _assign(files, part)),
            CleaningStage("comparison", ranges(before.tasks), lambda number: self._compare(files, number)),
        )

    def step(self, before: StepWorkspace, task: int) -> CopyDropper:
        """Drops what is close to one that is kept."""
        files = _Files(before)
        return copy_dropper(files.copies, files.ids, task)

    def _embed(self, before: StepWorkspace, part: int) -> None:
        files = _Files(before)
        ids: list[str] = []
        found: list[Embeddings] = []
        pages = iter(before.pages(part))
        while batch := list(itertools.islice(pages, self._config.batch)):
            ids += [page.id for page in batch]
            found.append(unit(self._embedder([page.text for page in batch])))
            if not np.isfinite(found[-1]).all():
                row = int(np.flatnonzero(~np.isfinite(found[-1]).all(axis=1))[0])
                raise UserError(
                    f"{batch[row].id}: its embedding is not finite; name another model than "
                    f"steps[].embedder = {self._config.embedder}"
                )
        files.ids.write(part, ids)
        files.vectors.write(part, np.concatenate(found) if found else np.empty((0, 0), np.float32))

    def _learn(self, files: _Files) -> None:
        starts = files.ids.starts()
        total, chance = int(starts[-1]), np.random.default_rng(self._config.seed)
        count = min(self._config.clusters, total)
        chosen = np.sort(chance.choice(total, min(count * self._config.sample, total), replace=False))
        part = np.searchsorted(starts, chosen, side="right") - 1
        sample = files.vectors.rows(number_of(part, chosen - starts[part]))
        first = np.sort(chance.choice(len(sample), count, replace=False))
        files.centres.write(0, spherical_k_means(sample, sample[first], self._config.rounds))

    def _compare(self, files: _Files, number: int) -> None:
        clusters, count = len(files.centres.read(0)), ranges(files.members.tasks)
        members = files.members.between("cluster", clusters * number // count, clusters * (number + 1) // count)
        members = sorted_by(members, "cluster", "cosine", "document")
        found = [np.empty(0, COPY)]
        for cluster in np.split(members["document"], group_begins(members["cluster"])[1:]):
            kept, cosine = copies_of(files.vectors.rows(cluster), 1 - self._config.epsilon)
            gone = kept >= 0
            copies = np.empty(np.count_nonzero(gone), COPY)
            copies["document"], copies["kept"], copies["similarity"] = cluster[gone], cluster[kept[gone]], cosine[gone]
            found.append(copies)
        files.copies.write(number, sorted_by(np.concatenate(found), "document"))


class _Files:
    """What the stages write."""

    def __init__(self, before: StepWorkspace) -> None:
        self.ids = IdFiles(before.folder, before.tasks)
        self.vectors = ArrayFiles(before.folder / "vectors", before.tasks)
        self.centres = ArrayFiles(before.folder / "centres", 1)
        self.members = ArrayFiles(before.folder / "members", before.tasks)
        self.copies = ArrayFiles(before.folder / "copies", ranges(before.tasks))


def unit(vectors: Embeddings) -> Embeddings:
    """Embeddings [n, d] divided by their lengths; zeros stay."""
    lengths = np.sqrt(np.sum(vectors.astype(np.float64) ** 2, axis=1, keepdims=True))
    return np.asarray(vectors / np.where(lengths == 0, 1, lengths), np.float32)


def spherical_k_means(sample: Embeddings, centres: Embeddings, rounds: int) -> Embeddings:
    """Centres [k, d] of length 1, each the direction of the sum of the vectors [n, d] for which its cosine is greatest
    (Dhillon & Modha 2001); one without vectors stays where it is."""
    for _ in range(rounds):
        nearest = nearest_centre(sample, centres)
        sums = np.zeros(centres.shape, np.float64)
        np.add.at(sums, nearest, sample)  # one after the other: no sum depends on how they are grouped
        filled = np.bincount(nearest, minlength=len(centres)) > 0
        centres = np.where(filled[:, None], unit(sums.astype(np.float32)), centres)
    return centres


def nearest_centre(vectors: Embeddings, centres: Embeddings) -> npt.NDArray[np.int64]:
    """Of vectors [n, d], the number [n] of the centre with the greatest cosine; of several the first."""
    found = [np.empty(0, np.int64)]
    for begin in range(0, len(vectors), _BLOCK):
        block = np.zeros((_BLOCK, vectors.shape[1]), np.float32)
        rows = vectors[begin : begin + _BLOCK]
        block[: len(rows)] = rows
        found.append(np.argmax(block @ centres.T, axis=1)[: len(rows)])
    return np.concatenate(found)


def copies_of(vectors: Embeddings, most: float) -> tuple[npt.NDArray[np.int64], Embeddings]:
    """Of unit vectors [n, d] in turn: the first one before it that is kept and whose cosine with it is more than
    `most`, and that cosine; -1 if there is none, and it is kept itself."""
    kept = np.full(len(vectors), -1)
    cosine = np.zeros(len(vectors), np.float32)
    for begin in range(0, len(vectors), _BLOCK):
        products = vectors[begin : begin + _BLOCK] @ vectors[begin:].T
        for row, of_row in enumerate(products):
            if kept[begin + row] < 0:
                near = np.flatnonzero((of_row > most) & (kept[begin:] < 0))
                near = near[near > row]
                kept[begin + near], cosine[begin + near] = begin + row, of_row[near]
    return kept, cosine


def _assign(files: _Files, part: int) -> None:
    vectors, centres = files.vectors.read(part), files.centres.read(0)
    members = np.empty(len(vectors), _MEMBER)
    members["cluster"] = nearest_centre(vectors, centres) if len(vectors) else 0
    members["cosine"] = np.sum(vectors * centres[members["cluster"].astype(np.int64)], axis=1) if len(vectors) else 0
    members["document"] = number_of(part, np.arange(len(vectors)))
    files.members.write(part, sorted_by(members, "cluster", "cosine", "document"))
