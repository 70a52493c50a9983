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

With forced words (Post and Vilar 2018, arXiv:1804.06609) the beginnings are in banks, one for each number of tokens
that are missing still, and the W places go round the banks that have a beginning, those nearest to the end first.
Besides the likeliest ids those are looked at after which less is missing, so that the words come however unlikely they
are; and a beginning that could not have all of them within max_new_tokens is dropped. (The paper counts the tokens of
words that have come, and its words share none; Hu et al. 2019, ACL anthology N19-1090, keep them in a trie.) Without
words there is one bank.

Each open beginning is a request of one token. The engine finds the beginning in its cache as far as it fills blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maxlm.config import BeamConfig, UserError
from maxlm.inference.forced import ForcedWords, Had, Spelling, shares
from maxlm.inference.request import TOP_SCORES, Request, TokenScore, check_searched, one_more


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
    had: Had = Had()


def beam_search(
    answer: Callable[[list[Request]], Sequence[TokenScore]],
    requests: Sequence[Request],
    beams: BeamConfig,
    words: Sequence[Sequence[Spelling]] = (),
) -> list[list[Hypothesis]]:
    """The best texts for each request; requests are searched side by side.

    Args:
        answer: the score of the one new token of each request.
        requests: what to go on with, all `max_new_tokens` of it. The seed does not matter.
        beams: how many beginnings are kept, and how many texts are wanted.
        words: each text has all of them among its new tokens, in one of their spellings. (`beams.force` is text, and
            not looked at.)

    Returns:
        For each request at most n_best texts, best first; of equal ones that with the lower first id that differs.
        Fewer only where fewer were found.

    Raises:
        UserError: a setting does not go with beams, the words do not fit the new tokens, no text was found that has
            them, or as `answer`.
    """
    searches = [_Search(request, beams, words) for request in requests]
    while running := [search for search in searches if search.open]:
        scores = iter(answer([request for search in running for request in search.requests()]))
        for search in running:
            search.take([next(scores) for _ in search.open])
    if words and not all(search.finished for search in searches):
        raise UserError("force: no text has these words, as some of their ids are banned; force others, or ban fewer")
    return [search.finished for search in searches]


class _Search:
    """Of one request."""

    def __init__(self, request: Request, beams: BeamConfig, words: Sequence[Sequence[Spelling]]) -> None:
        check_searched(request, "beams")
        # Of one beginning at most W that do not end are kept, and all that end may stand before them.
        self._top = beams.beams + len(request.ends)
        if self._top > TOP_SCORES:
            raise UserError(
                f"beams = {beams.beams} and {len(request.ends)} ids that end a text make {self._top}, more than the "
                f"{TOP_SCORES} likeliest ids that are told; use at most {TOP_SCORES - len(request.ends)} beams"
            )
        self._request, self._beams = dataclasses.replace(request, sampling=beams.searched(request.sampling)), beams
        self._words = ForcedWords(words, request.ends)
        if (least := self._words.missing(Had())) > request.max_new_tokens:
            raise UserError(
                f"max_new_tokens = {request.max_new_tokens} is less than the {least} tokens of the forced words; "
                "allow more, or force fewer"
            )
        self.open = [_Beginning()]
        """In falling order; none: the search has ended."""
        self.finished: list[Hypothesis] = []
        """The n best, in falling order."""

    def requests(self) -> list[Request]:
        """One for each open beginning."""
        nearer = self._words.nearer
        return [one_more(self._request, one.tokens, top=self._top, told=tuple(nearer(one.had))) for one in self.open]

    def take(self, scores: Sequence[TokenScore]) -> None:
        """Go a token further.

        Args:
            scores: for each open beginning the log-probabilities of the likeliest ids, and of those asked for by name.
        """
        longer = [one for before, score in zip(self.open, scores, strict=True) for one in self._longer(before, score)]
        longer.sort(key=lambda one: (-one.logprob, one.tokens))
        banks: dict[int, list[_Beginning]] = {}
        for one in longer:
            banks.setdefault(self._words.missing(one.had), []).append(one)
        nearest = [banks[missing] for missing in sorted(banks)]
        kept, self.open = list[_Beginning](), list[_Beginning]()
        for bank, n in zip(nearest, shares(self._beams.beams, list(map(len, nearest))), strict=True):
            kept += bank[:n]
            self.open += [one for one in bank if not self._ends(one)][:n]
        self.open.sort(key=lambda one: (-one.logprob, one.tokens))
        self.finished += [self._hypothesis(one) for one in kept if self._ends(one)]
        self.finished = sorted(self.finished, key=lambda one: (-one.score, one.tokens))[: self._beams.n_best]
        if len(self.finished) == self._beams.n_best and self.open and self._bound() < self.finished[-1].score:
            self.open = []

    def _longer(self, before: _Beginning, score: TokenScore) -> list[_Beginning]:
        """A beginning with each of the tokens that were scored after it, but for those that can lead to nothing."""
        found = []
        for token, logprob in dict([*score.top, *zip(self._words.nearer(before.had), score.told, strict=True)]).items():
            had = self._words.after(before.had, token)
            one = _Beginning((*before.tokens, token), before.logprob + logprob, had)
            left = 0 if self._ends(one) else self._request.max_new_tokens - len(one.tokens)
            if logprob > -float("inf") and self._words.missing(had) <= left:  # neither banned nor too far away
                found.append(one)
        return found

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
