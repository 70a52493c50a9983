"""Published models beyond plain logits: what transformers said of padding, of the next tokens, and of gradients."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import published
import pytest
from helpers import loss_function, one_device, plainly, small_run, through_cache
from published import SHORT, T

from maxlm.config import Experts, ModelConfig, TopKRouter
from maxlm.hub.families import FAMILIES
from maxlm.hub.models import load_model, pieces_of
from maxlm.hub.names import tensors
from maxlm.inference.language_model import LanguageModel


def quick(names: Collection[str]) -> pytest.MarkDecorator:
    """Every model, but the others among the nightly tests."""
    marks = lambda name: [] if name in names else [pytest.mark.nightly]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in published.MODELS])


FIRST_OF_A_FAMILY = {config["model_type"]: name for name, config in reversed(published.MODELS.items())}.values()
DECODED_IN_THEIR_OWN_WAY = ("mistral", "mixtral", "phi3", "gemma2", "gpt2", "bloom", "deepseek_v3")
ARRANGED_IN_THEIR_OWN_WAY = (
    "llama", "qwen3_moe", "phi3", "olmo2", "cohere", "glm", "gemma", "gpt2", "gpt_neox", "falcon", "opt", "bloom",
    "deepseek_v3",
)  # fmt: skip


@functools.cache
def loaded(name: str) -> LanguageModel:
    with tempfile.TemporaryDirectory() as folder:
        published.write_model(published.MODELS[name], Path(folder))
        return load_model(folder)[0]


@quick(FIRST_OF_A_FAMILY)
def test_padding_on_either_side_and_packing_change_nothing(name: str) -> None:
    """All in one call, which is one program. transformers pads on the left."""
    model, (first, second), pad = loaded(name), published.ids(), T
    row = np.arange(T + SHORT)
    zeros = lambda n: np.zeros(n, int)
    places = {
        "right": (np.append(second[:SHORT], zeros(pad)), row * 0 + 1, row),
        "left": (np.append(zeros(pad), second[:SHORT]), row >= pad, np.maximum(row - pad, 0)),
        "packed": (np.append(first, second[:SHORT]), 1 + (row >= T), np.where(row < T, row, row - T)),
        "alone": (np.append(first, zeros(SHORT)), row * 0 + 1, row),
    }
    tokens, segments, positions = (np.stack(arrays).astype(int) for arrays in zip(*places.values(), strict=True))
    right, left, packed, alone = np.asarray(model(tokens, segments, positions))
    want = published.depth(name).padded
    for found, meant in ((right[:SHORT], want), (left[pad:], want), (packed[T:], want), (packed[:T], alone[:T])):
        np.testing.assert_allclose(found, meant, rtol=0, atol=5e-6 * abs(meant).max())


@quick(DECODED_IN_THEIR_OWN_WAY)
def test_the_likeliest_tokens_are_those_of_transformers(name: str) -> None:
    """Each is the likeliest after all before it, read through a cache; the prompts have two lengths."""
    model, lengths, told = loaded(name), (T, SHORT), published.depth(name).continuations
    prompts = [ids[:length] for ids, length in zip(published.ids(), lengths, strict=True)]
    texts = [[*prompt, *more[:-1]] for prompt, more in zip(prompts, told, strict=True)]
    found = through_cache(model.config, model.parameters, plainly(), texts, widths=[5])
    for logits, length, more in zip(found, lengths, told, strict=True):
        np.testing.assert_array_equal(logits[length - 1 :].argmax(-1), more)


def without_balance(model: ModelConfig) -> ModelConfig:
    """The same, with the loss of its tokens alone."""

    def plain(mlp: Any) -> Any:
        match mlp:
            case Experts(router=TopKRouter() as router):
                return dataclasses.replace(mlp, router=dataclasses.replace(router, load_balance=0.0))
            case _:
                return mlp

    return dataclasses.replace(
        model, blocks=tuple(dataclasses.replace(block, mlp=plain(block.mlp)) for block in model.blocks)
    )


@quick(ARRANGED_IN_THEIR_OWN_WAY)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    """Of training: the gradient of each tensor, under its published name."""
    model = without_balance(loaded(name).config)
    run = small_run(model, batch_size=2, seq_len=T - 1)
    ids, row = published.ids().astype(np.int32), np.arange(T - 1)
    counts = row < np.array([T - 1, SHORT - 1])[:, None]
    batch = {
        "inputs": np.where(row < np.array([T, SHORT])[:, None], ids[:, :-1], 0),
        "targets": ids[:, 1:],
        "segment_ids": np.ones_like(ids[:, 1:]),
        "positions": np.tile(row, (2, 1)).astype(np.int32),
        "loss_mask": counts.astype(np.float32),
    }
    loss = loss_function(run, one_device())
    mean = lambda parameters, batch: loss(parameters, batch).objective / counts.sum()
    found, gradient = jax.jit(jax.value_and_grad(mean))(loaded(name).parameters, batch)
    want = published.depth(name)
    assert found == pytest.approx(float(want.loss), rel=1e-5)

    family, pieces = FAMILIES[published.MODELS[name]["model_type"]], pieces_of(jax.tree.map(np.asarray, gradient))
    listed = sorted(tensors(model, family.names_of(model)), key=lambda tensor: tensor.name)
    whole = np.linalg.norm(want.gradients[:, 2])
    for tensor, (*sums, length) in zip(listed, want.gradients, strict=True):
        got = published.sketch(tensor.name, tensor.join(pieces(tensor.parts)))
        # Some are nothing but rounding: a bias of keys moves all scores of a query alike.
        np.testing.assert_allclose(got, [*sums, length], rtol=0, atol=1e-4 * length + 1e-6 * whole, err_msg=tensor.name)
