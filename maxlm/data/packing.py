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

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self._stream = stream
        self._seq_len = seq_len

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
