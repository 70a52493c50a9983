"""Text from prompts: the engine, asked for a few texts and waited for."""

from __future__ import annotations

import collections.abc
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from maxlm.config import (
    BeamConfig,
    ContrastiveConfig,
    EngineConfig,
    GuidanceConfig,
    SamplingConfig,
    UserError,
    WeightFormat,
)
from maxlm.inference.beam import beam_search
from maxlm.inference.contrastive import contrastive_search
from maxlm.inference.engine import Engine, Ticket
from maxlm.inference.forced import spellings
from maxlm.inference.request import Delta, Finish, Request, TokenScore, nth_seed
from maxlm.inference.text_stream import TextStream

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(Generation):
    """One of several that were compared."""

    score: float
    """The higher, the better."""


class Generator:
    """Continues prompts, with an engine of its own. Holds the weights on the mesh of the run that it is given."""

    def __init__(
        self,
        run: LoadedRun,
        *,
        weights: WeightFormat = WeightFormat.DTYPE,
        engine: EngineConfig = EngineConfig(slots=8),
        draft: LoadedRun | None = None,
    ) -> None:
        """Places the weights, and compiles all that will run.

        Args:
            run: what to continue prompts with.
            weights: the format in which they are held.
            engine: how many texts at once, in how much memory. It changes no text.
            draft: the model that `engine.speculation` names, if it is a `DraftModel`.

        Raises:
            UserError: as `Engine`.
        """
        self.engine = Engine(run, engine, weights=weights, draft=draft)
        self._inbox: dict[Ticket, deque[Delta]] = {}

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        beams: BeamConfig = BeamConfig(),
        guidance: GuidanceConfig = GuidanceConfig(),
    ) -> list[Generation]:
        """Continue several prompts, each up to `max_new_tokens` or the end of its document.

        A text's randomness is a function of the seed, the prompt's place among the prompts and the token's position.

        Args:
            prompts: of any lengths.
            max_new_tokens: of each.
            sampling: how the next token is drawn.
            seed: of all of them.
            beams: search in place of drawing; the best text of each prompt, `Ranked`. The seed does not matter then.
            guidance: away from another prompt, the same for all texts.

        Raises:
            UserError: a prompt is not UTF-8, it and its new tokens do not fit model.max_seq_len, `max_new_tokens` or
                the seed is out of range, a setting does not go with `beams`, or the model's output is not finite.
        """
        if beams.n_best != 1:
            raise UserError(f"n_best = {beams.n_best}, and here each prompt has one text; call Generator.search")
        if beams.beams:
            if guidance.guidance_scale != 1:
                raise UserError(f"guidance_scale = {guidance.guidance_scale} does not go with beams; leave it out")
            return [
                best for best, *_ in self.search(prompts, max_new_tokens=max_new_tokens, beams=beams, sampling=sampling)
            ]
        return self.answer(
            [self.request(prompt, max_new_tokens, sampling, seed, n, guidance) for n, prompt in enumerate(prompts)]
        )

    def search(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        beams: BeamConfig,
        sampling: SamplingConfig = SamplingConfig(),
    ) -> list[list[Ranked]]:
        """The likeliest continuations of each prompt that a beam search finds, at most `n_best`, best first.

        Nothing is drawn: the same prompt has the same texts. `tokens_per_s` is None.

        Raises:
            UserError: as `generate`; nothing may come any more after some text; or a text cannot have the forced words.
        """
        requests = [self.request(prompt, max_new_tokens, sampling) for prompt in prompts]
        for request in requests:  # with all tokens that it may get
            self.engine.check(request)
        words = [spellings(self.engine.tokenizer, word) for word in beams.force]
        found = beam_search(lambda asked: [text.scores[0] for text in self.texts(asked)], requests, beams, words)
        return [
            [
                Ranked(text=self._said(request, one.tokens), tokens=[*one.tokens], tokens_per_s=None, score=one.score)
                for one in hypotheses
            ]
            for request, hypotheses in zip(requests, found, strict=True)
        ]

    def contrast(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        contrastive: ContrastiveConfig,
        sampling: SamplingConfig = SamplingConfig(),
    ) -> list[Generation]:
        """The text of each prompt that contrastive search finds. Nothing is drawn. `tokens_per_s` is None.

        Raises:
            UserError: as `generate`; or nothing may come any more after some text.
        """
        requests = [self.request(prompt, max_new_tokens, sampling) for prompt in prompts]
        for request in requests:
            self.engine.check(request)
            if (room := self.engine.max_length - len(request.prompt) - 1) < max_new_tokens:
                raise UserError(
                    f"max_new_tokens = {max_new_tokens} with contrastive search, which looks one token further, and "
                    f"model.max_seq_len = {self.engine.max_length}; use at most {room}, or a shorter prompt"
                )

        def answer(asked: list[Request]) -> list[list[TokenScore]]:
            return [[*text.prompt_scores, *text.scores] for text in self.texts(asked)]

        return [
            Generation(text=self._said(request, tokens), tokens=[*tokens], tokens_per_s=None)
            for request, tokens in zip(requests, contrastive_search(answer, requests, contrastive), strict=True)
        ]

    def answer(self, requests: Sequence[Request]) -> list[Generation]:
        """The text of each request.

        Raises:
            UserError: one cannot be served, or the model's output is not finite.
        """
        return [text.generation for text in self.texts(requests)]

    def texts(self, requests: Sequence[Request]) -> list[GrowingText]:
        """The text of each request, with the scores that it asks for.

        Raises:
            UserError: one cannot be served, or the model's output is not finite.
        """
        for request in requests:  # all of them, before the first has begun
            self.engine.check(request)
        texts, waiting = [GrowingText() for _ in requests], list(zip(requests, range(len(requests)), strict=True))[::-1]
        running: dict[Ticket, GrowingText] = {}
        try:
            while waiting or running:
                while waiting and not self.engine.full:
                    request, n = waiting.pop()
                    running[self._submit(request)] = texts[n]
                self._step()
                for ticket, text in list(running.items()):
                    while self._inbox[ticket]:
                        delta = self._inbox[ticket].popleft()
                        text.add(delta)
                        if delta.finish is not None:
                            del running[ticket], self._inbox[ticket]
                            break
        finally:  # of a text that ended with an error, the others too
            for ticket in running:
                self.engine.cancel(ticket)
                del self._inbox[ticket]
        return texts

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        guidance: GuidanceConfig = GuidanceConfig(),
    ) -> collections.abc.Generator[str, None, Generation]:
        """Continue one prompt, yielding its text piece by piece; the generator's return value is the whole.

        The pieces together are the text of `generate([prompt])`, and never end within a character.

        Raises:
            UserError: as `generate`, at the first piece.
        """
        text = GrowingText()
        for delta in self._deltas(self.request(prompt, max_new_tokens, sampling, seed, guidance=guidance)):
            text.add(delta)
            if delta.text:
                yield delta.text
        return text.generation

    def request(
        self,
        prompt: str,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int = 0,
        n: int = 0,
        guidance: GuidanceConfig = GuidanceConfig(),
    ) -> Request:
        """For the n-th of several texts.

        Raises:
            UserError: the prompt is not UTF-8.
        """
        engine, negative = self.engine, guidance.negative_prompt
        return Request(
            prompt=engine.prompt_ids(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=nth_seed(seed, n),
            ends=engine.ends.last,
            guidance_scale=guidance.guidance_scale,
            negative_prompt=() if negative is None else engine.prompt_ids(negative),
        )

    def _said(self, request: Request, tokens: Sequence[int]) -> str:
        """Tokens that go on with a prompt, as text."""
        stream = TextStream(self.engine.tokenizer, request.prompt)
        return stream.add(tokens) + stream.finish()

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


class GrowingText:
    """A text as it grows."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[int] = []
        self.scores: list[TokenScore] = []
        """Of the tokens, if they were asked for."""
        self.prompt_scores: list[TokenScore] = []
        """Of those of the prompt."""
        self.finish: Finish | None = None
        """Why it ended; None: it has not."""
        self._timed, self._seconds = 0, 0.0

    def add(self, delta: Delta) -> None:
        """
        Raises:
            UserError: it ended with an error.
        """
        if delta.finish in (Finish.ERROR, Finish.NOTHING_FITS):
            raise UserError(delta.error)
        self.finish = delta.finish
        self._text.append(delta.text)
        self._tokens += delta.tokens
        self.scores += delta.scores
        self.prompt_scores += delta.prompt_scores
        if delta.seconds and delta.tokens:
            self._timed += len(delta.tokens)
            self._seconds += delta.seconds

    @property
    def generation(self) -> Generation:
        rate = self._timed / self._seconds if self._timed else None
        return Generation(text="".join(self._text), tokens=self._tokens, tokens_per_s=rate)
