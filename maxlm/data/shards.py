"""The folder that `prepare` writes: its record, its shard files, and their token stream.

dataset.json             the record (`DatasetInfo`), written last: a folder without it is not finished
tokenizer/               the tokenizer, as `Tokenizer.save` writes it
train-00000.tokens       token ids of whole documents, one after the other: uint16 or uint32, little endian
train-00000.offsets      where each document starts in that file, in tokens: int64, little endian
validation-00000.tokens  ... and so on

Of conversations a document is one text of a record (`texts.py`), and there are also
chat/                    the template that they were written with, as a published model's folder has it
train-00000.counts       of each token whether the loss counts it: uint8
train-00000.texts        of each text whether it is the first of a record, and its value: uint8, float32, little endian
Of prompts there are also
train-00000.records      of each prompt its record, as it was read: a line of JSON
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from maxlm.config import Conversations, Documents, PrepareConfig, Purpose, UserError, serialize
from maxlm.config.fields import Range, config
from maxlm.data.shard_bytes import REMEDY, read_numbers
from maxlm.data.tokenizers import Tokenizer, load_tokenizer

RECORD = "dataset.json"
UNFINISHED = "prepare.json"
"""Stands in a folder until the record is written: the config that it is made with."""
TOKENIZER = "tokenizer"
CHAT = "chat"
FORMAT_VERSION = 1
_OFFSET = np.dtype("<i8")
_COUNTS = np.dtype("<u1")
_BYTE = np.dtype("<u1")
TEXT = np.dtype([("begins", "<u1"), ("value", "<f4")])
"""What the file of texts has of each."""
_STRIDE = 512
"""Offsets of a file of which one is kept in memory; the ones between are read as needed: 4 KiB."""
_SCANNED = 1 << 22
"""Bytes of a file of records that are looked through at a time."""

Count = Annotated[int, Range(ge=0, lt=2**63)]


class Split(enum.Enum):
    """The two parts of a data set."""

    TRAIN = "train"
    VALIDATION = "validation"


@config("")
class ShardInfo:
    """Size and checksums of the files of one shard."""

    tokens: Count
    """With bos and eos."""
    documents: Count
    """Documents that begin in it."""
    text_bytes: Count
    """UTF-8 bytes of the documents' text."""
    tokens_sha256: str
    """Of the token file, in hex."""
    offsets_sha256: str
    """Of the offset file, in hex."""
    counted: Count | None = None
    """Tokens that the loss counts; None: all that are not the first of a document."""
    counts_sha256: str | None = None
    """Of the file that says which they are, in hex."""
    texts_sha256: str | None = None
    """Of the file of first texts and values, in hex."""
    records_bytes: Count | None = None
    """Of the file of whole records; None: there is none."""
    records_sha256: str | None = None
    """Of that file, in hex."""

    @property
    def sha256s(self) -> tuple[str | None, ...]:
        """Of its files, in the order of `shard_files`."""
        return self.tokens_sha256, self.offsets_sha256, self.counts_sha256, self.texts_sha256, self.records_sha256


@config("")
class DatasetInfo:
    """The record of a prepared folder."""

    format_version: int = FORMAT_VERSION
    """Of the folder."""
    prepare: PrepareConfig
    """What decided the bytes of the folder."""
    tokenizer_fingerprint: str
    """As `Tokenizer.fingerprint`."""
    vocab_size: Count
    """Ids that the tokenizer has."""
    dtype: str
    """Of the token files: `uint16` or `uint32`."""
    text_sha256: str
    """Of all the documents read, in order, each after its length."""
    unreadable: Count
    """Documents passed over because they could not be read."""
    empty: Count
    """Documents without any text, left out."""
    train: tuple[ShardInfo, ...]
    """In the order of their numbers."""
    validation: tuple[ShardInfo, ...]
    """In the order of their numbers."""
    cut_document: Count | None = None
    """Number, from 0, of the document whose end alone is held out; None: documents are held out whole."""
    tokens_in_all: Count | None = None
    """Of all shards, to notice one that is no longer named here; None: an earlier version wrote this."""
    documents_in_all: Count | None = None
    """Of all shards."""

    @property
    def of_records(self) -> bool:
        """Whether its documents are texts of records."""
        return isinstance(self.prepare.documents, Conversations)

    @property
    def purpose(self) -> Purpose | None:
        """What its records are for; None: it is running text."""
        documents = self.prepare.documents
        return documents.purpose if isinstance(documents, Conversations) else None

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

    def counted(self, split: Split) -> int:
        """Tokens of one split that the loss counts."""
        counted = [shard.counted for shard in self.shards(split)]
        return sum(s.tokens - s.documents if n is None else n for s, n in zip(self.shards(split), counted, strict=True))

    def text_bytes(self, split: Split) -> int:
        """UTF-8 bytes of text of one split, of conversations: of what is counted."""
        return sum(shard.text_bytes for shard in self.shards(split))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type, at least 16 bits wide, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_files(folder: Path, split: Split, number: int) -> tuple[Path, Path, Path, Path, Path]:
    """The files of tokens, offsets, counts, texts and records of a shard, of which it has the first `n_files`."""
    endings = ("tokens", "offsets", "counts", "texts", "records")
    tokens, offsets, counts, texts, records = (folder / f"{split.value}-{number:05d}.{ending}" for ending in endings)
    return tokens, offsets, counts, texts, records


