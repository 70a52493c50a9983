"""An engine that says what it is told to say, a token at a time, for the tests of the server."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chats

from maxlm.config import HuggingFaceTokenizer, UserError
from maxlm.data.chat import find_chat_template
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Tokenizer, open_tokenizer
from maxlm.inference.request import BadRequest, Delta, Finish, QueueFull, Request, TokenScore
from maxlm.serving.app import Service
from maxlm.serving.listening import DrainingServer, bind_address
from maxlm.serving.served import Served

NAME = "little"
CACHED = 3


@dataclasses.dataclass
class FakeStats:
    running: int = 0
    waiting: int = 0
    blocks: int = 8
    free_blocks: int = 6
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 8
    accepted_tokens: int = 5
    steps: int = 0


@dataclasses.dataclass(eq=False)
class FakeTicket:
    request: Request
    on_delta: Callable[[Delta], None]
    tokens: list[int]
    done: int = 0
    text: str = ""
    shown: int = 0


class FakeLoop:
    """A thread that hands each request a token in turn."""

    def __init__(self, tokenizer: Tokenizer, *, queue: int = 256, pause_s: float = 0.0) -> None:
        self.tokenizer, self.queue, self.pause_s = tokenizer, queue, pause_s
        self.says: Callable[[Request], str] = lambda request: "Hello, w\u00f6rld! \U0001f600 <tag> & more"
        self.fails: Finish | None = None
        self.failure: str | None = None
        self.seen: list[Request] = []
        self.cancelled = 0
        self._stats, self._tickets = FakeStats(), list[FakeTicket]()
        self._wake, self._ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> FakeTicket:
        if len(request.prompt) > 10_000 or request.prompt[0] == 13:
            raise BadRequest("prompt: begins with 13; must not")
        with self._wake:
            if len(self._tickets) >= self.queue:
                raise QueueFull(f"{self.queue} requests wait already; try again later")
            tokens = [*self.tokenizer.encode(self.says(request)), *request.ends[:1]]
            ticket = FakeTicket(request, on_delta, tokens)
            self.seen.append(request)
            self._tickets.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: FakeTicket) -> None:
        with self._wake:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self.cancelled += 1
                ticket.on_delta(Delta(finish=Finish.CANCELLED))

    @property
    def stats(self) -> FakeStats:
        return dataclasses.replace(self._stats, running=len(self._tickets))

    def stop(self) -> None:
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._tickets and not self._ended:
                    self._wake.wait()
                if self._ended:
                    return
                tickets = list(self._tickets)
            for ticket in tickets:
                delta = self._next(ticket)
                with self._wake:
                    if ticket not in self._tickets:
                        continue
                    if delta.finish is not None:
                        self._tickets.remove(ticket)
                ticket.on_delta(delta)
            time.sleep(self.pause_s)

    def _next(self, ticket: FakeTicket) -> Delta:
        request, stats = ticket.request, self._stats
        stats.steps += 1
        if self.fails is not None:
            return Delta(finish=self.fails, error="the model's output is not finite")
        token = ticket.tokens[ticket.done % len(ticket.tokens)]
        ticket.done += 1
        stats.generated_tokens += 1
        first = ticket.done == 1
        if first:
            stats.prompt_tokens += len(request.prompt)
        finish, reason = None, None
        if token in request.ends:
            finish, reason = Finish.STOP, token
        elif ticket.done >= request.max_new_tokens:
            finish = Finish.LENGTH
        ticket.text = self.tokenizer.decode((ticket.tokens * 99)[: ticket.done])
        final = ticket.text if finish else ticket.text.rstrip("\ufffd")
        for stop in request.stop:
            if (at := final.find(stop)) >= 0:
                final, finish, reason = final[:at], Finish.STOP, stop
        if finish is None and request.stop:  # it may begin at the end
            final = final[: 1 - max(map(len, request.stop))]
        text, ticket.shown = final[ticket.shown :], max(len(final), ticket.shown)
        return Delta(
            tokens=(token,),
            text=text,
            scores=(self._score(token, request.logprobs),) if request.logprobs is not None else (),
            prompt_scores=tuple(self._score(i, request.prompt_logprobs or 0) for i in request.prompt[1:])
            if first and request.prompt_logprobs is not None
            else (),
            finish=finish,
            stop_reason=reason,
            cached_tokens=CACHED if first else 0,
        )

    def _score(self, token: int, n: int) -> TokenScore:
        return TokenScore(token, -0.5 - token / 1000, tuple((i, -1.0 - i) for i in range(60, 60 + n)))


def check(request: Request) -> None:
    """As the engine would."""
    if request.grammar is not None and "impossible" in str(request.grammar):
        raise UserError("json_schema: impossible; use another")


def fake_embed(texts: list[list[int]], pooling: str) -> list[list[float]]:
    return [[float(len(text)), 1.0 if pooling == "mean" else 2.0] for text in texts]


def make_served(folder: Path, template: str | None = chats.QWEN, **loop: Any) -> Served:
    """A fake of a model that holds conversations."""
    place = chats.write_folder(folder, "chatml", template)
    tokenizer = open_tokenizer(HuggingFaceTokenizer(path=str(place / "tokenizer.json"), eos="<|im_end|>", bos=""))
    return Served(
        name=NAME,
        loop=FakeLoop(tokenizer, **loop),
        tokenizer=tokenizer,
        ends=TextEnds((), (tokenizer.eos_id,)),
        max_length=2000,
        vocab_size=tokenizer.vocab_size,
        created=1,
        chat=find_chat_template(place),
        check=check,
        embed=fake_embed,
    )


@contextlib.contextmanager
def running_server(service: Service, *, drain_s: float = 5.0) -> Iterator[tuple[str, DrainingServer]]:
    """Its address, and itself."""
    server = DrainingServer(service, drain_s=drain_s)
    listener = bind_address("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
