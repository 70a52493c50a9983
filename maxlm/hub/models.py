"""Published models as models of this project, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import (
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    HuggingFaceTokenizer,
    ModelConfig,
    RunConfig,
    SentencePieceTokenizer,
    ShardingConfig,
    TrainConfig,
    UserError,
)
from maxlm.data.tokenizers import Tokenizer, open_tokenizer
from maxlm.hub.folder import ModelFolder, write_folder
from maxlm.hub.names import Piece
from maxlm.hub.tensor_files import DTYPES
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.load import ONE_DEVICE, LoadedRun, layout_for
from maxlm.models import abstract_parameters


def load_model(
    path: str | Path, dtype: str = "float32", *, sharding: ShardingConfig = ONE_DEVICE
) -> tuple[LanguageModel, ModelConfig]:
    """A model of a Hugging Face folder. Also `maxlm.load_model`.

    Args:
        path: folder with config.json and safetensors files.
        dtype: number format of products and activations; the parameters stay as they are, in float32.
        sharding: how to lay the model out, as for `maxlm.load_run`.

    Returns:
        The model, and what it is. `model(tokens)` are the logits [B, T, V] in float32, as `LanguageModel.logits` says.

    Raises:
        UserError: the family is not supported, the files are damaged or do not fit each other, or there is no such
            format.
    """
    if dtype not in [known.value for known in Dtype]:
        raise UserError(f"dtype = {dtype!r} must be {' or '.join(repr(known.value) for known in Dtype)}")
    folder = ModelFolder(Path(path))
    layout = layout_for(folder.model, sharding)
    execution = ExecutionConfig(dtype=Dtype(dtype))
    parameters = folder.parameters(abstract_parameters(folder.model, layout))
    return LanguageModel(folder.model, execution, layout, parameters), folder.model


def load_folder(folder: Path, *, sharding: ShardingConfig) -> LoadedRun:
    """A published model as `maxlm.load_run` gives a run; computes in float32 on CPUs, in bfloat16 elsewhere.

    Raises:
        UserError: as `maxlm.load_model`; or the folder has no tokenizer.
    """
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: has no tokenizer.json and no tokenizer.model; put that of the model there")
    files = ModelFolder(folder)
    layout = layout_for(files.model, sharding)
    return LoadedRun(
        config=untrained(files.model, dtype=Dtype.FLOAT32 if layout.on_cpu else Dtype.BFLOAT16, sharding=sharding),
        layout=layout,
        parameters=files.parameters(abstract_parameters(files.model, layout)),
        tokenizer=tokenizer,
        step=0,
    )


def untrained(model: ModelConfig, *, dtype: Dtype, sharding: ShardingConfig, run_dir: str = "runs/none") -> RunConfig:
    """A config around a model that was not trained here; its data and lengths say nothing."""
    return RunConfig(
        model=model,
        data=DataConfig(datasets=(Dataset(path="data/none"),)),
        train=TrainConfig(steps=1, batch_size=1, seq_len=min(model.max_seq_len, 2048)),
        execution=ExecutionConfig(dtype=dtype),
        sharding=sharding,
        run_dir=run_dir,
    )


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """That of a folder's `tokenizer.json` or, without one, `qwen.tiktoken` or `tokenizer.model`."""
    for name in ("tokenizer.json", "qwen.tiktoken"):
        if (folder / name).is_file():
            return open_tokenizer(HuggingFaceTokenizer(path=str(folder / name)))
    if (folder / "tokenizer.model").is_file():
        return open_tokenizer(SentencePieceTokenizer(path=str(folder / "tokenizer.model")))
    return None


def save_model(
    model: LanguageModel, path: str | Path, dtype: str = "float32", *, tokenizer: str | Path | None = None
) -> None:
    """Write a model as a Hugging Face folder, for `AutoModelForCausalLM.from_pretrained` and other programs. Also
    `maxlm.save_model`.

    Args:
        model: of `load_model`, or `maxlm.load_run(...).model`.
        path: a new folder.
        dtype: number format of the files: float32 (nothing is lost), bfloat16 or float16.
        tokenizer: a folder whose tokenizer files go along; None: none do.

    Raises:
        UserError: no family of published models can say all of this one, there is something at `path`, it cannot be
            written, or there is no such format.
    """
    write_folder(
        model.config,
        pieces_of(model.parameters),
        Path(path),
        dtype=number_format(dtype),
        tokenizer=None if tokenizer is None else Path(tokenizer),
    )


def number_format(name: str) -> np.dtype[Any]:
    """Of weights in files, by its name.

    Raises:
        UserError: there is none of that name.
    """
    found = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in found:
        raise UserError(f"dtype = {name!r} must be {' or '.join(map(repr, sorted(found)))}")
    return found[name]


def pieces_of(parameters: Any) -> Any:
    """The part of an array that a tensor holds, from the tree of parameters."""

    def piece(part: Piece) -> npt.NDArray[Any]:
        node = parameters
        for key in part.array.name.split("/"):
            node = node[key]
        return np.asarray(node[part.at])

    return piece
