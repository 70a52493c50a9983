"""The routes.

Starlette, without the FastAPI around it: that knows what a request may hold only where it reads the body itself,
however large or slow it is, and has errors of its own where clients know OpenAI's. Its page at /docs loads a script of
another site.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import logging
import traceback
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxlm.config import UserError
from maxlm.serving import api_errors
from maxlm.serving.answers import ChatReply, CompletionReply, Reply
from maxlm.serving.api_errors import ApiError
from maxlm.serving.chat_format import conversation_ids
from maxlm.serving.connection import ClientLeft, EventStream, failed, read, unless_left
from maxlm.serving.jobs import Job, Running, chat_job, collect, completion_job, prompt_ids
from maxlm.serving.preferences import Preferences
from maxlm.serving.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Generating,
    PreferenceRequest,
    TokenizeRequest,
)
from maxlm.serving.served import Served
from maxlm.serving.server_metrics import ServerMetrics

_LOG = logging.getLogger(__name__)
_PAGE = Path(__file__).with_name("chat_page.html")
_OPEN_PATHS = ("/", "/health", "/metrics")
"""Those that need no key."""
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


@dataclasses.dataclass(kw_only=True)
class Service:
    """What all requests share."""

    models: Mapping[str, Served]
    """By the name that a request gives."""
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    """Names by which a client may call the server; none: any. A page of another site that has its name point here is
    kept out by it."""
    max_body: int = 32 << 20
    """Bytes."""
    preferences: Preferences | None = None
    """Where rankings of answers go; None: nobody is asked for any."""
    draining: bool = False
    """Nothing new is taken."""
    busy: int = 0
    """Requests that are being answered."""
    metrics: ServerMetrics = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(self.models)

    def find(self, name: str | None) -> Served:
        """The model of that name; of no name, the first. Here alone a name becomes what decodes.

        Raises:
            ApiError: there is none.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            words = (
                f"model = {api_errors.shown(name)} is not here; use {' or '.join(map(api_errors.shown, self.models))}"
            )
            raise ApiError(404, words, param="model", code="model_not_found")
        return self.models[name]


def make_app(service: Service) -> ASGIApp:
    """The server as an ASGI application."""
    routes = (
        ("/v1/completions", _completions, "POST"),
        ("/v1/chat/completions", _chat_completions, "POST"),
        ("/v1/embeddings", _embeddings, "POST"),
        ("/tokenize", _tokenize, "POST"),
        ("/detokenize", _detokenize, "POST"),
        ("/preferences", _preferences, "POST"),
        ("/v1/models", _models, "GET"),
        ("/v1/models/{name:path}", _model, "GET"),
        ("/health", _health, "GET"),
        ("/metrics", _metrics, "GET"),
        ("/", _page, "GET"),
    )
    app = Router([Route(path, partial(handler, service), methods=[method]) for path, handler, method in routes])
    return _Guard(app, service)


async def _completions(service: Service, request: Request) -> Response:
    asked = await read(request, CompletionRequest, service.max_body)
    job = await _in_thread(completion_job, service.find(asked.model), asked)
    return await _answered(service, request, asked, job, CompletionReply(job, asked.model))


async def _chat_completions(service: Service, request: Request) -> Response:
    asked = await read(request, ChatRequest, service.max_body)
    job = await _in_thread(chat_job, service.find(asked.model), asked)
    tools = [] if asked.tool_choice == "none" else [tool.function.name for tool in asked.tools or ()]
    return await _answered(service, request, asked, job, ChatReply(job, asked.model, tools, stream=bool(asked.stream)))


async def _answered(service: Service, request: Request, asked: Generating, job: Job, answer: Reply) -> Response:
    running = Running(job, service.metrics)
    if asked.stream:
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        await running.begin()  # what the engine refuses is an answer with a status of its own
        return EventStream(_pieces(running, answer, with_usage))
    return JSONResponse(answer.whole(await unless_left(request, collect(running))))


async def _pieces(running: Running, answer: Reply, with_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
    more = {"usage": None} if with_usage else {}
    deltas = running.deltas()
    try:
        for piece in answer.opening():
            yield {**piece, **more}
        async for i, delta in deltas:
            for piece in answer.pieces(i, delta):
                yield {**piece, **more}
        if with_usage:
            yield answer.closing()
    finally:
        running.cancel()
        await deltas.aclose()


async def _embeddings(service: Service, request: Request) -> Response:
    asked = await read(request, EmbeddingRequest, service.max_body)
    served = service.find(asked.model)
    if served.embed is None:
        raise ApiError(400, "this server gives no embeddings; start it with --embeddings", code="unsupported")
    if served.pooling is not None and asked.pooling not in (None, served.pooling):
        words = f"pooling = {asked.pooling}: {served.name} was trained with {served.pooling}; leave it out"
        raise ApiError(400, words, param="pooling", code="invalid_value")
    ids = [prompt_ids(served, text, f"input.{i}") for i, text in enumerate(asked.input)]
    if served.pooling is not None:
        ends = [[served.tokenizer.eos_id] if isinstance(text, str) else [] for text in asked.input]
        ids = [one + end for one, end in zip(ids, ends, strict=True)]
    for i, one in enumerate(ids):
        if len(one) > served.max_length:
            words = f"input.{i} has {len(one)} tokens, must have at most {served.max_length}"
            raise ApiError(400, words, param="input", code="context_length_exceeded")
    vectors = await _in_thread(served.embed, ids, asked.pooling or served.pooling or "mean")
    as_bytes = lambda vector: base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    of = as_bytes if asked.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": of(vector)} for i, vector in enumerate(vectors)]
    n = sum(map(len, ids))
    used = {"prompt_tokens": n, "total_tokens": n}
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": used})


async def _tokenize(service: Service, request: Request) -> Response:
    asked = await read(request, TokenizeRequest, service.max_body)
    ids = await _in_thread(_tokenized, service.find(asked.model), asked)
    limit = service.find(asked.model).max_length
    return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})


