"""Drafts change how many tokens a step gives, and never which: a text is the same to the bit, whatever is guessed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from helpers import whole_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import BYTE_MODEL, parameters_of
from test_engine import SHARED, SMALL, finish, fresh, loaded, outcome, requests, wide_model

from maxlm.config import DraftModel, PromptLookup, SamplingConfig, Speculation, UserError
from maxlm.config.speculation import speculation
from maxlm.data.tokenizers import Bytes
from maxlm.inference.drafting import Continuing, Drafter, Followed, drafter_of, require_same_tokens
from maxlm.inference.engine import Engine
from maxlm.inference.request import Delta, Finish, Request
from maxlm.inference.scheduler import Sequence
from maxlm.inference.structured import Regex

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingConfig(temperature=0)
END = 257
Texts = dict[tuple[int, ...], tuple[int, ...]]
"""Prompt -> what follows it."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(loaded(wide_model()), dataclasses.replace(SMALL, speculation=PromptLookup(drafts=5)))


class Silent:
    """No drafts."""

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        return [[] for _ in asked]


class Knowing:
    """The text's own next tokens, each of which is replaced by another id with a probability."""

    def __init__(self, texts: Texts, wrong: float = 0.0, by: int | None = None) -> None:
        """
        Args:
            texts: all that are asked for.
            wrong: the probability.
            by: the other id; None: any.
        """
        self.texts, self.wrong, self.by, self.rng = texts, wrong, by, np.random.default_rng(0)

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        return [self.of(sequence, most) for sequence, most in asked]

    def of(self, sequence: Sequence, most: int) -> list[int]:
        follows = (*self.texts.get(sequence.request.prompt, ()), *[END] * most)
        others = self.rng.integers(0, 258, most) if self.by is None else [self.by] * most
        wrong = self.rng.random(most) < self.wrong
        right = follows[sequence.generated :][:most]
        return [int(other if bad else token) for token, other, bad in zip(right, others, wrong, strict=False)]


def plain(engine: Engine, request: Request) -> tuple[object, ...]:
    """Without drafts, alone, with nothing in the cache."""
    own, engine._drafter = engine._drafter, Silent()
    found = fresh(engine, request)
    engine._drafter = own
    return found


def with_drafts(engine: Engine, drafter: Drafter, asked: list[Request]) -> list[list[Delta]]:
    own, engine._drafter = engine._drafter, drafter
    found = finish(engine, asked)
    engine._drafter = own
    return found


def counts(engine: Engine) -> np.ndarray:
    """Steps, drafts, those that came true."""
    stats = engine.stats
    return np.array([stats.steps, stats.drafted_tokens, stats.accepted_tokens])


@settings(max_examples=10, deadline=None)
@given(
    asked=st.lists(requests, min_size=1, max_size=5, unique_by=lambda request: request.prompt),
    wrong=st.sampled_from([0.0, 0.2, 1.0]),
    by=st.sampled_from([None, END, 0]),
)
def test_a_text_is_the_same_to_the_bit_whatever_is_guessed(
    engine: Engine, asked: list[Request], wrong: float, by: int | None
) -> None:
    """Tokens, log-probabilities, end; several texts in few blocks."""
    want = [plain(engine, request) for request in asked]
    texts = {request.prompt: tokens for request, (tokens, *_) in zip(asked, want, strict=True)}
    assert [outcome(deltas) for deltas in with_drafts(engine, Knowing(texts, wrong, by), asked)] == want
    assert [outcome(deltas) for deltas in finish(engine, asked)] == want
    assert engine.stats.free_blocks == engine.stats.blocks


SETTINGS = [
    {"sampling": SamplingConfig(repetition_penalty=1.5, frequency_penalty=0.7, temperature=0.6)},
    {"sampling": SamplingConfig(presence_penalty=1.0, typical_p=0.8)},
    {"sampling": SamplingConfig(dry_multiplier=2.0, dry_allowed_length=1, temperature=0)},
    {"sampling": SamplingConfig(no_repeat_ngram=2, top_k=5, min_p=0.05), "processed_logprobs": True},
    {"sampling": SamplingConfig(min_new_tokens=9, top_p=0.7), "logit_bias": {END: 9.0}},
    {"sampling": SamplingConfig(temperature=0.0), "banned": ((40, 41), (9,)), "logit_bias": {40: 5.0, 41: 5.0}},
]


def test_every_rule_sees_the_drafts_before_a_row(engine: Engine) -> None:
    """What a rule says of a token depends on all before it, of which the last ones are guesses in the same step."""
    asked = [
        Request(prompt=SHARED[n : n + 6], max_new_tokens=17, ends=(END,), logprobs=2, seed=n, **rule)  # type: ignore[arg-type]
        for n, rule in enumerate(SETTINGS)
    ]
    want = [plain(engine, request) for request in asked]
    texts = {request.prompt: tokens for request, (tokens, *_) in zip(asked, want, strict=True)}
    for wrong in (0.0, 0.3):
        assert [outcome(with_drafts(engine, Knowing(texts, wrong), [one])[0]) for one in asked] == want


