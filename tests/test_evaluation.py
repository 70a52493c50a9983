"""Held-out figures against models whose loss is known, and against float64 arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import plainly, run_decoder, small_run
from run_folder import BYTE_MODEL, make_run, parameters_of

from maxlm import evaluate
from maxlm.config import RunConfig, UserError
from maxlm.data.loader import open_batches
from maxlm.data.shards import Split, open_prepared
from maxlm.evaluation.perplexity import held_out, summary
from maxlm.models import Tokens


@pytest.fixture(scope="module", autouse=True)
def private_cache() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_run(tmp_path_factory.mktemp("run"), batch_size=4)


def measured(capsys: pytest.CaptureFixture[str], run: RunConfig, *options: str) -> dict[str, Any]:
    evaluate.main(["--run", run.run_dir, "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = dict(parameters_of(small_run(BYTE_MODEL)))
    parameters["unembed"] = jnp.zeros_like(parameters["unembed"])
    found = measured(capsys, make_run(tmp_path, parameters), "--batches", "2")
    assert found["perplexity"] == pytest.approx(BYTE_MODEL.vocab_size, rel=1e-6)


@pytest.mark.parametrize("seq_len", [None, 12])
def test_the_whole_split_against_float64(
    run: RunConfig, capsys: pytest.CaptureFixture[str], seq_len: int | None
) -> None:
    options = ["--batch_size", "1", "--whole"] + (["--seq_len", str(seq_len)] if seq_len else [])
    found = measured(capsys, run, *options)
    seq_len = seq_len or run.train.seq_len
    batches = open_batches(run.data, batch_size=1, seq_len=seq_len, split=Split.VALIDATION)
    parameters = parameters_of(run, seed=2)

    @jax.jit
    def hidden_of(parameters: Any, batch: Any) -> jax.Array:
        tokens = Tokens(batch["positions"], batch["segment_ids"])
        return run_decoder(run.model, parameters, plainly(), batch["inputs"], tokens).hidden

    nats, tokens = 0.0, 0.0
    table = np.asarray(parameters["unembed"], np.float64)
    for i in range(batches.n_batches):
        batch = batches.rows(i, slice(None))
        logits = np.asarray(hidden_of(parameters, batch), np.float64) @ table.T
        log_z = np.log(np.exp(logits).sum(-1))
        target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        nats += np.sum((log_z - target) * batch["loss_mask"])
        tokens += batch["loss_mask"].sum()
    assert found["step"] == 2 and found["tokens"] == tokens
    assert measured(capsys, run, *options[:2], "--data", run.data.datasets[0].path, *options[3:]) == found
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    # A byte tokenizer predicts one token for each byte, and eos once a document.
    info = open_prepared(Path(run.data.datasets[0].path), verify=True).info
    text_bytes, documents = info.text_bytes(Split.VALIDATION), info.documents(Split.VALIDATION)
    predicted_per_byte = (text_bytes + documents) / text_bytes
    assert found["bits_per_byte"] == pytest.approx(nats / tokens / math.log(2) * predicted_per_byte, rel=1e-5)


def test_devices_batches_and_steps(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one = measured(capsys, run, "--batches", "2")
    four = measured(capsys, run, "--batches", "2", "--sharding.data", "2", "--sharding.tensor", "2")
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["tokens"] == one["tokens"] <= 2 * 4 * run.train.seq_len
    assert measured(capsys, run, "--batches", "2", "--step", "1")["loss"] != one["loss"]
    evaluate.main(["--run", run.run_dir, "--batches", "2"])
    assert f"{one['loss']:.4f} nats/token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "--batches = 0 must be positive"),
        (["--batch_size", "3", "--sharding.data", "2"], "train.batch_size = 3 is not a multiple of 2"),
    ],
)
def test_mistakes(run: RunConfig, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.main(["--run", run.run_dir, *options])


def test_every_token_weighs_the_same() -> None:
    sums = iter([(jnp.float32(30.0), jnp.float32(10.0)), (jnp.float32(2.0), jnp.float32(6.0))])
    found = held_out(lambda parameters, batch: next(sums), None, [{}, {}], bytes_per_token=4.0)
    assert found.loss == pytest.approx(2.0) and found.tokens == 16
    assert found.perplexity == pytest.approx(math.e**2)
    assert found.bits_per_byte == pytest.approx(2 / math.log(2) / 4)
    assert summary(nats=1e6, tokens=1, bytes_per_token=1.0).perplexity == math.inf
    with pytest.raises(UserError, match="no held-out token"):
        held_out(lambda parameters, batch: next(sums), None, [], bytes_per_token=4.0)
