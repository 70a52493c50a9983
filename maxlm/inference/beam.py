"""Beam search: the texts of the highest score that a few open beginnings lead to.

After each token the W likeliest beginnings are kept, W the number of beams. A text's score is

    sum of the log-probabilities of its tokens / length ** length_penalty,

the id that ends it counted among both: transformers' form. Wu et al. 2016 (arXiv:1609.08144, section 7) divide by
((5 + length) / 6) ** length_penalty, and add a coverage term; that form is not here. Log-probabilities are those after
all rules of SamplingConfig but temperature and truncation, and sum to 1 over what may come; transformers leaves them as
they are after its rules.

A step is breadth first, as in Freitag and Al-Onaizan 2017 (arXiv:1702.01806, section 2) without their pruning: of all
beginnings with one more token, in falling order of their sums, those that end and are among the first W become finished
texts, and the first W that do not end stay open. The search ends when no open beginning can come among the n best
finished texts any more (Huang, Zhao and Ma 2017, arXiv:1809.00069, for a text's score here): a sum never grows, so that
the best that an open beginning can reach is its sum over the longest length that it may have where length_penalty > 0,
over the shortest otherwise. That is transformers' early_stopping="never", for its n best in place of all W. (Its True
ends with the W-th finished text, and its False compares with the present length: with length_penalty > 0 both may miss
a better text.)

Each open beginning is a request of one token. The engine finds the beginning in its cache as far as it fills blocks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maxlm.config import BeamConfig, UserError
from maxlm.inference.request import TOP_SCORES, Request, TokenScore

_UNSUPPORTED = ("stop", "grammar", "deadline_s", "logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class Hypothesis:
    """A finished text."""

    tokens: tuple[int, ...]
    """New ones; the last is one that ends a text, unless there are max_new_tokens."""
    logprob: float
    """The sum of theirs."""
    score: float


@dataclass(frozen=True)
class _Beginning:
    tokens: tuple[int, ...] = ()
    logprob: float = 0.0


def beam_search(
    answer: Callable[[list[Request]], Sequence[TokenScore]], requests: Sequence[Request], beams: BeamConfig
) -> list[list[Hypothesis]]:
    """The best texts for each request; requests are searched side by side.

    Args:
        answer: the score of the one new token of each request.
        requests: what to go on with, all `max_new_tokens` of it. The seed does not matter.
        beams: how many beginnings are kept, and how many texts are wanted.

    Returns:
        For each request at most n_best texts, best first; of equal ones that with the lower first id that differs.
        Fewer only where fewer were found.

    Raises:
        UserError: a setting does not go with beams, or as `answer`.
    """
    searches = [_Search(request, beams) for request in requests]
    while running := [search for search in searches if search.open]:
        scores = iter(answer([request for search in running for request in search.requests()]))
        for search in running:
            search.take([next(scores).top for _ in search.open])
    return [search.finished for search in searches]


class _Search:
    """Of one request."""

    def __init__(self, request: Request, beams: BeamConfig) -> None:
        for name in _UNSUPPORTED:
            if (value := getattr(request, name)) not in (None, ()):
                raise UserError(f"{name} = {value!r} does not go with beams; leave it out")
        self._sampling = beams.searched(request.sampling)
        # Of one beginning at most W that do not end are kept, and all that end may stand before them.
        self._top = beams.beams + len(request.ends)
        if self._top > TOP_SCORES:
            raise UserError(
                f"beams = {beams.beams} and {len(request.ends)} ids that end a text make {self._top}, more than the "
                f"{TOP_SCORES} likeliest ids that are told; use at most {TOP_SCORES - len(request.ends)} beams"
            )
        self._request, self._beams = request, beams
        self.open = [_Beginning()]
        """In falling order; none: the search has ended."""
        self.finished: list[Hypothesis] = []
        """The n best, in falling order."""

    def requests(self) -> list[Request]:
        """One for each open beginning."""
        return [self._asked(beginning.tokens) for beginning in self.open]

    def take(self, tops: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Go a token further.

        Args:
            tops: for each open beginning the likeliest ids with their log-probabilities.
        """
        longer = [
            _Beginning((*beginning.tokens, token), beginning.logprob + logprob)
            for beginning, top in zip(self.open, tops, strict=True)
            for token, logprob in top
            if logprob > -float("inf")  # what is banned
        ]
        longer.sort(key=lambda one: (-one.logprob, one.tokens))
        width = self._beams.beams
        self.finished += [self._hypothesis(one) for one in longer[:width] if self._ends(one)]
        self.finished = sorted(self.finished, key=lambda one: (-one.score, one.tokens))[: self._beams.n_best]
        self.open = [one for one in longer if not self._ends(one)][:width]
        if len(self.finished) == self._beams.n_best and self.open and self._bound() < self.finished[-1].score:
            self.open = []

    def _asked(self, tokens: tuple[int, ...]) -> Request:
        """Tokens so far are part of its prompt, and two rules look at those that are not: told here in other words."""
        request, sampling = self._request, self._sampling
        bias = dict(request.logit_bias)
        for token, count in Counter(tokens).items():
            bias[token] = bias.get(token, 0) - count * sampling.frequency_penalty - sampling.presence_penalty
        still = max(sampling.min_new_tokens - len(tokens), 0)
        return dataclasses.replace(
            request,
            prompt=request.prompt + tokens,
            max_new_tokens=1,
            sampling=dataclasses.replace(sampling, min_new_tokens=still, presence_penalty=0.0, frequency_penalty=0.0),
            logprobs=self._top,
            processed_logprobs=True,
            logit_bias={token: value for token, value in bias.items() if value},
        )

    def _ends(self, one: _Beginning) -> bool:
        return one.tokens[-1] in self._request.ends or len(one.tokens) == self._request.max_new_tokens

    def _hypothesis(self, one: _Beginning) -> Hypothesis:
        return Hypothesis(one.tokens, one.logprob, self._score(one.logprob, len(one.tokens)))

    def _bound(self) -> float:
        """The highest score that an open beginning may reach."""
        best = self.open[0]
        longest = self._request.max_new_tokens if self._beams.length_penalty > 0 else len(best.tokens) + 1
        return self._score(best.logprob, longest)

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self._beams.length_penalty
