"""Windows of exercises: each piece of a document is one, and a segment; a window is as full as they can make it.

An exercise may be longer than its text (by sentinels) or shorter (as its last token is no input). So windows begin at a
fixed stride of the stream, each takes as many tokens as then fill it, and the stride is the least that a sample of
windows takes: nothing is left out but by chance, and a few tokens are in two windows.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from maxlm.config.predictions import ENDS, PLACES
from maxlm.data.exercises import Exercise, MakeAnswer, MakeExercise, TokenIds, TurnText, left_to_right
from maxlm.data.packing import Batch
from maxlm.data.record_windows import RecordWindows
from maxlm.data.shards import TokenStream

_PROBED = 64
"""Windows whose length decides the stride."""


class StridedWindows(abc.ABC):
    """The stream cut into windows of `seq_len` columns."""

    def __init__(self, stream: TokenStream, seq_len: int, *, seed: int) -> None:
        self._stream, self._seq_len, self._seed = stream, seq_len, seed
        places = max(0, len(stream) - seq_len)  # where a window may begin: what follows fills it, but for a few columns
        probes = np.linspace(0, places, min(_PROBED, places), endpoint=False, dtype=np.int64).tolist()
        self._stride = max(1, min((self._at(start, i)[1] for i, start in enumerate(probes)), default=1))
        self._count = -(-places // self._stride)

    def __len__(self) -> int:
        return self._count

    def row(self, number: int, draw: int) -> Batch:
        """Window `number`, as arrays [seq_len]; what is random in it is decided by the seed and `draw`."""
        return self._at(number * self._stride, draw)[0]

    @abc.abstractmethod
    def _at(self, start: int, draw: int) -> tuple[Batch, int]:
        """The window that begins at a token, and how many tokens it took."""


class PredictedWindows(StridedWindows):
    """Of each piece of a document what `make` makes of it."""

    def __init__(self, stream: TokenStream, seq_len: int, make: MakeExercise, *, seed: int) -> None:
        self._make = make
        super().__init__(stream, seq_len, seed=seed)

    def _at(self, start: int, draw: int) -> tuple[Batch, int]:
        T = self._seq_len
        ids = np.empty(min(2 * T, len(self._stream) - start), np.int32)  # as a piece of two tokens may be one column
        begins, counts = np.zeros(len(ids), np.bool_), np.empty(len(ids), np.bool_)
        self._stream.read(start, ids, begins, counts)
        cuts = np.union1d([0, len(ids)], np.flatnonzero(begins)).tolist()
        row, at, used = FilledRow(T), 0, 0
        for number, (first, stop) in enumerate(itertools.pairwise(cuts)):
            one = functools.partial(self._exercise, ids, first, draw, number)
            # No exercise has less than a column for each token but one.
            length, exercise = fitted(one, min(stop - first, T - at + 1), T - at)
            used = first + length
            if exercise is not None:
                at = row.add(exercise)
            if length < stop - first:
                break
        return row.arrays, used

    def _exercise(self, ids: TokenIds, first: int, draw: int, number: int, length: int) -> Exercise | None:
        """Of so many tokens of a document's piece, of which any length has the same random numbers."""
        return self._make(ids[first : first + length], np.random.default_rng((self._seed, draw, number)))


class TurnedWindows(StridedWindows):
    """The next token of documents that are turned before they are cut; how, is decided by the seed and the document
    alone, so that all windows of one have parts of the same."""

    def __init__(self, stream: TokenStream, seq_len: int, turn: TurnText, *, seed: int) -> None:
        self._turn = turn
        super().__init__(stream, seq_len, seed=seed)

    def _at(self, start: int, draw: int) -> tuple[Batch, int]:
        """The token at `start` of its document as it is turned is the first; by the special tokens in it that is longer
        than it was, and its last ones count as none that are taken."""
        row, at, place = FilledRow(self._seq_len), 0, start
        while at < self._seq_len and place < len(self._stream):
            begins, ends = self._stream.document(place)
            ids, whole = self._turned(begins, ends, place - begins, self._seq_len - at + 1)
            place = ends if whole else min(place + len(ids), ends - 1)
            if len(ids) > 1:
                at = row.add(left_to_right(ids, 0))
        return row.arrays, place - start

    def _turned(self, begins: int, ends: int, first: int, most: int) -> tuple[TokenIds, bool]:
        """At most so many tokens of a document as it is turned, from number `first` on; whether these are all."""
        head, tail = self._read(begins, begins + 1), self._read(ends - 1, ends)
        draw = np.random.default_rng((self._seed, begins))
        found, passed, wanted = [], 0, range(first, first + most)
        for piece in self._turn(ends - begins, int(head[0]), int(tail[0]), draw):
            length = len(piece) if isinstance(piece, range) else 1
            low, high = max(wanted.start - passed, 0), min(wanted.stop - passed, length)
            passed += length
            if low < high and isinstance(piece, range):
                found.append(self._read(begins + piece.start + low, begins + piece.start + high))
            elif low < high:
                found.append(np.array([piece], np.int32))
        return np.concatenate(found), passed <= wanted.stop

    def _read(self, first: int, stop: int) -> TokenIds:
        ids = np.empty(stop - first, np.int32)
        self._stream.read(first, ids, np.zeros(len(ids), np.bool_), np.empty(len(ids), np.bool_))
        return ids


