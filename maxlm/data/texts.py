"""A record of post-training data: one or more texts, with what the loss counts of them. And how they are shortened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from maxlm.config import UserError


class Text(NamedTuple):
    """Ids as the model sees them. A record is a list of texts, which stay together."""

    ids: list[int]
    counts: list[bool]
    """For each id, whether the loss counts it as a target."""
    value: float
    """What it means is of the record's purpose: `maxlm.config.purposes.Purpose`."""


def kept(counts: Sequence[bool], max_len: int, head: int = 0) -> tuple[int, int]:
    """Which ids of a text that is too long stay: its first `head`, and those in [start, stop).

    The oldest turns go first, whole: up to the end of a run of ids that count. What is left always has ids that count.
    If the last of these runs with what is before it is still too long, the beginning of what is before it goes too. If
    that is not enough, the end of the run goes, and one id before the run stays, so that all that is left of it is
    predicted from something.

    Args:
        counts: of a text; at least one after the first `head` counts.
        max_len: ids that may stay, at least `head` + 2.
        head: ids at the beginning that always stay, such as bos.
    """
    if len(counts) <= max_len:
        return head, len(counts)
    assert max_len >= head + 2 and any(counts[head:]), "a text that can be shortened"
    room = max_len - head
    ends = [i for i in range(head + 1, len(counts) + 1) if counts[i - 1] and not (i < len(counts) and counts[i])]
    for end in ends[:-1]:
        if len(counts) - end <= room:
            return end, len(counts)
    before, last = [head, *ends][-2:]
    first = next(i for i in range(before, last) if counts[i])
    start = max(first - 1, before)
    return (max(before, last - room), last) if last - start <= room else (start, start + room)


def truncated(text: Text, max_len: int, head: int = 0) -> tuple[Text, int]:
    """The text in at most `max_len` ids, as `kept` says, and how many ids were left out."""
    start, stop = kept(text.counts, max_len, head)
    ids, counts = [[*values[:head], *values[start:stop]] for values in (text.ids, text.counts)]
    return Text(ids, counts, text.value), len(text.ids) - len(ids)


def fitted(record: Sequence[Text], max_len: int, head: int = 0) -> tuple[list[Text], int]:
    """The texts of a record in at most `max_len` ids together, and how many ids were left out.

    What all of them begin with, the prompt, loses the same ids in each, so that it stays one prompt: its beginning, but
    for `head`, and at least one of its ids stays. If that is not enough, each text has an equal share of the room, as
    `truncated` makes it.

    Args:
        record: at least one text; each has an id that counts.
        max_len: ids that may stay; at least `head` + 2 for each text.
        head: ids at the beginning of each text that always stay.

    Raises:
        UserError: there is less room than that.
    """
    over = sum(len(text.ids) for text in record) - max_len
    if over <= 0:
        return list(record), 0
    common = 0
    for ids, counts in zip(
        zip(*(text.ids for text in record), strict=False), zip(*(text.counts for text in record), strict=False),
        strict=True,
    ):  # fmt: skip
        if len(set(ids)) > 1 or any(counts):
            break
        common += 1
    cut = -(-over // len(record))
    if len(record) > 1 and cut <= common - head - 1:
        drop = lambda values: [*values[:head], *values[head + cut :]]
        return [Text(drop(ids), drop(counts), value) for ids, counts, value in record], cut * len(record)
    share = max_len // len(record)
    if share < head + 2:
        raise UserError(
            f"the {len(record)} texts of a record do not fit into {max_len} ids; train with a seq_len of at least "
            f"{(head + 2) * len(record)}"
        )
    found = [truncated(text, share, head) for text in record]
    return [text for text, _ in found], sum(lost for _, lost in found)
