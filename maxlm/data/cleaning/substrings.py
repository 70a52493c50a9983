"""Stretches of text that stand earlier, wherever they begin, without a suffix array of all text.

A byte goes if it lies in a window of `least_bytes` bytes of one document that stands earlier: in an earlier document,
or at least its own length before in the same one. The suffix array of arXiv:2107.06499 says so too, but needs memory
for all text at once, and one machine. Here windows are divided so that equal ones always meet. Each has as its anchor
that stretch of half its length in it whose hash is least, the first of several (winnowing: Schleimer et al. 2003,
section 4), and meets those whose anchors have the same hash. There they are compared as bytes: a hash never decides
what is equal.

On the disk is the text, and 24 bytes for each anchor, of which there is one in about `least_bytes` / 4 bytes. In memory
are: of a part its text, twice, and its anchors; then the anchors of a range of hashes, about as many as a part has; and
of one anchor about 4 `least_bytes` for each different surroundings in which it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config.cleaning.duplicate_steps import ExactSubstrings
from maxlm.data.cleaning.duplicate_verdicts import Cutter, by_document
from maxlm.data.cleaning.hashed_words import mixed
from maxlm.data.cleaning.sorted_files import (
    ArrayFiles,
    IdFiles,
    RecordArray,
    bounds_of_part,
    group_begins,
    in_part,
    number_of,
    of_part,
    ranges,
    sorted_by,
)
from maxlm.data.cleaning.stages import CleaningStage, StepWorkspace

_ANCHOR = np.dtype([("hash", "<u8"), ("begin", "<u8"), ("windows", "<u4"), ("ahead", "<u4")])
"""Windows in a row with the same anchor: the first one's first byte, how many, and how far the anchor is from there."""
_CUT = np.dtype([("begin", "<u8"), ("end", "<u8")])
_STRIDE = 1 << 17
"""Windows looked at together: arrays that fit a processor's cache."""
_PLACE = np.uint64((1 << 20) - 1)
"""Bits that hold a place among them."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CODES = mixed(np.arange(1, 257, dtype=np.uint64))
_NO_TERM = np.zeros(1, np.uint64)
_OPEN = 256
"""Files of text that are open together."""


class SubstringCutter:
    """See `ExactSubstrings`."""

    def __init__(self, config: ExactSubstrings) -> None:
        self._config = config

    def stages(self, before: StepWorkspace) -> tuple[CleaningStage, ...]:
        """Text and anchors of each part, then the windows of each range of anchors."""
        files = _Files(before)
        return (
            CleaningStage("anchors", before.tasks, lambda part: self._write_anchors(before, part)),
            CleaningStage("comparison", ranges(before.tasks), lambda number: self._compare(files, number)),
        )

    def step(self, before: StepWorkspace, task: int) -> Cutter:
        """Cuts out what stands earlier."""
        files = _Files(before)
        cuts = united(files.cuts.between("begin", *bounds_of_part(task)))
        ends = files.ends.read(task)
        place = np.searchsorted(ends, in_part(cuts["begin"]), side="right") - 1
        bounds = np.stack([in_part(cuts[field]).astype(np.int64) - ends[place] for field in ("begin", "end")], axis=1)
        of_documents = by_document(files.ids, number_of(task, place), bounds)
        return Cutter(self._config, "stretch seen earlier", of_documents, without)

    def _write_anchors(self, before: StepWorkspace, part: int) -> None:
        files = _Files(before)
        ids, texts = [], []
        for page in before.pages(part):
            ids.append(page.id)
            texts.append(page.text.encode(errors="surrogatepass"))
        ends = np.cumsum([0, *map(len, texts)])
        text = np.frombuffer(b"".join(texts), np.uint8)
        files.ids.write(part, ids)
        files.text.write(part, text)
        files.ends.write(part, ends)
        found = anchors(text, ends, self._config.least_bytes)
        found["begin"] = number_of(part, found["begin"])
        files.anchors.write(part, sorted_by(found, "hash"))

    def _compare(self, files: _Files, number: int) -> None:
        records = sorted_by(files.anchors.in_range("hash", number), "hash", "begin")
        text = functools.lru_cache(_OPEN)(lambda part: np.asarray(files.text.read(part)))
        cuts = [np.empty(0, _CUT)]
        begins = group_begins(records["hash"])
        sizes = np.diff(begins, append=len(records))
        for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
            cuts.append(later_windows(records[begin : begin + size], text, self._config.least_bytes))
        files.cuts.write(number, united(np.concatenate(cuts)))


class _Files:
    """What the stages write."""

    def __init__(self, before: StepWorkspace) -> None:
        self.ids = IdFiles(before.folder, before.tasks)
        self.text = ArrayFiles(before.folder / "text", before.tasks)
        self.ends = ArrayFiles(before.folder / "ends", before.tasks)
        self.anchors = ArrayFiles(before.folder / "anchors", before.tasks)
        self.cuts = ArrayFiles(before.folder / "cuts", ranges(before.tasks))


def anchors(text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64], size: int) -> RecordArray:
    """The windows [n] of `size` bytes of documents that stand one after the other, `ends` [documents + 1] their bounds.

    The hash of a stretch is a polynomial modulo 2^64 whose coefficients are 64-bit codes of its bytes, mixed; sums of
    terms from the left give those of all stretches by one subtraction each (Karp & Rabin 1987).
    """
    width = size // 2
    powers = np.full(_STRIDE + size, _FACTOR)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    found = [np.empty(0, _ANCHOR)]
    for low in range(0, len(text) - size + 1, _STRIDE):
        piece = text[low : low + _STRIDE + size - 1]
        sums = np.concatenate([_NO_TERM, np.cumsum(_CODES[piece] * powers[: len(piece)])])
        hashes = mixed((sums[width:] - sums[:-width]) * powers[::-1][: len(piece) - width + 1])
        placed = (hashes & ~_PLACE) | np.arange(len(hashes), dtype=np.uint64)
        anchor = (_least(placed, size - width + 1) & _PLACE).astype(np.int64)
        whole = np.ones(len(anchor), bool)
        first, last = np.searchsorted(ends, (low + 1, low + len(piece)))
        for end in ends[first:last]:
            whole[max(end - low - size + 1, 0) : end - low] = False
        begins = np.flatnonzero(whole)
        anchor = anchor[begins]
        starts = np.flatnonzero((np.diff(anchor, prepend=-1) != 0) | (np.diff(begins, prepend=-1) != 1))
        records = np.empty(len(starts), _ANCHOR)
        records["hash"] = mixed(hashes[anchor[starts]])  # again: those of anchors are small ones
        records["begin"] = low + begins[starts]
        records["windows"] = np.diff(starts, append=len(begins))
        records["ahead"] = anchor[starts] - begins[starts]
        found.append(records)
    return np.concatenate(found)


def _least(values: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
    """The least of each `size` values in a row."""
    width = 1
    while width < size:
        step = min(width, size - width)
        values = np.minimum(values[:-step], values[step:])
        width += step
    return values


def later_windows(group: RecordArray, text_of: Callable[[int], npt.NDArray[np.uint8]], size: int) -> RecordArray:
    """The windows that stand earlier [n], of those whose anchors have the same hash, by their begins; `text_of` gives
    the bytes of a part."""
    cuts: list[tuple[int, int]] = []
    there: dict[bytes, int] = {}
    rest: list[_Stretch] = []
    for i in range(0, len(group), _STRIDE):
        for _, begin, windows, ahead in group[i : i + _STRIDE].tolist():
            place = in_part(begin)
            held = text_of(of_part(begin))[place : place + windows + size - 1].tobytes()
            if begin - there.setdefault(held, begin) < size:
                rest.append(_Stretch(begin, windows, ahead, held, []))
            elif cuts and cuts[-1][1] > begin:
                cuts[-1] = (cuts[-1][0], begin + len(held))
            else:
                cuts.append((begin, begin + len(held)))
    if len(rest) > 1:  # windows can only be equal if they are equally far from their anchors
        for distance in range(max(one.ahead for one in rest) + 1):
            first_of: dict[bytes, int] = {}
            for begin, windows, ahead, held, runs in rest:
                if 0 <= (place := ahead - distance) < windows:
                    at = begin + place
                    if at - first_of.setdefault(held[place : place + size], at) >= size:
                        if runs and runs[-1][0] == at + 1:
                            runs[-1] = (at, runs[-1][1])
                        else:
                            runs.append((at, at + size))
    return np.array(cuts + [run for one in rest for run in one.later], _CUT)


class _Stretch(NamedTuple):
    begin: int
    windows: int
    ahead: int
    held: bytes
    later: list[tuple[int, int]]


def united(cuts: RecordArray) -> RecordArray:
    """The same bytes in stretches that do not overlap, in their order; two that touch may be of two documents."""
    cuts = sorted_by(cuts, "begin")
    reached = np.maximum.accumulate(cuts["end"])
    apart = cuts["begin"][1:] >= reached[:-1]
    first, last = np.ones(len(cuts), bool), np.ones(len(cuts), bool)
    first[1:], last[:-1] = apart, apart
    joined = np.empty(np.count_nonzero(first), _CUT)
    joined["begin"], joined["end"] = cuts["begin"][first], reached[last]
    return joined


def without(text: str, cuts: npt.NDArray[np.int64]) -> str:
    """The text without the characters all of whose bytes are in the stretches [n, 2] of its UTF-8."""
    encoded = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
    stays = np.ones(len(encoded), bool)
    for begin, end in cuts:
        stays[begin:end] = False
    first_bytes = np.flatnonzero(encoded & 0xC0 != 0x80)
    stays = np.repeat(np.logical_or.reduceat(stays, first_bytes), np.diff(first_bytes, append=len(encoded)))
    return encoded[stays].tobytes().decode(errors="surrogatepass")
