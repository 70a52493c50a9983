"""GGUF files of llama.cpp: metadata and tensors, read where they lie in a mapped file.

The `gguf` package knows the formats of numbers and dequantises them. Its reader believes each length that a file says
(a list of 2^60 numbers keeps it busy for ever), so the header is read here, each length held against the file's end.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.json_file import kind_of
from maxlm.hub.tensor_files import TensorEntry, require_finite

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of values, as `struct` writes them."""
_FLOAT, _STRING, _LIST = 6, 8, 9
_MAX_DIMS = 4
BETTER = "another GGUF file of the model, of a newer llama.cpp"
"""What to take where something is missing."""
_LEAST_VALUE, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes of the shortest value with its key, and of the shortest entry of a tensor."""


class _Place(NamedTuple):
    """Of a tensor in the file."""

    kind: Any
    """Number format, a gguf.GGMLQuantizationType."""
    begin: int
    n_bytes: int


class GgufFile:
    """A file with its metadata, and its tensors as float32. Their dims are in numpy's order, the reverse of its own."""

    def __init__(self, path: Path) -> None:
        """Reads the header alone.

        Raises:
            UserError: it is no whole GGUF file, it is a part of a model, or it has numbers in a format that the package
                gguf cannot dequantise.
        """
        self.path = path
        self._bytes = _mapped(path)
        header = _Header(path, self._bytes)
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, _Place] = {}
        n_tensors, n_values = header.counts()
        for _ in range(n_values):
            key = header.string("a key")
            if key in self.metadata:
                raise header.damaged(f"the key {key!r} stands twice")
            self.metadata[key] = header.value(key, header.take("I", key))
        if (parts := self.metadata.get("split.count", 1)) != 1:
            raise UserError(f"{path}: is one of {parts} parts of a model; join them (llama-gguf-split --merge)")
        listed = [header.tensor() for _ in range(n_tensors)]
        begin = -(-header.at // self._alignment) * self._alignment
        for name, dims, number, offset in listed:
            self._add(header, name, dims, number, begin + offset)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor, or a part of one.

        Raises:
            UserError: it holds a number that is not finite.
        """
        kind, shape = self._places[name].kind, self.entries[name].shape
        raw = self.bytes_of(name).reshape(*shape[:-1], -1)
        with np.errstate(all="ignore"):  # what is not finite is said below
            values = import_gguf(self.path).dequantize(raw, kind)
        return require_finite(f"{self.path}: {name}", values)

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """As they lie in the file."""
        _, begin, n_bytes = self._places[name]
        return self._bytes[begin : begin + n_bytes]

    def part(self, name: str, number: int, called: str) -> None:
        """Make an entry of its own, `called`, of a part of a tensor along the first dim."""
        kind, begin, n_bytes = self._places[name]
        shape = self.entries[name].shape
        size = n_bytes // shape[0]
        self.entries[called] = self.entries[name]._replace(shape=shape[1:])
        self._places[called] = _Place(kind, begin + number * size, size)

    @property
    def _alignment(self) -> int:
        found = self.metadata.get("general.alignment", 32)
        if not isinstance(found, int) or found < 1 or found & (found - 1):
            raise UserError(f"{self.path}: general.alignment = {found!r} must be a power of 2; download it again")
        return found

    def _add(self, header: _Header, name: str, dims: tuple[int, ...], number: int, begin: int) -> None:
        gguf = import_gguf(self.path)
        if name in self.entries:
            raise header.damaged(f"the tensor {name!r} stands twice")
        if number not in {kind.value for kind in gguf.GGMLQuantizationType}:
            raise UserError(f"{self.path}: {name} is in the format {number}, which the package gguf does not know")
        kind = gguf.GGMLQuantizationType(number)
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros(n_bytes, np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: {name} is in {kind.name}, which the package gguf cannot dequantise; take the model in "
                "another format, such as Q8_0"
            ) from error
        if dims[0] % block:
            raise header.damaged(f"{name} has rows of {dims[0]}, {kind.name} has blocks of {block}")
        n_bytes = math.prod(dims) // block * n_bytes
        if begin % self._alignment:
            raise header.damaged(f"{name} lies at {begin}, no multiple of {self._alignment}")
        if begin + n_bytes > len(self._bytes):
            raise header.damaged(f"{name} ends at byte {begin + n_bytes:,}, the file at {len(self._bytes):,}")
        self.entries[name] = TensorEntry(self.path.name, dims[::-1], kind.name)
        self._places[name] = _Place(kind, begin, n_bytes)


def import_gguf(path: Path) -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: needs the package gguf; install it: pip install -e '.[weights]'") from error
    return gguf


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: is a folder, must be a GGUF file; name the file in it")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is {kind_of(mode)}, must be a GGUF file")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: no GGUF file (it is empty); download it again")
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a GGUF file") from error


class _Header:
    """What stands before the tensors, value by value."""

    def __init__(self, path: Path, content: npt.NDArray[np.uint8]) -> None:
        self._path, self._content = path, content
        self.at = 0

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self._path}: no whole GGUF file ({why}); download it again")

    def counts(self) -> tuple[int, int]:
        """Of tensors and values, after looking at the magic number and the version."""
        if (magic := bytes(self._content[:4])) != _MAGIC:
            raise UserError(f"{self._path}: no GGUF file (it begins with {magic!r}, not {_MAGIC!r}); name one")
        self.at = 4
        if (version := self.take("I", "its version")) not in _VERSIONS:
            other = ", or big-endian," if version & 0xFFFF == 0 else ""
            raise UserError(f"{self._path}: GGUF version {version}{other} is not supported; must be 2 or 3")
        n_tensors, n_values = self.take("Q", "the number of tensors"), self.take("Q", "the number of values")
        for what, count, least in (("tensors", n_tensors, _LEAST_TENSOR), ("values", n_values, _LEAST_VALUE)):
            if count * least > self.left:
                raise self.damaged(f"it says that it has {count:,} {what}, in {self.left:,} bytes")
        return n_tensors, n_values

    @property
    def left(self) -> int:
        return len(self._content) - self.at

    def skip(self, n_bytes: int, what: str) -> int:
        """Where `n_bytes` begin, which are taken."""
        if n_bytes > self.left:
            raise self.damaged(f"{what} has {n_bytes:,} bytes, {self.left:,} are left")
        self.at += n_bytes
        return self.at - n_bytes

    def take(self, kind: str, what: str) -> Any:
        return struct.unpack_from(f"<{kind}", self._content.data, self.skip(struct.calcsize(f"<{kind}"), what))[0]

    def string(self, what: str) -> str:
        length = self.take("Q", what)
        begin = self.skip(length, what)
        try:
            return self._content[begin : begin + length].tobytes().decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _LIST:
            return self._list(key)
        if kind not in _SCALARS:
            raise self.damaged(f"{key} is of the kind {kind}")
        value = self.take(_SCALARS[kind], key)
        return as_written(value) if kind == _FLOAT else value

    def _list(self, key: str) -> list[Any]:
        kind, length = self.take("I", key), self.take("Q", key)
        if kind == _STRING:
            if length * 8 > self.left:
                raise self.damaged(f"{key} has {length:,} strings, {self.left:,} bytes are left")
            return [self.string(key) for _ in range(length)]
        if kind not in _SCALARS:
            raise self.damaged(f"{key} is a list of the kind {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        begin = self.skip(length * dtype.itemsize, key)
        values: list[Any] = self._content[begin : self.at].view(dtype).tolist()
        return values

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, dims, number of the format, and where it begins after the header."""
        name = self.string("the name of a tensor")
        if not 1 <= (n_dims := self.take("I", name)) <= _MAX_DIMS:
            raise self.damaged(f"{name} has {n_dims} dims, may have 1 to {_MAX_DIMS}")
        dims = tuple(self.take("Q", name) for _ in range(n_dims))
        if 0 in dims:
            raise self.damaged(f"{name} has the dims {list(dims)}")
        return name, dims, self.take("I", name), self.take("Q", name)


def as_written(value: float) -> float:
    """The shortest decimal that is this float32: what stood in the config.json that it was made from."""
    return float(str(np.float32(value)))
