"""Text from prompts: the engine, asked for a few texts and waited for."""

from __future__ import annotations

import collections.abc
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from maxlm.config import EngineConfig, SamplingConfig, UserError, WeightFormat
from maxlm.inference.engine import Engine, Ticket
from maxlm.inference.request import Delta, Finish, Request, nth_seed

if TYPE_CHECKING:
    from maxlm.inference.load import LoadedRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt was continued with."""

    text: str
    """The continuation alone, without the prompt."""
    tokens: list[int]
    """Its ids; the last one is one that ends a text if the model ended it itself."""
    tokens_per_s: float | None
    """Tokens of this text for each second of decoding. Reading the prompt, which also gives the first token, and
    compilation do not count. None: there was nothing to decode after the first token."""


class Generator:
    """Continues prompts, with an engine of its own. Holds the weights on the mesh of the run that it is given."""

    def __init__(
        self,
        run: LoadedRun,
        *,
        weights: WeightFormat = WeightFormat.DTYPE,
        engine: EngineConfig = EngineConfig(slots=8),
    ) -> None:
        """Places the weights, and compiles all that will run.

        Args:
            run: what to continue prompts with.
            weights: the format in which they are held.
            engine: how many texts at once, in how much memory. It changes no text.

        Raises:
            UserError: as `Engine`.
        """
        self.engine = Engine(run, engine, weights=weights)
        self._inbox: dict[Ticket, deque[Delta]] = {}

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
    ) -> list[Generation]:
        """Continue several prompts, each up to `max_new_tokens` or the end of its document.

        A text's randomness is a function of the seed, the prompt's place among the prompts and the token's position.

        Raises:
            UserError: a prompt is not UTF-8, it and its new tokens do not fit model.max_seq_len, `max_new_tokens` or
                the seed is out of range, or the model's output is not finite.
        """
        return self.answer(
            [self._request(prompt, max_new_tokens, sampling, seed, n) for n, prompt in enumerate(prompts)]
        )

    def answer(self, requests: Sequence[Request]) -> list[Generation]:
        """The text of each request.

        Raises:
            UserError: one cannot be served, or the model's output is not finite.
        """
        for request in requests:  # all of them, before the first has begun
            self.engine.check(request)
        texts, waiting = [_Text() for _ in requests], list(zip(requests, range(len(requests)), strict=True))[::-1]
        running: dict[Ticket, _Text] = {}
        while waiting or running:
            while waiting and not self.engine.full:
                request, n = waiting.pop()
                running[self._submit(request)] = texts[n]
            self._step()
            for ticket in list(running):
                while self._inbox[ticket]:
                    delta = self._inbox[ticket].popleft()
                    running[ticket].add(delta)
                    if delta.finish is not None:
                        del running[ticket], self._inbox[ticket]
                        break
        return [text.generation for text in texts]

    def stream(
        self, prompt: str, *, max_new_tokens: int, sampling: SamplingConfig = SamplingConfig(), seed: int = 0
    ) -> collections.abc.Generator[str, None, Generation]:
        """Continue one prompt, yielding its text piece by piece; the generator's return value is the whole.

        The pieces together are the text of `generate([prompt])`, and never end within a character.

        Raises:
            UserError: as `generate`, at the first piece.
        """
        text = _Text()
        for delta in self._deltas(self._request(prompt, max_new_tokens, sampling, seed, 0)):
            text.add(delta)
            if delta.text:
                yield delta.text
        return text.generation

    def _request(self, prompt: str, max_new_tokens: int, sampling: SamplingConfig, seed: int, n: int) -> Request:
        engine = self.engine
        return Request(
            prompt=engine.prompt_ids(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=nth_seed(seed, n),
            ends=engine.ends.last,
        )

    def _deltas(self, request: Request) -> Iterator[Delta]:
        ticket = self._submit(request)
        try:
            while True:
                while self._inbox[ticket]:
                    delta = self._inbox[ticket].popleft()
                    yield delta
                    if delta.finish is not None:
                        return
                self._step()
        finally:  # whoever listens may go before the end
            self.engine.cancel(ticket)
            del self._inbox[ticket]

    def _submit(self, request: Request) -> Ticket:
        ticket = self.engine.submit(request)
        self._inbox[ticket] = deque()
        return ticket

    def _step(self) -> None:
        """Of all texts that are on their way: several streams may be read in turns."""
        for ticket, delta in self.engine.step():
            if ticket in self._inbox:
                self._inbox[ticket].append(delta)


class _Text:
    """A text as it grows."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._timed, self._seconds = 0, 0.0

    def add(self, delta: Delta) -> None:
        """
        Raises:
            UserError: it ended with an error.
        """
        if delta.finish is Finish.ERROR:
            raise UserError(delta.error)
        self._text.append(delta.text)
        self._tokens += delta.tokens
        if delta.seconds and delta.tokens:
            self._timed += len(delta.tokens)
            self._seconds += delta.seconds

    @property
    def generation(self) -> Generation:
        rate = self._timed / self._seconds if self._timed else None
        return Generation(text="".join(self._text), tokens=self._tokens, tokens_per_s=rate)
