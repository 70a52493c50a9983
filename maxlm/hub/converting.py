"""What `python -m maxlm.convert` does: a model read part by part from one kind of file, written to another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reference import PUBLISHED, run_and_step
from maxlm.checkpoint.store import Deferred
from maxlm.config import CheckpointConfig, Dtype, ExecutionConfig, ModelConfig, RunConfig, serialize
from maxlm.data.shards import CHAT
from maxlm.data.tokenizers import Tokenizer
from maxlm.hub.families import FAMILIES
from maxlm.hub.family import ModelFamily
from maxlm.hub.folder import (
    Pieces,
    appearing,
    copy_template,
    copy_tokenizer,
    write_ends,
    write_folder,
    write_origin,
)
from maxlm.hub.models import PublishedModel, load_run, no_tokenizer, number_format, open_base, pieces_of, untrained
from maxlm.hub.names import Piece
from maxlm.hub.published import Published
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.load import ONE_DEVICE, deferred_run, layout_for
from maxlm.models import abstract_parameters, declared
from maxlm.models.weights.holding import QUANTISED, kinds_of

_SETTLE_S = 2.0
"""tensorstore, which writes checkpoints, tries again for a moment after a full disk, and makes folders anew."""
_SHOWN = 3
_PROBE = 16
"""Tokens of the text that logits are compared on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to be written somewhere."""

    model: ModelConfig
    pieces: Pieces
    """Parts of arrays, in the number format that they are in."""
    layer: Callable[[shapes.Array, int | None], npt.NDArray[Any]]
    """One layer of an array that is a stack; or an array that is none, whole."""
    parameters: Callable[[], Any]
    """All arrays, on one device."""
    dtype: str
    """Number format that loses nothing."""
    tokenizer: Tokenizer | None
    family: ModelFamily | None
    """That it came from."""
    copy_tokenizer: Callable[[Path], None]
    """Writes its tokenizer's files into a folder, as far as there are any."""
    place: Path
    config: RunConfig
    step: int
    """Optimizer steps that it has seen."""
    ignored: Sequence[str] = ()
    """Tensors in the files that are no part of the model."""
    quantised: Any = None
    """The tree of parameters, with arrays that are `Deferred`, where weights are quantised; `pieces` and `layer` have
    the numbers that those stand for."""


def open_published(published: PublishedModel) -> Opened:
    """A model of `maxlm.hub.models.KINDS`.

    Raises:
        UserError: it does not fit on one device, or its tokenizer is damaged.
    """
    weights = published.weights
    layout = layout_for(weights.model, ONE_DEVICE)
    dtype = Dtype.FLOAT32 if weights.dtype.itemsize > 2 else Dtype.BFLOAT16
    return Opened(
        model=weights.model,
        pieces=lambda parts: [weights.piece(part) for part in parts],
        layer=weights.layer,
        parameters=lambda: weights.parameters(abstract_parameters(weights.model, layout)),
        dtype=weights.dtype.name,
        tokenizer=published.find_tokenizer(),
        family=weights.family,
        copy_tokenizer=published.copy_tokenizer,
        place=weights.place,
        config=untrained(weights.model, dtype=dtype, sharding=ONE_DEVICE),
        step=0,
        ignored=weights.ignored,
    )


