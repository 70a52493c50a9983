"""Where text comes from, how it becomes tokens, and how batches are drawn from it."""

from __future__ import annotations

import enum
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import (
    BelowOne,
    Changes,
    Filled,
    NotEmpty,
    NotNegative,
    PathName,
    Positive,
    Range,
    Seed,
    config,
    shown,
)
from maxlm.config.predictions import Prediction
from maxlm.config.purposes import Counted, Purpose

BYTE_ENDS = ("<|bos|>", "<|eos|>")
"""Names of the ids before and after a document, where tokens are bytes."""


def _refuse_twice(key: str, names: tuple[str, ...]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{key}: {shown(twice[0])} is there twice; name each token once")


@config("data.datasets[].prepare.tokenizer.", changes=Changes.NOTHING)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then the special ids. Needs no file."""

    special_tokens: tuple[NotEmpty[str], ...] = ()
    """Names of more special tokens, which no text spells; their ids come after those of bos and eos."""

    def __post_init__(self) -> None:
        _refuse_twice("data.datasets[].prepare.tokenizer.special_tokens", (*BYTE_ENDS, *self.special_tokens))


@config("data.datasets[].prepare.tokenizer.", changes=Changes.NOTHING)
class SentencePieceTokenizer:
    """A sentencepiece model file."""

    path: PathName
    """The file, which sentencepiece wrote."""


@config("data.datasets[].prepare.tokenizer.", changes=Changes.NOTHING)
class HuggingFaceTokenizer:
    """A `tokenizer.json` as the `tokenizers` library writes it, or the `qwen.tiktoken` of Qwen 1."""

    path: PathName
    """The file."""
    eos: NotEmpty[str] | None = None
    """The token that ends a document, as the file spells it; None: found by its name, see docs/data.md."""
    bos: str | None = None
    """The token that begins a document; empty: none; None: found by its name."""


class PieceModel(enum.Enum):
    """How sentencepiece chooses its pieces."""

    BPE = "bpe"
    UNIGRAM = "unigram"


@config("data.datasets[].prepare.tokenizer.", changes=Changes.NOTHING)
class TrainSentencePiece:
    """Train a sentencepiece model on the documents before tokenising them."""

    vocab_size: Positive[int] = 32_000
    """Pieces to learn, special ones included."""
    model: PieceModel = PieceModel.BPE
    """How sentencepiece chooses its pieces."""
    split_digits: bool = True
    """Every digit is a piece of its own (as in LLaMA)."""
    byte_fallback: bool = True
    """Spell characters outside the vocabulary in bytes, so that nothing is unknown."""
    whitespace_pieces: bool = True
    """Allow pieces that are runs of spaces, as code needs."""
    user_symbols: tuple[str, ...] = ()
    """Strings that are always one piece."""
    special_tokens: tuple[NotEmpty[str], ...] = ()
    """Names of pieces that no text spells: what a prediction needs (`special_tokens(prediction)`)."""
    max_sentences: Positive[int] = 1_000_000
    """Lines sampled for training."""
    seed: Seed = 0
    """Which lines are sampled."""

    def __post_init__(self) -> None:
        usual = ("<unk>", "<s>", "</s>")
        _refuse_twice(
            "data.datasets[].prepare.tokenizer.special_tokens", (*usual, *self.user_symbols, *self.special_tokens)
        )


TokenizerConfig = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer
TokenizerSource = TokenizerConfig | TrainSentencePiece


@config("data.datasets[].prepare.documents.", changes=Changes.NOTHING)
class StandardLibrary:
    """The Python standard library's own sources on this machine: real text that needs no download."""


@config("data.datasets[].prepare.documents.", changes=Changes.NOTHING)
class Files:
    """Files and folders (searched recursively); the ending of a name says how it is read.

    `.jsonl`, `.ndjson`: one document a line under `text_key`; `.json`: one an object. `.csv`, `.tsv`, and `.parquet`
    (extra `hub`): one a row. Anything else: one UTF-8 document a file. All but parquet may be compressed: `.gz`,
    `.bz2`, `.xz`, `.zst` (extra `hub`).
    """

    paths: Annotated[tuple[PathName, ...], Filled(note="name files or folders")]
    """Files and folders."""
    pattern: NotEmpty[str] = "*"
    """Names taken from folders, as in the shell."""
    text_key: NotEmpty[str] = "text"
    """Key or column of the text in JSON, CSV, TSV and parquet files."""


@config("data.datasets[].prepare.documents.", changes=Changes.NOTHING)
class HuggingFaceDataset:
    """A data set of the Hugging Face hub or a local one (extra `hub`)."""

    name: NotEmpty[str]
    """As the hub or `datasets.load_dataset` knows it."""
    subset: NotEmpty[str] | None = None
    """Configuration of the data set; None: its default."""
    split: NotEmpty[str] = "train"
    """Split to read."""
    text_key: NotEmpty[str] = "text"
    """Column of the text."""


@config("data.datasets[].prepare.documents.", changes=Changes.NOTHING)
class Conversations:
    """Records in JSON (`.jsonl`, `.ndjson`, `.json`, compressed or not) or parquet, each an object: a conversation, or
    a prompt with what is said of its answers. Formats are recognised by their keys, see docs/posttrain.md."""

    paths: Annotated[tuple[PathName, ...], Filled(note="name files or folders")]
    """Files and folders."""
    pattern: NotEmpty[str] = "*"
    """Names taken from folders, as in the shell."""
    purpose: Purpose = Purpose.SFT
    """What they are read for."""
    counted: Counted = Counted.ANSWERS
    """Which tokens of a conversation the loss counts."""
    template: NotEmpty[str] | None = None
    """How a conversation becomes text: the name of a built-in template (chatml, llama2, llama3, mistral, qwen, zephyr,
    plain, raw), or a Jinja file; None: the template that the tokenizer came with, or `plain` if it has none."""
    classes: tuple[str, ...] = ()
    """Names of classes, where labels are names; the first is class 0."""
    max_tokens: Positive[int] | None = None
    """Longer conversations lose their oldest turns; None: none does before a window ends. A prompt that is too long
    with its last turn alone is refused."""

    def __post_init__(self) -> None:
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise UserError(
                f"data.datasets[].prepare.documents.classes = {shown(self.classes)} has {twice[0]!r} twice; name "
                "each class once"
            )


Documents = StandardLibrary | Files | HuggingFaceDataset | Conversations


@config("data.datasets[].prepare.", changes=Changes.NOTHING)
class PrepareConfig:
    """From documents to tokenised shards."""

    documents: Documents
    """Where the text comes from."""
    tokenizer: TokenizerSource
    """What makes tokens of it: a tokenizer, or how to train one on the documents first."""
    validation_fraction: BelowOne = 0.01
    """Share of the documents held out; chosen by a hash of the text, so that it never changes. Of a single document:
    of its text, at the end."""
    shard_tokens: Positive[int] = 1 << 26
    """Tokens in one shard file, about."""
    workers: Annotated[int, Range(ge=0, note="0 means one for each core")] = 0
    """Tokenising processes; 0: one for each core."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of counting it."""


@config("data.datasets[].", changes=Changes.NOTHING)
class Dataset:
    """One prepared data set and its share of the mixture."""

    path: PathName
    """Folder that `python -m maxlm.data prepare` wrote."""
    weight: Annotated[NotNegative[float], Changes.IDENTITY] = 1.0
    """Share of the windows drawn from it, relative to the other data sets; 0: none, before a phase says otherwise. Each
    one runs through its own epochs."""
    predict: Annotated[Prediction | None, Changes.IDENTITY] = None
    """What is asked of its texts, where that differs from the others' (`task.predict`): so instructions can stand among
    running text; None: what the task says."""
    prepare: PrepareConfig | None = None
    """How to make the folder; training makes it first if it is not there."""


@config("data.past[].", changes=Changes.IDENTITY)
class Stretch:
    """Windows that are behind, one after the other."""

    windows: NotNegative[int]
    """How many, of all data sets together."""
    seq_len: Positive[int]
    """Tokens of each."""
    weights: tuple[NotNegative[float], ...]
    """Of the data sets, as they were drawn."""
    steps: NotNegative[int] = 0
    """Steps of this run that read them; 0: no step of it did."""


@config("data.", changes=Changes.IDENTITY)
class DataConfig:
    """What a run reads: batch number i is a function of this, train.batch_size, train.seq_len and i alone."""

    datasets: Annotated[tuple[Dataset, ...], Filled(note="name at least one prepared folder")]
    """The data sets to mix; more are added in the config file."""
    seed: Seed = 0
    """Shuffling and mixing."""
    verify: Annotated[bool, Changes.NOTHING] = True
    """Compare every shard's checksum with the folder's record before the first step."""
    past: tuple[Stretch, ...] = ()
    """What is not read again: training begins after it. `train.phases` add to it; a run that starts from another one's
    parameters, in the midst of the same data, says here what that has read."""

    def __post_init__(self) -> None:
        if not any(self.weights):
            raise UserError("data.datasets: every weight is 0, so that nothing is read; give one of them at least 1.0")
        for i, stretch in enumerate(self.past):
            if len(stretch.weights) != len(self.datasets) or not any(stretch.weights):
                raise UserError(
                    f"data.past.{i}.weights = {shown(stretch.weights)} must have a number for each of the "
                    f"{len(self.datasets)} data.datasets, one of them above 0"
                )

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the data sets."""
        return tuple(dataset.weight for dataset in self.datasets)
