"""Beam search against all texts there are, against a search that never ends early, and against transformers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import published
import pytest
from helpers import FLOAT32, one_device, small_run, whole_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import BeamConfig, EngineConfig, SamplingConfig, ShardingConfig, UserError
from maxlm.data.tokenizers import Bytes
from maxlm.hub.models import load_model
from maxlm.inference.beam import Hypothesis, beam_search
from maxlm.inference.best_of import Rank, best_of
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request, TokenScore

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingConfig(temperature=0)
HELLO = tuple(b"Hello ")
LLAMA = {**published.MODELS["llama"], "vocab_size": 258}


# --- Made-up distributions ---


class MadeUp:
    """Log-probabilities of ids after other ids, in halves so that many are equal; some ids are banned."""

    def __init__(self, seed: int, vocab: int) -> None:
        self.seed, self.vocab, self.asked = seed, vocab, 0

    def after(self, tokens: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *tokens])
        values = -np.ceil(rng.exponential(3.0, self.vocab)) / 2
        values[1:][rng.random(self.vocab - 1) < 0.1] = -np.inf
        return values

    def answer(self, requests: Sequence[Request]) -> list[TokenScore]:
        self.asked += len(requests)
        return [self._score(request) for request in requests]

    def _score(self, request: Request) -> TokenScore:
        assert request.max_new_tokens == 1 and request.processed_logprobs and request.logprobs is not None
        values = self.after(request.prompt)
        ids = np.argsort(-values, kind="stable")[: request.logprobs]
        top = tuple((int(i), float(values[i])) for i in ids)
        return TokenScore(*top[0], top, tuple(float(values[i]) for i in request.told))


def request(ends: Sequence[int], new: int, **changes: Any) -> Request:
    return Request(prompt=(7, 7), max_new_tokens=new, sampling=GREEDY, ends=tuple(ends), **changes)


def score(logprob: float, length: int, penalty: float) -> float:
    return logprob / length**penalty


def in_order(found: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(found, key=lambda one: (-one.score, one.tokens))


def every_text(model: MadeUp, ends: Sequence[int], new: int, penalty: float) -> list[Hypothesis]:
    found = []
    for length in range(1, new + 1):
        for tokens in itertools.product(range(model.vocab), repeat=length):
            if any(token in ends for token in tokens[:-1]) or (length < new and tokens[-1] not in ends):
                continue
            logprob = sum(float(model.after((7, 7, *tokens[:n]))[token]) for n, token in enumerate(tokens))
            if logprob > -np.inf:
                found.append(Hypothesis(tokens, logprob, score(logprob, length, penalty)))
    return in_order(found)


def never_early(model: MadeUp, width: int, ends: Sequence[int], new: int, penalty: float) -> list[Hypothesis]:
    """All that any step finishes, with all ids of all open beginnings."""
    found, open_ = [], [((), 0.0)]
    for length in range(1, new + 1):
        longer = []
        for tokens, logprob in open_:
            values = model.after((7, 7, *tokens))
            longer += [((*tokens, i), logprob + float(value)) for i, value in enumerate(values) if value > -np.inf]
        longer.sort(key=lambda one: (-one[1], one[0]))
        over = [tokens[-1] in ends or length == new for tokens, _ in longer]
        for (tokens, logprob), ended in zip(longer[:width], over[:width], strict=True):
            if ended:
                found.append(Hypothesis(tokens, logprob, score(logprob, length, penalty)))
        open_ = [one for one, ended in zip(longer, over, strict=True) if not ended][:width]
    return in_order(found)


PENALTIES = st.sampled_from([-1.0, -0.5, 0.0, 0.6, 1.0, 2.0])


@given(st.integers(0, 10**6), PENALTIES, st.integers(1, 12), st.sampled_from([(3,), (0,), (1, 2)]))
@settings(max_examples=40, deadline=None)
def test_with_room_for_all_texts_the_best_ones_are_found(
    seed: int, penalty: float, n: int, ends: tuple[int, ...]
) -> None:
    model = MadeUp(seed, vocab=4)
    [found] = beam_search(model.answer, [request(ends, 3)], BeamConfig(beams=12, length_penalty=penalty, n_best=n))
    assert found == every_text(model, ends, 3, penalty)[:n]


@given(st.integers(0, 10**6), PENALTIES, st.integers(1, 4), st.data(), st.sampled_from([(5,), (0,), (1, 2, 3)]))
@settings(max_examples=100, deadline=None)
def test_the_end_comes_where_nothing_better_can_come(
    seed: int, penalty: float, width: int, data: st.DataObject, ends: tuple[int, ...]
) -> None:
    model, n, new = MadeUp(seed, vocab=6), data.draw(st.integers(1, width)), data.draw(st.integers(1, 7))
    beams = BeamConfig(beams=width, length_penalty=penalty, n_best=n)
    [found] = beam_search(model.answer, [request(ends, new)], beams)
    assert found == never_early(model, width, ends, new, penalty)[:n]
    # Several at once are as each alone.
    other = dataclasses.replace(request(ends, 2), prompt=(7,))
    assert beam_search(model.answer, [other, request(ends, new)], beams)[1] == found


@given(st.integers(0, 10**6), st.sampled_from([0.0, -1.0]))
@settings(max_examples=30, deadline=None)
def test_one_beam_whose_score_cannot_grow_is_greedy(seed: int, penalty: float) -> None:
    model, tokens = MadeUp(seed, vocab=6), []
    while len(tokens) < 8 and 5 not in tokens:
        tokens.append(int(model.after((7, 7, *tokens)).argmax()))
    [[found]] = beam_search(model.answer, [request([5], 8)], BeamConfig(beams=1, length_penalty=penalty))
    assert list(found.tokens) == tokens


def test_it_ends_at_once_where_it_may_and_goes_on_where_it_must() -> None:
    class Ending(MadeUp):
        def after(self, tokens: Sequence[int]) -> np.ndarray:
            return np.log([0.6, 0.3, 0.1])

    steps = {}
    for penalty in (-1.0, 0.0, 1.0):
        model = Ending(0, vocab=3)
        beam_search(model.answer, [request([0], 6)], BeamConfig(beams=1, length_penalty=penalty))
        steps[penalty] = model.asked
    # log 0.6 = -0.51 is sure where more tokens only cost. As a mean, log 0.3 + later ones may still reach
    # -1.20 / 6 = -0.20; after two more -2.41 / 6 = -0.40, then -3.61 / 6 = -0.60 cannot win.
    assert steps == {-1.0: 1, 0.0: 1, 1.0: 3}


# --- A model ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp("llama")
    published.write_model(LLAMA, folder)
    model, config = load_model(folder)
    whole = dataclasses.replace(small_run(model=config, sharding=ShardingConfig(data=1)), execution=FLOAT32)
    return LoadedRun(config=whole, layout=one_device(), parameters=model.parameters, tokenizer=Bytes(), step=0)


@pytest.fixture(scope="module")
def generator(run: LoadedRun) -> Generator:
    return Generator(run, engine=EngineConfig(slots=4, tokens_per_step=8, block_size=4))


def search(generator: Generator, asked: Request, beams: BeamConfig) -> list[Hypothesis]:
    [found] = beam_search(lambda more: [text.scores[0] for text in generator.texts(more)], [asked], beams)
    return found


@pytest.mark.parametrize(
    ("ends", "width", "penalty", "expected", "scores"),
    [
        ((212,), 4, 0.0, [(212,), (58, 212)], [-3.62084, -6.60082]),
        (
            (212,),
            4,
            2.0,
            [(89, 53, 25, 16, 23, 16, 220, 212), (89, 53, 25, 16, 23, 16, 148, 212)],
            [-0.37519, -0.38846],
        ),
        # With early_stopping True and False transformers says (212, 136, 136, 136, 136, 47), of -2.92367, in place of
        # the best: True ends with the second text, and False where no open one is better at its present length.
        (
            (182, 47),
            2,
            1.0,
            [(212, 136, 136, 212, 116, 136, 169, 43), (212, 136, 136, 136, 136, 47)],
            [-2.9205, -2.92367],
        ),
        (
            (101, 97, 182, 25),
            4,
            1.0,
            [(58, 212, 136, 136, 136, 182), (212, 136, 136, 212, 116, 136, 169, 43)],
            [-2.86342, -2.9205],
        ),
        (
            (101, 97, 182, 25),
            3,
            -1.0,
            [(212, 136, 136, 136, 136, 182), (212, 136, 136, 136, 136, 47, 136, 136)],
            [-107.26485, -190.56302],
        ),
    ],
)
def test_texts_are_those_of_transformers(
    generator: Generator,
    ends: tuple[int, ...],
    width: int,
    penalty: float,
    expected: list[tuple[int, ...]],
    scores: list[float],
) -> None:
    """transformers 5.24: `generate(HELLO, num_beams=width, length_penalty=penalty, early_stopping="never",
    num_return_sequences=2, max_new_tokens=8, eos_token_id=ends, do_sample=False)` of `published.write_model(LLAMA)`."""
    asked = Request(prompt=HELLO, max_new_tokens=8, sampling=GREEDY, ends=ends)
    found = search(generator, asked, BeamConfig(beams=width, length_penalty=penalty, n_best=2))
    assert [one.tokens for one in found] == expected
    np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-5, atol=1e-5)


def test_rules_are_those_of_transformers_where_probabilities_sum_to_one(generator: Generator) -> None:
    """As above with `no_repeat_ngram_size=1, renormalize_logits=True`."""
    asked = Request(prompt=HELLO, max_new_tokens=8, sampling=dataclasses.replace(GREEDY, no_repeat_ngram=1), ends=(47,))
    found = search(generator, asked, BeamConfig(beams=4, n_best=2))
    assert [one.tokens for one in found] == [(58, 212, 53, 25, 114, 39, 102, 16), (58, 212, 53, 25, 114, 39, 182, 209)]
    np.testing.assert_allclose([one.score for one in found], [-2.97377, -3.03478], atol=1e-5)


def test_a_models_best_texts_among_all(run: LoadedRun, generator: Generator) -> None:
    """Four ids may come, one of which ends the text; float64 sums of the full forward pass."""
    ids, end, new = (10, 97, 136, 182), 97, 3
    banned = tuple((i,) for i in range(258) if i not in ids)
    asked = Request(prompt=HELLO, max_new_tokens=new, sampling=GREEDY, ends=(end,), banned=banned)
    open_ = [i for i in ids if i != end]
    longest = list(itertools.product(open_, repeat=new - 1))
    logits = whole_logits(run.config.model, run.parameters, [(*HELLO, *tokens) for tokens in longest])
    found = {}
    for tokens, of_text in zip(longest, logits, strict=True):
        among = of_text[len(HELLO) - 1 :, ids].astype(np.float64)
        among -= np.log(np.exp(among).sum(-1, keepdims=True))
        for length in range(1, new + 1):
            before = sum(among[n, ids.index(tokens[n])] for n in range(length - 1))
            for i in ids if length == new else (end,):
                found[*tokens[: length - 1], i] = (before + among[length - 1, ids.index(i)]) / length**0.7
    expected = sorted(found.items(), key=lambda one: -one[1])[:8]
    got = search(generator, asked, BeamConfig(beams=12, length_penalty=0.7, n_best=8))
    assert [one.tokens for one in got] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([one.score for one in got], [value for _, value in expected], rtol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        SamplingConfig(temperature=0, presence_penalty=1.5, frequency_penalty=0.5, min_new_tokens=4),
        SamplingConfig(temperature=0, repetition_penalty=1.4, min_new_tokens=2),
    ],
)
def test_one_beam_has_all_rules_as_greedy_decoding_has_them(generator: Generator, rules: SamplingConfig) -> None:
    for ends in ((73,), (25,)):  # the text begins with 73
        asked = Request(prompt=HELLO, max_new_tokens=9, sampling=rules, ends=ends, logit_bias={58: 1.5, 47: -0.5})
        [greedy] = generator.texts([dataclasses.replace(asked, logprobs=0, processed_logprobs=True)])
        [found] = search(generator, asked, BeamConfig(beams=1, length_penalty=0.0))
        assert list(found.tokens) == greedy.generation.tokens
        assert math.isclose(found.logprob, sum(one.logprob for one in greedy.scores), rel_tol=1e-5)


def test_prompts_together_are_as_alone_and_the_cache_holds_what_was_read(generator: Generator) -> None:
    beams, prompts = BeamConfig(beams=3, n_best=2), ["Hello ", "", "Hello there"]
    before = generator.engine.stats
    together = generator.search(prompts, max_new_tokens=6, beams=beams)
    after = generator.engine.stats
    assert [generator.search([one], max_new_tokens=6, beams=beams)[0] for one in prompts] == together
    assert (after.cached_tokens - before.cached_tokens) > 0.5 * (after.prompt_tokens - before.prompt_tokens)
    for texts in together:
        assert len(texts) == 2 and texts[0].score >= texts[1].score and texts[0].tokens_per_s is None
        assert all(Bytes().decode(one.tokens) == one.text for one in texts)
    best = generator.generate(prompts, max_new_tokens=6, beams=BeamConfig(beams=3))
    assert best == [texts[0] for texts in together]


def test_a_models_texts_have_the_forced_words(generator: Generator) -> None:
    forced = BeamConfig(beams=4, n_best=2, force=("fox", "ox!"))
    for prompt, texts in zip(
        ["Hello ", ""], generator.search(["Hello ", ""], max_new_tokens=8, beams=forced), strict=True
    ):
        assert len(texts) == 2 and all("fox" in one.text and "ox!" in one.text for one in texts)
        [[likelier]] = generator.search([prompt], max_new_tokens=8, beams=BeamConfig(beams=4))
        assert likelier.score > texts[0].score
    for new, words, message in (
        (3, ("fox", "ox!"), "max_new_tokens = 3 is less than the 4 tokens of the forced words"),
        (8, ("",), "force = '' has no tokens that spell it"),
    ):
        with pytest.raises(UserError, match=message):
            generator.search(["Hello "], max_new_tokens=new, beams=BeamConfig(beams=2, force=words))


# --- Best of several ---


def test_the_likeliest_of_several_comes_first(run: LoadedRun, generator: Generator) -> None:
    ask: dict[str, Any] = {"max_new_tokens": 5, "sampling": SamplingConfig(temperature=0.8, top_k=40), "seed": 3}
    drawn = generator.generate(["Hello "] * 4, **ask)
    for rank in Rank:
        found = best_of(generator, "Hello ", n=4, rank=rank, **ask)
        assert sorted(one.tokens for one in found) == sorted(one.tokens for one in drawn)
        prompt = generator.engine.prompt_ids("Hello ")
        rows = whole_logits(run.config.model, run.parameters, [(*prompt, *one.tokens) for one in found])
        for one, row in zip(found, rows, strict=True):
            values = row[len(prompt) - 1 : -1].astype(np.float64)
            values -= np.log(np.exp(values).sum(-1, keepdims=True))
            of_tokens = values[np.arange(len(one.tokens)), one.tokens]
            assert math.isclose(one.score, of_tokens.mean() if rank is Rank.MEAN else of_tokens.sum(), rel_tol=1e-5)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    with pytest.raises(UserError, match="n = 0; must be at least 1"):
        best_of(generator, "Hello ", n=0, **ask)


# --- Mistakes ---


@pytest.mark.parametrize(
    ("beams", "message"),
    [
        ({"beams": 20}, r"beams = 20 must be in \[0, 19\]"),
        ({"beams": 4, "n_best": 5}, "n_best = 5 is more than beams = 4"),
        ({"n_best": 2}, "n_best = 2 is of a search, and beams = 0"),
        ({"force": ("a",)}, r"force = \('a',\) is of a search, and beams = 0"),
        ({"length_penalty": 0.5}, r"length_penalty = 0.5 is of a search, and beams = 0"),
        ({"beams": 4, "length_penalty": 11.0}, r"length_penalty = 11.0 must be in \[-10, 10\]"),
    ],
)
def test_beams_out_of_range(beams: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BeamConfig(**beams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": SamplingConfig(temperature=0.7)}, "temperature = 0.7 with beams: nothing is drawn"),
        ({"sampling": SamplingConfig(top_p=0.9)}, "top_p = 0.9 with beams"),
        ({"sampling": SamplingConfig(presence_penalty=1.0, repetition_penalty=1.2)}, "repetition_penalty = 1.2 with"),
        ({"ends": tuple(range(5))}, "beams = 16 and 5 ids .* make 21, more than the 20 .* use at most 15 beams"),
        ({"stop": ("x",)}, "stop = .* does not go with beams"),
        ({"deadline_s": 1.0}, "deadline_s = 1.0 does not go with beams"),
    ],
)
def test_what_does_not_go_with_beams(changes: dict[str, Any], message: str) -> None:
    model = MadeUp(0, vocab=6)
    with pytest.raises(UserError, match=message):
        beam_search(model.answer, [dataclasses.replace(request([5], 3), **changes)], BeamConfig(beams=16))
    assert not model.asked


def test_mistakes_of_the_generator(generator: Generator) -> None:
    with pytest.raises(UserError, match=r"more than model\.max_seq_len = 32"):
        generator.search(["Hello "], max_new_tokens=40, beams=BeamConfig(beams=2))
    with pytest.raises(UserError, match="n_best = 2, and here each prompt has one text"):
        generator.generate(["Hello "], max_new_tokens=4, beams=BeamConfig(beams=2, n_best=2))
    with pytest.raises(UserError, match="beams = 0 searches nothing"):
        generator.search(["Hello "], max_new_tokens=4, beams=BeamConfig())
