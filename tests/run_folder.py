"""A tiny run folder, made without training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from helpers import initial_parameters, small_model, small_run

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import ByteTokenizer, DataConfig, Dataset, Files, ModelConfig, PrepareConfig, RunConfig, serialize
from maxlm.data.prepare import prepare
from maxlm.data.tokenizers import Bytes

BYTE_MODEL = small_model(vocab_size=264)
"""For `Bytes`, which has 258 ids; the last six are padding."""


def parameters_of(config: RunConfig, seed: int = 3) -> dict[str, Any]:
    """Initial parameters; copy before changing the dict."""
    return initial_parameters(config.model, seed)


def make_run(
    folder: Path, parameters: dict[str, Any] | None = None, *, model: ModelConfig = BYTE_MODEL, **train: Any
) -> RunConfig:
    """A prepared data set of a few documents, and a run of steps 1 and 2 in `folder / "run"`."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"document {i}: " + "the café says 🙂 " * (i % 5 + 1))
    dataset = Dataset(path=str(folder / "data"))
    prepare(
        PrepareConfig(
            documents=Files(paths=(str(texts),)), tokenizer=ByteTokenizer(), validation_fraction=0.5, workers=1
        ),
        Path(dataset.path),
    )
    config = dataclasses.replace(
        small_run(model=model, **train),
        data=DataConfig(datasets=(dataset,)),
        run_dir=str(folder / "run"),
    )
    run_dir = Path(config.run_dir)
    Bytes().save(run_dir / "tokenizer")
    serialize.save(config, run_dir / "config.json")
    with Checkpointer(run_dir / "checkpoints", config.checkpoint) as checkpointer:
        for step in (1, 2):
            values = parameters if parameters is not None else parameters_of(config, seed=step)
            checkpointer.save(
                step, params=values, optimizer={"count": jax.numpy.zeros(())}, meta={"tokenizer": Bytes().fingerprint}
            )
    return config
