"""Supervised fine-tuning: what counts, noise and weights of tokens, and a run from records to an answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import initial_parameters, one_device, packed_batch, plainly, run_decoder, small_run

from maxlm.config import (
    ByteTokenizer,
    Conversations,
    DataConfig,
    Dataset,
    Files,
    Gold,
    ObserveConfig,
    PrepareConfig,
    Pretrain,
    Purpose,
    RunConfig,
    Sft,
    ShardingConfig,
    UserError,
)
from maxlm.inference.load import load_run
from maxlm.models import Tokens, bind, ops
from maxlm.recipes import recipe
from maxlm.sharding import make_layout
from maxlm.training.assistant_loss import Answers
from maxlm.training.loop import run
from maxlm.training.objective import Sums
from maxlm.training.step import gradient_function


def sums(config: RunConfig, task: Sft, batch: dict[str, Any], parameters: Any) -> Sums:
    objective = Answers(config, task, one_device())
    found = lambda p, batch: objective.loss(p, None, batch, objective.counted(p, None, batch))
    return jax.jit(found)(parameters, batch)


def masked(config: RunConfig, share: float = 0.3) -> dict[str, Any]:
    batch = packed_batch(config)
    keep = np.random.default_rng(1).random(batch["loss_mask"].shape) < share
    return batch | {"loss_mask": batch["loss_mask"] * keep}


def log_probs(config: RunConfig, parameters: Any, batch: dict[str, Any]) -> np.ndarray:
    """float64 [B, T] of the targets, from the logits of the whole batch."""

    @jax.jit
    def forward(parameters: Any, batch: Any) -> jax.Array:
        tokens = Tokens(batch["positions"], batch["segment_ids"])
        hidden = run_decoder(config.model, parameters, plainly(), batch["inputs"], tokens).hidden
        return ops.logits(hidden, bind(config.model, parameters).unembedding)

    logits = np.asarray(forward(parameters, batch), np.float64)
    logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(
        -1, keepdims=True
    )
    return np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]


def test_gold_is_its_formula() -> None:
    config = small_run()
    batch, parameters = masked(config), initial_parameters(config.model)
    found = sums(config, Sft(gold=Gold(alpha=0.7, beta=0.1)), batch, parameters)
    logp = log_probs(config, parameters, batch)
    weights = np.maximum(np.exp(logp) ** 0.7, 0.1)
    assert (weights > 0.1).any() and (weights == 0.1).any()
    np.testing.assert_allclose(found.objective, -(batch["loss_mask"] * weights * logp).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.means["loss"], -(batch["loss_mask"] * logp).sum(), rtol=1e-5)


def test_golds_gradient_is_that_of_the_weighted_log_probabilities() -> None:
    """The weights are constants: with them written down, the gradient is the same."""
    config = small_run()
    batch, parameters = masked(config), initial_parameters(config.model)
    gradient = lambda task, batch: jax.jit(jax.grad(lambda p: sums(config, task, batch, p).objective))(parameters)
    with_gold = gradient(Sft(gold=Gold()), batch)
    logp = log_probs(config, parameters, batch)
    fixed = batch | {"loss_mask": jnp.asarray(batch["loss_mask"] * np.maximum(np.exp(logp) ** 0.5, 0.05), jnp.float32)}
    plain = gradient(Sft(), fixed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), with_gold, plain)


def test_noise_is_uniform_and_as_large_as_the_text_is_long() -> None:
    config = small_run()
    batch, parameters = packed_batch(config), initial_parameters(config.model)
    objective = Answers(config, Sft(neftune_alpha=5.0), one_device())
    drawn = objective.draw(batch, jax.random.key(3))
    model, tokens = bind(config.model, parameters), Tokens(batch["positions"], batch["segment_ids"])
    clean = objective._embeddings(model, batch, tokens)
    noise = np.asarray(objective._embeddings(model, drawn, tokens) - clean)
    lengths = (batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None, :]).sum(-1)
    bound = 5.0 / np.sqrt(lengths * config.model.d_model)
    assert (np.abs(noise) <= bound[..., None] + 1e-6).all()
    scaled = noise / bound[..., None]
    assert abs(scaled.mean()) < 0.02 and abs(scaled.var() - 1 / 3) < 0.01  # of a uniform one within 1
    again = objective.draw(batch, jax.random.key(4))
    assert not np.allclose(objective._embeddings(model, again, tokens) - clean, noise)
    # Nothing is drawn where a model is measured.
    assert (
        sums(config, Sft(neftune_alpha=5.0), batch, parameters).objective
        == sums(config, Sft(), batch, parameters).objective
    )


@pytest.mark.parametrize("task", [Sft(), Sft(gold=Gold())], ids=["plain", "gold"])
def test_micro_batches_of_unequal_answers_are_the_whole_batch(task: Sft) -> None:
    """An average of averages would not be (transformers 24725)."""
    config = small_run()
    batch, parameters = masked(config), initial_parameters(config.model)
    batch["loss_mask"][1:] *= np.random.default_rng(2).random(batch["loss_mask"][1:].shape) < 0.2
    found = []
    for parts in (1, 2):
        one = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=parts))
        objective = Answers(one, task, one_device())
        found.append(jax.jit(gradient_function(one, one_device(), objective))(parameters, None, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_sharded_is_unsharded() -> None:
    sharding = ShardingConfig(data=2, tensor=2, seq=2)
    config = small_run(sharding=sharding)
    batch, parameters = masked(config), initial_parameters(config.model)
    task, layout = Sft(neftune_alpha=5.0, gold=Gold()), make_layout(sharding)
    whole, cut = Answers(config, task, one_device()), Answers(config, task, layout)
    drawn = whole.draw(batch, jax.random.key(0))
    want = jax.jit(lambda p, b: whole.loss(p, None, b, jnp.float32(1)))(parameters, drawn)
    with jax.set_mesh(layout.mesh):
        drawn = jax.jit(cut.draw)(batch, jax.random.key(0))
        got = jax.jit(lambda p, b: cut.loss(p, None, b, jnp.float32(1)))(parameters, drawn)
    np.testing.assert_allclose(got.objective, want.objective, rtol=1e-5)


def sft_config(folder: Path, **changes: Any) -> RunConfig:
    file = folder / "sums.jsonl"
    if not file.exists():
        lines = ({"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(12) for b in range(12))
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents = Conversations(paths=(str(file),))
    data = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.1, workers=1)
    base = small_run(batch_size=8, seq_len=48, steps=4)
    values = {
        "model": dataclasses.replace(base.model, vocab_size=384),
        "data": DataConfig(datasets=(Dataset(path=str(folder / "data"), prepare=data),)),
        "task": Sft(neftune_alpha=1.0),
        "observe": ObserveConfig(sample_prompt="2+3=", sample_tokens=4),
        "run_dir": str(folder / "run"),
    }
    return dataclasses.replace(base, **values | changes)


def test_a_run_learns_answers_and_is_asked_as_it_was_taught(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    result = run(config, recipe)
    assert result.step == 4 and result.run.chat is not None
    loaded = load_run(tmp_path / "run")
    assert loaded.chat is not None and loaded.chat.sources == result.run.chat.sources
    assert loaded.ends is not None and loaded.tokenizer.eos_id in loaded.ends.last
    [row] = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert row["prompt"].startswith("2+3=")
    rows = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    # Held out are 144 records, of which the answers' digits and ends count.
    assert 0 < rows[-1]["eval_tokens"] < 144 * 3


def test_running_text_alone_is_refused(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    (tmp_path / "a.txt").write_text("words " * 200)
    text = PrepareConfig(documents=Files(paths=(str(tmp_path / "a.txt"),)), tokenizer=ByteTokenizer())
    data = DataConfig(datasets=(Dataset(path=str(tmp_path / "text"), prepare=text),))
    with pytest.raises(UserError, match="is running text, and the task learns from conversations"):
        run(dataclasses.replace(config, data=data), recipe)


def test_bad_answers_are_not_learned(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    documents = Conversations(paths=(str(tmp_path / "pairs.jsonl"),), purpose=Purpose.PREFERENCE)
    pairs = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0, workers=1)
    sets = (*config.data.datasets, Dataset(path=str(tmp_path / "pairs"), prepare=pairs))
    for task in (Sft(), Pretrain()):
        with pytest.raises(UserError, match="pairs: was prepared with purpose = preference, and the task would learn"):
            recipe(dataclasses.replace(config, task=task, data=DataConfig(datasets=sets)), one_device())
