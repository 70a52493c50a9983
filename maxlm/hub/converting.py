"""What `python -m maxlm.convert` does: a model read part by part from one kind of folder, written to another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reference import run_and_step
from maxlm.config import CheckpointConfig, Dtype, ExecutionConfig, ModelConfig, RunConfig, UserError, serialize
from maxlm.data.tokenizers import Tokenizer
from maxlm.hub.families import FAMILIES
from maxlm.hub.family import ModelFamily
from maxlm.hub.folder import ModelFolder, appearing, copy_tokenizer, write_folder
from maxlm.hub.models import find_tokenizer, number_format, pieces_of, untrained
from maxlm.hub.names import Piece
from maxlm.hub.published import Published
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.load import ONE_DEVICE, layout_for, load_run
from maxlm.models import abstract_parameters

PUBLISHED = "published"
"""Folder of a run with the tokenizer's files, chat template and config.json of the model that it was made from."""
_PROBE = 16
"""Tokens of the text that logits are compared on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to be written somewhere."""

    model: ModelConfig
    piece: Callable[[Piece], npt.NDArray[Any]]
    """A part of one array."""
    array: Callable[[str], npt.NDArray[Any]]
    """One array, by its name, in float32."""
    parameters: Callable[[], Any]
    """All arrays, on one device."""
    dtype: str
    """Number format that loses nothing."""
    tokenizer: Tokenizer | None
    family: ModelFamily | None
    """That it came from."""
    files: Path
    """Where its tokenizer's files lie, if anywhere."""
    config: RunConfig
    step: int
    """Optimizer steps that it has seen."""


def open_published(folder: Path) -> Opened:
    """A Hugging Face folder.

    Raises:
        UserError: as `ModelFolder`.
    """
    files = ModelFolder(folder)
    layout = layout_for(files.model, ONE_DEVICE)
    dtype = Dtype.FLOAT32 if files.dtype.itemsize > 2 else Dtype.BFLOAT16
    return Opened(
        model=files.model,
        piece=files.piece,
        array=files.array,
        parameters=lambda: files.parameters(abstract_parameters(files.model, layout)),
        dtype=files.dtype.name,
        tokenizer=find_tokenizer(folder),
        family=files.family,
        files=folder,
        config=untrained(files.model, dtype=dtype, sharding=ONE_DEVICE),
        step=0,
    )


def open_run(place: Path) -> Opened:
    """A run folder, or RUN_DIR/checkpoints/STEP.

    Raises:
        UserError: as `load_run`.
    """
    folder, step = run_and_step(str(place))
    run = load_run(folder, step=step)
    piece = pieces_of(run.parameters)
    named = {array.name: array for array in shapes.arrays(run.config.model)}
    return Opened(
        model=run.config.model,
        piece=piece,
        array=lambda name: piece(Piece(named[name], ())),
        parameters=lambda: run.parameters,
        dtype="float32",
        tokenizer=run.tokenizer,
        family=_family_of_origin(folder / PUBLISHED),
        files=folder / PUBLISHED if (folder / PUBLISHED).is_dir() else folder / "tokenizer",
        config=run.config,
        step=run.step,
    )


def write_published(opened: Opened, folder: Path, dtype: str | None) -> None:
    """For other programs.

    Raises:
        UserError: as `write_folder`.
    """
    write_folder(
        opened.model,
        opened.piece,
        folder,
        dtype=number_format(dtype or opened.dtype),
        tokenizer=opened.files,
        prefer=opened.family,
    )


def write_run(opened: Opened, folder: Path) -> None:
    """A run folder with one checkpoint, without an optimizer: to be asked, exported, or started from.

    Raises:
        UserError: there is no tokenizer, something is at `folder`, or it cannot be written.
    """
    if opened.tokenizer is None:
        raise UserError(f"{opened.files}: has no tokenizer.json and no tokenizer.model; put that of the model there")
    config = dataclasses.replace(opened.config, run_dir=str(folder))
    with appearing(folder) as partial:
        serialize.save(config, partial / "config.json")
        opened.tokenizer.save(partial / "tokenizer")
        (partial / PUBLISHED).mkdir()
        copy_tokenizer(opened.files, partial / PUBLISHED)
        if opened.family is not None:
            (partial / PUBLISHED / "config.json").write_text(
                json.dumps({"model_type": opened.family.model_type}) + "\n"
            )
        meta = {
            "tokenizer": opened.tokenizer.fingerprint,
            "config": serialize.to_dict(config),
            "data": {"next_batch": 0, "fingerprint": "none: not trained here"},
        }
        with Checkpointer(partial / "checkpoints", CheckpointConfig()) as checkpointer:
            checkpointer.save(opened.step, params=opened.parameters(), optimizer={}, meta=meta)


def _family_of_origin(folder: Path) -> ModelFamily | None:
    """Of a run that was made of a published model."""
    if not (folder / "config.json").is_file():
        return None
    return FAMILIES.get(str(Published.read(folder).values.get("model_type")))


def report(opened: Opened, published: Path) -> Iterator[str]:
    """What was converted, in lines.

    Args:
        opened: what was read.
        published: the published folder, source or target.
    """
    arrays = shapes.arrays(opened.model)
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.name.encode())
        digest.update(np.ascontiguousarray(opened.array(array.name)).data)
    yield f"{sum(array.size for array in arrays):,} parameters, SHA-256 of all in float32 {digest.hexdigest()}"
    yield _compare_logits(opened, published)


def _compare_logits(opened: Opened, published: Path) -> str:
    """With transformers, where it is installed and has the family."""
    family = _family_of_origin(published)
    if family is not None and family.needs_code:
        return (
            f"logits: not compared, as transformers reads {family.model_type} only with code that comes with the "
            "model, which is not run here; docs/hub.md says how other programs read the folder"
        )
    try:
        import torch
        import transformers
    except ImportError:
        return "logits: not compared, as the packages torch and transformers are not installed"
    ids = np.arange(_PROBE)[None] * 7919 % opened.model.vocab_size
    layout = layout_for(opened.model, ONE_DEVICE)
    ours = np.asarray(LanguageModel(opened.model, ExecutionConfig(), layout, opened.parameters())(ids))
    model = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    return (
        f"logits of {_PROBE} tokens: at most {difference:.1e} from those of transformers {transformers.__version__}, "
        f"which go up to {largest:.1f}"
    )
