"""Conversations as templates want them, and the schemas that answers keep to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maxlm.data.chat import Chat, ChatError, ChatTemplate
from maxlm.data.tokenizers import Tokenizer
from maxlm.data.tool_calls import parsed
from maxlm.serving.api_errors import ApiError
from maxlm.serving.schema import ChatRequest, Message, NamedTool, ResponseFormat, Tool


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
    for arguments in (parsed, str):  # most templates want objects, some the string itself
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
