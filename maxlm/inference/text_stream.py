"""Tokens to text while they come, so that no character on the screen ever has to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from maxlm.data.tokenizers import Tokenizer, TokenizerKind

_REPLACEMENT = "\ufffd"
_LONGEST_BEGINNING = 3  # bytes of a UTF-8 character that still lacks its last
_WINDOW = 64
"""Tokens that are decoded again with each new one, at most twice as many and those of a run of bytes."""
_CONTEXT = 16
"""Tokens before these that are decoded with them."""


class TextStream:
    """The continuation of a prompt, handed out as far as later tokens cannot change it, up to a stop string.

    Text is decoded together with what stands before it: a piece alone does not show whether a space belongs before it.
    What waits: the beginning of a character whose last byte has not come; with a `tokenizer.json` a run of byte pieces
    that may go on, because that library shows all bytes of a run as U+FFFD if one of them does not fit; and what may be
    the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context = self._tail(prompt)
        self._settled = ""
        """Text of the continuation before `_ids`."""
        self._ids: list[int] = []
        self._shown = 0
        self._searched = 0
        self.stopped: str | None = None
        """The stop string that has come. The text ends before it."""
        self._end: int | None = None

    @property
    def text(self) -> str:
        """The continuation as all tokens so far make it."""
        return self._continuation(len(self._ids))[: self._end]

    def add(self, ids: Sequence[int]) -> str:
        """Take more tokens; returns the text that they make final. After a stop string nothing comes any more."""
        self._ids += ids
        n_final = self._n_final_ids()
        final = self._continuation(n_final)
        tail = final[-_LONGEST_BEGINNING:]
        final = final[: len(final) - (len(tail) - len(tail.rstrip(_REPLACEMENT)))]
        self._find_stop(final)
        shown = self._show(final[: self._end if self.stopped is not None else len(final) - self._beginning(final)])
        self._settle(n_final)
        return shown

    def finish(self) -> str:
        """The rest, when no more tokens will come."""
        whole = self._continuation(len(self._ids))
        self._find_stop(whole)
        return self._show(whole[: self._end])

    def _find_stop(self, text: str) -> None:
        """Of all stop strings the one that ends first, however many tokens come at a time; of such, the longest."""
        if self.stopped is not None or not self._stop:
            return
        start = max(self._searched - max(map(len, self._stop)), 0)
        found = [(place + len(stop), place, stop) for stop in self._stop if (place := text.find(stop, start)) >= 0]
        self._searched = len(text)
        if found:
            _, self._end, self.stopped = min(found)

    def _beginning(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new

    def _n_final_ids(self) -> int:
        n = len(self._ids)
        match self._tokenizer.kind:
            case TokenizerKind.HUGGING_FACE:
                # A special token inside the run shows nothing, and does not end it.
                while n and (
                    self._ids[n - 1] in self._tokenizer.byte_ids or not self._tokenizer.decode([self._ids[n - 1]])
                ):
                    n -= 1
            case TokenizerKind.BYTES | TokenizerKind.SENTENCEPIECE:  # a character is final once its last byte is there
                pass
        return n

    def _continuation(self, n: int) -> str:
        """With the first n of the ids."""
        return self._settled + self._decoded(self._context, self._ids[:n])

    def _decoded(self, context: Sequence[int], ids: Sequence[int]) -> str:
        before, whole = self._tokenizer.decode(context), self._tokenizer.decode([*context, *ids])
        if whole.startswith(before):
            return whole[len(before) :]
        return self._tokenizer.decode(ids)  # bytes that do not fit the bytes at the context's end

    def _settle(self, n_final: int) -> None:
        """Decode old tokens no more, so that a token of a long text costs what one of a short text does."""
        n = n_final - _WINDOW
        if n < _WINDOW:
            return
        settled = self._settled + self._decoded(self._context, self._ids[:n])
        context, rest = self._tail([*self._context, *self._ids[:n]]), self._ids[n:]
        if settled + self._decoded(context, rest) == self._continuation(len(self._ids)):
            self._settled, self._context, self._ids = settled, context, rest

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The last of them; where a run of bytes is decoded as one, from its beginning on."""
        start = max(len(ids) - _CONTEXT, 0)
        while self._tokenizer.kind is TokenizerKind.HUGGING_FACE and start and ids[start] in self._tokenizer.byte_ids:
            start -= 1
        return list(ids[start:])
