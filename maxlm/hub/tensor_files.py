"""Folders of safetensors files, read tensor by tensor and written so.

The `safetensors` package reads and checks the files. It writes whole files from memory; here the same format (a length
in 8 bytes, a JSON header, then the bytes of each tensor) is written one tensor after another.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.json_file import read_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 << 30
"""A file that is written ends with the tensor that takes it past this."""
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
"""Number formats of weights, as safetensors calls them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
"""What is written, quantised weights included."""


class TensorEntry(NamedTuple):
    """A tensor of a folder."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it."""


class TensorSource(Protocol):
    """Tensors by name, from whatever kind of file."""

    entries: dict[str, TensorEntry]

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor of its entry's shape; all its numbers are finite."""
        ...


class TensorFolder:
    """The tensors of a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards; or those
    of another single file."""

    def __init__(self, folder: Path, file: str | None = None) -> None:
        """Reads the names and shapes alone.

        Raises:
            UserError: there are no such files, one is damaged or missing, or the index leads out of the folder.
        """
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self._open: dict[str, Any] = {}
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}
        for name, listed in (_files(folder) if file is None else {file: set[str]()}).items():
            for key, entry in self._read_header(name).items():
                if key in self.entries:
                    raise UserError(f"{folder}: {key} is in {self.entries[key].file} and in {name}; keep one")
                self.entries[key] = entry
            if missing := sorted(listed - self.entries.keys()):
                raise UserError(f"{folder / name}: lacks {missing[0]}, which {INDEX} says it has; download it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: types.TracebackType | None
    ) -> None:
        self._open.clear()

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor, in its own number format.

        Raises:
            UserError: it is not of a format in `DTYPES`, or holds a number that is not finite.
        """
        entry = self.entries[name]
        place = f"{self.folder / entry.file}: {name}"
        if entry.dtype not in DTYPES:
            raise UserError(f"{place} is in {entry.dtype}; must be one of {', '.join(DTYPES)}: convert it first")
        values = self.read_bytes(name, entry.file).view(DTYPES[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "F64":  # every parameter is float32
            as_format(place, values, np.dtype(np.float32))
        return self._finite(name, values)

    def _finite(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return require_finite(f"{self.folder / self.entries[name].file}: {name}", values)

    def read_bytes(self, name: str, file: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor in a file that `entries` have, or had, where its header says that they are.

        The package, which has checked the header, would map the whole file into memory.
        """
        with (self.folder / file).open("rb") as stream:
            if file not in self._headers:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[file] = 8 + length, json.loads(stream.read(length))
            start, header = self._headers[file]
            begin, end = header[name]["data_offsets"]
            return np.fromfile(stream, np.uint8, end - begin, offset=start + begin - stream.tell())

    def _opened(self, name: str) -> Any:
        if name not in self._open:
            try:
                import safetensors
            except ImportError as error:
                raise UserError(
                    f"{self.folder / name}: needs the package safetensors; install it: pip install -e '.[weights]'"
                ) from error
            try:
                self._open[name] = safetensors.safe_open(self.folder / name, framework="np").__enter__()
            except (safetensors.SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{self.folder / name}: no safetensors file ({reason}); download it again") from error
        return self._open[name]

    def _read_header(self, name: str) -> dict[str, TensorEntry]:
        file = self._opened(name)
        found = {}
        for key in file.keys():  # noqa: SIM118  it is no dict
            part = file.get_slice(key)
            found[key] = TensorEntry(name, tuple(part.get_shape()), part.get_dtype())
        return found


def require_finite(place: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values. Raises UserError where a number is not finite."""
    if not np.isfinite(values).all():
        raise UserError(f"{place} holds numbers that are not finite; take another copy of the model")
    return values


def as_format(place: str, values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The same values in a number format. Raises UserError where one is not finite, or too large for it."""
    with np.errstate(over="ignore"):
        found = values.astype(dtype, copy=False)
    if not np.isfinite(found).all():
        require_finite(place, values)
        largest = np.abs(values[~np.isfinite(found)]).max()
        raise UserError(
            f"{place} holds {largest:g}, more than {dtype.name} has room for, {float(ml_dtypes.finfo(dtype).max):g}; "
            "take a format with a wider range, or another copy of the model"
        )
    return found


def _files(folder: Path) -> dict[str, set[str]]:
    """The files to read, and which tensors the index says that each has."""
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX, "an index of safetensors files").get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX}: weight_map must be an object with a file for each tensor")
        files: dict[str, set[str]] = {}
        for key, name in index.items():
            if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
                raise UserError(
                    f"{folder / INDEX}: weight_map.{key} = {name!r} must be the name of a file in this folder"
                )
            files.setdefault(name, set()).add(key)
        return dict(sorted(files.items()))
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    if pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
        raise UserError(
            f"{pickles[0]}: pickled weights can run code when they are read: they are refused; take the safetensors "
            "files of the model, or write them with its own library (save_pretrained of transformers)"
        )
    raise UserError(f"{folder}: holds no {SINGLE} and no {INDEX}; name the folder of a downloaded model")


class Spec(NamedTuple):
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[npt.NDArray[Any]],
    shard_bytes: int = SHARD_BYTES,
    single: str = SINGLE,
) -> None:
    """Write tensors of these names in their order, one at a time, into one file or several with an index; `single` is
    the name of one."""
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(one.n_bytes for one in shards[-1].values()) >= shard_bytes:
            shards.append({})
        shards[-1][name] = spec
    n, values = len(shards), iter(tensors)
    names = [single] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(_header(shard))
            for (key, spec), tensor in zip(shard.items(), values, strict=False):
                assert (tensor.shape, tensor.dtype) == spec, f"{key}: {tensor.shape} {tensor.dtype}, announced {spec}"
                stream.write(np.ascontiguousarray(tensor).view(np.uint8).data)
    if n > 1:
        index = {
            "metadata": {"total_size": sum(spec.n_bytes for spec in specs.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: Mapping[str, Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    for (name, spec), begin in zip(shard.items(), _offsets(shard.values()), strict=True):
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.n_bytes],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _offsets(specs: Iterable[Spec]) -> Iterator[int]:
    at = 0
    for spec in specs:
        yield at
        at += spec.n_bytes
