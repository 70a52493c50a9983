"""Bodies in and answers out, over connections that are slow, endless or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from maxlm.serving.api_errors import ApiError, of_validation

Schema = TypeVar("Schema", bound=BaseModel)
T = TypeVar("T")

BODY_S = 30.0
"""Seconds in which a body must have come."""
SEND_S = 60.0
"""Seconds that a client may leave a piece of an answer unread."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def read(request: Request, schema: type[Schema], limit: int) -> Schema:
    """The body of a request.

    Raises:
        ApiError: it is too large, too slow, no JSON, or not what the schema says.
        ClientLeft: it did not come whole.
    """
    said = request.headers.get("content-type", "")
    if said.partition(";")[0].strip().lower() != "application/json":
        words = f"content-type = {said[:60]!r} must be application/json"  # which no page of another site may send
        raise ApiError(415, words, code="unsupported_media_type")
    too_large = ApiError(413, f"the body has more than {limit:,} bytes; send less", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {BODY_S:g} s", code="timeout") from error
    except ClientDisconnect as error:
        raise ClientLeft from error
    try:
        return schema.model_validate_json(bytes(body))
    except ValidationError as error:
        raise of_validation(error, schema) from error


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives, which ends at once when the client leaves.

    Raises:
        ClientLeft: it has.
    """
    return await _first(asyncio.create_task(work), asyncio.create_task(_gone(request.receive)))


async def _first(work: asyncio.Task[T], gone: asyncio.Task[None]) -> T:
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeft
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer in pieces, as server-sent events. It ends with `[DONE]`, or with an error."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it.

        Raises:
            ClientLeft: nobody reads any more.
        """
        try:
            await _first(asyncio.create_task(self._run(send)), asyncio.create_task(_gone(receive)))
        finally:
            await self._events.aclose()

    async def _run(self, send: Send) -> None:
        await _patiently(send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}))
        last = "[DONE]"
        try:
            async for event in self._events:
                await self._send(send, json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        except ApiError as error:
            last = json.dumps(error.body)
        await self._send(send, last)
        await _patiently(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _send(self, send: Send, text: str) -> None:
        await _patiently(send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}))


async def _patiently(sent: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(SEND_S):
            await sent
    except TimeoutError as error:
        raise ClientLeft from error


def failed(error: ApiError) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error.body, error.status, error.headers)
