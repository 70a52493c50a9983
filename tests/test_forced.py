"""Forced words: against all texts there are. (Those of a model: test_beam.py.)"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam import MadeUp, every_text, request

from maxlm.config import BeamConfig, UserError
from maxlm.data.tokenizers import Bytes
from maxlm.inference.beam import beam_search
from maxlm.inference.forced import ForcedWords, Had, Spelling, shares, spellings

Words = list[list[Spelling]]
ids = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)
words = st.lists(st.lists(ids, min_size=1, max_size=2), min_size=1, max_size=3)


def has(text: Sequence[int], word: Sequence[Spelling]) -> bool:
    return any(tuple(text[i : i + len(one)]) == one for one in word for i in range(len(text)))


def fewest(text: Spelling, wanted: Words) -> int:
    """By trying all that may follow."""
    return next(
        n
        for n in range(10)
        for more in itertools.product(range(3), repeat=n)
        if all(has((*text, *more), word) for word in wanted)
    )


@given(words, st.lists(st.integers(0, 2), max_size=5).map(tuple))
@settings(max_examples=60, deadline=None)
def test_what_is_missing_is_the_least_that_brings_all_words(wanted: Words, text: Spelling) -> None:
    forced, had = ForcedWords(wanted), Had()
    for token in text:
        had = forced.after(had, token)
    least = fewest(text, wanted)
    assert forced.missing(had) == least
    assert had.words == {n for n, word in enumerate(wanted) if has(text, word)}
    assert forced.nearer(had) == [i for i in range(3) if fewest((*text, i), wanted) < least]


@given(st.integers(0, 10**6), st.data(), st.sampled_from([(4, 3), (3, 4)]), st.sampled_from([-1.0, 0.0, 0.6, 2.0]))
@settings(max_examples=60, deadline=None)
def test_with_room_for_all_texts_the_best_that_have_the_words_are_found(
    seed: int, data: st.DataObject, size: tuple[int, int], penalty: float
) -> None:
    (vocab, new), model = size, MadeUp(seed, vocab=size[0])
    asked = data.draw(words.filter(lambda some: fewest((), some) <= new))
    asked = [[one for one in word if max(one) < vocab - 1] for word in asked]
    asked = [word for word in asked if word] or [[(0,)]]
    end, n = vocab - 1, data.draw(st.integers(1, 12))
    beams = BeamConfig(beams=12, length_penalty=penalty, n_best=n)
    every = every_text(model, [end], new, penalty)
    if expected := [one for one in every if all(has(one.tokens, word) for word in asked)]:
        assert beam_search(model.answer, [request([end], new)], beams, asked) == [expected[:n]]
    elif fewest((), asked) <= new:
        with pytest.raises(UserError, match="force: no text has these words, as some of their ids are banned"):
            beam_search(model.answer, [request([end], new)], beams, asked)


class NothingBanned(MadeUp):
    def after(self, tokens: Sequence[int]) -> np.ndarray:
        return np.maximum(super().after(tokens), -30.0)


@given(st.integers(0, 10**6), words, st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_however_few_beams_each_text_has_the_words(seed: int, wanted: Words, width: int, more: int) -> None:
    """Of 30 ids, of which only two are told, so that the words are seen for being asked for."""
    model, new = NothingBanned(seed, vocab=30), fewest((), wanted) + more
    if new:
        [found] = beam_search(model.answer, [request([29], new)], BeamConfig(beams=width, n_best=width), wanted)
        assert found
        for one in found:
            assert all(has(one.tokens, word) for word in wanted)
            sums = [model.after((7, 7, *one.tokens[:n]))[token] for n, token in enumerate(one.tokens)]
            assert one.logprob == sum(sums)


def test_places_are_shared_out_as_equally_as_may_be() -> None:
    assert shares(10, [2, 9, 9]) == [2, 4, 4]
    assert shares(11, [2, 9, 9]) == [2, 5, 4]
    assert shares(2, [5, 5, 5]) == [1, 1, 0]
    assert shares(9, [1, 2]) == [1, 2]
    assert shares(3, []) == []


def test_words_that_cannot_come() -> None:
    with pytest.raises(UserError, match="word 1 has no ids that may stand within a text"):
        ForcedWords([[(1,)], [(2, 3)]], ends=(3,))
    with pytest.raises(UserError, match="force has 9 words; use at most 8"):
        ForcedWords([[(1,)]] * 9)


def test_spellings_are_with_a_space_and_without() -> None:
    assert set(spellings(Bytes(), "ab")) == {(97, 98), (32, 97, 98)}
