"""Tokens to text while they come, so that no character on the screen ever has to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from maxlm.data.tokenizers import Tokenizer, TokenizerKind

_REPLACEMENT = "\ufffd"
_LONGEST_BEGINNING = 3  # bytes of a UTF-8 character that still lacks its last


class TextStream:
    """The continuation of a prompt, handed out as far as later tokens cannot change it.

    Text is decoded together with the prompt: a piece alone does not show whether a space belongs before it. What waits:
    the beginning of a character whose last byte has not come; and with a `tokenizer.json` a run of byte pieces that may
    go on, because that library shows all bytes of a run as U+FFFD if one of them does not fit.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._prompt = tokenizer, list(prompt)
        self._prompt_text = tokenizer.decode(self._prompt)
        self._ids: list[int] = []
        self._shown = 0

    @property
    def text(self) -> str:
        """The continuation as all tokens so far make it."""
        return self._continuation(self._ids)

    def add(self, ids: Sequence[int]) -> str:
        """Take more tokens; returns the text that they make final."""
        self._ids += ids
        final = self._continuation(self._ids[: self._n_final_ids()])
        tail = final[-_LONGEST_BEGINNING:]
        return self._show(final[: len(final) - (len(tail) - len(tail.rstrip(_REPLACEMENT)))])

    def finish(self) -> str:
        """The rest, when no more tokens will come."""
        return self._show(self.text)

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

    def _continuation(self, ids: Sequence[int]) -> str:
        whole = self._tokenizer.decode([*self._prompt, *ids])
        if whole.startswith(self._prompt_text):
            return whole[len(self._prompt_text) :]
        return self._tokenizer.decode(ids)  # bytes that do not fit the bytes at the prompt's end