def _tokenized(served: Served, asked: TokenizeRequest) -> list[int]:
    if asked.messages is not None:
        chat = conversation_ids(
            served.chat,
            served.tokenizer,
            asked.messages,
            asked.tools,
            add_generation_prompt=asked.add_generation_prompt,
        )
        return chat.ids
    prompt = asked.prompt or ""
    if not asked.add_special_tokens:
        return served.tokenizer.encode(prompt)
    return [*served.ends.first, *served.tokenizer.encode(prompt)]


async def _detokenize(service: Service, request: Request) -> Response:
    asked = await read(request, DetokenizeRequest, service.max_body)
    served = service.find(asked.model)
    text = await _in_thread(lambda: served.tokenizer.decode(prompt_ids(served, asked.tokens, "tokens")))
    return JSONResponse({"prompt": text})


async def _preferences(service: Service, request: Request) -> Response:
    asked = await read(request, PreferenceRequest, service.max_body)
    if service.preferences is None:
        raise ApiError(400, "this server keeps no preferences; start it with --preferences FILE", code="unsupported")
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    try:
        return JSONResponse({"pairs": await _in_thread(service.preferences.add, messages, asked.ranking)})
    except OSError as error:
        raise api_errors.broken(f"the ranking cannot be written ({error.strerror})") from error


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service, one) for one in service.models.values()]})


async def _model(service: Service, request: Request) -> Response:
    return JSONResponse(_described(service, service.find(request.path_params["name"])))


def _described(service: Service, served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "maxlm",
        "max_model_len": served.max_length,
        "chat": served.chat is not None,
        "documents": served.documents is not None,
        "preferences": service.preferences is not None,
    }


async def _health(service: Service, request: Request) -> Response:
    if service.draining:
        raise api_errors.draining()
    for served in service.models.values():
        if served.loop.failure is not None:
            raise api_errors.broken(f"the engine of {served.name} failed: {served.loop.failure}")
    return JSONResponse({"status": "ok"})


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _page(service: Service, request: Request) -> Response:
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)


async def _in_thread(work: Any, *arguments: Any) -> Any:
    """Work that would keep the event loop from other requests: templates, tokenizers, grammars.

    Raises:
        ApiError: its own, and what it says to the user.
    """
    try:
        return await asyncio.to_thread(work, *arguments)
    except UserError as error:
        raise api_errors.of_user_error(error) from error


class _Guard:
    """Around every request: who may ask, how many are busy, and errors as answers. The log says where an error was,
    and nothing of what was asked."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, status = self._service, list[int]()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        service.busy += 1
        try:
            self._check(Request(scope))
            # With `app`, Starlette raises for what it has no route for; without, it answers in words of its own.
            await self._app({**scope, "app": self}, receive, sending)
        except ClientLeft:
            service.metrics.left()
        except HTTPException as error:
            words = {404: "there is nothing at this address", 405: f"this address does not take {scope['method']}"}
            said = words.get(error.status_code, str(error.detail))
            await failed(ApiError(error.status_code, said, code="not_found"))(scope, receive, sending)
        except ApiError as error:
            await failed(error)(scope, receive, sending)
        except Exception as error:
            place = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("%s while a request was answered, at\n%s", type(error).__name__, place)
            if status:
                raise _Broken from None  # the connection ends in the middle of the answer
            await failed(api_errors.broken())(scope, receive, sending)
        finally:
            service.busy -= 1
            if status:
                service.metrics.answered(status[0])

    def _check(self, request: Request) -> None:
        """
        Raises:
            ApiError: this client may not ask this now.
        """
        service, path = self._service, request.scope["path"]
        host = request.headers.get("host", "").rpartition("]")[0] or request.headers.get("host", "").partition(":")[0]
        if service.hosts and host.strip("[]").lower() not in service.hosts:
            words = f"the host {api_errors.shown(host)} is not one of this server's; start it with --allow_host"
            raise ApiError(403, words, code="unknown_host")
        if service.api_key is not None and path not in _OPEN_PATHS:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(
                key.strip().encode("latin-1"), service.api_key.encode()
            ):
                words = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                raise ApiError(401, words, code="invalid_api_key")
        if service.draining and path not in _OPEN_PATHS:
            raise api_errors.draining()


class _Broken(Exception):
    """An answer that cannot be ended."""
