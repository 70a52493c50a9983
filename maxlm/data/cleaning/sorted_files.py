"""Records of fixed width in sorted files, by which tasks of a stage hand to those of the next what they need.

Documents are known by a number that keeps their order whatever the parts are: the part's, and the document's in it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.data.claimed import replaced

RecordArray = npt.NDArray[Any]
"""A structured array [n]."""

PART = 40
"""Bits of a number below the part's: of documents in it, or of bytes."""
_MOST_RANGES = 1024


def ranges(tasks: int) -> int:
    """Tasks among which the keys of `tasks` files are divided, equally: as many, so that one holds about as much as a
    part does, up to 1024, as each reads every file."""
    return min(tasks, _MOST_RANGES)


def of_part(numbers: Any) -> Any:
    """The part of each number."""
    return numbers >> PART


def in_part(numbers: Any) -> Any:
    """The place in its part of each number."""
    return numbers & ((1 << PART) - 1)


def number_of(part: Any, place: Any) -> npt.NDArray[np.uint64]:
    """Numbers [n] of what stands at these places in these parts."""
    return (np.asarray(part, np.uint64) << np.uint64(PART)) + np.asarray(place, np.uint64)


def bounds_of_part(part: int) -> tuple[int, int]:
    """Between which its numbers are, the second excluded."""
    return part << PART, (part + 1) << PART


def sorted_by(records: RecordArray, *fields: str) -> RecordArray:
    """The records in the order of these fields, the first one first."""
    return records[np.lexsort([records[field] for field in reversed(fields)])]


def group_begins(keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where, in sorted keys [n], each new one begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]]))


class ArrayFiles(NamedTuple):
    """Files of arrays, one for each of some tasks."""

    folder: Path
    tasks: int

    def write(self, task: int, values: npt.NDArray[Any]) -> None:
        """Whole, or not at all."""
        file = self._file(task)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file, shared=True) as stream:
            np.save(stream, values, allow_pickle=False)

    def read(self, task: int) -> npt.NDArray[Any]:
        """As it lies on the disk: only what is looked at is read."""
        return np.load(self._file(task), mmap_mode="r", allow_pickle=False)

    def between(self, field: str, low: int, high: int) -> RecordArray:
        """The records of all files whose value of the field by which each is sorted is in [low, high), file by file."""
        found = []
        for task in range(self.tasks):
            values = self.read(task)
            column = values[field]  # bisect looks at a few places, np.searchsorted would copy the column
            begin, end = (bisect.bisect_left(column, bound, key=int) for bound in (low, high))
            found.append(np.array(values[begin:end]))
        return np.concatenate(found)

    def in_range(self, field: str, number: int) -> RecordArray:
        """The records of one of `ranges(tasks)` equal ranges of a field of 64 bits that is spread evenly."""
        count = ranges(self.tasks)
        return self.between(field, (number << 64) // count, ((number + 1) << 64) // count)

    def rows(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
        """Of files of a row a document, the rows [n, ...] of the documents of these numbers."""
        parts = of_part(numbers)
        found: npt.NDArray[Any] | None = None
        for part in np.unique(parts):
            here = parts == part
            values = self.read(int(part))[in_part(numbers[here])]
            if found is None:
                found = np.empty((len(numbers), *values.shape[1:]), values.dtype)
            found[here] = values
        return self.read(0)[:0] if found is None else found

    def _file(self, task: int) -> Path:
        return self.folder / f"{task:05}.npy"


class IdFiles:
    """The ids of all documents, by their numbers."""

    def __init__(self, folder: Path, tasks: int) -> None:
        self._text = ArrayFiles(folder / "ids", tasks)
        self._ends = ArrayFiles(folder / "id-ends", tasks)

    def write(self, part: int, ids: Iterable[str]) -> None:
        """Those of a part, in the order of its documents."""
        encoded = [id.encode(errors="surrogatepass") for id in ids]
        self._text.write(part, np.frombuffer(b"".join(encoded), np.uint8))
        self._ends.write(part, np.cumsum([0, *map(len, encoded)]))

    def count(self, part: int) -> int:
        """Documents of a part."""
        return len(self._ends.read(part)) - 1

    def starts(self) -> npt.NDArray[np.int64]:
        """How many documents [parts + 1] stand before each part, and in all."""
        return np.cumsum([0, *(self.count(part) for part in range(self._ends.tasks))])

    def of(self, numbers: npt.NDArray[np.uint64]) -> list[str]:
        """Of documents, by their numbers."""
        found = [""] * len(numbers)
        parts = of_part(numbers)
        for part in np.unique(parts).tolist():
            text, ends = self._text.read(part), self._ends.read(part)
            for row in np.flatnonzero(parts == part).tolist():
                place = int(in_part(numbers[row]))
                found[row] = text[ends[place] : ends[place + 1]].tobytes().decode(errors="surrogatepass")
        return found
