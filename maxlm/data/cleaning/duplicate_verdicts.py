"""What becomes of documents whose copies are known: they are dropped, or something is cut out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config.cleaning.duplicate_steps import AnyCutting
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.cleaning.sorted_files import ArrayFiles, IdFiles, RecordArray, bounds_of_part

COPY = np.dtype([("document", "<u8"), ("kept", "<u8"), ("similarity", "<f4")])
"""A document that is dropped, the one that stays instead, and how similar they are."""


class CopyDropper:
    """Drops those whose copies are kept."""

    limits: tuple[Limit, ...] = (Limit("kept documents like it", most=0, unit="documents"),)

    def __init__(self, kept: Mapping[str, str]) -> None:
        """`kept`: by its id, what is said of a document that goes."""
        self._kept = kept

    def __call__(self, page: Page) -> Finding:
        seen = self._kept.get(page.id)
        return Finding((0.0,)) if seen is None else Finding((1.0,), seen)


def copy_dropper(copies: ArrayFiles, ids: IdFiles, part: int) -> CopyDropper:
    """For a part, by files of `COPY` sorted by document."""
    found = copies.between("document", *bounds_of_part(part))
    gone, kept = ids.of(found["document"]), ids.of(found["kept"])
    return CopyDropper(
        {
            id: f"{other} is kept (similarity {similarity:.2f})"
            for id, other, similarity in zip(gone, kept, found["similarity"], strict=True)
        }
    )


class Cutter:
    """Cuts out what stands earlier, and drops what is then too short."""

    def __init__(
        self,
        config: AnyCutting,
        rule: str,
        cuts: Mapping[str, npt.NDArray[Any]],
        left: Callable[[str, npt.NDArray[Any]], str],
    ) -> None:
        """
        Args:
            rule: what is counted in `Finding.changes`.
            cuts: by its id, what is to go of a document.
            left: what is left of a text without it.
        """
        self.limits: tuple[Limit, ...] = (
            Limit("share of the text left", least=config.least_share),
            Limit("words left", least=config.least_words, unit="words"),
        )
        self._rule, self._cuts, self._left = rule, cuts, left

    def __call__(self, page: Page) -> Finding:
        cuts = self._cuts.get(page.id)
        if cuts is None:
            return Finding()
        text = self._left(page.text, cuts)
        values = measured(self.limits, (len(text) / len(page.text), len(text.split())))
        return Finding(values, text=text, changes={self._rule: len(cuts)})


def by_document(ids: IdFiles, numbers: npt.NDArray[np.uint64], cuts: RecordArray) -> dict[str, RecordArray]:
    """The cuts [n] of each document, by its id; `numbers` [n]: whose each is, in rising order."""
    found, begins = np.unique(numbers, return_index=True)
    return dict(zip(ids.of(found), np.split(cuts, begins[1:]), strict=True)) if len(found) else {}