def open_run(place: Path) -> Opened:
    """A run folder, or RUN_DIR/checkpoints/STEP.

    Raises:
        UserError: as `load_run`.
    """
    folder, step = run_and_step(str(place))
    run = deferred_run(folder, step=step, open_base=open_base)
    published, pieces = folder / PUBLISHED, pieces_of(run.parameters)
    trained = serialize.load(RunConfig, folder / "config.json").model
    further = [array.name for array in shapes.arrays(trained) if array.name.startswith(f"{shapes.MTP}/")]

    def copy(target: Path) -> None:
        if published.is_dir():
            copy_tokenizer(published, target)
            if run.step and run.ends is not None:  # documents of its data have ends that the first model may not have
                write_ends(target, {"eos_token_id": list(run.ends.last)})
        else:
            copy_tokenizer(folder / "tokenizer", target)
            write_ends(target, {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": run.tokenizer.eos_id})
            _write_tokenizer_config(run.tokenizer, target)
        if (folder / CHAT).is_dir():
            assert run.ends is not None
            copy_template(folder / CHAT, target)
            write_ends(target, {"eos_token_id": list(run.ends.last)})

    return Opened(
        model=run.config.model,
        pieces=pieces,
        layer=lambda array, number: pieces([Piece(array, () if number is None else (number,))])[0],
        parameters=lambda: load_run(folder, step=run.step).parameters,
        dtype="float32",
        tokenizer=run.tokenizer,
        family=family_of_origin(published),
        copy_tokenizer=copy,
        place=folder,
        config=run.config,
        step=run.step,
        ignored=further,
        quantised=run.parameters if kinds_of(run.config.model, run.parameters) else None,
    )


def _write_tokenizer_config(tokenizer: Tokenizer, folder: Path) -> None:
    """What no other file says: how texts begin, and that the ids are those of the file.

    Without a class transformers takes that of the family, which cuts a text in its own way and adds tokens of its own.
    """
    bos = None if tokenizer.bos_id is None else tokenizer.name_of(tokenizer.bos_id)
    eos = tokenizer.name_of(tokenizer.eos_id)
    if eos is None:  # it has no file
        return
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos is not None, "eos_token": eos}
    said |= {} if bos is None else {"bos_token": bos}
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_published(opened: Opened, folder: Path, dtype: str | None) -> None:
    """For other programs.

    Raises:
        UserError: as `write_folder`.
    """
    write_folder(
        opened.model,
        opened.pieces,
        folder,
        dtype=number_format(dtype or opened.dtype),
        tokenizer=opened.copy_tokenizer,
        prefer=opened.family,
        quantised=opened.quantised,
    )


def write_run(
    opened: Opened, folder: Path, *, parameters: Any = None, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """A run folder with one checkpoint, without an optimizer: to be asked, exported, or started from.

    Args:
        opened: the model.
        folder: new.
        parameters: in place of its own, with `Weight`s of fewer bits among them. What those are, the checkpoint says.
        more: what else the checkpoint says.

    Raises:
        UserError: there is no tokenizer, something is at `folder`, or it cannot be written.
    """
    if opened.tokenizer is None:
        raise no_tokenizer(opened.place)
    config = dataclasses.replace(opened.config, run_dir=str(folder))
    with appearing(folder, settle_s=_SETTLE_S) as place:
        serialize.save(config, place / "config.json")
        opened.tokenizer.save(place / "tokenizer")
        write_origin(place, opened.family, opened.copy_tokenizer)
        meta = {
            **more,
            "tokenizer": opened.tokenizer.fingerprint,
            "config": serialize.to_dict(config),
            "data": {"next_batch": 0, "fingerprint": "none: not trained here"},
        }
        if parameters is not None:
            meta[QUANTISED] = kinds_of(opened.model, parameters)
        with Checkpointer(place / "checkpoints", CheckpointConfig()) as checkpointer:
            own = partial(_deferred, opened)
            params = jax.tree.map(own, declared(opened.model)) if parameters is None else parameters
            checkpointer.save(opened.step, params=params, optimizer={}, meta=meta)


def _deferred(opened: Opened, array: shapes.Array) -> Deferred:
    """An array in float32, which is made, layer by layer, when it is needed."""
    return Deferred(
        shape=array.shape,
        dtype=np.dtype(np.float32),
        by_layer=array.dims[0] == "layers",
        read=lambda number: np.asarray(opened.layer(array, number), np.float32),
    )


def family_of_origin(folder: Path) -> ModelFamily | None:
    """Of a run that was made of a published model."""
    if not (folder / "config.json").is_file():
        return None
    return FAMILIES.get(str(Published.read(folder).values.get("model_type")))


def report(opened: Opened, folder: Path | None) -> Iterator[str]:
    """What was converted, in lines.

    Args:
        opened: what was read.
        folder: the Hugging Face folder, source or target, whose logits are compared; None: there is none.
    """
    arrays = shapes.arrays(opened.model)
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.name.encode())
        made = _deferred(opened, array)
        for number in made.numbers:
            digest.update(np.ascontiguousarray(made.read(number)).data)
    if opened.ignored:
        shown = ", ".join(opened.ignored[:_SHOWN]) + (", ..." if len(opened.ignored) > _SHOWN else "")
        yield f"{len(opened.ignored)} tensors that are no part of the model were passed over: {shown}"
    yield f"{sum(array.size for array in arrays):,} parameters, SHA-256 of all in float32 {digest.hexdigest()}"
    if folder is not None:
        yield _compare_logits(opened, folder)


def _compare_logits(opened: Opened, folder: Path) -> str:
    """With transformers, where it is installed, has the family and reads the folder."""
    family = family_of_origin(folder)
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
    layout, execution = layout_for(opened.model, ONE_DEVICE), ExecutionConfig(dtype=Dtype.FLOAT32)
    ours = np.asarray(LanguageModel(opened.model, execution, layout, opened.parameters())(ids))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids)).logits.numpy()
    except Exception as error:  # quantised weights want packages and devices of their own, to name one
        reason = " ".join(str(error).split())
        return f"logits: not compared, as transformers {transformers.__version__} cannot run the folder ({reason})"
    difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    return (
        f"logits of {_PROBE} tokens: at most {difference:.1e} from those of transformers {transformers.__version__}, "
        f"which go up to {largest:.1f}"
    )
