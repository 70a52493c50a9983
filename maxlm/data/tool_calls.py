"""Calls of tools out of the text of an answer.

Three forms of calls are known, whatever the model: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes,
Qwen); an answer that is such an object, or a list of them, and nothing else (Llama 3 with `parameters`, Mistral); and
lines at its end with `Call: ` and such an object (the built-in template `plain`).
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LINE = "\nCall: "
_LONGEST_CALL = 1 << 20
"""Characters of a call; longer ones are text."""


@dataclasses.dataclass(frozen=True)
class Called:
    """A call of a tool, as a client sees it."""

    id: str
    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """Of a stream with its number among the answer's calls."""
        found = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return found if index is None else {"index": index, **found}


class ToolReader:
    """Text in, as it comes; text that is no call, and calls, out. What may become a call waits until it is one or is
    none."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)  # a name may be anything here, lists too, which have no hash
        self._held = ""
        self._begun = False
        """Something that is no blank has come."""

    def add(self, text: str) -> tuple[str, list[Called]]:
        """Take more text: what of it is text for certain, and calls that are whole."""
        self._held += text
        shown, calls = "", list[Called]()
        while self._held:
            if not self._begun:
                if not self._held.strip():
                    break
                if self._held.lstrip()[0] in "{[" and len(self._held) <= _LONGEST_CALL:
                    break  # the whole answer may be a call: its end shows it
            if (start := self._held.find(_OPEN)) >= 0:
                shown += self._show(start)
                if (end := self._held.find(_CLOSE)) >= 0:
                    whole = self._held[: end + len(_CLOSE)]
                    found = self._calls(whole[len(_OPEN) : -len(_CLOSE)])
                    self._held = self._held[len(whole) :]
                    self._begun = True
                    calls += found
                    shown += "" if found else whole
                    continue
                if len(self._held) <= _LONGEST_CALL:
                    break
            start = self._held.find(_LINE + "{")
            if start >= 0 and len(self._held) <= _LONGEST_CALL:
                shown += self._show(start)
                break  # the rest may be calls: its end shows it
            waits = max(_beginning(self._held, word) for word in (_OPEN, _LINE + "{"))
            shown += self._show(len(self._held) - waits)
            break
        return shown, calls

    def finish(self) -> tuple[str, list[Called]]:
        """When no more will come."""
        rest, self._held = self._held, ""
        lines = rest.strip().removeprefix(_OPEN).removeprefix(_LINE.strip()).split(_LINE)
        found = [self._calls(line) for line in lines]
        calls = [call for some in found for call in some] if all(found) else []
        return ("" if calls else rest), calls

    def _show(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        self._begun |= bool(text.strip())
        return text

    def _calls(self, text: str) -> list[Called]:
        """Those of a JSON text; none if it is anything else."""
        try:
            value = _read(text)
        except (ValueError, RecursionError):
            return []
        found = []
        for one in value if isinstance(value, list) else [value]:
            arguments = one.get("arguments", one.get("parameters")) if isinstance(one, dict) else None
            if isinstance(arguments, str):
                arguments = parsed(arguments)
            if not isinstance(arguments, dict) or one.get("name") not in self._names:
                return []
            found.append(
                Called(f"call_{uuid.uuid4().hex[:24]}", one["name"], json.dumps(arguments, ensure_ascii=False))
            )
        return found


def seems_call(text: str) -> bool:
    """Whether an answer looks as if it called a tool, though perhaps it does so in no way that is known."""
    return _OPEN in text or _LINE in text


def _beginning(text: str, word: str) -> int:
    """Characters at the end of a text that may be the beginning of a word."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def parsed(arguments: str) -> Any:
    """Arguments as a value of JSON; those that are none as they stand."""
    try:
        return _read(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return arguments


def _read(text: str) -> Any:
    """
    Raises:
        ValueError, RecursionError: it is no JSON; NaN, infinite numbers and halves of characters are none.
    """
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value
