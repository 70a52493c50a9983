"""The folder that `prepare` writes: its record, its shard files, and their token stream.

dataset.json             the record (`DatasetInfo`), written last: a folder without it is not finished
tokenizer/               the tokenizer, as `Tokenizer.save` writes it
train-00000.tokens       token ids of whole documents, one after the other: uint16 or uint32, little endian
train-00000.offsets      where each document starts in that file, in tokens: int64, little endian
validation-00000.tokens  ... and so on
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import PrepareConfig, UserError, serialize
from maxlm.data.tokenizers import Tokenizer, load_tokenizer

RECORD = "dataset.json"
TOKENIZER = "tokenizer"
FORMAT_VERSION = 1
_OFFSET = np.dtype("<i8")


class Split(enum.Enum):
    """The two parts of a data set."""

    TRAIN = "train"
    VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Size and checksums of one pair of shard files."""

    tokens: int
    """With bos and eos."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    tokens_sha256: str
    offsets_sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The record of a prepared folder."""

    format_version: int = FORMAT_VERSION
    prepare: PrepareConfig
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    """Of the token files: `uint16` or `uint32`."""
    text_sha256: str
    """Of all the documents read, in order, each after its length."""
    unreadable: int
    """Documents passed over because they could not be read."""
    empty: int
    """Documents without any text, left out."""
    train: tuple[ShardInfo, ...]
    validation: tuple[ShardInfo, ...]

    def shards(self, split: Split) -> tuple[ShardInfo, ...]:
        """The shards of one split in the order of their numbers."""
        match split:
            case Split.TRAIN:
                return self.train
            case Split.VALIDATION:
                return self.validation

    def tokens(self, split: Split) -> int:
        """Tokens of one split, with bos and eos."""
        return sum(shard.tokens for shard in self.shards(split))

    def documents(self, split: Split) -> int:
        """Documents of one split."""
        return sum(shard.documents for shard in self.shards(split))

    def text_bytes(self, split: Split) -> int:
        """UTF-8 bytes of text of one split."""
        return sum(shard.text_bytes for shard in self.shards(split))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type, at least 16 bits wide, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_files(folder: Path, split: Split, number: int) -> tuple[Path, Path]:
    """The token file and the offset file of a shard."""
    stem = f"{split.value}-{number:05d}"
    return folder / f"{stem}.tokens", folder / f"{stem}.offsets"


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_info(folder: Path) -> DatasetInfo | None:
    """The record of `folder`, None where it is not there.

    Raises:
        UserError: the record is damaged or of another format version.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        info = serialize.load(DatasetInfo, file)
    except UserError as error:
        raise UserError(
            f"{file}: not a record that this version of maxlm can read ({error}); prepare the data again"
        ) from error
    if info.format_version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {info.format_version}, this version of maxlm reads {FORMAT_VERSION}; "
            "prepare the data again in another folder"
        )
    if info.dtype != token_dtype(info.vocab_size).name:
        raise UserError(
            f"{file}: dtype = {info.dtype} does not go with vocab_size = {info.vocab_size}; prepare the data again"
        )
    return info


class Shard:
    """One pair of shard files, mapped into memory when first read. Pickles without the mapping."""

    def __init__(self, folder: Path, split: Split, number: int, info: ShardInfo, dtype: np.dtype[Any]) -> None:
        self.info = info
        self._dtype = dtype
        self._tokens_file, self._offsets_file = shard_files(folder, split, number)

    @functools.cached_property
    def tokens(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """`[tokens]`: ids."""
        return np.asarray(np.memmap(self._tokens_file, dtype=self._dtype, mode="r"))

    @functools.cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """`[documents]`: where each document starts in `tokens`."""
        return np.asarray(np.memmap(self._offsets_file, dtype=_OFFSET, mode="r"))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("tokens", "offsets")}

    def check(self, verify: bool) -> None:
        """Compare sizes, and checksums where `verify`, with the record.

        Raises:
            UserError: a file is missing, cut short or changed.
        """
        for file, size, sha256 in (
            (self._tokens_file, self.info.tokens * self._dtype.itemsize, self.info.tokens_sha256),
            (self._offsets_file, self.info.documents * _OFFSET.itemsize, self.info.offsets_sha256),
        ):
            remedy = "restore the file, or delete the folder and prepare it again"
            try:
                seen = os.stat(file).st_size
                if seen != size:
                    raise UserError(f"{file}: {seen} bytes, {RECORD} says {size}; {remedy}")
                if verify and (digest := file_sha256(file)) != sha256:
                    raise UserError(
                        f"{file}: has changed: {size} bytes as expected, but SHA-256 {digest[:12]}..., "
                        f"{RECORD} says {sha256[:12]}...; {remedy}"
                    )
            except OSError as error:
                raise UserError(
                    f"{file}: cannot be read ({error.strerror}), {size} bytes expected; {remedy}"
                ) from error


class TokenStream:
    """All tokens of a split as one sequence, over the borders of its shards."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0] + [shard.info.tokens for shard in shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, tokens: npt.NDArray[np.int32], begins: npt.NDArray[np.bool_]) -> None:
        """Fill `tokens[n]` with the ids from position `start` on, and set `begins[n]` where a document begins.

        `begins` must be all False before.
        """
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(tokens):
            shard, first = self._shards[number], start + done - int(self._starts[number])
            count = min(len(tokens) - done, shard.info.tokens - first)
            tokens[done : done + count] = shard.tokens[first : first + count]
            low, high = shard.offsets.searchsorted((first, first + count))
            begins[shard.offsets[low:high] + (done - first)] = True
            done += count
            number += 1


@dataclass(frozen=True)
class Prepared:
    """A finished folder, opened."""

    folder: Path
    info: DatasetInfo
    tokenizer: Tokenizer

    def stream(self, split: Split) -> TokenStream:
        """The tokens of one split."""
        return TokenStream(tuple(_shards(self.folder, self.info, split)))


def open_prepared(folder: Path, *, verify: bool, splits: Sequence[Split] = tuple(Split)) -> Prepared:
    """The data set that `prepare` wrote into `folder`, with the shards of `splits` checked.

    Raises:
        UserError: the folder is not finished; a file is missing, of another size than recorded, or (where `verify`)
            of another checksum; the tokenizer is not the recorded one.
    """
    info = read_info(folder)
    if info is None:
        raise not_finished(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.fingerprint != info.tokenizer_fingerprint:
        raise UserError(
            f"{folder / TOKENIZER}: fingerprint {tokenizer.fingerprint[:12]}..., {folder / RECORD} says "
            f"{info.tokenizer_fingerprint[:12]}...; restore the tokenizer, or delete the folder and prepare it again"
        )
    shards = [shard for split in splits for shard in _shards(folder, info, split)]
    with ThreadPoolExecutor() as pool:  # hashing and reading both leave Python's lock
        list(pool.map(lambda shard: shard.check(verify), shards))
    return Prepared(folder=folder, info=info, tokenizer=tokenizer)


def not_finished(folder: Path) -> UserError:
    """What to tell someone whose folder has no record."""
    return UserError(
        f"{folder}: holds no finished data set; make it with: python -m maxlm.data prepare PATH... --out {folder}"
    )


def _shards(folder: Path, info: DatasetInfo, split: Split) -> list[Shard]:
    dtype = token_dtype(info.vocab_size)
    return [Shard(folder, split, number, shard, dtype) for number, shard in enumerate(info.shards(split))]
