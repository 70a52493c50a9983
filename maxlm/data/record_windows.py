"""Windows of records: each is whole in one window, and its texts are documents there.

What stands in windows of running text is cut where a window ends. An answer without its question, or one of two answers
without the other, would teach something else; so records are packed, longest first, each into the fullest window that
has room for it (best fit decreasing; arXiv:2404.10830 for documents).
"""

from __future__ import annotations

import bisect
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.data.shards import TokenStream
from maxlm.data.texts import Text, fitted

NO_TEXT = -1


class RecordWindows:
    """Windows of `seq_len` inputs over the records of a split.

    What is left of a window is filled with `filler`, as one more document that the loss does not count. A record that
    is longer than a window is shortened as `texts.fitted` says.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, filler: int, head: int, virtual: int = 0) -> None:
        """`head`: ids at the beginning of each text that always stay, such as bos; `virtual`: as of `Windows`, with
        which a record is as whole as without.

        Raises:
            UserError: a record has more texts than fit into a window, however short each is made.
        """
        self._virtual = virtual
        self._stream, self._seq_len, self._filler, self._head = stream, seq_len, filler, head
        self._starts = stream.starts()
        texts = stream.texts()
        self._values = texts["value"]
        self._firsts = np.append(np.flatnonzero(texts["begins"]), len(texts))
        """The first text of each record, and at the end the number of texts."""
        self.n_texts = len(texts)
        self.largest_value = float(self._values.max()) if len(texts) else 0.0
        lengths = np.diff(self._starts[self._firsts]) + virtual * np.diff(self._firsts)
        least = np.where(lengths > seq_len, np.diff(self._firsts) * (virtual + head + 2), 0)
        if (most := int(least.max(initial=0))) > seq_len:
            raise UserError(
                f"train.seq_len = {seq_len} is too short for the {np.diff(self._firsts)[least.argmax()]} texts of a "
                f"record; use at least {most}, or leave out answers"
            )
        self.shortened = int((lengths > seq_len).sum())
        """Records that are longer than a window."""
        self._windows = _packed(np.minimum(lengths, seq_len), seq_len)
        self.most_texts = max((self._count(window) for window in self._windows), default=0)
        """In any window."""

    def __len__(self) -> int:
        return len(self._windows)

    def _count(self, window: list[int]) -> int:
        return sum(int(self._firsts[record + 1] - self._firsts[record]) for record in window)

    def fill(
        self,
        number: int,
        tokens: npt.NDArray[np.int32],
        begins: npt.NDArray[np.bool_],
        counts: npt.NDArray[np.bool_],
    ) -> None:
        """As of `packing.Windows`."""
        at = 0
        for record in self._windows[number]:
            for text in self._texts(record):
                end = at + len(text.ids)
                tokens[at:end], counts[at:end], begins[at] = text.ids, text.counts, True
                at = end
        tokens[at:], counts[at:], begins[at] = self._filler, False, True

    def texts(self, number: int, most: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], list[int]]:
        """What window `number` has for the losses of whole texts.

        Returns:
            int32 [2, most]: of each text which record of the window it is of, and its number in the data; NO_TEXT where
            the window has no such text. float32 [most]: its value. Where each text ends: the place of its last token.
        """
        whose, values, ends, at = np.full((2, most), NO_TEXT, np.int32), np.zeros(most, np.float32), list[int](), 0
        for place, record in enumerate(self._windows[number]):
            first = int(self._firsts[record])
            for i, text in enumerate(self._texts(record)):
                whose[:, len(ends)] = place, first + i
                values[len(ends)] = text.value
                at += len(text.ids)
                ends.append(at - 1)
        return whose, values, ends

    def _texts(self, record: int) -> list[Text]:
        """Of a record, shortened to what a window can hold."""
        first, stop = int(self._firsts[record]), int(self._firsts[record + 1])
        start = int(self._starts[first])
        length = int(self._starts[stop]) - start
        ids, begins, counts = np.empty(length, np.int32), np.zeros(length, np.bool_), np.empty(length, np.bool_)
        self._stream.read(start, ids, begins, counts)
        found = []
        for i in range(first, stop):
            of_text = slice(int(self._starts[i]) - start, int(self._starts[i + 1]) - start)
            found.append(Text(ids[of_text].tolist(), counts[of_text].tolist(), float(self._values[i])))
        if not self._virtual:
            return fitted(found, self._seq_len, self._head)[0]
        texts = fitted(found, self._seq_len - self._virtual * len(found), self._head)[0]
        before = [0] * self._virtual, [False] * (self._virtual + 1)
        return [Text(before[0] + text.ids, before[1] + text.counts[1:], text.value) for text in texts]


def _packed(lengths: npt.NDArray[np.int64], room: int) -> list[list[int]]:
    """Which records each window has, in the order of their numbers: the same for the same lengths."""
    left: dict[int, list[int]] = defaultdict(list)
    """Windows by the room that they have left."""
    sizes: list[int] = []
    """Those rooms, in order."""
    windows: list[list[int]] = []
    for record in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[record])
        place = bisect.bisect_left(sizes, length)
        if place == len(sizes):
            window, rest = len(windows), room - length
            windows.append([])
        else:
            size = sizes[place]
            window, rest = left[size].pop(), size - length
            if not left[size]:
                del sizes[place]
        windows[window].append(record)
        if not left[rest]:
            bisect.insort(sizes, rest)
        left[rest].append(window)
    return sorted(sorted(window) for window in windows)
