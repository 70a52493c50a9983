"""Where text comes from, how it becomes tokens, and how batches are drawn from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from maxlm.config.errors import UserError, require_positive


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then the special ids. Needs no file."""


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer:
    """A sentencepiece model file."""

    path: str


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json` as the `tokenizers` library writes it."""

    path: str


class PieceModel(enum.Enum):
    """How sentencepiece chooses its pieces."""

    BPE = "bpe"
    UNIGRAM = "unigram"


@dataclass(frozen=True, kw_only=True)
class TrainSentencePiece:
    """Train a sentencepiece model on the documents before tokenising them."""

    vocab_size: int = 32_000
    model: PieceModel = PieceModel.BPE
    split_digits: bool = True
    """Every digit is a piece of its own (as in LLaMA)."""
    byte_fallback: bool = True
    """Spell characters outside the vocabulary in bytes, so that nothing is unknown."""
    whitespace_pieces: bool = True
    """Allow pieces that are runs of spaces, as code needs."""
    user_symbols: tuple[str, ...] = ()
    """Strings that are always one piece."""
    max_sentences: int = 1_000_000
    """Lines sampled for training."""
    seed: int = 0


TokenizerConfig = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer
TokenizerSource = TokenizerConfig | TrainSentencePiece


@dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """The Python standard library's own sources on this machine: real text that needs no download."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files and folders (searched recursively); the ending of a name says how it is read.

    `.jsonl`, `.jsonl.gz`, `.jsonl.zst`: one document a line under `text_key`. `.parquet` (extra `hub`): one a row.
    Anything else: one UTF-8 document a file.
    """

    paths: tuple[str, ...]
    pattern: str = "*"
    """Names taken from folders, as in the shell."""
    text_key: str = "text"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceDataset:
    """A data set of the Hugging Face hub or a local one (extra `hub`)."""

    name: str
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"


Documents = StandardLibrary | Files | HuggingFaceDataset


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From documents to tokenised shards."""

    documents: Documents
    tokenizer: TokenizerSource
    validation_fraction: float = 0.01
    """Share of the documents held out; chosen by a hash of the text, so that it never changes."""
    shard_tokens: int = 1 << 26
    """Tokens in one shard file, about."""
    workers: int = 0
    """Tokenising processes; 0: one for each core."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of counting it."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"prepare.validation_fraction = {self.validation_fraction} must lie in [0, 1)")
        require_positive("prepare.shard_tokens", self.shard_tokens)
        if self.workers < 0:
            raise UserError(f"prepare.workers = {self.workers} must not be negative; 0 means one for each core")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One prepared data set and its share of the mixture."""

    path: str
    """Folder that `python -m maxlm.data prepare` wrote."""
    weight: float = 1.0
    """Share of the windows drawn from it, relative to the other data sets. Each one runs through its own epochs."""
    prepare: PrepareConfig | None = None
    """How to make the folder; training makes it first if it is not there."""

    def __post_init__(self) -> None:
        require_positive("data.datasets[].weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads: batch number i is a function of this, train.batch_size, train.seq_len and i alone."""

    datasets: tuple[Dataset, ...]
    seed: int = 0
    """Shuffling and mixing."""
    verify: bool = True
    """Compare every shard's checksum with the folder's record before the first step."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise UserError("data.datasets is empty; name at least one prepared folder")
