"""Conversations as templates want them, and calls of tools out of the text of an answer.

Two forms of calls are known, whatever the model: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes,
Qwen), and an answer that is such an object, or a list of them, and nothing else (Llama 3 with `parameters`, Mistral).
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maxlm.data.chat import Chat, ChatError, ChatTemplate
from maxlm.data.tokenizers import Tokenizer
from maxlm.serving.api_errors import ApiError
from maxlm.serving.schema import ChatRequest, Message, NamedTool, ResponseFormat, Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LONGEST_CALL = 1 << 20
"""Characters of a call; longer ones are text."""


def conversation_ids(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> Chat:
    """What the model is asked.

    Raises:
        ApiError: the model has no template.
        UserError: as `ChatTemplate.encode`.
    """
    if template is None:
        raise ApiError(400, "this model has no chat template; ask /v1/completions", param="messages")
    more = dict(variables or {})
    if reserved := {"messages", "tools", "documents", "add_generation_prompt", *template.tokens} & set(more):
        raise ApiError(400, f"chat_template_kwargs must not hold {min(reserved)}", param="chat_template_kwargs")
    shown = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    errors: list[ChatError] = []
    for arguments in (_parsed, str):  # most templates want objects, some the string itself
        try:
            return template.encode(
                tokenizer,
                [_for_template(message, arguments) for message in messages],
                tools=shown,
                add_generation_prompt=add_generation_prompt,
                **more,
            )
        except ChatError as error:
            errors.append(error)
            if not any(message.tool_calls for message in messages):
                break
    raise errors[0]


def _for_template(message: Message, arguments: Callable[[str], Any]) -> dict[str, Any]:
    """`developer` is a newer word for what templates call `system`; an answer that only calls has no text."""
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content or "",
    }
    for key in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, key)) is not None:
            found[key] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _parsed(arguments: str) -> Any:
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


def forced_schema(asked: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of an answer that must be the call of a tool; None: it need not be one.

    Raises:
        ApiError: see `check_schema`.
    """
    choice = asked.tool_choice
    if choice in (None, "none", "auto"):
        return None
    named = choice.function.name if isinstance(choice, NamedTool) else None
    tools = [tool.function for tool in asked.tools or () if named in (None, tool.function.name)]
    check_schema([one.parameters for one in tools], "tools")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": one.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def response_schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema that an answer is asked to keep to; None: it may be any text.

    Raises:
        ApiError: see `check_schema`.
    """
    if form is None or form.type == "text":
        return None
    schema = {"type": "object"} if form.json_schema is None else form.json_schema.json_schema
    check_schema(schema, "response_format.json_schema.schema")
    return schema


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
            shown += self._show(len(self._held) - _beginning(self._held, _OPEN))
            break
        return shown, calls

    def finish(self) -> tuple[str, list[Called]]:
        """When no more will come."""
        rest, self._held = self._held, ""
        calls = self._calls(rest.strip().removeprefix(_OPEN)) if rest else []
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
                arguments = _parsed(arguments)
            if not isinstance(arguments, dict) or one.get("name") not in self._names:
                return []
            found.append(
                Called(f"call_{uuid.uuid4().hex[:24]}", one["name"], json.dumps(arguments, ensure_ascii=False))
            )
        return found


def _beginning(text: str, word: str) -> int:
    """Characters at the end of a text that may be the beginning of a word."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def check_schema(schema: Any, param: str) -> None:
    """
    Raises:
        ApiError: it is deeper than any program needs, or refers to another document.
    """
    stack = [(schema, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > 64:
            raise ApiError(400, f"{param}: nested more than 64 deep; must be simpler", param=param)
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str) and not re.match(r"#(/|$)", reference):
                raise ApiError(
                    400, f"{param}: $ref = {reference[:60]!r} must begin with #/, a place in it", param=param
                )
            stack += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            stack += [(inner, depth + 1) for inner in value]
