"""Passages near to a question, and the question with them before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from maxlm.data.passages import Passage
from maxlm.data.tokenizers import Tokenizer

EmbedTexts = Callable[[list[list[int]], str], list[list[float]]]
_ASK = "Answer the question at the end from these sources, and cite them by their numbers, like [1]."


class Index:
    """Passages with a vector each: the mean of the last layer's states, of unit length."""

    def __init__(
        self, passages: Sequence[Passage], embed: EmbedTexts, tokenizer: Tokenizer, *, top: int, longest: int
    ) -> None:
        """
        Args:
            passages: all there are.
            embed: texts, as ids of `tokenizer`, as vectors.
            tokenizer: of the model that embeds.
            top: passages that are found.
            longest: tokens of a text that are looked at.
        """
        self.passages, self.top = tuple(passages), top
        self._embed, self._tokenizer, self._longest = embed, tokenizer, longest
        self._vectors = self._of([one.text for one in self.passages])

    def find(self, question: str) -> list[Passage]:
        """The nearest passages by the cosine, nearest first; of equally near ones that which stands first."""
        cosines = self._vectors @ self._of([question])[0]
        return [self.passages[i] for i in np.argsort(-cosines, kind="stable")[: self.top]]

    def _of(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D]."""
        ids = [one[: self._longest] or [0] for one in self._tokenizer.encode_batch(texts)]
        return np.asarray(self._embed(ids, "mean"), np.float32)


def with_sources(index: Index, question: str, *, room: int) -> tuple[str, list[Passage]]:
    """The question with sources before it, and which they are: the first is [1].

    Args:
        index: where to look.
        question: what a user asks.
        room: tokens for the sources; those that do not fit are left out.
    """
    found: list[Passage] = []
    for passage in index.find(question):
        if sum(one.tokens for one in found) + passage.tokens <= room:
            found.append(passage)
    return ("\n\n".join([_ASK, numbered(found), f"Question: {question}"]) if found else question), found


def numbered(passages: Sequence[Passage]) -> str:
    """Passages with their numbers and places, for a model."""
    return "\n\n".join(f"[{n}] {passage.place}\n{passage.text}" for n, passage in enumerate(passages, start=1))
