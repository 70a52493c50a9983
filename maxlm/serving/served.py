"""A model as the server needs it, whatever runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

from maxlm.data.chat import ChatTemplate
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Tokenizer
from maxlm.inference.request import Delta, Request
from maxlm.inference.retrieval import Index
from maxlm.serving.token_names import TokenNames


class Stats(Protocol):
    """Of `maxlm.inference.engine_stats.EngineStats`, what /metrics shows."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def steps(self) -> int: ...


class Loop(Protocol):
    """Of `maxlm.inference.loop.EngineLoop`, what the server calls, from any thread. `submit` may wait for a step."""

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> Any: ...
    def cancel(self, ticket: Any) -> None: ...
    @property
    def stats(self) -> Stats: ...
    @property
    def failure(self) -> str | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model under its name."""

    name: str
    loop: Loop
    tokenizer: Tokenizer
    ends: TextEnds
    max_length: int
    """Tokens of a prompt and its answer together."""
    vocab_size: int
    """Ids of a prompt are below it."""
    created: int
    """Seconds since 1970."""
    chat: ChatTemplate | None = None
    adapter: str | None = None
    """What requests of it ask the loop for; None: the model as it is."""
    check: Callable[[Request], None] = lambda request: None
    """Raises UserError for what the engine would refuse. It takes the time that a grammar takes to compile, which the
    engine's thread, where all others would wait, then does not."""
    embed: Callable[[list[list[int]], str], list[list[float]]] | None = None
    """Texts as vectors of unit length; the second is `mean` or `last`. From any thread."""
    pooling: str | None = None
    """Of a model that was trained for vectors: which of the two it was trained with, on texts with eos at their end."""

    documents: Index | None = None
    """What conversations are answered from."""

    @functools.cached_property
    def names(self) -> TokenNames:
        """Its tokens, for people."""
        return TokenNames(self.tokenizer)
