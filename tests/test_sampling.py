"""Decoding rules against float64 formulas, transformers' processors and sorting; draws against their distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import decoding_rules
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from maxlm.config import SamplingConfig, UserError
from maxlm.inference.logits_rules import History
from maxlm.inference.sampling import COLDEST, TOP, LogProbs, choose, draw, fewest, log_probs, noise, processed
from maxlm.inference.settings import MAX_EDITS, MAX_WORD, MAX_WORDS, Settings, mask_words, settings_row, take

GREEDY = SamplingConfig(temperature=0)
R, V, M = 8, 517, 40
"""Most tests share the programs of these sizes."""


def stacked(rows: Sequence[Settings]) -> Settings:
    return Settings(*(np.stack(column) for column in zip(*rows, strict=True)))


def history_of(texts: Sequence[Sequence[int]], n_prompt: Sequence[int]) -> History:
    """The texts in arrays, with ids behind them that must not matter."""
    tokens = np.random.default_rng(0).integers(0, 8, (len(texts), M)).astype(np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in texts], np.int32)
    return History(tokens, np.arange(len(texts)), np.array(n_prompt, np.int32), lengths)


def packed(allowed: np.ndarray) -> np.ndarray:
    bits = np.zeros(mask_words(len(allowed)) * 32, np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view("<u4")


# Formulas, in float64, as the papers have them


def edited_by_formula(
    logits: np.ndarray,
    text: Sequence[int],
    n_prompt: int,
    sampling: SamplingConfig,
    *,
    ends: Sequence[int] = (),
    bias: Mapping[int, float] = {},
    banned: Sequence[Sequence[int]] = (),
    allowed: np.ndarray | None = None,
    tokens: int | None = None,
) -> np.ndarray:
    x = logits.astype(np.float64)
    text, new = list(text), list(text)[n_prompt:]
    for i, value in bias.items():
        x[i] += value
    for i in set(text):
        x[i] = x[i] * sampling.repetition_penalty if x[i] < 0 else x[i] / sampling.repetition_penalty
    for i in set(new):
        x[i] -= new.count(i) * sampling.frequency_penalty + sampling.presence_penalty
    for i, n in dry_lengths(text, sampling).items():
        if n >= sampling.dry_allowed_length:
            x[i] -= sampling.dry_multiplier * sampling.dry_base ** (n - sampling.dry_allowed_length)
    if n := sampling.no_repeat_ngram:
        for end in range(n, len(text) + 1):
            gram = text[end - n : end]
            if gram[:-1] == text[len(text) - (n - 1) :]:
                x[gram[-1]] = -np.inf
    for word in banned:
        *beginning, last = word
        if text[len(text) - len(beginning) :] == beginning and len(beginning) <= len(text):
            x[last] = -np.inf
    if len(new) < sampling.min_new_tokens:
        x[list(ends)] = -np.inf
    if allowed is not None:
        x[~allowed] = -np.inf
    x[len(x) if tokens is None else tokens :] = -np.inf
    return x


def dry_lengths(text: Sequence[int], sampling: SamplingConfig) -> dict[int, int]:
    """Of each id that would go on with a repetition: the length of the longest one."""
    if not sampling.dry_multiplier:
        return {}
    text = text[max(0, len(text) - sampling.dry_range) :] if sampling.dry_range else text
    found: dict[int, int] = {}
    for place, token in enumerate(text):
        n = 0
        while n < place and text[place - 1 - n] == text[len(text) - 1 - n] not in sampling.dry_breakers:
            n += 1
        if n and token not in sampling.dry_breakers:
            found[token] = max(found.get(token, 0), n)
    return found


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


class Unsure(Exception):
    """float32 may put the edge of a truncation elsewhere."""


def kept_by_formula(values: np.ndarray, weights: np.ndarray, mass: float) -> list[int]:
    order = sorted(np.flatnonzero(np.isfinite(values)), key=lambda i: (-values[i], i))
    kept, total = [], 0.0
    for i in order:
        if kept and abs(total - mass) < 1e-5:
            raise Unsure
        if total >= mass:
            if 0 < values[kept[-1]] - values[i] < 1e-5:
                raise Unsure
            break
        kept.append(i)
        total += weights[i]
    return kept


def truncated_by_formula(x: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """Logits of what is drawn from, up to a constant."""
    if sampling.temperature == 0:
        return x
    x = x / sampling.temperature

    def only(kept: Sequence[int] | np.ndarray) -> np.ndarray:
        out = np.full_like(x, -np.inf)
        out[kept] = x[kept]
        return out

    if sampling.top_k:
        x = only(kept_by_formula(x, np.ones_like(x), sampling.top_k - 0.5))
    if sampling.top_p < 1:
        x = only(kept_by_formula(x, softmax(x), sampling.top_p))
    if sampling.min_p:
        ratio = softmax(x) / softmax(x).max()
        if (abs(ratio - sampling.min_p) < 1e-5).any():
            raise Unsure
        x = only(np.flatnonzero(ratio >= sampling.min_p))
    if sampling.typical_p < 1:
        p = softmax(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(p)
            entropy = np.nansum(np.where(p > 0, p * surprise, 0))
        x = only(kept_by_formula(-abs(surprise - entropy), p, sampling.typical_p))
    return x


def same_distribution(got: np.ndarray, want: np.ndarray, places: float = 2e-4) -> None:
    """Logits equal up to a constant; what is left, exactly."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    left = np.isfinite(want)
    np.testing.assert_allclose(got[left] - got[left].max(), want[left] - want[left].max(), atol=places, rtol=1e-5)


