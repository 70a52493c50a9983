"""Published models as models of this project, and back."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.checkpoint.store import Deferred
from maxlm.config import (
    ChosenModel,
    DataConfig,
    Dataset,
    DraftModel,
    Dtype,
    ExecutionConfig,
    HuggingFaceTokenizer,
    Medusa,
    ModelConfig,
    PromptLookup,
    RunConfig,
    SentencePieceTokenizer,
    ShardingConfig,
    Speculation,
    TrainConfig,
    UserError,
)
from maxlm.data.chat import ChatTemplate, find_chat_template
from maxlm.data.text_ends import TextEnds, published_ends
from maxlm.data.tokenizers import Tokenizer, open_tokenizer
from maxlm.hub import gguf_tokenizer
from maxlm.hub.folder import TOKENIZER_FILES, Pieces, copy_tokenizer, open_folder, write_folder, write_origin
from maxlm.hub.gguf_file import GgufFile
from maxlm.hub.gguf_weights import open_weights
from maxlm.hub.names import Piece
from maxlm.hub.tensor_files import DTYPES
from maxlm.hub.weights import PublishedWeights
from maxlm.inference import load
from maxlm.inference.bases import Base, RunBase
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.load import ONE_DEVICE, LoadedRun, layout_for
from maxlm.models import abstract_parameters
from maxlm.models.weights.kinds import Quantised, Weight
from maxlm.shapes import Array
from maxlm.sharding import Layout


class PublishedModel(NamedTuple):
    """A published model as the commands want it, from whatever kind of file."""

    weights: PublishedWeights
    find_tokenizer: Callable[[], Tokenizer | None]
    find_ends: Callable[[Tokenizer], TextEnds]
    """Where its texts begin and end."""
    find_chat: Callable[[], ChatTemplate | None]
    """How it is asked in a conversation."""
    copy_tokenizer: Callable[[Path], None]
    """Writes its tokenizer's files, and its chat template, into a folder."""


def _open_folder(folder: Path) -> PublishedModel:
    return PublishedModel(
        open_folder(folder),
        partial(find_tokenizer, folder),
        partial(published_ends, folder),
        partial(find_chat_template, folder),
        partial(copy_tokenizer, folder),
    )


def _open_gguf(path: Path) -> PublishedModel:
    file = GgufFile(path)
    return PublishedModel(
        open_weights(file),
        partial(gguf_tokenizer.find_tokenizer, file),
        partial(gguf_tokenizer.find_ends, file),
        partial(gguf_tokenizer.find_chat, file),
        partial(gguf_tokenizer.write_tokenizer, file),
    )


KINDS: dict[str, Callable[[Path], PublishedModel]] = {"hf": _open_folder, "gguf": _open_gguf}
"""What opens each kind of published model, `KIND:PATH` on a command line. All raise UserError as `PublishedWeights`."""


def load_model(
    path: str | Path, dtype: str = "float32", *, sharding: ShardingConfig = ONE_DEVICE
) -> tuple[LanguageModel, ModelConfig]:
    """A published model. Also `maxlm.load_model`.

    Args:
        path: folder with config.json and safetensors files; or a GGUF file.
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
    weights = KINDS["gguf" if Path(path).is_file() else "hf"](Path(path)).weights
    layout = layout_for(weights.model, sharding)
    execution = ExecutionConfig(dtype=Dtype(dtype))
    parameters = weights.parameters(abstract_parameters(weights.model, layout))
    return LanguageModel(weights.model, execution, layout, parameters), weights.model


def load_published(published: PublishedModel, *, sharding: ShardingConfig) -> LoadedRun:
    """A published model as `maxlm.load_run` gives a run; computes in float32 on CPUs, in bfloat16 elsewhere.

    Raises:
        UserError: it has no tokenizer, its numbers are not right, or the layout does not fit.
    """
    weights, tokenizer = published.weights, require_tokenizer(published)
    layout = layout_for(weights.model, sharding)
    return LoadedRun(
        config=untrained(weights.model, dtype=Dtype.FLOAT32 if layout.on_cpu else Dtype.BFLOAT16, sharding=sharding),
        layout=layout,
        parameters=weights.parameters(abstract_parameters(weights.model, layout)),
        tokenizer=tokenizer,
        step=0,
        ends=published.find_ends(tokenizer),
        chat=published.find_chat(),
    )


def open_base(place: str) -> Base:
    """A published model, as `hf:DIR` or `gguf:FILE`, or a run, which may be `run:DIR`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    kind, _, path = place.partition(":")
    if kind in KINDS:
        return PublishedBase(kind, Path(path))
    return RunBase(path if kind == "run" else place)


def files_fingerprint(path: Path) -> str:
    """SHA-256 in hex of a published model: of a file, or of a folder's config.json and safetensors with their names."""
    files = [path] if path.is_file() else sorted([path / "config.json", *path.glob("*.safetensors")])
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(file.name.encode() + b"\n")
        with file.open("rb") as open_file:
            digest.update(hashlib.file_digest(open_file, "sha256").digest())
    return digest.hexdigest()


