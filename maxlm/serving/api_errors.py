"""Errors as OpenAI's clients read them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from maxlm.config import UserError
from maxlm.inference.request import Draining, QueueFull

_SHOWN = 60
"""Characters of a value that a message shows."""
_RETRY_S = "1"


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside it."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": _RETRY_S} if self.status in (429, 503) else {}


def of_user_error(error: UserError, param: str | None = None) -> ApiError:
    """What the engine, a template or a schema does not take."""
    match error:
        case QueueFull():
            return ApiError(429, str(error), type="rate_limit_error", code="queue_full")
        case Draining():
            return draining(str(error))
        case _:
            return ApiError(400, str(error), param=param)


def draining(message: str = "the server is shutting down; ask another one") -> ApiError:
    """Nothing new is taken."""
    return ApiError(503, message, type="server_error", code="shutting_down")


def broken(message: str = "the server failed at this request; its log says why") -> ApiError:
    """A mistake of the server's own."""
    return ApiError(500, message, type="server_error", code="internal_error")


def of_validation(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """The first mistake: field, value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    kind, value = first["type"], first["input"]
    field = ".".join(str(part) for part in first["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])
        known = list(schema.model_fields) if len(first["loc"]) == 1 else []
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; leave it out"
        return ApiError(400, f"{field} is not known here{hint}", param=field, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{field} is missing", param=field, code="missing_parameter")
    words = first["msg"].removeprefix("Value error, ")
    words = words.removeprefix("Input should be ").removeprefix("a valid ")
    place = f"{field} = {shown(value)}" if field else "the request"
    said = words if kind == "value_error" else f"must be {words}"
    return ApiError(400, f"{place}: {said}", param=field or None, code="invalid_value")


def shown(value: Any) -> str:
    """A value as JSON, cut."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
