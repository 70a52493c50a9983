"""Replies to replies as conversations: every way from a root to a leaf (OpenAssistant, Reddit).

Three forms are known. Trees of OpenAssistant (arXiv:2304.07327), one a record: `prompt` with `text`, `role`, `replies`.
Its messages, one a record: `message_id`, `parent_id`, `text`, `role`. And Reddit's: `id`, `parent_id`, `body`, or
`title` and `selftext` of what it begins with; there who replies to a user is the assistant, and so on in turn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from maxlm.data.conversation_formats import BadRecord, Turn

_GONE = ("", "[deleted]", "[removed]")
_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass
class Node:
    """A message and what replies to it."""

    text: str
    role: str | None
    """None: the other one than that of its parent; of a root, the user."""
    rank: float
    """Among its siblings, the smallest is the best; infinite if nobody said."""
    replies: list[Node] = dataclasses.field(default_factory=list)


def roots(records: Iterable[Mapping[str, Any]]) -> Iterator[Node]:
    """The trees that the records hold, in the order in which they begin. Replies to what is not there begin none.

    Raises:
        BadRecord: a record is of none of the known forms, or a message comes twice.
    """
    nodes, parents = dict[str, Node | None](), dict[str, str]()
    first = list[str]()
    for n, record in enumerate(records):
        if isinstance(record.get("prompt"), dict):
            if (tree := _tree(record["prompt"])) is not None:
                yield tree
            continue
        name = record.get("message_id", record.get("id"))
        if not isinstance(name, str) or not ({"text", "body", "title"} & record.keys()):
            raise BadRecord(f"record {n + 1} is no tree and no message of OpenAssistant or Reddit")
        if name in nodes:
            raise BadRecord(f"record {n + 1}: message {name} comes twice")
        nodes[name] = _node(record)
        parent = record.get("parent_id")
        if parent is None:
            first.append(name)
        else:
            parents[name] = str(parent)
    for name, parent in parents.items():
        known = parent if parent in nodes else parent.partition("_")[2]  # of Reddit: t1_ and the id
        above, here = nodes.get(known), nodes[name]
        if above is not None and here is not None:
            above.replies.append(here)
    yield from (node for name in first if (node := nodes[name]) is not None)


def conversations(root: Node, *, best: bool = False, once: bool = True) -> Iterator[dict[str, Any]]:
    """Each way from the root to a leaf, up to the assistant's last word on it, as `messages`.

    Args:
        root: of a tree.
        best: take only the best of the assistant's replies to a message: of the smallest rank, or the first.
        once: what an earlier conversation of the tree held already has `weight` 0, so that it is learned once and not
            as often as it was replied to.
    """
    seen = set[int]()
    for path in _paths(root, best):
        while path and path[-1][1] != "assistant":
            path.pop()
        if not path or id(path[-1][0]) in seen:
            continue
        messages: list[Turn] = []
        for node, role in path:
            known = {"weight": 0} if once and role == "assistant" and id(node) in seen else {}
            messages.append({"role": role, "content": node.text, **known})
        seen.update(id(node) for node, _ in path)
        yield {"messages": messages}


def rankings(root: Node) -> Iterator[dict[str, Any]]:
    """For each message of a user with ranked replies: what was said up to it, and the replies with ranks from 1."""
    waiting: list[tuple[list[Turn], Node, str]] = [([], root, root.role or "user")]
    while waiting:
        before, node, role = waiting.pop()
        said = [*before, {"role": role, "content": node.text}]
        answers = [reply for reply in node.replies if math.isfinite(reply.rank)]
        if role == "user" and len({reply.rank for reply in answers}) > 1:
            ordered = sorted({reply.rank for reply in answers})
            yield {
                "prompt": said,
                "completions": [reply.text for reply in answers],
                "ranks": [1 + ordered.index(reply.rank) for reply in answers],
            }
        waiting += [(said, reply, _role(reply, role)) for reply in reversed(node.replies)]


def _paths(root: Node, best: bool) -> Iterator[list[tuple[Node, str]]]:
    """Without recursion: threads can be thousands of replies deep."""
    waiting: list[list[tuple[Node, str]]] = [[(root, root.role or "user")]]
    while waiting:
        path = waiting.pop()
        node, role = path[-1]
        replies = node.replies
        if best and role == "user" and replies:
            replies = [min(replies, key=lambda reply: reply.rank)]
        if not replies:
            yield path
        waiting += [[*path, (reply, _role(reply, role))] for reply in reversed(replies)]


def _role(node: Node, above: str) -> str:
    return node.role or ("assistant" if above == "user" else "user")


def _tree(record: Mapping[str, Any]) -> Node | None:
    top = _node(record)
    waiting = [(top, record)] if top is not None else []
    while waiting:
        node, said = waiting.pop()
        for reply in said.get("replies") or ():
            if (below := _node(reply)) is not None:
                node.replies.append(below)
                waiting.append((below, reply))
    return top


def _node(record: Mapping[str, Any]) -> Node | None:
    """None: what was deleted, with all that replies to it."""
    if "title" in record:
        text = "\n\n".join(filter(None, (str(record["title"]), str(record.get("selftext") or ""))))
    else:
        text = record.get("text", record.get("body"))
    if not isinstance(text, str) or text.strip() in _GONE or record.get("deleted") is True:
        return None
    role, rank = record.get("role"), record.get("rank")
    if role is not None and role not in _ROLES:
        raise BadRecord(f"role = {role!r} is unknown; known: {', '.join(_ROLES)}")
    if rank is None and isinstance(score := record.get("score"), int | float):
        rank = -score
    return Node(text, None if role is None else _ROLES[role], math.inf if rank is None else float(rank))
