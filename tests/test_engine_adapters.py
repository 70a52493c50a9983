"""Several adapters on one engine: each request as if its adapter were the only one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from helpers import initial_parameters, latent_model, whole_logits, with_attention
from run_folder import BYTE_MODEL
from test_engine import finish, loaded, outcome

from maxlm.config import AdaLora, Adapter, AdapterKind, Bottleneck, EngineConfig, Ia3, Lora, ModelConfig, UserError
from maxlm.inference.engine import Engine
from maxlm.inference.mixed_adapters import LoadedAdapter, check_adapter
from maxlm.inference.request import BadRequest, Request
from maxlm.shapes import PREFIX

pytestmark = pytest.mark.usefixtures("programs_kept")

KINDS = {
    "small": Lora(rank=1),
    "wide": Lora(rank=3, alpha=6, rank_stabilized=True, targets=("all-linear",)),
    "dora": Lora(rank=2, dora=True, targets=("o_proj", "q_proj", "mlp/down_proj")),
    "ia3": Ia3(),
    "ada": AdaLora(),
}
MODEL = with_attention(BYTE_MODEL, qkv_bias=True)
PROMPT = tuple(range(7, 20))


def on(model: ModelConfig, kind: AdapterKind) -> ModelConfig:
    return dataclasses.replace(model, adapter=Adapter(kind=kind))


def grown(model: ModelConfig, base: Any, seed: int) -> Any:
    """Parameters with an adapter that has learned something."""
    parameters, rng = initial_parameters(model, seed=1), np.random.default_rng(seed)
    moved = lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return {**base, PREFIX: jax.tree.map(moved, parameters[PREFIX])}


@pytest.fixture(scope="module")
def models() -> dict[str | None, tuple[ModelConfig, Any]]:
    """By the name of the adapter; all on one base."""
    rng, base = np.random.default_rng(9), initial_parameters(MODEL, seed=1)
    is_bias = lambda path: path[-1].key.endswith("_bias")
    shifted = lambda path, x: rng.standard_normal(x.shape).astype(np.float32) if is_bias(path) else x
    base = jax.tree_util.tree_map_with_path(shifted, base)
    found: dict[str | None, tuple[ModelConfig, Any]] = {None: (MODEL, base)}
    for seed, (name, kind) in enumerate(KINDS.items()):
        found[name] = on(MODEL, kind), grown(on(MODEL, kind), found[None][1], seed)
    return found


@pytest.fixture(scope="module")
def engine(models: dict[str | None, tuple[ModelConfig, Any]]) -> Iterator[Engine]:
    run = dataclasses.replace(loaded(MODEL), parameters=models[None][1])
    adapters = {name: LoadedAdapter(*pair) for name, pair in models.items() if name}
    adapters = {name: one._replace(parameters=one.parameters[PREFIX]) for name, one in adapters.items()}
    return Engine(run, EngineConfig(slots=4, tokens_per_step=8, block_size=4, decode_steps=2), adapters=adapters)


def request(name: str | None) -> Request:
    return Request(prompt=PROMPT, max_new_tokens=4, logprobs=5, prompt_logprobs=5, adapter=name, seed=5)


def test_each_request_has_the_logits_of_its_adapter_alone(
    engine: Engine, models: dict[str | None, tuple[ModelConfig, Any]]
) -> None:
    """In float32, of one forward pass with that adapter, within 2e-5 of log-probabilities; beside others to the bit."""
    names = list(models)
    mixed = dict(zip(names, finish(engine, [request(name) for name in names]), strict=True))
    firsts = set()
    for name, (model, parameters) in models.items():
        tokens = [*PROMPT, *(token for delta in mixed[name] for token in delta.tokens)]
        [logits] = whole_logits(model, parameters, [tokens])
        wanted = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), -1, keepdims=True)
        scores = [*mixed[name][0].prompt_scores, *(score for delta in mixed[name] for score in delta.scores)]
        assert len(scores) == len(tokens) - 1
        for place, score in enumerate(scores):
            for token, log_prob in ((score.token, score.logprob), *score.top):
                assert log_prob == pytest.approx(wanted[place, token], abs=2e-5)
        firsts.add(scores[-1].logprob)
        [alone] = finish(engine, [request(name)])
        assert outcome(alone) == outcome(mixed[name])
    assert len(firsts) == len(names), "the adapters make a difference"


def test_two_ranks_answer_at_once_as_the_sums_that_they_stand_for(
    engine: Engine, models: dict[str | None, tuple[ModelConfig, Any]]
) -> None:
    """Of ranks 1 and 3 in one batch: W + alpha / r A B, and with a stabilised rank W + alpha / sqrt(r) A B, put
    together in float64 and asked as models of their own."""
    ranks_and_scales = {"small": (1, 16.0), "wide": (3, 6 / 3**0.5)}
    names = ["small", "wide", "small", "wide"]
    mixed = finish(engine, [request(name) for name in names])
    for name, deltas in zip(names, mixed, strict=True):
        _, parameters = models[name]
        whole = dict(parameters)
        added = whole.pop(PREFIX)

        def summed(weight: Any, factors: Any, rank: int, scale: float) -> Any:
            if isinstance(weight, dict):
                return weight | {key: summed(weight[key], one, rank, scale) for key, one in factors.items()}
            a, b = (np.asarray(factors[of], np.float64) for of in "ab")  # of all layers
            product = a.reshape(len(a), -1, rank) @ b.reshape(len(b), rank, -1)
            return np.float32(np.asarray(weight, np.float64) + scale * product.reshape(weight.shape))

        tokens = [*PROMPT, *(token for delta in deltas for token in delta.tokens)]
        [logits] = whole_logits(MODEL, summed(whole, added, *ranks_and_scales[name]), [tokens])
        wanted = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), -1, keepdims=True)
        scores = [*deltas[0].prompt_scores, *(score for delta in deltas for score in delta.scores)]
        assert len(scores) == len(tokens) - 1
        for place, score in enumerate(scores):
            assert score.logprob == pytest.approx(wanted[place, score.token], abs=2e-5)


def test_the_cache_keeps_adapters_apart(engine: Engine) -> None:
    """The same prompt, once with each adapter, finds its own beginning alone."""
    cached = []
    for name in ("small", "wide", "small", None, "wide", None):
        [deltas] = finish(
            engine, [dataclasses.replace(request(name), prompt_logprobs=None, prompt=tuple(range(90, 103)))]
        )
        cached.append(deltas[0].cached_tokens)
    assert cached == [0, 0, 12, 0, 12, 12]


def test_what_is_not_here_is_told(engine: Engine) -> None:
    with pytest.raises(BadRequest, match=r"adapter = 'other' is not here; use small or wide or dora or ia3 or ada"):
        engine.submit(request("other"))


@pytest.mark.parametrize(
    ("model", "change", "match"),
    [
        (BYTE_MODEL, {"kind": Bottleneck()}, "it is a Bottleneck"),
        (BYTE_MODEL, {"full": ("unembed",)}, "it has trained unembed as a whole"),
        (
            dataclasses.replace(BYTE_MODEL, d_model=64),
            {},
            r"q_proj \[2, 32, 4, 8\], of which this model has \[2, 64, 4, 8\]",
        ),
        (latent_model(BYTE_MODEL), {"kind": Lora(targets=("v_proj",))}, "decoding with latents"),
    ],
    ids=["kind", "full", "sizes", "latents"],
)
def test_adapters_that_do_not_fit(model: ModelConfig, change: dict[str, Any], match: str) -> None:
    source = model if "latents" in match else BYTE_MODEL
    adapter = dataclasses.replace(Adapter(kind=Lora()), **change)
    with pytest.raises(UserError, match=match):
        check_adapter("mine", LoadedAdapter(dataclasses.replace(source, adapter=adapter), {}), model)
