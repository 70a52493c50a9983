"""Contrastive search against the paper's formula on transformers' states, and the states that the engine tells."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers import plainly, run_decoder
from test_beam import GREEDY, HELLO, generator, run

from maxlm.config import ContrastiveConfig, SamplingConfig, UserError
from maxlm.inference.contrastive import contrastive_search
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request
from maxlm.models import Tokens

pytestmark = pytest.mark.usefixtures("programs_kept")
__all__ = ["generator", "run"]  # fixtures

ASKED = Request(prompt=HELLO, max_new_tokens=10, sampling=GREEDY)


def search(generator: Generator, asked: list[Request], k: int, alpha: float) -> list[tuple[int, ...]]:
    answer = lambda some: [[*text.prompt_scores, *text.scores] for text in generator.texts(some)]
    return contrastive_search(answer, asked, ContrastiveConfig(contrastive_k=k, contrastive_alpha=alpha))


@pytest.mark.parametrize(
    ("k", "alpha", "ends", "expected"),
    [
        (4, 0.6, (), (58, 193, 106, 250, 39, 182, 207, 87, 124, 250)),
        (4, 0.6, (182,), (58, 193, 106, 250, 39, 182)),
        (8, 0.3, (), (53, 146, 184, 51, 29, 43, 124, 23, 168, 39)),
        (20, 0.9, (), (53, 106, 159, 201, 217, 142, 198, 80, 256, 97)),
        (5, 0.0, (), (73, 47, 208, 25, 53, 101, 58, 73, 16, 72)),
    ],
)
def test_texts_are_those_of_the_formula(
    generator: Generator, k: int, alpha: float, ends: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Equation 5 in float64 on `logits` and `hidden_states[-1]` of `published.write_model(LLAMA)` by transformers 5.24,
    whose own contrastive search has left it. No choice is nearer than 0.0007 to the next best."""
    asked = dataclasses.replace(ASKED, ends=ends)
    other = dataclasses.replace(asked, prompt=(1, 2), max_new_tokens=4)
    assert search(generator, [other, asked], k, alpha)[1] == expected


def test_rules_hold_and_without_a_penalty_it_is_greedy(generator: Generator) -> None:
    for rules in ({"repetition_penalty": 1.4}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}):
        asked = dataclasses.replace(ASKED, sampling=dataclasses.replace(GREEDY, **rules), banned=((58,), (73, 47)))
        [greedy] = generator.answer([asked])
        assert search(generator, [asked], 3, 0.0) == [tuple(greedy.tokens)]


def test_states_are_those_of_the_forward_pass(run: LoadedRun, generator: Generator) -> None:
    """Of the prompt's tokens, and of new ones, whatever the cache holds."""
    asked = dataclasses.replace(ASKED, logprobs=0, states=True)
    [whole] = generator.texts([dataclasses.replace(asked, prompt_logprobs=0)])
    [again] = generator.texts([asked])
    ids = np.asarray([[*HELLO, *whole.generation.tokens]], np.int32)
    tokens = Tokens(np.arange(ids.shape[1], dtype=np.int32)[None])
    want = np.asarray(run_decoder(run.config.model, run.parameters, plainly(), ids, tokens).hidden)[0]
    states = [score.state for score in (*whole.prompt_scores, *whole.scores)]
    np.testing.assert_allclose(np.stack(states), want[:-1], atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        np.stack([one.state for one in again.scores]),  # type: ignore[misc]
        np.stack([one.state for one in whole.scores]),  # type: ignore[misc]
    )
    [without] = generator.texts([dataclasses.replace(ASKED, logprobs=0)])
    assert without.scores[0].state is None


def test_the_generator(generator: Generator) -> None:
    contrastive = ContrastiveConfig(contrastive_k=4)
    found = generator.contrast(["Hello ", "a"], max_new_tokens=10, contrastive=contrastive)
    asked = Request(prompt=(256, *HELLO), max_new_tokens=10, sampling=GREEDY, ends=(257,))  # with the bos of `Bytes`
    assert [tuple(found[0].tokens)] == search(generator, [asked], 4, 0.6)
    assert found[0].text == generator.engine.tokenizer.decode(found[0].tokens) and found[0].tokens_per_s is None
    for new, config, sampling, message in (
        (25, contrastive, {}, "max_new_tokens = 25 with contrastive search, .*max_seq_len = 32; use at most 24"),
        (4, ContrastiveConfig(), {}, "contrastive_k = 0 searches nothing"),
        (4, contrastive, {"top_p": 0.5}, "top_p = 0.5 with contrastive search: nothing is drawn"),
    ):
        with pytest.raises(UserError, match=message):
            generator.contrast(["Hello "], max_new_tokens=new, contrastive=config, sampling=SamplingConfig(**sampling))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"contrastive_k": 21}, r"contrastive_k = 21 must be in \[0, 20\]"),
        ({"contrastive_k": 4, "contrastive_alpha": 1.5}, r"contrastive_alpha = 1.5 must be in \[0, 1\]"),
        ({"contrastive_alpha": 0.5}, "contrastive_alpha = 0.5 is of a search, and contrastive_k = 0"),
    ],
)
def test_mistakes(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ContrastiveConfig(**config)
