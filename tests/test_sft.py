"""Supervised fine-tuning: what counts, noise and weights of tokens, and a run from records to an answer."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import initial_parameters, one_device, packed_batch, plainly, run_decoder, small_run

from maxlm import convert
from maxlm.config import (
    Adapter,
    ByteTokenizer,
    CheckpointConfig,
    Conversations,
    DataConfig,
    Dataset,
    Files,
    Gold,
    MtpModules,
    ObserveConfig,
    Preference,
    PrepareConfig,
    Pretrain,
    Purpose,
    RunConfig,
    Sft,
    ShardingConfig,
    UserError,
)
from maxlm.data.chat_templates import BUILT_IN
from maxlm.data.tokenizers import Bytes
from maxlm.inference.load import load_run
from maxlm.models import Tokens, bind, ops
from maxlm.models.mtp import without_mtp
from maxlm.recipes import recipe
from maxlm.recipes.taught import Known, Taught, otherwise
from maxlm.sharding import make_layout
from maxlm.training.assistant_loss import Answers
from maxlm.training.loop import Result, run
from maxlm.training.objective import Sums
from maxlm.training.step import gradient_function, make_trainer


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


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result[Any]]:
    """A run of four steps, in the template plain, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, run(sft_config(folder), recipe)


def test_a_run_learns_answers_and_is_asked_as_it_was_taught(learned: tuple[Path, Result[Any]]) -> None:
    tmp_path, result = learned
    assert result.step == 4 and result.run.chat is not None
    loaded = load_run(tmp_path / "run")
    assert loaded.chat is not None and loaded.chat.sources == result.run.chat.sources
    assert loaded.ends is not None and loaded.tokenizer.eos_id in loaded.ends.last
    [row] = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert row["prompt"].startswith("2+3=")
    rows = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    # Held out are 144 records, of which the answers' digits and ends count.
    assert 0 < rows[-1]["eval_tokens"] < 144 * 3


def test_modules_that_predict_further_learn_answers_alone(tmp_path: Path) -> None:
    """`model.mtp`: with as few tokens counted as the answers have, and the run is used without them."""
    base = sft_config(tmp_path)
    model = dataclasses.replace(base.model, mtp=MtpModules(depth=1, weight=1.0))
    config = dataclasses.replace(base, model=model, run_dir=str(tmp_path / "mtp"), task=Sft(gold=Gold(alpha=1e-6)))
    result = run(config, recipe)
    assert result.step == 4 and result.run.config.model == base.model
    parameters = jax.tree.map(jnp.asarray, initial_parameters(model, 1))
    batch = masked(config)
    two, one = (
        sums(config, config.task, batch, parameters),
        sums(base, config.task, batch, without_mtp(model, parameters)[1]),
    )
    # Gold with alpha = 0 weighs every token 1, so that a module's loss is the cross-entropy that is logged.
    np.testing.assert_allclose(two.objective - one.objective, two.means["mtp_loss"], rtol=1e-5)
    none = sums(config, config.task, batch | {"loss_mask": 0 * batch["loss_mask"]}, parameters)
    assert none.means["mtp_loss"] == 0 < two.means["mtp_loss"]


def starts_from(place: str, folder: Path, template: str, task: Any = Sft(), **changes: Any) -> tuple[str, ...]:
    """What is said of a run that is taught with a template, and starts from a model."""
    base = sft_config(folder)
    assert base.data.datasets[0].prepare is not None
    old = base.data.datasets[0].prepare
    documents = Conversations(paths=(str(folder / "sums.jsonl"),), template=template)
    data = DataConfig(
        datasets=(Dataset(path=str(folder / template), prepare=dataclasses.replace(old, documents=documents)),)
    )
    base = dataclasses.replace(base, checkpoint=CheckpointConfig(init_from=place), data=data, run_dir="unused")
    config = dataclasses.replace(base, **changes)
    made = recipe(config, one_device())
    assert made.start is not None
    return made.start(make_trainer(config, one_device(), made.objective), None, None).changes


def taught_with(template: str, folder: Path) -> Taught:
    return Taught(Bytes(), folder / template / "chat")


def test_another_form_of_conversations_than_the_model_knows_is_told(learned: tuple[Path, Result[Any]]) -> None:
    tmp_path, _ = learned
    place = f"{tmp_path}/run"
    assert starts_from(place, tmp_path, "plain") == ()
    parted = r"chat template: .*run/chat writes '<\|bos\|>User: Hi.*Assistant:', .*raw/chat writes '<\|bos\|>Hi'"
    [said] = starts_from(place, tmp_path, "raw")
    assert re.fullmatch(parted, said)
    known = Known(taught_with("plain", tmp_path).chat, taught_with("plain", tmp_path).ends)
    [said] = otherwise(Preference(), taught_with("raw", tmp_path), known)
    assert "for task = Preference that is nearly always a mistake" in said
    # On a base under an adapter, and of a published model, whose template looks otherwise and writes the same.
    adapted = dataclasses.replace(sft_config(tmp_path).model, adapter=Adapter())
    assert re.fullmatch(parted, starts_from(f"run:{place}", tmp_path, "raw", model=adapted)[-1])
    convert.main(["--from", f"run:{place}", "--to", f"hf:{tmp_path}/hf"])
    about = tmp_path / "hf" / "tokenizer_config.json"
    assert starts_from(f"hf:{tmp_path}/hf", tmp_path, "plain") == ()
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    about.write_text(json.dumps(names))
    about.with_name("chat_template.jinja").write_text("{# plain #}" + BUILT_IN["plain"][0])
    assert starts_from(f"hf:{tmp_path}/hf", tmp_path, "plain") == ()
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    end = f"end of an answer: the model knows 7, the data has {Bytes().eos_id}"
    assert starts_from(f"hf:{tmp_path}/hf", tmp_path, "plain") == (end,)
    for file in (about, about.with_name("chat_template.jinja")):
        file.unlink()  # a base that knows no conversations
    assert starts_from(f"hf:{tmp_path}/hf", tmp_path, "raw") == ()


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