class PublishedBase:
    """A published model, of `maxlm.hub.models.KINDS`."""

    step = 0

    def __init__(self, kind: str, path: Path) -> None:
        self._published = KINDS[kind](path)
        self._weights = self._published.weights
        self.place = f"{kind}:{path.absolute()}"
        self.model, self.family = self._weights.model, self._weights.family
        tokenizer = self._published.find_tokenizer()
        self.tokenizer = None if tokenizer is None else tokenizer.fingerprint
        self._path = path

    def fingerprint(self) -> str:
        return files_fingerprint(self._path)

    def read(self, names: set[str], layout: Layout, made: Callable[[Array, Weight], Weight]) -> dict[str, Weight]:
        found = dict[str, Weight]()
        for array in shapes.arrays(self.model):
            if array.name in names:
                place = layout.sharding(layout.parameter(array.dims))
                plain = self._weights.placed(array.name, jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=place))
                found[array.name] = jax.block_until_ready(made(array, plain))
        return found

    def deferred(self, names: set[str]) -> dict[str, Any]:
        return {array.name: self._deferred(array) for array in shapes.arrays(self.model) if array.name in names}

    def _deferred(self, array: Array) -> Deferred:
        return Deferred(
            shape=array.shape,
            dtype=np.dtype(np.float32),
            by_layer=array.dims[0] == "layers",
            read=lambda number: self._weights.layer(array, number),
        )

    def keep(self, run_dir: Path) -> None:
        write_origin(run_dir, self.family, self._published.copy_tokenizer)


def load_run(run_dir: str | Path, *, step: int | None = None, sharding: ShardingConfig = ONE_DEVICE) -> LoadedRun:
    """Read a run folder and put the parameters on this process's devices. Also `maxlm.load_run`.

    The model that its adapter is laid on, if it has one, may be a run or a published model. Arguments, result and
    errors are those of `maxlm.inference.load.load_run`.
    """
    return load.load_run(run_dir, step=step, sharding=sharding, open_base=open_base)


def load_chosen(chosen: ChosenModel) -> LoadedRun:
    """What a command line names.

    Raises:
        UserError: as `load_run` or `load_published`, or such a published model cannot be opened.
    """
    if chosen.run is not None:
        return load_run(chosen.run, step=chosen.step, sharding=chosen.sharding)
    kind, place = next((kind, Path(one)) for kind in KINDS if (one := getattr(chosen, kind)) is not None)
    return load_published(KINDS[kind](place), sharding=chosen.sharding)


def load_draft(speculation: Speculation | None) -> LoadedRun | None:
    """The draft model that a config names, on one device; None: it names none.

    Raises:
        UserError: as `load_run` or `load_published`.
    """
    match speculation:
        case None | PromptLookup() | Medusa():
            return None
        case DraftModel(run=place):
            path = Path(place)
            if (path / "checkpoints").is_dir():
                return load_run(path)
            return load_published(KINDS["gguf" if path.is_file() else "hf"](path), sharding=ONE_DEVICE)
        case _:
            assert_never(speculation)


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


def require_tokenizer(published: PublishedModel) -> Tokenizer:
    """Raises UserError where there is none."""
    tokenizer = published.find_tokenizer()
    if tokenizer is None:
        raise no_tokenizer(published.weights.place)
    return tokenizer


def no_tokenizer(place: Path) -> UserError:
    """What to say of a model without one."""
    if place.is_dir():
        return UserError(f"{place}: has no tokenizer.json and no tokenizer.model; put that of the model there")
    return UserError(f"{place}: has no tokenizer; take a GGUF file that has one")


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
            written, there is no such format, or no tokenizer.
    """
    if tokenizer is not None and not any((Path(tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"tokenizer = {str(tokenizer)!r}: has none of {', '.join(TOKENIZER_FILES)}; name their folder")
    write_folder(
        model.config,
        pieces_of(model.parameters),
        Path(path),
        dtype=number_format(dtype),
        tokenizer=None if tokenizer is None else partial(copy_tokenizer, Path(tokenizer)),
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


def pieces_of(parameters: Any) -> Pieces:
    """From the tree of parameters, which may be `Deferred`: then what the last tensor had parts of is kept. What is
    quantised comes as the numbers that it stands for."""
    kept: dict[tuple[str, int | None], Any] = {}

    def find(name: str) -> Any:
        return functools.reduce(operator.getitem, name.split("/"), parameters)

    def layer(part: Piece) -> int | None:
        """Of an array that is kept layer by layer."""
        node = find(part.array.name)
        return part.at[0] if isinstance(node, Deferred) and node.by_layer and part.at else None

    def read(name: str, number: int | None) -> Any:
        node = find(name)
        if isinstance(node, Quantised):
            whole = lambda leaf: jnp.asarray(leaf.read(None) if isinstance(leaf, Deferred) else leaf)
            return jax.tree.map(whole, node).dense(jnp.dtype(jnp.float32))
        return node.read(number) if isinstance(node, Deferred) else node

    def pieces(parts: Sequence[Piece]) -> list[npt.NDArray[Any]]:
        keys = [(part.array.name, layer(part)) for part in parts]
        for key in kept.keys() - set(keys):
            del kept[key]
        kept.update({key: read(*key) for key in keys if key not in kept})
        inner = [part.at if number is None else part.at[1:] for part, (_, number) in zip(parts, keys, strict=True)]
        return [np.asarray(kept[key][at]) for key, at in zip(keys, inner, strict=True)]

    return pieces
