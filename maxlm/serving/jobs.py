"""A client's request as requests of the engine, and what comes back of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from maxlm.config import SamplingConfig, UserError
from maxlm.data.passages import Passage
from maxlm.inference.request import Delta, Finish, Request, TokenScore
from maxlm.inference.retrieval import with_sources
from maxlm.inference.structured import JsonSchema
from maxlm.serving.api_errors import ApiError, broken, draining, of_user_error
from maxlm.serving.chat_format import conversation_ids, forced_schema, response_schema
from maxlm.serving.schema import ChatRequest, CompletionRequest, Generating, Message
from maxlm.serving.served import Served
from maxlm.serving.server_metrics import ServerMetrics

_WAITING = ThreadPoolExecutor(64, "submit")
_APART_S = 0.01
_DEFAULT_TOKENS = 16
"""Of a completion that does not say how long it may be, as OpenAI has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Texts to be generated: `per_prompt` for each prompt, in the order of prompts, of which `n` are wanted."""

    served: Served
    requests: tuple[Request, ...]
    n: int
    per_prompt: int
    prompts: tuple[str, ...] = ()
    """Texts of the prompts, where the answer repeats them."""
    scores: bool = False
    """Whether log-probabilities are wanted."""
    sources: tuple[Passage, ...] | None = None
    """What it was answered from; None: documents were not looked at."""
    prompt_only: bool = False
    """Nothing new is wanted; the engine makes one token, which is thrown away."""


def completion_job(served: Served, asked: CompletionRequest) -> Job:
    """
    Raises:
        ApiError: a prompt is too long, or holds ids that the model does not know.
        UserError: its schema is none.
    """
    ids = [prompt_ids(served, prompt, f"prompt.{i}") for i, prompt in enumerate(asked.prompt)]
    n, per_prompt = asked.n or 1, asked.best_of or asked.n or 1
    scores = asked.logprobs if asked.logprobs is not None else (0 if per_prompt > n else None)
    wanted = _DEFAULT_TOKENS if asked.max_tokens is None else max(asked.max_tokens, 1)
    schema = response_schema(asked.response_format)
    negative = [] if asked.negative_prompt is None else prompt_ids(served, asked.negative_prompt, "negative_prompt")
    requests = _requests(served, asked, ids, per_prompt, wanted, asked.max_tokens is not None, scores, schema, negative)
    if asked.echo and asked.logprobs is not None:
        requests = [dataclasses.replace(one, prompt_logprobs=asked.logprobs) for one in requests]
    decode = served.tokenizer.decode
    texts = [one if isinstance(one, str) else decode(one) for one in asked.prompt] if asked.echo else []
    return Job(
        served=served,
        requests=tuple(requests),
        n=n,
        per_prompt=per_prompt,
        prompts=tuple(texts),
        scores=asked.logprobs is not None,
        prompt_only=asked.max_tokens == 0,
    )


def chat_job(served: Served, asked: ChatRequest) -> Job:
    """
    Raises:
        ApiError: the conversation is too long, or the model has no template.
        UserError: the template does not take it, or its schema is none.
    """
    tools = None if asked.tool_choice == "none" else asked.tools
    schema = response_schema(asked.response_format) or forced_schema(asked)
    messages, sources = _with_documents(served, asked)
    ids_of = lambda messages: conversation_ids(
        served.chat, served.tokenizer, messages, tools, variables=asked.chat_template_kwargs
    )
    chat, negative = ids_of(messages), list[int]()
    if asked.negative_prompt is not None:  # the conversation under another system message
        rest = [message for message in messages if message.role not in ("system", "developer")]
        negative = ids_of([Message(role="system", content=asked.negative_prompt), *rest]).ids
    said = asked.max_completion_tokens or asked.max_tokens
    wanted = said or max(served.max_length - len(chat.ids), 1)
    scores = (asked.top_logprobs or 0) if asked.logprobs else None
    requests = _requests(served, asked, [chat.ids], asked.n or 1, wanted, said is not None, scores, schema, negative)
    n = asked.n or 1
    return Job(served=served, requests=tuple(requests), n=n, per_prompt=n, sources=sources, scores=bool(asked.logprobs))


def _with_documents(served: Served, asked: ChatRequest) -> tuple[list[Message], tuple[Passage, ...] | None]:
    """The conversation with sources before the user's last message, which may take half of the model's length.

    Raises:
        ApiError: documents are asked for, and there are none.
    """
    messages = asked.messages
    if served.documents is None and asked.documents:
        words = "documents = true: this server has none; start it with --docs"
        raise ApiError(400, words, param="documents", code="unsupported")
    if served.documents is None or asked.documents is False:
        return messages, None
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None or not (asks := messages[last].content):
        return messages, ()
    if len(served.tokenizer.encode(asks)) >= served.max_length:
        return messages, ()  # to be refused as too long, without a search that takes longest for such a text
    text, found = with_sources(served.documents, asks, room=served.max_length // 2)
    question = messages[last].model_copy(update={"content": text})
    return [*messages[:last], question, *messages[last + 1 :]], tuple(found)


def prompt_ids(served: Served, prompt: str | Sequence[int], field: str) -> list[int]:
    """
    Raises:
        ApiError: an id is none of the model's.
    """
    if isinstance(prompt, str):
        return served.ends.prompt_ids(served.tokenizer, prompt)
    for place, i in enumerate(prompt):
        if not 0 <= i < served.vocab_size:
            words = f"{field}.{place} = {i} must be a token id in [0, {served.vocab_size})"
            raise ApiError(400, words, param="prompt", code="invalid_value")
    return list(prompt)


def _requests(
    served: Served,
    asked: Generating,
    prompts: Sequence[list[int]],
    per_prompt: int,
    wanted: int,
    said: bool,
    scores: int | None,
    schema: Any,
    negative: Sequence[int],
) -> list[Request]:
    found, sampling = [], _sampling(asked)
    grammar = None if schema is None else JsonSchema(json.dumps(schema, ensure_ascii=False))
    for number, ids in enumerate(prompts):
        left = served.max_length - len(ids)
        if left < 1 or (said and wanted > left):
            raise _too_long(len(ids), wanted, served.max_length, f"prompt.{number}" if len(prompts) > 1 else None)
        new = wanted if said else min(wanted, left, max(served.max_length - len(negative), 1))
        for i in range(per_prompt):
            # Of a prompt's texts each has its own seed, whatever other prompts stand beside it.
            seed = secrets.randbits(32) if asked.seed is None else (asked.seed + i) % 2**32
            found.append(
                Request(
                    prompt=tuple(ids),
                    max_new_tokens=new,
                    sampling=sampling,
                    seed=seed,
                    ends=() if asked.ignore_eos else served.ends.last,
                    stop=tuple(asked.stop),
                    logprobs=scores,
                    logit_bias=asked.logit_bias,
                    grammar=grammar,
                    guidance_scale=1.0 if asked.guidance_scale is None else asked.guidance_scale,
                    negative_prompt=tuple(negative),
                    adapter=served.adapter,
                )
            )
        served.check(found[-1])
    return found


def _sampling(asked: Generating) -> SamplingConfig:
    said: dict[str, Any] = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": None if asked.top_k is None else max(asked.top_k, 0),
        "min_p": asked.min_p,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "repetition_penalty": asked.repetition_penalty,
        "min_new_tokens": None if asked.ignore_eos else asked.min_tokens,
    }
    return SamplingConfig(**{key: value for key, value in said.items() if value is not None})


def _too_long(prompt: int, wanted: int, limit: int, which: str | None) -> ApiError:
    more = f"use max_tokens <= {limit - prompt} or a shorter prompt" if prompt < limit else "use a shorter prompt"
    words = f"{which or 'the prompt'} has {prompt} tokens, with max_tokens = {wanted} more than the {limit} that the "
    return ApiError(400, f"{words}model is meant for; {more}", param="prompt", code="context_length_exceeded")


class Running:
    """A job in the engine. For the thread of the event loop it was made on."""

    def __init__(self, job: Job, metrics: ServerMetrics) -> None:
        self.job, self._metrics = job, metrics
        self._events, self._there = asyncio.get_running_loop(), asyncio.Event()
        self._arrived = list[tuple[int, Delta]]()
        self._lock, self._ended = threading.Lock(), False
        self._tickets: dict[int, Any] = {}
        self._began = time.monotonic()

    async def begin(self) -> None:
        """Hand it to the engine, which may be in the middle of a step: one thread waits for each text.

        Raises:
            ApiError: the engine did not take all of it; it then has none.
        """
        submit = lambda i: self._events.run_in_executor(_WAITING, self._submit, i)
        try:
            await asyncio.gather(*(submit(i) for i in range(len(self.job.requests))))
        except UserError as error:
            self.cancel()
            raise of_user_error(error) from error
        except BaseException:
            self.cancel()
            raise

    def _submit(self, i: int) -> None:
        def receive(delta: Delta) -> None:  # on the engine's thread
            with self._lock:
                self._arrived.append((i, delta))
                if len(self._arrived) > 1:  # who waits has been told
                    return
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._events.call_soon_threadsafe(self._there.set)

        if self._ended:  # another of its texts was refused
            return
        ticket = self.job.served.loop.submit(self.job.requests[i], receive)
        with self._lock:
            if not self._ended:
                self._tickets[i] = ticket
                return
        self.job.served.loop.cancel(ticket)  # the client left in the meantime

    def cancel(self) -> None:
        """End what has not ended."""
        with self._lock:
            self._ended, tickets = True, list(self._tickets.values())
            self._tickets.clear()
        for ticket in tickets:
            self.job.served.loop.cancel(ticket)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What each text grows by, until all have ended. What comes within `_APART_S` is one Delta: an event takes
        longer than a small model's token.

        Raises:
            ApiError: one ended for another reason than its own.
        """
        last, name, handed = dict[int, float](), self.job.served.name, -math.inf
        try:
            while self._tickets:
                await self._there.wait()
                self._there.clear()
                wait = handed + _APART_S - time.monotonic()
                if wait > 0 and not any(delta.finish for _, delta in self._arrived):
                    await asyncio.sleep(wait)
                with self._lock:
                    arrived, self._arrived = self._arrived, []
                handed = now = time.monotonic()
                for i, delta in _joined(arrived):
                    if i not in self._tickets:
                        continue
                    if delta.tokens:
                        seconds = now - last.get(i, self._began)
                        self._metrics.tokens(name, len(delta.tokens), seconds, first=i not in last)
                        last[i] = now
                    if delta.finish is not None:
                        del self._tickets[i]
                        _check(delta)
                    yield i, delta
        finally:
            self.cancel()
            self._metrics.ended(name, time.monotonic() - self._began)


