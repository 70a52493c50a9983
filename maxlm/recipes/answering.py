"""Conversations answered anew by a model, which may be told what the one that learns of them is not.

That is the data of context distillation (arXiv:2112.00861, section 2.2): answers of a model that sees a context, to be
learned without it. And the middle step of Ghost attention (`maxlm/data/ghost.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from maxlm.data.conversation_formats import Turn
from maxlm.data.conversations import told


class Speaker(Protocol):
    """A model that has the next word in conversations."""

    def __call__(self, conversations: Sequence[list[Turn]], seed: int) -> list[str]:
        """What the assistant says next in each."""


def answered(
    conversations: Sequence[Sequence[Turn]], reply: Speaker, context: str | None = None, seed: int = 0
) -> list[list[Turn] | None]:
    """Each conversation with all answers new, one after the other, each after the new ones before it.

    Args:
        conversations: in order, as `in_order` has them; of their answers only the places count.
        reply: the model.
        context: what the system says to it before all else; it is not in the result.
        seed: of the first answers; the n-th of a conversation have seed + n.

    Returns:
        None where an answer has no text.
    """
    found: list[list[Turn] | None] = [[] for _ in conversations]
    places = [[n for n, turn in enumerate(turns) if turn["role"] == "assistant"] for turns in conversations]
    for n in range(max(map(len, places), default=0)):
        asked = [i for i, own in enumerate(places) if n < len(own) and found[i] is not None]
        for i in asked:
            so_far = found[i] or []
            found[i] = [*so_far, *conversations[i][len(so_far) : places[i][n]]]
        said = reply([found[i] or [] if context is None else told(found[i] or [], context) for i in asked], seed + n)
        for i, text in zip(asked, said, strict=True):
            found[i] = [*(found[i] or []), {"role": "assistant", "content": text.strip()}] if text.strip() else None
    return found
