"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maxlm.config import SamplingConfig, UserError

if TYPE_CHECKING:
    from maxlm.inference.structured import Grammar

TOP_SCORES = 20
"""The most likely tokens that a request can ask for at each position."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to go on with. Its tokens are a function of this and the model alone."""

    prompt: tuple[int, ...]
    """Token ids; at least one."""
    max_new_tokens: int
    """It ends after so many."""
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    """Randomness is a function of the seed and of a token's position."""
    ends: tuple[int, ...] = ()
    """Ids each of which ends the text; the id is among its tokens, and not in its text."""
    stop: tuple[str, ...] = ()
    """Strings each of which ends the text before it. No part of one is ever shown."""
    logprobs: int | None = None
    """Log-probability of each new token, and of so many of the likeliest ones; None: neither."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, but for the first. No prefix is then taken from the cache."""
    processed_logprobs: bool = False
    """Of the distribution that tokens are drawn from, in place of the model's."""
    told: tuple[int, ...] = ()
    """Ids whose log-probability is told with each new token, if `logprobs` asks for any."""
    states: bool = False
    """With each log-probability the state that the last layer leaves, after the last norm, of the token before."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    banned: tuple[tuple[int, ...], ...] = ()
    """Runs of ids that never come."""
    guidance_scale: float = 1.0
    """Another one than 1: logits, before all rules, are n + scale * (p - n), p and n the log-probabilities after this
    text and after `negative_prompt` with the same new tokens (arXiv:2306.17806). Log-probabilities that are told of new
    tokens are those of these logits. It takes two slots."""
    negative_prompt: tuple[int, ...] = ()
    """Of guidance; none: the last token of the prompt."""
    grammar: Grammar | None = None
    """What the text must be a sentence of."""
    deadline_s: float | None = None
    """Seconds after which it ends, done or not."""
    adapter: str | None = None
    """Which of the engine's adapters changes the model for it; None: none does."""

    @property
    def twin(self) -> Request | None:
        """The same new tokens after the negative prompt, if it is guided."""
        if self.guidance_scale == 1:
            return None
        return Request(
            prompt=self.negative_prompt or self.prompt[-1:],
            max_new_tokens=self.max_new_tokens,
            sampling=SamplingConfig(temperature=0),
            ends=self.ends,
            adapter=self.adapter,
        )


def check_searched(request: Request, what: str) -> None:
    """
    Raises:
        UserError: a setting does not go with a search.
    """
    for name in ("stop", "grammar", "deadline_s", "logprobs", "prompt_logprobs"):
        if (value := getattr(request, name)) not in (None, ()):
            raise UserError(f"{name} = {value!r} does not go with {what}; leave it out")
    if request.guidance_scale != 1:
        raise UserError(f"guidance_scale = {request.guidance_scale} does not go with {what}; leave it out")


def one_more(request: Request, tokens: tuple[int, ...], *, top: int, told: tuple[int, ...] = ()) -> Request:
    """What asks for a single token after some of a request's: its log-probabilities after all rules.

    A search lays its texts out of such: the engine finds all but the newest tokens in its cache, in whole blocks.

    Tokens so far are part of its prompt, and two rules look at those that are not: told here in other words.
    """
    sampling, bias = request.sampling, dict(request.logit_bias)
    for token, count in Counter(tokens).items():
        bias[token] = bias.get(token, 0) - count * sampling.frequency_penalty - sampling.presence_penalty
    still = max(sampling.min_new_tokens - len(tokens), 0)
    return dataclasses.replace(
        request,
        prompt=request.prompt + tokens,
        max_new_tokens=1,
        sampling=dataclasses.replace(sampling, min_new_tokens=still, presence_penalty=0.0, frequency_penalty=0.0),
        logprobs=top,
        processed_logprobs=True,
        told=told,
        logit_bias={token: value for token, value in bias.items() if value},
    )


def with_virtual(request: Request, n: int) -> Request:
    """The request with places for n virtual tokens before its prompt, and before its negative one. Nothing reads what
    stands there but penalties of repetition, to which it is one more 0."""
    if not n:
        return request
    before, twin = (0,) * n, request.twin
    negative = request.negative_prompt if twin is None else before + twin.prompt
    return dataclasses.replace(request, prompt=before + request.prompt, negative_prompt=negative)


def nth_seed(seed: int, n: int) -> int:
    """Of the n-th of several texts that are asked for with one seed; the first one's is the seed itself."""
    return seed if n == 0 else int(np.random.SeedSequence((seed, n)).generate_state(1)[0])


class Refused(UserError):
    """The engine did not take a request."""


class QueueFull(Refused):
    """As many wait as may."""


class Draining(Refused):
    """Nothing new is taken any more."""


class BadRequest(Refused):
    """No state of the engine could serve it."""


class Finish(enum.Enum):
    """Why a text ended."""

    STOP = "stop"
    """The model ended it, or a stop string did."""
    LENGTH = "length"
    """It has its max_new_tokens."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    NOTHING_FITS = "nothing_fits"
    """No token is left that the request allows, or its grammar cannot go on."""
    ERROR = "error"
    """Of the model or the engine."""


@dataclass(frozen=True)
class TokenScore:
    """How likely a token was."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids and their log-probabilities, best first."""
    told: tuple[float, ...] = ()
    """Log-probabilities of the ids that were asked for by name."""
    state: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    """[D]: what the logits were made of, if it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a text has grown by."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    """Final: nothing that comes later changes it. It may lag behind the tokens."""
    scores: tuple[TokenScore, ...] = ()
    """One for each token, if they were asked for."""
    prompt_scores: tuple[TokenScore, ...] = ()
    """Of the prompt's tokens from the second on, all in one Delta, if they were asked for."""
    finish: Finish | None = None
    """With the last one."""
    stop_reason: str | int | None = None
    """The string or id that ended it."""
    error: str = ""
    """With Finish.ERROR and Finish.NOTHING_FITS, in one line."""
    cached_tokens: int = 0
    """Of the prompt, taken from the cache; of the first Delta."""
    seconds: float = 0.0
    """The device's time since the Delta before; 0 in the first, which is the prompt's."""