class PredictedRecords(RecordWindows):
    """Windows of whole records, in which the first token that counts begins the answer."""

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        made: tuple[int, MakeAnswer],
        *,
        filler: int,
        head: int,
    ) -> None:
        """`made`: how many columns an exercise has beside its text, and what makes it; else as `RecordWindows`."""
        self._room, self._answer = made
        super().__init__(stream, seq_len, filler=filler, head=head, virtual=self._room)

    def row(self, number: int, draw: int) -> Batch:
        """As of `PredictedWindows`; nothing is random."""
        T = self._seq_len
        ids, begins, counts = np.empty(T + 1, np.int32), np.zeros(T + 1, np.bool_), np.empty(T + 1, np.bool_)
        self.fill(number, ids, begins, counts)
        row = FilledRow(T)
        for first, stop in itertools.pairwise([*np.flatnonzero(begins).tolist(), T + 1]):
            if counts[first:stop].any():
                text = slice(first + self._room, stop)
                row.add(self._answer(ids[text], counts[text]))
        return row.arrays


Predicted = StridedWindows | PredictedRecords


class FilledRow:
    """A window that exercises are put into, each a segment; what remains is a segment that the loss does not count."""

    def __init__(self, seq_len: int) -> None:
        columns, zeros = np.arange(seq_len, dtype=np.int32), lambda: np.zeros(seq_len, np.int32)
        self._at, self._segments = 0, 0
        self.arrays: Batch = {
            "inputs": zeros(),
            "targets": zeros(),
            "segment_ids": np.ones(seq_len, np.int32),
            "positions": columns.copy(),
            "loss_mask": np.zeros(seq_len, np.float32),
            ENDS: columns + 1,
            PLACES[0]: zeros(),
            PLACES[1]: columns + 1,
        }

    def add(self, exercise: Exercise) -> int:
        """Put it in; how much of the window is filled then."""
        here, stop = self._at, self._at + len(exercise.inputs)
        self._segments += 1
        values: dict[str, Any] = {
            "inputs": exercise.inputs,
            "targets": exercise.targets,
            "segment_ids": self._segments,
            "positions": exercise.positions,
            "loss_mask": exercise.counts,
            ENDS: here + exercise.ends,
            PLACES[0]: exercise.context,
            PLACES[1]: exercise.block,
        }
        for name, value in values.items():
            self.arrays[name][here:stop] = value
        self.arrays["segment_ids"][stop:] = self._segments + 1
        rest = np.arange(len(self.arrays["inputs"]) - stop)
        self.arrays["positions"][stop:], self.arrays[PLACES[1]][stop:] = rest, rest + 1
        self._at = stop
        return stop


def fitted(make: Callable[[int], Exercise | None], length: int, room: int) -> tuple[int, Exercise | None]:
    """The longest beginning of a piece of `length` tokens whose exercise has at most `room` columns: how many tokens it
    has, and the exercise, None where it has none."""
    whole = length
    best = make(length)
    while (size := 0 if best is None else len(best.inputs)) > room:
        length = min(length - 1, length * room // size)
        best = make(length)
    more = min(room - size, whole - length)
    while more:
        exercise = make(length + more)
        if exercise is not None and size < len(exercise.inputs) <= room:
            length, best, size = length + more, exercise, len(exercise.inputs)
            more = min(room - size, whole - length)
        else:
            more //= 2
    return length, best


def beside(batch: Batch) -> Batch:
    """Of windows of the next token the arrays that others have beside them."""
    columns = np.broadcast_to(np.arange(1, batch["inputs"].shape[1] + 1, dtype=np.int32), batch["inputs"].shape)
    return {ENDS: columns, PLACES[0]: np.zeros_like(columns), PLACES[1]: batch["positions"] + 1}
