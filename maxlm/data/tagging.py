"""Answers of which some are bad as conversations that say so: the model learns what each kind is like, and is asked for
the good kind.

AlphaCode (arXiv:2203.07814, section 4.3, "value conditioning") says CORRECT SOLUTION, INCORRECT SOLUTION and ratings in
the prompt.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

from maxlm.config import Purpose
from maxlm.data.conversation_formats import BadRecord, Example, Turn, read
from maxlm.data.conversations import told

_OF_PROMPT = ("prompt", "messages", "system", "tools")


class TagPlace(enum.Enum):
    """Where a tag stands."""

    PROMPT = "prompt"
    """The first line of what is answered: of the user's last turn."""
    SYSTEM = "system"
    """The first line of what the system says."""


class TagWords(NamedTuple):
    """What is said of answers."""

    good: str
    bad: str
    rating: str
    """Before the number."""


def tagged(record: Mapping[str, Any], wording: TagWords, place: TagPlace) -> list[dict[str, Any]]:
    """Each answer of a record as a conversation with its tag: of labels, of `chosen` and `rejected`, of a `rating` or
    of several `ratings`.

    Raises:
        BadRecord: it has none of these, or is not as its format wants it.
    """
    present = {key: value for key, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= present.keys():
        example = _example(present, Purpose.PREFERENCE)
        return [_made(example, n, said, place) for n, said in enumerate((wording.good, wording.bad))]
    prompt = {key: value for key, value in present.items() if key in _OF_PROMPT}
    if "label" in present:
        example = _example(present, Purpose.BINARY)
        return [_made(example, 0, wording.good if example.answers[0].value else wording.bad, place)]
    if "ratings" in present:
        answers, ratings = present.get("completions", ()), present["ratings"]
        lists = isinstance(answers, list) and isinstance(ratings, list)
        if not lists or not 0 < len(answers) == len(ratings):
            raise BadRecord("completions and ratings: must be two lists of the same length, with at least one answer")
    elif "rating" in present and "completion" in present:
        answers, ratings = [present["completion"]], [present["rating"]]
    else:
        raise BadRecord("has no label, no rating, no ratings, and no chosen with rejected: nothing to tag answers by")
    found = []
    for answer, rating in zip(answers, ratings, strict=True):
        if type(rating) not in (int, float):
            raise BadRecord(f"rating = {rating!r} must be a number")
        example = _example({**prompt, "completion": answer, "label": True}, Purpose.BINARY)
        found.append(_made(example, 0, f"{wording.rating} {rating:g}", place))
    return found


def _example(record: Mapping[str, Any], purpose: Purpose) -> Example:
    example = read(record, purpose)
    assert isinstance(example, Example), "of these purposes"
    return example


def _made(example: Example, n: int, said: str, place: TagPlace) -> dict[str, Any]:
    """Answer number n."""
    turns: list[Turn]
    match place:
        case TagPlace.SYSTEM:
            turns = told(example.prompt, said)
        case TagPlace.PROMPT:
            last = max(i for i, turn in enumerate(example.prompt) if turn["role"] == "user")
            turns = [*example.prompt]
            turns[last] = {**turns[last], "content": f"{said}\n\n{turns[last]['content']}"}
    tools = {} if example.tools is None else {"tools": example.tools}
    # Only the answer that the tag is of is learned.
    before = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    return {"messages": [*before, *example.answers[n].messages], **tools}