def _joined(arrived: Sequence[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """Of each text one Delta of all that came, in the order of the first; what failed stays by itself, behind it."""
    found: dict[tuple[int, bool], Delta] = {}
    for i, delta in arrived:
        key = i, delta.finish not in (None, Finish.STOP, Finish.LENGTH)
        if (before := found.get(key)) is None:
            found[key] = delta
            continue
        found[key] = dataclasses.replace(
            delta,
            tokens=before.tokens + delta.tokens,
            text=before.text + delta.text,
            scores=before.scores + delta.scores,
            prompt_scores=before.prompt_scores + delta.prompt_scores,
            cached_tokens=before.cached_tokens + delta.cached_tokens,
            seconds=before.seconds + delta.seconds,
        )
    return [(i, delta) for (i, _), delta in found.items()]


def _check(delta: Delta) -> None:
    match delta.finish:
        case Finish.ERROR:
            raise broken(delta.error or "the engine failed at this request")
        case Finish.NOTHING_FITS:  # it would end so again
            raise ApiError(400, delta.error)
        case Finish.CANCELLED:  # not by its client, who has left
            raise draining()
        case Finish.DEADLINE:
            raise ApiError(504, "the time for this request is over", type="server_error", code="timeout")


@dataclasses.dataclass
class TextSoFar:
    """One text, as far as it has come."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    prompt_scores: tuple[TokenScore, ...] = ()
    finish: Finish | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Grow."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.scores += delta.scores
        self.prompt_scores += delta.prompt_scores
        self.cached_tokens += delta.cached_tokens
        if delta.finish is not None:
            self.finish, self.stop_reason = delta.finish, delta.stop_reason

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(score.logprob for score in self.scores) / max(len(self.scores), 1)


def scores_of(grown: TextSoFar | Delta) -> Sequence[TokenScore]:
    """Of the tokens of a text, without that of the id that ended it."""
    return grown.scores[:-1] if isinstance(grown.stop_reason, int) else grown.scores


async def collect(running: Running) -> list[TextSoFar]:
    """All texts, whole.

    Raises:
        ApiError: as `Running.begin` and `Running.deltas`.
    """
    await running.begin()
    texts = [TextSoFar() for _ in running.job.requests]
    async for i, delta in running.deltas():
        texts[i].add(delta)
    return texts


def best(job: Job, texts: Sequence[TextSoFar]) -> list[TextSoFar]:
    """Of each prompt's texts the n likeliest, in the order of prompts."""
    found = []
    for start in range(0, len(texts), job.per_prompt):
        group = list(texts[start : start + job.per_prompt])
        found += group if job.n == job.per_prompt else sorted(group, key=lambda text: -text.likelihood)[: job.n]
    return found


def usage(job: Job, texts: Sequence[TextSoFar]) -> dict[str, Any]:
    """Tokens read and made. Those of a prompt count once, whatever number of texts it has."""
    prompts = sum(len(request.prompt) for request in job.requests[:: job.per_prompt])
    new = 0 if job.prompt_only else sum(len(text.tokens) for text in texts)
    cached = sum(text.cached_tokens for text in texts[:: job.per_prompt])
    return {
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "total_tokens": prompts + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
