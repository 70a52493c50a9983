"""Steps of cleaning that ask a run: what it says, opened when asked, and never another run than was trained with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
from helpers import small_run, whole_logits
from run_folder import BYTE_MODEL, make_run, parameters_of

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import UserError
from maxlm.config.cleaning.score_steps import RunEmbeddings
from maxlm.data.__main__ import _model, main
from maxlm.data.cleaning.quality_classifier import Classifier
from maxlm.data.tokenizers import Bytes

TEXTS = {"good": "the offer of the method", "bad": "qzx qqz zxz"}
PIPELINE = """
from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.score_steps import BitsPerByteFilter, QualityFilter


def get_pipeline():
    return CleaningPipeline(steps=({steps},))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    make_run(folder)
    for name, text in TEXTS.items():
        rows = [json.dumps({"text": f"{text} {n}"}) for n in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


def cleaned(folder: Path, out: str, steps: str) -> list[dict[str, Any]]:
    """The records that a pipeline keeps of both files."""
    (folder / f"{out}.py").write_text(PIPELINE.format(steps=steps))
    inputs = [str(folder / f"{name}.jsonl") for name in TEXTS]
    argv = ["clean", "--pipeline", str(folder / f"{out}.py"), *inputs, "--out", str(folder / out), "--workers", "1"]
    _model.cache_clear()  # as a new process has it
    assert main([*argv, "--force"]) == 0
    files = sorted((folder / out).rglob("*.jsonl*"))
    return [json.loads(line) for file in files if "removed" not in str(file) for line in file.open()]


def test_bits_per_byte_are_those_of_the_newest_checkpoint(run: Path) -> None:
    """Each text is read as the model reads documents: after the token that begins one."""
    rows = cleaned(run, "bits", f"BitsPerByteFilter(run={str(run / 'run')!r})")
    assert len(rows) == 60
    for row in rows[::20]:
        ids = list(row["text"].encode())
        [logits] = whole_logits(BYTE_MODEL, parameters_of(small_run(BYTE_MODEL), seed=2), [[256, *ids]])
        log_probability = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
        nats = -sum(log_probability[place, token] for place, token in enumerate(ids))
        assert row["bits_per_byte"] == pytest.approx(nats / len(ids) / math.log(2), rel=1e-5)


def test_a_classifier_of_a_run_keeps_to_its_checkpoint(run: Path) -> None:
    """Later checkpoints change nothing; other weights in its place are refused."""
    classes = [f"{name}={run / name}.jsonl" for name in TEXTS]
    features = ["--run", str(run / "run")]
    assert main(["judge", "classifier", *classes, *features, "--out", str(run / "judge")]) == 0
    assert Classifier.open(run / "judge").features == RunEmbeddings(run=str(run / "run/checkpoints/2"))
    step = f"QualityFilter(model={str(run / 'judge')!r})"
    before = cleaned(run, "before", step)
    assert {"qzx" in row["text"] for row in before} == {False}
    with Checkpointer(run / "run/checkpoints", small_run(BYTE_MODEL).checkpoint) as checkpointer:
        meta = {"tokenizer": Bytes().fingerprint}
        other = parameters_of(small_run(BYTE_MODEL), seed=9)
        checkpointer.save(3, params=other, optimizer={"count": jax.numpy.zeros(())}, meta=meta)
    assert cleaned(run, "after", step) == before

    shutil.rmtree(run / "run")
    shutil.rmtree(run / "texts")
    shutil.rmtree(run / "data")
    make_run(run, parameters_of(small_run(BYTE_MODEL), seed=5))
    with pytest.raises(UserError, match="checkpoints/2: has other weights than when a classifier was trained with it"):
        cleaned(run, "other", step)