# Rules


class Outcome(NamedTuple):
    logits: np.ndarray
    tokens: np.ndarray
    logprobs: LogProbs


@jax.jit
def _in_parts(logits: jax.Array, rows: Settings, history: History) -> Outcome:
    after = processed(logits, rows, history)
    tokens = draw(after, rows, history.length)
    return Outcome(after, tokens, log_probs(after, tokens, rows.told))


_choose = jax.jit(choose)


def outcome(
    logits: np.ndarray, rows: Sequence[Settings], texts: Sequence[Sequence[int]], n_prompt: Sequence[int]
) -> Outcome:
    """Of up to R rows, filled up to R with others; `choose` must give the same, but for another program's rounding."""
    fill = R - len(logits)
    logits = np.concatenate([logits, np.zeros((fill, V), np.float32)])
    settings = stacked([*rows, *[settings_row(GREEDY, vocab=V)] * fill])
    history = history_of([*texts, *[[1]] * fill], [*n_prompt, *[1] * fill])
    got = _in_parts(logits, settings, history)
    chosen = _choose(
        logits, settings._replace(processed_logprobs=np.ones(R, bool), logprobs=np.ones(R, np.int32)), history
    )
    np.testing.assert_array_equal(got.tokens, chosen.tokens)
    for one, other in ((got.logprobs.chosen, chosen.logprobs.chosen), (got.logprobs.top, chosen.logprobs.top)):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)  # another program, which joins other products
    return jax.tree.map(lambda x: np.asarray(x)[: R - fill], got)


