"""The likeliest of several drawn texts. (A vote among answers: `maxlm/evaluation/reasoning.py`.)"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import assert_never

from maxlm.config import SamplingConfig, UserError
from maxlm.inference.generator import Generator, Ranked
from maxlm.inference.request import TokenScore


class Rank(enum.Enum):
    """What is compared: of the log-probabilities of a text's tokens, the one that ends it included,"""

    MEAN = "mean"
    """the mean, as OpenAI's `best_of` does;"""
    SUM = "sum"
    """the sum: the likeliest text, which favours short ones."""


def best_of(
    generator: Generator,
    prompt: str,
    *,
    n: int,
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    rank: Rank = Rank.MEAN,
) -> list[Ranked]:
    """Draw n continuations of a prompt and put the likeliest first.

    Log-probabilities are the model's own, whatever `sampling` made of them. The texts are those of
    `generator.generate([prompt] * n, ...)`.

    Returns:
        All n, each with its mean or sum as `score`; of equal ones that which was drawn first.

    Raises:
        UserError: n is not positive, or as `Generator.generate`.
    """
    if n < 1:
        raise UserError(f"n = {n}; must be at least 1")
    requests = [generator.request(prompt, max_new_tokens, sampling, seed, i) for i in range(n)]
    drawn = generator.texts([dataclasses.replace(request, logprobs=0) for request in requests])
    found = [Ranked(**vars(text.generation), score=_score(text.scores, rank)) for text in drawn]
    return sorted(found, key=lambda one: -one.score)


def _score(scores: list[TokenScore], rank: Rank) -> float:
    total = math.fsum(score.logprob for score in scores)
    match rank:
        case Rank.MEAN:
            return total / len(scores)
        case Rank.SUM:
            return total
        case _:
            assert_never(rank)