def test_a_text_ends_where_it_would_within_what_came_true(engine: Engine) -> None:
    """At an id, a string, or a length, with guesses that go on beyond it; counts and steps are those that must be."""
    ask = Request(prompt=SHARED[:5], max_new_tokens=13, sampling=GREEDY, logprobs=0)
    tokens, _, text, _ = plain(engine, dataclasses.replace(ask, max_new_tokens=30))
    drafter, before = Knowing({ask.prompt: tokens}), counts(engine)
    [deltas] = with_drafts(engine, drafter, [ask])
    assert outcome(deltas)[0] == tokens[:13] and deltas[-1].finish is Finish.LENGTH
    # 5 of the prompt's and 3 guesses; 1 and 5; 1 and 2, since the last token is drawn and not read.
    assert [len(delta.tokens) for delta in deltas] == [4, 6, 3]
    assert (counts(engine) - before).tolist() == [3, 3 + 5 + 2, 3 + 5 + 2]
    for change in ({"ends": (tokens[8],)}, {"stop": (text[7:10],)}, {"max_new_tokens": 1}):
        request = dataclasses.replace(ask, **change)  # type: ignore[arg-type]
        [deltas] = with_drafts(engine, drafter, [request])
        assert outcome(deltas)[2:] == plain(engine, request)[2:]
        if "stop" not in change:
            assert outcome(deltas) == plain(engine, request)
        assert len(deltas[-1].scores) == len(deltas[-1].tokens)


def test_a_grammar_has_no_drafts(engine: Engine) -> None:
    ask = Request(prompt=(65,), max_new_tokens=9, grammar=Regex("[0-9]{3}"), ends=(END,), logprobs=1)
    want, before = plain(engine, ask), counts(engine)
    assert outcome(with_drafts(engine, Knowing({ask.prompt: want[0]}), [ask])[0]) == want
    assert (counts(engine) - before)[1] == 0


ONE, OTHER = 10, 21
GUESSES: dict[str, Callable[[tuple[int, ...]], Iterable[int]]] = {
    "good": lambda tokens: tokens,
    "bad": lambda tokens: [ONE + OTHER - token for token in tokens],
    "as long as it is the first": lambda tokens: itertools.takewhile(lambda token: token == ONE, tokens),
}


class Seeded:
    """What a function makes of the text's next tokens: what is guessed may depend on what would be drawn."""

    def __init__(self, texts: list[tuple[int, ...]], guess: Callable[[tuple[int, ...]], Iterable[int]]) -> None:
        self.texts, self.guess = texts, guess

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        follows = [self.texts[sequence.request.seed][sequence.generated :][:most] for sequence, most in asked]
        return [list(self.guess(tokens)) for tokens in follows]


def test_what_is_drawn_has_the_models_distribution(engine: Engine) -> None:
    """Three tokens, each one of two: eight texts, over many seeds, against the forward pass."""
    run, n = loaded(wide_model()), 256
    likely = {ONE: 61.0, OTHER: 60.0}
    asked = [Request(prompt=SHARED[:4], max_new_tokens=3, seed=seed, logit_bias=likely) for seed in range(n)]
    texts = drawn(engine, Silent(), asked)
    rows = [[*SHARED[:4], *two] for two in itertools.product((ONE, OTHER), repeat=2)]
    want: dict[tuple[int, ...], float] = {}
    for row, logits in zip(rows, whole_logits(run.config.model, run.parameters, rows), strict=True):
        both = np.exp(np.asarray(logits, np.float64)[3:, [ONE, OTHER]] + list(likely.values()))
        p = both / both.sum(1, keepdims=True)
        places = [0 if token == ONE else 1 for token in row[4:]]
        for last, token in enumerate((ONE, OTHER)):
            want[(*row[4:], token)] = n * p[0, places[0]] * p[1, places[1]] * p[2, last]
    assert sum(want.values()) == pytest.approx(n) and min(want.values()) > 4
    for name, guess in GUESSES.items():
        before = counts(engine)
        found = drawn(engine, Seeded(texts, guess), asked)
        _, drafted, accepted = counts(engine) - before
        assert found == texts, name
        assert drafted and accepted == (0 if name == "bad" else drafted)
        seen = Counter(found)
        chi_squared = sum((seen[text] - m) ** 2 / m for text, m in want.items())
        assert sum(seen[text] for text in want) == n
        assert chi_squared < 7 + 5 * math.sqrt(2 * 7)  # five standard deviations; the seeds are fixed