@pytest.mark.parametrize("name", decoding_rules.CASES)
def test_processed_logits_are_those_of_transformers(name: str) -> None:
    case, known = decoding_rules.CASES[name], decoding_rules.V
    logits, history = decoding_rules.logits_and_history(name)
    row = settings_row(
        case.sampling,
        vocab=V,
        tokens=known,
        ends=[decoding_rules.END],
        logit_bias=dict(case.bias),
        banned=case.banned,
    )
    x = np.zeros((1, V), np.float32)
    x[0, :known] = logits
    got = outcome(x, [row], [history.tolist()], [decoding_rules.PROMPT]).logits[0]
    with np.load(decoding_rules.ANSWERS) as answers:
        same_distribution(got[:known], answers[name], 1e-5)
    assert not np.isfinite(got[known:]).any()


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 0, 1, 5, 30, V, 1000]),
    "top_p": st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.99]),
    "min_p": st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0]),
    "typical_p": st.sampled_from([1.0, 1.0, 0.1, 0.6, 0.95]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
    "presence_penalty": st.sampled_from([0.0, 0.7, -1.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
    "no_repeat_ngram": st.sampled_from([0, 0, 0, 2, 3, 5]),
    "dry_multiplier": st.sampled_from([0.0, 0.8]),
    "dry_base": st.sampled_from([1.0, 1.75]),
    "dry_allowed_length": st.integers(1, 3),
    "dry_range": st.sampled_from([0, 1, 5, 12, 100]),
    "dry_breakers": st.sampled_from([(), (2,), (0, 3)]),
    "min_new_tokens": st.sampled_from([0, 8, 100]),
}
SAMPLINGS = st.builds(SamplingConfig, **FIELDS)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request, its history and its logits; ids of the history are few, so that they are repeated."""
    text = draw(st.lists(st.integers(0, 3), min_size=1, max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, 2, V).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits * 2) / 2  # several are equal
    words = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=3)
    return {
        "logits": logits,
        "text": text,
        "n_prompt": draw(st.integers(0, len(text))),
        "sampling": draw(SAMPLINGS),
        "ends": draw(st.lists(st.integers(0, V - 9), max_size=3)),
        "bias": draw(st.dictionaries(st.integers(0, V - 9), st.sampled_from([-1.5, 2.0, 100.0]), max_size=4)),
        "banned": draw(words),
        "allowed": draw(st.none() | st.just(rng.random(V) < 0.7)),
        "tokens": draw(st.sampled_from([V, V - 8])),
    }


def row_of(request: dict[str, Any], **more: Any) -> Settings:
    row = settings_row(
        request["sampling"],
        vocab=V,
        tokens=request["tokens"],
        ends=request["ends"],
        logit_bias=request["bias"],
        banned=request["banned"],
        **more,
    )
    return row if request["allowed"] is None else row._replace(allowed=packed(request["allowed"]))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(requests(), min_size=1, max_size=4))
def test_every_mix_of_rules_is_its_formula(batch: list[dict[str, Any]]) -> None:
    got = outcome(
        np.stack([one["logits"] for one in batch]),
        [row_of(one) for one in batch],
        [one["text"] for one in batch],
        [one["n_prompt"] for one in batch],
    )
    for x, one in zip(got.logits, batch, strict=True):
        want = edited_by_formula(**one)
        try:
            want = truncated_by_formula(want, one["sampling"]) if np.isfinite(want).any() else want
        except Unsure:
            continue
        if np.isfinite(want).any():
            same_distribution(x, want)
        else:
            assert not np.isfinite(x).any()


def test_dry_takes_what_it_says() -> None:
    """As the pull request explains it: after "a b c ... a b", c would go on with two repeated tokens."""
    more = SamplingConfig(temperature=0, dry_multiplier=2.0, dry_base=3.0)
    cases: list[tuple[list[int], dict[str, Any], dict[int, float]]] = [
        ([1, 2, 3, 9, 1, 2], {}, {3: 2.0}),
        ([1, 2, 3, 4, 9, 1, 2, 3], {}, {4: 6.0}),
        ([1, 2, 3, 4, 9, 1, 2, 3], {"dry_breakers": (2,)}, {}),
        ([1, 2, 3, 4, 9, 1, 2, 3], {"dry_breakers": (4,)}, {}),
        ([1, 2, 3, 4, 9, 1, 2, 3], {"dry_range": 5}, {}),
        ([1, 2, 3, 4, 9, 1, 2, 3], {"dry_range": 7}, {4: 2.0}),
        ([7] * M, {"dry_base": 1000.0}, {7: 1e30}),
    ]
    want = np.zeros((len(cases), V))
    for row, (_, _, penalties) in zip(want, cases, strict=True):
        row[list(penalties)] = [-value for value in penalties.values()]
    rows = [settings_row(dataclasses.replace(more, **changes), vocab=V) for _, changes, _ in cases]
    got = outcome(np.zeros(want.shape, np.float32), rows, [text for text, _, _ in cases], [0] * len(cases))
    np.testing.assert_allclose(got.logits, want, rtol=1e-6)


def test_nothing_is_repeated_from_before_the_text() -> None:
    """What stands at the end of a full history is not before its beginning."""
    text = [1, 7, *range(8, 8 + M - 4), 1, 1]
    row = settings_row(SamplingConfig(temperature=0, no_repeat_ngram=3, dry_multiplier=1.0), vocab=V)
    assert not outcome(np.zeros((1, V), np.float32), [row], [text], [0]).logits.any()


def test_a_default_row_is_left_to_the_bit_whatever_others_ask() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (2, V)).astype(np.float32)
    logits[:, 4] = -0.0
    every = SamplingConfig(
        temperature=0.5, top_k=9, top_p=0.8, min_p=0.01, typical_p=0.9, repetition_penalty=1.2, presence_penalty=1.0,
        frequency_penalty=1.0, no_repeat_ngram=2, dry_multiplier=1.0, min_new_tokens=99,
    )  # fmt: skip
    rows = [settings_row(GREEDY, vocab=V), settings_row(every, vocab=V, ends=[1], logit_bias={3: 1.0}, banned=[(1, 2)])]
    got = outcome(logits, rows, [[1, 2, 1]] * 2, [1, 1])
    assert got.logits[0].tobytes() == logits[0].tobytes()


@pytest.mark.parametrize("sizes", [(R, 2), pytest.param((R, 2, 32), marks=pytest.mark.slow)])
def test_a_row_depends_on_itself_alone(sizes: tuple[int, ...]) -> None:
    """Bitwise, in batches of several sizes, beside rows that ask for everything and for nothing."""
    rng = np.random.default_rng(5)
    numbers = {"temperature": [0.0, 0.7, 1.3], "top_k": [0, 40], "top_p": [1.0, 0.9], "min_p": [0.0, 0.02],
               "typical_p": [1.0, 0.9], "repetition_penalty": [1.0, 1.2], "presence_penalty": [0.0, 0.5],
               "frequency_penalty": [0.0, 0.1], "no_repeat_ngram": [0, 3], "dry_multiplier": [0.0, 0.8]}  # fmt: skip
    rows = []
    for seed in range(32):
        sampling = SamplingConfig(**{key: rng.choice(some).item() for key, some in numbers.items()})
        more: dict[str, Any] = {"logit_bias": {5: 2.0}, "banned": [(6, 7)]} if seed % 3 else {}
        rows.append(settings_row(sampling, vocab=V, seed=seed, **more))
    logits = rng.normal(0, 3, (32, V)).astype(np.float32)
    texts = [rng.integers(0, 9, n).tolist() for n in rng.integers(1, M, 32)]
    everything = logits, stacked(rows), history_of(texts, [len(text) // 2 for text in texts])
    plain = stacked([settings_row(GREEDY, vocab=V)] * 32)

    alike: dict[int, list[bytes]] = {}
    before = _in_parts._cache_size()
    for size in sizes:
        order = rng.permutation(32)
        for start in range(0, 32, size):
            part = order[start : start + size]
            batch = jax.tree.map(lambda x, part=part: x[part], everything)
            batch = (*batch[:2], batch[2]._replace(slots=np.arange(size)))
            beside_plain = jax.tree.map(lambda x, y, size=size: np.concatenate([x[:1], y[1:size]]), batch[1], plain)
            together, apart = jax.device_get((_in_parts(*batch), _in_parts(batch[0], beside_plain, batch[2])))
            found = [(row, together, place) for place, row in enumerate(part)] + [(part[0], apart, 0)]
            for row, of, place in found:
                values = [x[place].tobytes() for x in jax.tree.leaves(of)]
                assert alike.setdefault(row, values) == values, (size, rows[row])
    assert _in_parts._cache_size() <= before + len(sizes)  # one program for each size, whatever is asked for


# Truncation


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    st.lists(st.sampled_from([-np.inf, -3.5, -1.0, -0.0, 0.0, 1e-40, 1e-30, 2.0, 3e38]), min_size=12, max_size=12),
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
    st.integers(1, 40),
)
def test_fewest_is_a_prefix_of_the_order(values: list[float], weights: list[int], mass: int) -> None:
    got = np.flatnonzero(np.asarray(_FEWEST(*(np.array([x], np.float32) for x in (values, weights, mass)))[0]))
    # XLA takes a denormal number for zero
    order = sorted(range(12), key=lambda i: (-(0.0 if abs(values[i]) < 1e-38 else values[i]), i))
    sums = np.cumsum([weights[i] for i in order])
    enough = int(np.argmax(sums >= mass)) + 1 if sums[-1] >= mass else 12
    assert got.tolist() == sorted(order[:enough])


_FEWEST = jax.jit(fewest)


def test_fewest_of_many_values() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    values[1] = np.round(values[1], 1)
    values[2] = 0.25
    kept = np.asarray(jax.jit(fewest)(values, np.ones_like(values), np.array([700.0, 700.0, 700.0], np.float32)))
    for row, got in zip(values, kept, strict=True):
        want = np.argsort(-row, kind="stable")[:700]
        np.testing.assert_array_equal(np.flatnonzero(got), np.sort(want))


# Drawing


def test_draws_have_the_distribution() -> None:
    configs = [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=1.5, top_k=8, top_p=0.8),
        SamplingConfig(top_p=1e-6),
        SamplingConfig(temperature=2.0, min_p=0.1),
        SamplingConfig(typical_p=0.6),
    ]
    some, draws = np.random.default_rng(1).normal(0, 1.5, 20).astype(np.float32), 1600
    logits = np.tile(np.concatenate([some, np.full(V - 20, 9.0, np.float32)]), (R, 1))
    for config in configs:
        row = settings_row(config, vocab=V, tokens=20, seed=11)
        rows, history = stacked([row] * R), history_of([[1]] * R, [1] * R)
        places = np.arange(draws, dtype=np.int32).reshape(-1, R)
        got = np.concatenate([_choose(logits, rows, history._replace(length=eight)).tokens for eight in places])
        counts = np.bincount(got, minlength=20)
        want = softmax(truncated_by_formula(some.astype(np.float64), config))
        assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(want))
        likely = want * draws >= 5
        chi_squared = np.sum((counts[likely] - want[likely] * draws) ** 2 / (want[likely] * draws))
        freedom = max(1, likely.sum() - 1)
        assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations; the seed is fixed


def test_noise_is_gumbel_and_of_the_id_alone() -> None:
    seeds, positions = np.arange(8, dtype=np.uint32), np.full(8, 3, np.int32)
    of = jax.jit(noise, static_argnums=2)
    got, later = np.asarray(of(seeds, positions, 5000)), np.asarray(of(seeds, positions + 1, 5000))
    np.testing.assert_array_equal(of(seeds, positions, 1500), got[:, :1500])
    n = got.size
    gaps = np.sort(np.exp(-np.exp(-got.astype(np.float64).ravel()))) - (np.arange(n) + 0.5) / n
    assert abs(gaps).max() < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov: one of a thousand is larger
    for a, b in ((got, later), (got[:-1], got[1:]), (got[:, 1:], got[:, :-1]), (got[:, 512:], got[:, :-512])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(n - 512 * 8)
    assert (got[0] != got[1]).all() and np.isfinite(got).all()


def test_greedy_and_the_cold_limit_take_the_likeliest_of_lowest_id() -> None:
    logits = np.random.default_rng(2).normal(size=(R, V)).astype(np.float32)
    logits[0] = 0.5
    logits[1, [4, 9]] = 7.0
    for sampling in (GREEDY, SamplingConfig(temperature=0, top_k=3, typical_p=0.01, top_p=0.1)):
        got = outcome(logits, [settings_row(sampling, vocab=V)] * R, [[1]] * R, [1] * R)
        np.testing.assert_array_equal(got.tokens, np.argmax(logits, -1))
    cold = settings_row(SamplingConfig(temperature=COLDEST / 1e30), vocab=V)
    got = outcome(logits[2:], [cold] * (R - 2), [[1]] * (R - 2), [1] * (R - 2))
    np.testing.assert_array_equal(got.tokens, np.argmax(logits[2:], -1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_says_so(temperature: float) -> None:
    row = settings_row(SamplingConfig(temperature=temperature, top_p=0.9, min_p=0.1), vocab=V)
    rows = stacked([row._replace(allowed=np.zeros_like(row.allowed)), *[row] * (R - 1)])
    logits = np.zeros((R, V), np.float32)
    logits[1, 3] = np.nan
    logits[2, 3] = np.inf
    got = _choose(logits, rows, history_of([[1]] * R, [1] * R)).tokens
    assert got[0] == got[1] == got[2] == -1 and (got[3:] >= 0).all()


def test_log_probabilities_are_the_models_own_or_those_of_the_draw() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (R, V)).astype(np.float32)
    sampling = SamplingConfig(temperature=0.5, top_k=30, repetition_penalty=1.5)
    asks: list[dict[str, Any]] = [{"logprobs": 5}, {"logprobs": 0, "processed_logprobs": True}, *[{}] * (R - 2)]
    rows = stacked([settings_row(sampling, vocab=V, **ask) for ask in asks])
    tokens, got = _choose(logits, rows, history_of([[1, 2, 3]] * R, [1] * R))
    for row in (0, 1):
        x = logits[row].astype(np.float64)
        if row == 1:
            x = truncated_by_formula(edited_by_formula(x, [1, 2, 3], 1, sampling), sampling)
        with np.errstate(divide="ignore"):
            want = np.log(softmax(x))
        best = np.argsort(-want, kind="stable")[:TOP]
        np.testing.assert_allclose(got.chosen[row], want[tokens[row]], atol=1e-5)
        np.testing.assert_array_equal(got.top_ids[row], best)
        np.testing.assert_allclose(got.top[row], want[best], atol=1e-5)


# Settings


def test_rows_are_taken_from_slots() -> None:
    slots, row = Settings.empty(4, V), settings_row(SamplingConfig(temperature=0.3), vocab=V, seed=7, ends=[3])
    for column, value in zip(slots, row, strict=True):
        column[2] = value
    got = jax.jit(take)(slots, np.array([2, 0, 2]))
    np.testing.assert_allclose(got.temperature, [0.3, 0, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(got.ends[:, 0], [3, -1, 3])
    assert all(x.dtype == y.dtype for x, y in zip(got, row, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ends": [V]}, f"ends: {V} is no id of the tokenizer; use ids in [0, {V})"),
        ({"tokens": 40, "logit_bias": {41: 1.0}}, "logit_bias: 41 is no id"),
        ({"logit_bias": {1: math.nan}}, "the bias of id 1 is nan"),
        ({"banned": [[1], []]}, "has no ids"),
        ({"banned": [[-1]]}, "banned: -1 is no id"),
        ({"banned": [[1, 2]] * (MAX_WORDS + 1)}, f"use at most {MAX_WORDS}"),
        ({"banned": [[1] * (MAX_WORD + 1)]}, f"use at most {MAX_WORD}"),
        ({"ends": list(range(50))}, "ends: 50 ids; use at most"),
        ({"vocab": 1000, "logit_bias": dict.fromkeys(range(MAX_EDITS + 1), 1.0)}, f"use at most {MAX_EDITS}"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        settings_row(SamplingConfig(), **({"vocab": V} | arguments))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"min_p": 1.1}, {"typical_p": 0.0}, {"repetition_penalty": 0.0}, {"no_repeat_ngram": -1}, {"dry_base": 0.5},
        {"dry_allowed_length": 0}, {"dry_breakers": (-1,)}, {"min_new_tokens": -1}, {"presence_penalty": math.inf},
    ],
)  # fmt: skip
def test_sampling_config_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        SamplingConfig(**values)
