"""Ghost attention (Llama 2, arXiv:2307.09288, section 3.3): an instruction that holds for a whole conversation.

Two steps, and a model between them. `asked` puts the instruction before every turn of the user; a model answers each
conversation anew. `learned` then leaves it in the first turn alone, and lets only the last answer count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from maxlm.data.conversation_formats import BadRecord, Turn


def asked(
    messages: Sequence[Turn], instructions: Sequence[str], seed: int | str = 0, at_most: int = 1
) -> dict[str, Any]:
    """The conversation with an instruction before every turn of the user, and under `ghost` which.

    Args:
        messages: without a system's turn, from a user's to an assistant's.
        instructions: such as "Always answer with a haiku."; which and how many of them is drawn.
        seed: of the drawing.
        at_most: instructions put together, as the paper does to make them complex.

    Raises:
        BadRecord: the conversation has an instruction of its own, from the system.
    """
    if messages[0]["role"] == "system":
        raise BadRecord("has a turn of the system, which would speak beside the instruction")
    draw = random.Random(seed)
    ghost = " ".join(draw.sample(list(instructions), draw.randint(1, min(at_most, len(instructions)))))
    changed = [
        {**turn, "content": f"{ghost}\n\n{turn['content']}"} if turn["role"] == "user" else turn for turn in messages
    ]
    return {"messages": changed, "ghost": ghost}


def learned(record: dict[str, Any]) -> dict[str, Any]:
    """What to learn from a conversation that `asked` made and a model answered anew: the instruction stays in the first
    turn of the user, and every answer but the last has `weight` 0.

    Raises:
        BadRecord: it has no `ghost`, or a turn of the user does not begin with it.
    """
    ghost = record.get("ghost")
    if not isinstance(ghost, str) or not ghost:
        raise BadRecord("has no ghost, the instruction that its turns begin with")
    messages: list[Turn] = []
    for n, turn in enumerate(record["messages"]):
        if turn["role"] == "user":
            if not turn["content"].startswith(f"{ghost}\n\n"):
                raise BadRecord(f"message {n}: does not begin with the instruction")
            first = not any(earlier["role"] == "user" for earlier in messages)
            messages.append(turn if first else {**turn, "content": turn["content"][len(ghost) + 2 :]})
        else:
            last = n + 1 == len(record["messages"])
            messages.append(turn if last else {**turn, "weight": 0})
    return {"messages": messages}