def drawn(engine: Engine, drafter: Drafter, asked: list[Request]) -> list[tuple[int, ...]]:
    """The tokens of many texts."""
    parts = [asked[start : start + SMALL.queue] for start in range(0, len(asked), SMALL.queue)]
    return [outcome(deltas)[0] for part in parts for deltas in with_drafts(engine, drafter, part)]


def test_a_lookup_finds_what_followed_the_longest_run() -> None:
    def guess(tokens: list[int], most: int, *, shortest: int = 1, longest: int = 3) -> list[int]:
        whole = Followed(shortest, longest)
        found = whole.guess(tokens, most)
        grows = Followed(shortest, longest)
        assert [grows.guess(tokens[:n], most) for n in range(1, len(tokens) + 1)][-1] == found
        return found

    assert guess([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2) == [4, 9]  # three tokens before the newer two
    assert guess([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2, longest=2) == [5, 1]  # of equal ones the last
    assert guess([7, 1, 2, 3, 9, 3], 9) == [9, 3, 9, 3, 9, 3, 9, 3, 9]
    assert guess([7, 1, 2, 3, 9, 3], 9, shortest=2) == []
    assert guess([5], 4) == guess([5, 6], 4) == []
    assert guess([5, 5], 4) == [5, 5, 5, 5]


def test_a_draft_model_draws_with_the_same_noise() -> None:
    """So that a model that is its own draft model guesses every token; another one helps less and harms nothing."""
    run = loaded(BYTE_MODEL)
    config = dataclasses.replace(SMALL, slots=2, speculation=DraftModel(run="x", drafts=3))
    with pytest.raises(UserError, match=r"DraftModel\('x'\) needs that model"):
        drafter_of(config, run.config.model, run.tokenizer, None, Engine)
    engine = Engine(run, config, draft=run)
    asked = [
        Request(prompt=SHARED[n : 2 * n + 9], max_new_tokens=22 + n, sampling=sampling, seed=n, ends=(END,))
        for n, sampling in enumerate((GREEDY, SamplingConfig(), SamplingConfig(top_k=9, min_new_tokens=20), GREEDY))
    ]
    want = [plain(engine, request) for request in asked]
    before = counts(engine)
    assert [outcome(deltas) for deltas in finish(engine, asked)] == want
    steps, drafted, accepted = counts(engine) - before
    assert accepted == drafted > 0 and steps < sum(len(tokens) for tokens, *_ in want) / 2
    drafter = engine._drafter
    assert isinstance(drafter, Continuing)
    drafter._engine.update_weights(parameters_of(run.config, seed=4))
    before = counts(engine)
    assert [outcome(deltas) for deltas in finish(engine, asked)] == want
    assert (counts(engine) - before)[2] < drafted / 2


class Named(Bytes):
    """Ids with names."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names, self.vocab_size, self.fingerprint = names, len(names), names

    def name_of(self, token: int) -> str | None:
        return self.names[token]


def test_a_draft_model_has_the_same_tokens() -> None:
    require_same_tokens(Bytes(), Bytes(), "x")
    other = Named("abcd")
    other.fingerprint = "another file that says the same"
    require_same_tokens(Named("abcd"), other, "x")
    for names, words in (
        ("abxd", "engine.speculation.run = 'x': id 2 is 'x' there and 'c' of the model"),
        ("abc", "id 3 is a token without a name there and 'd' of the model"),
        ("abcde", "id 4 is 'e' there and a token without a name of the model"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            require_same_tokens(Named("abcd"), Named(names), "x")
    with pytest.raises(UserError, match="id 0 is 'a' there and a token without a name"):
        require_same_tokens(Bytes(), Named("abcd"), "x")


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("lookup", PromptLookup()),
        ("lookup:ngram=4,drafts=9", PromptLookup(ngram=4, drafts=9)),
        ("draft:run=a,b/c:d,drafts=3", DraftModel(run="a,b/c:d", drafts=3)),
        ("draft:run=7", DraftModel(run="7")),
        ("words", "'words' must be lookup or draft"),
        ("draft", "lacks run; write draft:run=..."),
        ("lookup:n=3", "'n=3' must be one of drafts=..., ngram=..., shortest=..."),
        ("lookup:drafts=many", "engine.speculation.drafts = 'many' must be a whole number"),
        ("lookup:drafts=65", "engine.speculation.drafts = 65 must be in [1, 64]"),
        ("lookup:ngram=2,shortest=3", "engine.speculation.shortest = 3 is more than engine.speculation.ngram = 2"),
    ],
)
def test_what_a_command_line_says(words: str, want: Speculation | str) -> None:
    if not isinstance(want, str):
        assert speculation(words) == want
        return
    with pytest.raises(UserError, match=re.escape(want)):
        speculation(words)
