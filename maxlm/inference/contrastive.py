"""Contrastive search (Su et al. 2022, arXiv:2202.06417): a likely token whose state is like no state before.

Of the k likeliest tokens v after a text x that one comes next which has the largest (equation 5)

    (1 - alpha) p(v | x) - alpha max_j cos(h_v, h_j),

h the last layer's states after the last norm, h_j those of all tokens before, the prompt's too, and h_v that of v after
them. Probabilities are those after all rules of SamplingConfig but temperature and truncation: transformers' form.

Each of the k is read as a text of its own, a request of one token. The engine finds the text before it in its cache as
far as it fills blocks, and says with its state also what may come after it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from maxlm.config import ContrastiveConfig
from maxlm.inference.request import Request, TokenScore, check_searched, one_more


def contrastive_search(
    answer: Callable[[list[Request]], Sequence[Sequence[TokenScore]]],
    requests: Sequence[Request],
    config: ContrastiveConfig,
) -> list[tuple[int, ...]]:
    """One text for each request; they are searched side by side.

    Args:
        answer: the scores of each request's prompt, where asked for, and of its one new token.
        requests: what to go on with, all `max_new_tokens` of it. The seed does not matter.
        config: among how many tokens, and what counts.

    Returns:
        New tokens; the last is one that ends a text, unless there are max_new_tokens.

    Raises:
        UserError: a setting does not go with it, or as `answer`.
    """
    texts = [_Text(request, config) for request in requests]
    for text, scores in zip(texts, answer([text.beginning() for text in texts]), strict=True):
        text.begin(scores)
    while running := [text for text in texts if not text.ended]:
        asked = [text.candidates() for text in running]
        scores_of = iter(answer(list(itertools.chain(*asked))))
        for text, some in zip(running, asked, strict=True):
            text.take([next(scores_of)[-1] for _ in some])
    return [text.tokens for text in texts]


class _Text:
    """Of one request."""

    def __init__(self, request: Request, config: ContrastiveConfig) -> None:
        check_searched(request, "contrastive search")
        self._request, self._config = dataclasses.replace(request, sampling=config.searched(request.sampling)), config
        self.tokens: tuple[int, ...] = ()
        self._seen: list[npt.NDArray[np.float64]] = []
        """States of all tokens before the next one, of length 1."""
        self._next: list[tuple[int, float]] = []
        """What may come, with its log-probability."""

    @property
    def ended(self) -> bool:
        new = len(self.tokens)
        return new == self._request.max_new_tokens or (new > 0 and self.tokens[-1] in self._request.ends)

    def beginning(self) -> Request:
        """What asks for the states of the prompt."""
        return dataclasses.replace(self._asked(()), prompt_logprobs=0)

    def begin(self, scores: Sequence[TokenScore]) -> None:
        """With the states of the prompt: a score holds that of the token before it."""
        self._seen = [_direction(score) for score in scores]
        self._next = _possible(scores[-1])

    def candidates(self) -> list[Request]:
        """What asks for the state of each token that may come."""
        return [self._asked((*self.tokens, token)) for token, _ in self._next]

    def take(self, scores: Sequence[TokenScore]) -> None:
        """Go a token further, with what was found after each that may come."""
        alpha, seen = self._config.contrastive_alpha, np.stack(self._seen)
        states = [_direction(score) for score in scores]
        values = [
            (1 - alpha) * np.exp(logprob) - alpha * (seen @ state).max()
            for (_, logprob), state in zip(self._next, states, strict=True)
        ]
        best = int(np.argmax(values))  # of equal ones the likelier
        self.tokens = (*self.tokens, self._next[best][0])
        self._seen.append(states[best])
        self._next = _possible(scores[best])

    def _asked(self, tokens: tuple[int, ...]) -> Request:
        return dataclasses.replace(one_more(self._request, tokens, top=self._config.contrastive_k), states=True)


def _direction(score: TokenScore) -> npt.NDArray[np.float64]:
    assert score.state is not None
    state = score.state.astype(np.float64)
    return state / max(float(np.linalg.norm(state)), 1e-12)


def _possible(score: TokenScore) -> list[tuple[int, float]]:
    return [(token, logprob) for token, logprob in score.top if logprob > -float("inf")]
