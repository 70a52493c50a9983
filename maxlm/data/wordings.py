"""Records of a task in words: one file of wordings a task, as P3 and FLAN have them (arXiv:2110.08207, 2109.01652).

The file is JSON:

    {"wordings": [{"input": "{premise}\\n\\nDoes it follow that {hypothesis}?", "output": "{label}"}, ...],
     "thoughts": [{"input": "... Think step by step.", "output": "{why} So the answer is {label}."}],
     "inverted": [{"input": "Write a premise from which follows: {hypothesis}", "output": "{premise}"}],
     "values": {"label": {"0": "yes", "1": "no"}},
     "demonstration": "{input}\\n{output}\\n\\n"}

`{key}` is the value of the record's key; `values` says in words what a value means; a list becomes lines that begin
with "- "; `{{` and `}}` are braces. Only `wordings` must be there.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import UserError
from maxlm.config.json_file import read_object
from maxlm.data.conversation_formats import BadRecord

_KINDS = ("wordings", "thoughts", "inverted")
_KEYS = (*_KINDS, "values", "demonstration")
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


class Wording(NamedTuple):
    """How a record is asked, and answered."""

    input: str
    output: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wordings:
    """A file of wordings."""

    wordings: tuple[Wording, ...]
    thoughts: tuple[Wording, ...] = ()
    """With a chain of thought before the answer."""
    inverted: tuple[Wording, ...] = ()
    """What was given is asked for."""
    values: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    demonstration: str = "{input}\n{output}\n\n"
    """How a record that shows the task stands before the one that is asked."""

    def say(self, record: Mapping[str, Any], text: str) -> str:
        """The text with the record's values in it.

        Raises:
            BadRecord: it lacks a key, or holds under it what is no text, number or list of them.
        """

        def value(found: re.Match[str]) -> str:
            key = found[1]
            if key is None:
                return found[0][0]
            if record.get(key) is None:
                raise BadRecord(f"has no key {key!r}, which the wording needs")
            said = _said(record[key], key)
            return self.values.get(key, {}).get(said, said)

        return _FIELD.sub(value, text)


def read_wordings(file: Path) -> Wordings:
    """
    Raises:
        UserError: it cannot be read, or is no file of wordings.
    """
    found = read_object(file, "an object with wordings")
    if unknown := set(found) - set(_KEYS):
        raise UserError(f"{file}: unknown key {min(unknown)!r}; known: {', '.join(_KEYS)}")
    kinds = {}
    for kind in _KINDS:
        listed = found.get(kind, [])
        if not isinstance(listed, list) or not all(_is_wording(one) for one in listed):
            raise UserError(f"{file}: {kind} must be a list of objects with input and output, both text")
        kinds[kind] = tuple(Wording(one["input"], one["output"]) for one in listed)
    if not kinds["wordings"]:
        raise UserError(f"{file}: wordings is empty; write at least one")
    values = found.get("values", {})
    if not isinstance(values, dict) or not all(
        isinstance(one, dict) and all(isinstance(word, str) for word in one.values()) for one in values.values()
    ):
        raise UserError(f"{file}: values must be an object of objects with texts")
    shown = found.get("demonstration", Wordings.demonstration)
    if not isinstance(shown, str) or "{input}" not in shown or "{output}" not in shown:
        raise UserError(f"{file}: demonstration = {shown!r} must be a text with {{input}} and {{output}}")
    return Wordings(**kinds, values=values, demonstration=shown)


def worded(
    records: Sequence[Mapping[str, Any]],
    wordings: Wordings,
    *,
    every: bool = False,
    thoughts: float = 0.0,
    inverted: float = 0.0,
    shots: int = 0,
    seed: int = 0,
) -> Iterator[list[dict[str, Any]] | BadRecord]:
    """For each record the prompts and completions it becomes, or why it becomes none.

    Args:
        records: of one task.
        wordings: its file.
        every: each record in every wording, and not in one that is drawn.
        thoughts: share of the records that are answered with a chain of thought.
        inverted: share of the records that are asked the other way round; these have no thoughts.
        shots: other records of the same wording that are shown before each.
        seed: of what is drawn; it depends on a record's place and on nothing else.

    Raises:
        UserError: shares that need wordings of which the file has none, or more shots than other records.
    """
    for share, kind in ((thoughts, "thoughts"), (inverted, "inverted")):
        if share and not getattr(wordings, kind):
            raise UserError(f"{kind} = {share:g}: the file has no {kind}; write some, or leave it out")
    if shots and shots >= len(records):
        raise UserError(f"shots = {shots}: there are only {len(records)} records; use fewer")
    for n in range(len(records)):
        draw = random.Random(f"{seed}/{n}")
        drawn, pool = draw.random(), wordings.wordings
        if drawn < inverted:
            pool = wordings.inverted
        elif drawn < inverted + thoughts:
            pool = wordings.thoughts
        chosen = pool if every else [draw.choice(pool)]
        try:
            yield [_asked(records, n, wordings, wording, shots, draw) for wording in chosen]
        except BadRecord as error:
            yield error


def _asked(
    records: Sequence[Mapping[str, Any]], n: int, wordings: Wordings, wording: Wording, shots: int, draw: random.Random
) -> dict[str, Any]:
    others, shown = list[int](), ""
    while len(others) < shots:
        other = draw.randrange(len(records))
        if other != n and other not in others:
            others.append(other)
    for other in others:
        try:
            pair = {key: wordings.say(records[other], text) for key, text in wording._asdict().items()}
        except BadRecord as error:
            raise BadRecord(f"is shown record {other + 1}, which {error}") from error
        shown += Wordings(wordings=()).say(pair, wordings.demonstration)
    asked, answer = (wordings.say(records[n], text) for text in wording)
    if not asked.strip() or not answer.strip():
        raise BadRecord("the wording makes an empty text of it")
    return {"prompt": shown + asked, "completion": answer}


def _is_wording(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("input", "output"))


def _said(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(f"- {_said(one, key)}" for one in value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise BadRecord(f"{key}: holds an object, which has no words")
