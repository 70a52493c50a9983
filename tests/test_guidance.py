"""Classifier-free guidance against transformers and against the forward pass. (Schedules: test_engine.py.)"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers import whole_logits
from test_beam import GREEDY, HELLO, generator, run

from maxlm.config import BeamConfig, GuidanceConfig, SamplingConfig, UserError
from maxlm.inference.beam import beam_search
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request

pytestmark = pytest.mark.usefixtures("programs_kept")
__all__ = ["generator", "run"]  # fixtures

BYE = tuple(b"Good bye")
ASKED = Request(prompt=HELLO, max_new_tokens=10, sampling=GREEDY)


@pytest.mark.parametrize(
    ("scale", "negative", "rules", "expected"),
    [
        (1.5, (), {}, (212, 136, 212, 136, 16, 32, 212, 212, 136, 136)),
        (3.0, BYE, {}, (257, 216, 53, 101, 54, 170, 47, 136, 129, 47)),
        (0.0, BYE, {}, (148, 16, 198, 40, 33, 184, 184, 30, 182, 198)),
        (2.0, BYE, {"no_repeat_ngram": 1}, (257, 136, 212, 153, 43, 42, 47, 216, 215, 51)),
    ],
)
def test_texts_are_those_of_transformers(
    generator: Generator, scale: float, negative: tuple[int, ...], rules: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """transformers 5.24: `generate(HELLO, guidance_scale=scale, negative_prompt_ids=negative, max_new_tokens=10,
    do_sample=False, eos_token_id=None)` of `published.write_model(LLAMA)`, the last with `no_repeat_ngram_size=1`.
    A scale of 0 continues the negative prompt; transformers' own default is the prompt's last token, as here."""
    sampling = dataclasses.replace(GREEDY, **rules)
    asked = dataclasses.replace(ASKED, guidance_scale=scale, negative_prompt=negative, sampling=sampling)
    plain = dataclasses.replace(ASKED, sampling=SamplingConfig(temperature=0.8), seed=4)
    assert tuple(generator.answer([plain, asked, plain])[1].tokens) == expected


def test_probabilities_are_those_of_the_formula(run: LoadedRun, generator: Generator) -> None:
    """In float64 on the logits of the forward pass, of drawn tokens; those of the prompt are without guidance."""
    scale = 1.75
    asked = dataclasses.replace(
        ASKED,
        sampling=SamplingConfig(temperature=0.9),
        seed=5,
        guidance_scale=scale,
        negative_prompt=BYE,
        logprobs=3,
        prompt_logprobs=0,
    )
    [text] = generator.texts([asked])
    new = text.generation.tokens
    both = whole_logits(run.config.model, run.parameters, [(*HELLO, *new), (*BYE, *new)])
    p, n = (logits.astype(np.float64) for logits in both)
    log_softmax = lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
    p, n = log_softmax(p), log_softmax(n)[len(BYE) - 1 : -1]
    of_prompt = [p[i, token] for i, token in enumerate(HELLO[1:])]
    np.testing.assert_allclose([one.logprob for one in text.prompt_scores], of_prompt, atol=2e-5)
    guided = log_softmax(n + scale * (p[len(HELLO) - 1 : -1] - n))
    np.testing.assert_allclose([one.logprob for one in text.scores], guided[np.arange(10), new], atol=5e-5)
    for one, row in zip(text.scores, guided, strict=True):
        assert [i for i, _ in one.top] == np.argsort(-row)[:3].tolist()


def test_a_scale_of_one_is_without_and_the_cache_holds_both_prompts(generator: Generator) -> None:
    plain = generator.answer([ASKED])[0].tokens
    assert generator.answer([dataclasses.replace(ASKED, guidance_scale=1.0, negative_prompt=BYE)])[0].tokens == plain
    before = generator.engine.stats
    asked = dataclasses.replace(ASKED, guidance_scale=2.0, negative_prompt=tuple(range(9)))
    first, again = generator.answer([asked]), generator.answer([asked])
    assert first[0].tokens == again[0].tokens
    after = generator.engine.stats
    assert after.cached_tokens - before.cached_tokens >= 4 + 8  # whole blocks of 4 of both
    assert after.generated_tokens - before.generated_tokens == 20 and after.free_blocks == after.blocks


def test_the_generator_and_a_stream(generator: Generator) -> None:
    guidance = GuidanceConfig(guidance_scale=2.0, negative_prompt="bad")
    ask: dict[str, Any] = {"max_new_tokens": 8, "guidance": guidance, "seed": 3}
    one, two = generator.generate(["Hello ", "a"], **ask)
    stream = generator.stream("Hello ", **ask)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            assert end.value.tokens == one.tokens
            break
    asked = Request(
        prompt=(256, *HELLO), max_new_tokens=8, seed=3, ends=(257,), guidance_scale=2.0, negative_prompt=(256, *b"bad")
    )
    assert generator.answer([asked])[0].tokens == one.tokens and two.tokens


def test_mistakes(run: LoadedRun, generator: Generator) -> None:
    with pytest.raises(UserError, match="negative_prompt is of guidance, and guidance_scale = 1"):
        GuidanceConfig(negative_prompt="x")
    guidance = GuidanceConfig(guidance_scale=2.0)
    with pytest.raises(UserError, match=r"guidance_scale = 2\.0 does not go with beams; leave it out"):
        generator.generate(["a"], max_new_tokens=2, guidance=guidance, beams=BeamConfig(beams=2))
    with pytest.raises(UserError, match=r"guidance_scale = 2\.0 does not go with beams"):
        beam_search(lambda asked: [], [dataclasses.replace(ASKED, guidance_scale=2.0)], BeamConfig(beams=2))
