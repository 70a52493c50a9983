"""Whole documents and spans of them that are there twice, found by their hashes.

A hash has 128 bits: among 10^12 spans two different ones share one with a probability below 10^-14. On the disk a span
takes 28 bytes. In memory are the spans of one part, in about 150 bytes each, and then those of one range of hashes,
which are about as many, in about 120.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config.cleaning.duplicate_steps import ExactDocuments, ExactSpans, Ignoring, SpanUnit
from maxlm.data.cleaning.duplicate_verdicts import COPY, CopyDropper, Cutter, by_document, copy_dropper
from maxlm.data.cleaning.sorted_files import (
    ArrayFiles,
    IdFiles,
    RecordArray,
    bounds_of_part,
    group_begins,
    number_of,
    ranges,
    sorted_by,
)
from maxlm.data.cleaning.stages import CleaningStage, StepWorkspace
from maxlm.data.cleaning.word_splitting import CharacterKind, class_of

_SPAN = np.dtype([("hash", "<u8"), ("more", "<u8"), ("document", "<u8"), ("place", "<u4")])
_LATER = np.dtype([("document", "<u8"), ("place", "<u4"), ("kept", "<u8")])
_END = {
    SpanUnit.PARAGRAPH: re.compile(r"\n\s*\n"),
    SpanUnit.LINE: re.compile(r"\n"),
    SpanUnit.SENTENCE: re.compile(r"[.!?…]++[\"'\u201d\u2019»)\]]*+\s+|[\u3002\uff01\uff1f]++[」』\u201d]*+\s*|\n"),
}
_DIGIT = re.compile(r"\d")


class ExactDocumentDropper:
    """See `ExactDocuments`."""

    def __init__(self, config: ExactDocuments) -> None:
        self._comparable = functools.partial(comparable, config.ignoring)

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        """Hashes of each part, then in each range of hashes which came later."""
        return _stages(before, lambda text: [self._comparable(text)], lambda spans: _copies(_later(spans, 1)))

    def step(self, before: StepWorkspace, task: int) -> CopyDropper:
        """Drops the later ones."""
        return copy_dropper(_found(before), IdFiles(before.folder, before.tasks), task)


class SpanCutter:
    """See `ExactSpans`."""

    def __init__(self, config: ExactSpans) -> None:
        self._config = config
        self._comparable = functools.partial(comparable, config.ignoring)

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        """Hashes of each part, then in each range of hashes which came later."""
        return _stages(before, self._spans_of, lambda spans: _later(spans, self._config.span))

    def step(self, before: StepWorkspace, task: int) -> Cutter:
        """Cuts out the later ones."""
        later = _found(before).between("document", *bounds_of_part(task))
        later = sorted_by(later, "document", "place")
        cuts = by_document(IdFiles(before.folder, before.tasks), later["document"], later["place"])
        return Cutter(self._config, f"{self._config.unit.value} seen earlier", cuts, self._left)

    def _spans_of(self, text: str) -> list[str]:
        """The spans of a text; "" for one that is too short to count."""
        shown = [shape for piece in pieces(text, self._config.unit) if (shape := self._comparable(piece))]
        size = self._config.span
        spans = ["\n".join(shown[i : i + size]) for i in range(len(shown) - size + 1)]
        return [span if len(span) >= self._config.least_characters else "" for span in spans]

    def _left(self, text: str, places: npt.NDArray[Any]) -> str:
        """The text without the spans that begin at these of its pieces that are not blank."""
        gone = {place + i for place in places.tolist() for i in range(self._config.span)}
        left, place = [], 0
        for piece in pieces(text, self._config.unit):
            blank = not self._comparable(piece)
            if blank or place not in gone:
                left.append(piece)
            place += not blank
        return "".join(left)


def pieces(text: str, unit: SpanUnit) -> Iterator[str]:
    """The text in pieces, each with the blanks or line ends behind it."""
    begin = 0
    for end in _END[unit].finditer(text):
        yield text[begin : end.end()]
        begin = end.end()
    if begin < len(text):
        yield text[begin:]


def comparable(ignoring: Ignoring | None, text: str) -> str:
    """A text without the differences that do not count; blanks at both ends never do."""
    if ignoring is None:
        return text.strip()
    if ignoring.accents and not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    if ignoring.case:
        text = text.casefold()
    if ignoring.digits:
        text = _DIGIT.sub("0", text)
    if ignoring.punctuation:
        text = _not_word().sub("", text)
    return " ".join(text.split()) if ignoring.spaces else text.strip()


@functools.cache
def _not_word() -> re.Pattern[str]:
    marks = class_of(CharacterKind.MARK) + class_of(CharacterKind.MARK, beyond=True)
    return re.compile(rf"[^\w\s{marks}]+|_+")


def _spans(before: StepWorkspace) -> ArrayFiles:
    return ArrayFiles(before.folder / "spans", before.tasks)


def _found(before: StepWorkspace) -> ArrayFiles:
    return ArrayFiles(before.folder / "found", ranges(before.tasks))


def _stages(
    before: StepWorkspace, spans_of: Callable[[str], list[str]], found_in: Callable[[RecordArray], RecordArray]
) -> tuple[CleaningStage, ...]:
    """Hash the spans of texts, then write what is found in all spans of a range of hashes."""

    def compare(number: int) -> None:
        _found(before).write(number, found_in(_spans(before).in_range("hash", number)))

    return (
        CleaningStage("hashes", before.tasks, lambda part: _write_spans(before, part, spans_of)),
        CleaningStage("comparison", ranges(before.tasks), compare),
    )


def _write_spans(before: StepWorkspace, part: int, spans_of: Callable[[str], list[str]]) -> None:
    """Of a part: ids of its documents, and hashes of their spans that are not empty, in the order of the hashes."""
    ids, digests, documents, places = [], [], [], []
    for number, page in enumerate(before.pages(part)):
        ids.append(page.id)
        for place, span in enumerate(spans_of(page.text)):
            if span:
                digests.append(hashlib.blake2b(span.encode(errors="surrogatepass"), digest_size=16).digest())
                documents.append(number)
                places.append(place)
    records = np.empty(len(digests), _SPAN)
    records["hash"], records["more"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).T
    records["document"], records["place"] = number_of(part, documents), places
    IdFiles(before.folder, before.tasks).write(part, ids)
    _spans(before).write(part, sorted_by(records, "hash"))


def _later(spans: RecordArray, size: int) -> RecordArray:
    """Those that came earlier too, and not as a part of themselves: `_LATER`, by document and place."""
    spans = sorted_by(spans, "hash", "more", "document", "place")
    begins = group_begins(spans[["hash", "more"]])
    first = spans[np.repeat(begins, np.diff(begins, append=len(spans)))]
    elsewhere = spans["document"] != first["document"]
    is_later = elsewhere | (spans["place"].astype(int) - first["place"] >= size)
    later = np.empty(np.count_nonzero(is_later), _LATER)
    later["document"], later["place"] = spans["document"][is_later], spans["place"][is_later]
    later["kept"] = first["document"][is_later]
    return sorted_by(later, "document", "place")


def _copies(later: RecordArray) -> RecordArray:
    """`COPY` of spans that are whole documents."""
    copies = np.empty(len(later), COPY)
    copies["document"], copies["kept"], copies["similarity"] = later["document"], later["kept"], 1
    return copies