def n_files(documents: Documents) -> int:
    """How many files a shard of such documents has."""
    if not isinstance(documents, Conversations):
        return 2
    return 5 if documents.purpose is Purpose.PROMPTS else 4


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
    _check_complete(folder, info)
    return info


def _check_complete(folder: Path, info: DatasetInfo) -> None:
    """See that the record names all shards.

    Raises:
        UserError: there is another shard, or the sums are not those of the shards.
    """
    remedy = f"restore {RECORD}, or delete the folder and prepare it again"
    for split in Split:
        shards = info.shards(split)
        for file in shard_files(folder, split, len(shards)):
            if file.exists():
                raise UserError(
                    f"{folder / RECORD}: names {len(shards)} {split.value} shards, but {file.name} is there; {remedy}"
                )
    for what, recorded, seen in (
        ("tokens", info.tokens_in_all, sum(map(info.tokens, Split))),
        ("documents", info.documents_in_all, sum(map(info.documents, Split))),
    ):
        if recorded not in (None, seen):
            raise UserError(
                f"{folder / RECORD}: {what}_in_all = {recorded}, but the shards that it names have {seen}; {remedy}"
            )


class Shard:
    """The files of one shard, read where they are needed."""

    def __init__(self, folder: Path, split: Split, number: int, info: ShardInfo, vocab_size: int) -> None:
        self.info = info
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._files = shard_files(folder, split, number)
        self._tokens_file, self._offsets_file, self._counts_file, self._texts_file, self._records_file = self._files

    def tokens(self, first: int, count: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """`[count]`: ids from token number `first` on.

        Raises:
            UserError: one is not in the vocabulary, or the file has become shorter.
            MachineFailure: the disk fails.
        """
        ids = self._read(self._tokens_file, self._dtype, first, count)
        if count and (largest := int(ids.max())) >= self._vocab_size:
            raise UserError(
                f"{self._tokens_file}: holds the id {largest} after token {first}, but the tokenizer has "
                f"{self._vocab_size} ids; {REMEDY}"
            )
        return ids

    def begins(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Which of the `count` tokens from number `first` on, counted from there, begin a document; in order.

        Raises:
            UserError: the offsets cannot be those of this shard, or the file has become shorter.
            MachineFailure: the disk fails.
        """
        low = max(0, int(self._some_offsets.searchsorted(first)) - 1) * _STRIDE
        high = min(self.info.documents, int(self._some_offsets.searchsorted(first + count)) * _STRIDE)
        offsets = self._read(self._offsets_file, _OFFSET, low, max(0, high - low))
        return offsets[(offsets >= first) & (offsets < first + count)] - first

    def document(self, at: int) -> tuple[int, int]:
        """Where the document of token number `at` begins, and where it ends. Otherwise as `begins`."""
        low = (int(self._some_offsets.searchsorted(at, side="right")) - 1) * _STRIDE
        some = self._read(self._offsets_file, _OFFSET, low, min(_STRIDE + 1, self.info.documents - low))
        after = int(some.searchsorted(at, side="right"))
        return int(some[after - 1]), int(some[after]) if after < len(some) else self.info.tokens

    def counts(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """`[count]`: which tokens from number `first` on the loss counts.

        Raises:
            UserError: the file has become shorter.
            MachineFailure: the disk fails.
        """
        if self.info.counted is None:
            return np.ones(count, np.bool_)
        return self._read(self._counts_file, _COUNTS, first, count).astype(np.bool_)

    def offsets(self) -> npt.NDArray[np.int64]:
        """`[documents]`: where each begins. All in memory, as the next one; otherwise as `tokens`."""
        return self._read(self._offsets_file, _OFFSET, 0, self.info.documents)

    def texts(self) -> npt.NDArray[np.void]:
        """`[documents]` of `TEXT`. Of conversations."""
        return self._read(self._texts_file, TEXT, 0, self.info.documents)

    def record(self, number: int) -> dict[str, Any]:
        """Of a prompt the object that it was made of; otherwise as `tokens`."""
        start, stop = (int(at) for at in self._record_starts[number : number + 2])
        try:
            found = json.loads(self._read(self._records_file, _BYTE, start, stop - start).tobytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self._records_file}:{number + 1}: is no object of JSON; {REMEDY}")
        return found

    @functools.cached_property
    def _record_starts(self) -> npt.NDArray[np.int64]:
        """`[documents + 1]`: where each line of the file of records begins, and at the end its size."""
        size, found = self.info.records_bytes or 0, [np.zeros(1, np.int64)]
        for first in range(0, size, _SCANNED):
            part = self._read(self._records_file, _BYTE, first, min(_SCANNED, size - first))
            found.append(np.flatnonzero(part == ord("\n")) + first + 1)
        starts = np.concatenate(found)
        if len(starts) != self.info.documents + 1 or starts[-1] != size:
            raise UserError(
                f"{self._records_file}: has {len(starts) - 1} lines, {self.info.documents} expected; {REMEDY}"
            )
        return starts

    @functools.cached_property
    def _some_offsets(self) -> npt.NDArray[np.int64]:
        offsets = self.offsets()
        last = self.info.tokens
        if not (len(offsets) and offsets[0] == 0 and (np.diff(offsets, append=last) > 0).all()):
            raise UserError(f"{self._offsets_file}: its offsets do not rise from 0 to less than {last}; {REMEDY}")
        return offsets[::_STRIDE].copy()

    def _read(self, file: Path, dtype: np.dtype[Any], first: int, count: int) -> npt.NDArray[Any]:
        return read_numbers(self, file, dtype, first, count)

    def check(self, verify: bool) -> None:
        """Compare sizes, and checksums where `verify`, with the record.

        Raises:
            UserError: a file is missing, cut short or changed.
        """
        tokens, documents = self.info.tokens, self.info.documents
        sizes = [tokens * self._dtype.itemsize, documents * _OFFSET.itemsize, tokens, documents * TEXT.itemsize]
        sizes.append(self.info.records_bytes or 0)
        for file, size, sha256 in zip(self._files, sizes, self.info.sha256s, strict=True):
            if sha256 is None:
                continue
            try:
                seen = os.stat(file).st_size
                if seen != size:
                    raise UserError(f"{file}: {seen} bytes, {RECORD} says {size}; {REMEDY}")
                if verify and (digest := file_sha256(file)) != sha256:
                    raise UserError(
                        f"{file}: has changed: {size} bytes as expected, but SHA-256 {digest[:12]}..., "
                        f"{RECORD} says {sha256[:12]}...; {REMEDY}"
                    )
            except OSError as error:
                raise UserError(
                    f"{file}: cannot be read ({error.strerror}), {size} bytes expected; {REMEDY}"
                ) from error


class TokenStream:
    """All tokens of a split as one sequence, over the borders of its shards."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0] + [shard.info.tokens for shard in shards])
        self._documents = np.cumsum([0] + [shard.info.documents for shard in shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def starts(self) -> npt.NDArray[np.int64]:
        """Where each document begins, and at the end the number of tokens."""
        offsets = [shard.offsets() + start for shard, start in zip(self._shards, self._starts[:-1], strict=True)]
        return np.concatenate([*offsets, self._starts[-1:]])

    def document(self, at: int) -> tuple[int, int]:
        """Where the document of the token at position `at` begins, and where it ends.

        Raises:
            UserError: a shard holds what cannot be, or has become shorter since it was checked.
            MachineFailure: the disk fails.
        """
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        begins, ends = self._shards[number].document(at - int(self._starts[number]))
        return begins + int(self._starts[number]), ends + int(self._starts[number])

    def texts(self) -> npt.NDArray[np.void]:
        """Of each document what `TEXT` says. Of conversations."""
        return np.concatenate([shard.texts() for shard in self._shards] or [np.empty(0, TEXT)])

    def record(self, number: int) -> dict[str, Any]:
        """That of document `number`. Of prompts.

        Raises:
            UserError: the file holds what cannot be, or has become shorter since it was checked.
            MachineFailure: the disk fails.
        """
        shard = int(np.searchsorted(self._documents, number, side="right")) - 1
        return self._shards[shard].record(number - int(self._documents[shard]))

    def read(
        self,
        start: int,
        tokens: npt.NDArray[np.int32],
        begins: npt.NDArray[np.bool_],
        counts: npt.NDArray[np.bool_],
    ) -> None:
        """Fill `tokens[n]` with the ids from position `start` on and `counts[n]` with whether the loss counts them; set
        `begins[n]` where a document begins.

        `begins` must be all False before.

        Raises:
            UserError: a shard holds what cannot be, or has become shorter since it was checked.
            MachineFailure: the disk fails.
        """
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(tokens):
            shard, first = self._shards[number], start + done - int(self._starts[number])
            count = min(len(tokens) - done, shard.info.tokens - first)
            tokens[done : done + count] = shard.tokens(first, count)
            counts[done : done + count] = shard.counts(first, count)
            begins[shard.begins(first, count) + done] = True
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


def check_one_tokenizer(opened: Sequence[Prepared]) -> None:
    """
    Raises:
        UserError: two of them have different ones.
    """
    first = opened[0]
    for other in opened[1:]:
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise UserError(
                f"{other.folder}: its tokenizer ({other.tokenizer.fingerprint[:12]}...) is not that of {first.folder} "
                f"({first.tokenizer.fingerprint[:12]}...); prepare both with the same tokenizer"
            )


def not_finished(folder: Path) -> UserError:
    """What to tell someone whose folder has no record."""
    where = folder if folder.is_absolute() else f"{folder} (in the current folder, {Path.cwd()})"
    return UserError(
        f"{where}: holds no finished data set; make it with: python -m maxlm.data prepare PATH... --out {folder}"
    )


def _shards(folder: Path, info: DatasetInfo, split: Split) -> list[Shard]:
    return [Shard(folder, split, number, shard, info.vocab_size) for number, shard in enumerate(info.shards(split))]
