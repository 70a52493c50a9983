"""Windows of fixed length, with what attention and the loss must know about the documents in them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maxlm.data.shards import TokenStream

Batch = dict[str, npt.NDArray[np.generic]]


class Windows:
    """The stream cut into windows of `seq_len` inputs: window i predicts tokens i * seq_len + 1 ... (i + 1) * seq_len.

    Every token of the stream but the first, and but those after the last whole window, is the target of exactly one
    window.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, virtual: int = 0) -> None:
        """`virtual`: tokens that stand before each text for an adapter; what then has no room falls off at the end."""
        self._stream = stream
        self._seq_len = seq_len
        self._virtual = virtual

    def __len__(self) -> int:
        return max(0, (len(self._stream) - 1) // self._seq_len)

    def fill(
        self,
        number: int,
        tokens: npt.NDArray[np.int32],
        begins: npt.NDArray[np.bool_],
        counts: npt.NDArray[np.bool_],
    ) -> None:
        """Write window `number` into `tokens[seq_len + 1]`, where documents begin into `begins[seq_len + 1]`, and which
        tokens the loss counts into `counts[seq_len + 1]`.

        `begins` must be all False before.
        """
        self._stream.read(number * self._seq_len, tokens, begins, counts)
        if self._virtual:
            insert_virtual(self._virtual, tokens, begins, counts)


def insert_virtual(
    n: int, tokens: npt.NDArray[np.int32], begins: npt.NDArray[np.bool_], counts: npt.NDArray[np.bool_]
) -> None:
    """Put n places before the window's first token and before each beginning, in place; what has no room falls off.

    The loss counts neither them nor the token behind them, which no token of its text comes before. Their id is 0, and
    nothing reads it.
    """
    starts = np.union1d([0], np.flatnonzero(begins))
    old = tokens.copy(), counts.copy()
    at = np.arange(len(tokens)) + n * np.searchsorted(starts, np.arange(len(tokens)), side="right")
    inside = at < len(tokens)
    tokens[:], counts[:], begins[:] = 0, False, False
    tokens[at[inside]], counts[at[inside]] = old[0][inside], old[1][inside]
    firsts = starts + n * np.arange(len(starts))
    begins[firsts[firsts < len(tokens)]] = True
    behind = firsts + n
    counts[behind[behind < len(tokens)]] = False


def pack(tokens: npt.NDArray[np.int32], begins: npt.NDArray[np.bool_], counts: npt.NDArray[np.bool_]) -> Batch:
    """Training arrays from windows `tokens[R, T + 1]`, where documents begin in them, `begins[R, T + 1]`, and which
    tokens the loss counts, `counts[R, T + 1]`.

    Returns arrays `[R, T]`:
        inputs, targets: int32; `targets[t]` is the token after `inputs[t]`.
        segment_ids: int32; 1 for the document that the window starts in, then 2, 3, ...
        positions: int32; 0 at each start of a document and at the start of the window.
        loss_mask: float32; 1 where the target counts and does not begin another document, else 0.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    later = begins[:, 1:-1]
    segment_ids = np.ones((rows, length), np.int32)
    np.cumsum(later, axis=1, dtype=np.int32, out=segment_ids[:, 1:])
    segment_ids[:, 1:] += 1
    index = np.arange(length, dtype=np.int32)
    start = np.zeros((rows, length), np.int32)
    np.maximum.accumulate(np.where(later, index[1:], 0), axis=1, out=start[:, 1:])
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "segment_ids": segment_ids,
        "positions": index - start,
        "loss_mask": (counts[:, 1:] & ~begins[:, 1:]).astype(np.float32),
    }
