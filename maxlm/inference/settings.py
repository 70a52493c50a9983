"""The settings of many requests as arrays, so that one compiled program serves every mix of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from maxlm.config import SamplingConfig, UserError

A = TypeVar("A", jax.Array, np.ndarray)

MAX_EDITS = 512
"""Ids of a request with a bias, banned ones included; OpenAI allows 300."""
MAX_ENDS = 32
MAX_BREAKERS = 64
MAX_WORDS = 64
"""Banned words of two tokens or more."""
MAX_WORD = 16
"""Tokens of such a word."""
MAX_TOLD = 32
"""Ids whose log-probability is told by name."""

NOWHERE = -1
"""Fills lists of ids; no id."""
MASK_BITS = 32
_ALL = np.uint32(2**MASK_BITS - 1)


class Settings(NamedTuple):
    """One array [S, ...] for each setting, one row for each slot or each token that is to be drawn."""

    seed: Any
    """uint32 [S]."""
    vocab: Any
    """int32 [S]: ids from here on stand for no token and are never chosen."""
    temperature: Any
    """float32 [S], as the fields of SamplingConfig from here to `min_new_tokens`."""
    top_k: Any
    top_p: Any
    min_p: Any
    typical_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    no_repeat_ngram: Any
    dry_multiplier: Any
    dry_base: Any
    dry_allowed_length: Any
    dry_range: Any
    dry_breakers: Any
    """int32 [S, MAX_BREAKERS]."""
    min_new_tokens: Any
    ends: Any
    """int32 [S, MAX_ENDS]: ids that end the text."""
    edited: Any
    """int32 [S, MAX_EDITS]: ids with a bias."""
    bias: Any
    """float32 [S, MAX_EDITS], -inf of a banned id."""
    words: Any
    """int32 [S, MAX_WORDS, MAX_WORD]: banned words, filled on the left."""
    allowed: Any
    """uint32 [S, ceil(V / 32)]: bit i % 32 of word i // 32 says whether id i may come; a grammar's changes with every
    token."""
    logprobs: Any
    """int32 [S]: how many of the likeliest are wanted with their log-probability; -1: not even the chosen one."""
    processed_logprobs: Any
    """bool [S]: log-probabilities after all rules; False: the model's own."""
    guidance: Any
    """float32 [S]: how far away from the twin's distribution; of a text with a twin."""
    told: Any
    """int32 [S, MAX_TOLD]: ids whose log-probability is wanted too."""

    @staticmethod
    def empty(slots: int, vocab: int) -> Settings:
        """Numpy arrays of `slots` greedy requests without a rule, for logits [_, vocab]."""
        row = settings_row(SamplingConfig(temperature=0), vocab=vocab)
        return Settings(*(np.repeat(x[None], slots, 0) for x in row))


def settings_row(
    sampling: SamplingConfig,
    *,
    vocab: int,
    tokens: int | None = None,
    seed: int = 0,
    ends: Sequence[int] = (),
    logit_bias: Mapping[int, float] = {},
    banned: Sequence[Sequence[int]] = (),
    logprobs: int | None = None,
    processed_logprobs: bool = False,
    told: Sequence[int] = (),
    guidance: float = 1.0,
) -> Settings:
    """The settings of one request, as numpy arrays without the axis S.

    Args:
        sampling: what a request may ask for by name.
        vocab: V, the width of the logits.
        tokens: ids from here on stand for no token; None: every id is one.
        seed: of the request, below 2**32.
        ends: ids that end the text: banned before `sampling.min_new_tokens`.
        logit_bias: added to the logit of an id; -inf bans it.
        banned: words, as their ids, that must not come: the last id is banned after the others.
        logprobs: how many of the likeliest ids are wanted with each token; None: no log-probability at all.
        processed_logprobs: they are of the distribution that is drawn from, not of the model's own.
        told: ids whose log-probability is wanted too, where any is.
        guidance: of a text with a twin: see `maxlm.inference.sampling.guided`.

    Raises:
        UserError: an id is not one of the tokenizer's, a bias is NaN or +inf, or there are too many of something.
    """
    known = vocab if tokens is None else tokens
    for key, ids in (
        ("ends", ends),
        ("logit_bias", logit_bias),
        ("banned", [i for word in banned for i in word]),
        ("dry_breakers", sampling.dry_breakers),
        ("told", told),
    ):
        if unknown := [i for i in ids if not 0 <= i < known]:
            raise UserError(f"{key}: {unknown[0]} is no id of the tokenizer; use ids in [0, {known})")
    for i, value in logit_bias.items():
        if not value < np.inf:
            raise UserError(f"logit_bias: the bias of id {i} is {value}; use a finite number, or -inf to ban the id")
    if any(not word for word in banned):
        raise UserError("banned: one of the words has no ids; leave it out")

    edits = {i: float(value) for i, value in logit_bias.items()} | {w[0]: -np.inf for w in banned if len(w) == 1}
    words = [word for word in banned if len(word) > 1]
    if len(words) > MAX_WORDS:
        raise UserError(f"banned: {len(words)} words of two or more tokens; use at most {MAX_WORDS}")
    table = [_filled("banned", word, MAX_WORD, left=True) for word in words]
    table += [np.full(MAX_WORD, NOWHERE, np.int32)] * (MAX_WORDS - len(words))
    bias = np.zeros(MAX_EDITS, np.float32)
    edited = _filled("logit_bias and banned", list(edits), MAX_EDITS)
    bias[: len(edits)] = list(edits.values())
    return Settings(
        seed=np.uint32(seed),
        vocab=np.int32(known),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k),
        top_p=np.float32(sampling.top_p),
        min_p=np.float32(sampling.min_p),
        typical_p=np.float32(sampling.typical_p),
        repetition_penalty=np.float32(sampling.repetition_penalty),
        presence_penalty=np.float32(sampling.presence_penalty),
        frequency_penalty=np.float32(sampling.frequency_penalty),
        no_repeat_ngram=np.int32(sampling.no_repeat_ngram),
        dry_multiplier=np.float32(sampling.dry_multiplier),
        dry_base=np.float32(sampling.dry_base),
        dry_allowed_length=np.int32(sampling.dry_allowed_length),
        dry_range=np.int32(sampling.dry_range),
        dry_breakers=_filled("dry_breakers", sampling.dry_breakers, MAX_BREAKERS),
        min_new_tokens=np.int32(sampling.min_new_tokens),
        ends=_filled("ends", ends, MAX_ENDS),
        edited=edited,
        bias=bias,
        words=np.stack(table),
        allowed=np.full(mask_words(vocab), _ALL),
        logprobs=np.int32(-1 if logprobs is None else logprobs),
        processed_logprobs=np.bool_(processed_logprobs),
        guidance=np.float32(guidance),
        told=_filled("told", told, MAX_TOLD),
    )


def take(settings: Settings, slots: jax.Array) -> Settings:
    """The rows int32 [R] of the arrays: one for each token that is to be drawn."""
    return Settings(*(x[slots] for x in settings))


def mask_words(vocab: int) -> int:
    """uint32 words of a bit for each id."""
    return -(-vocab // MASK_BITS)


def _filled(key: str, ids: Sequence[int], size: int, *, left: bool = False) -> np.ndarray:
    if len(ids) > size:
        raise UserError(f"{key}: {len(ids)} ids; use at most {size}")
    fill = [NOWHERE] * (size - len(ids))
    return np.array([*fill, *ids] if left else [*ids, *fill], np.int32)
