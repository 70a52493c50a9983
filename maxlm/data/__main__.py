"""`python -m maxlm.data`: prepare data sets, train tokenizers, and report how well they compress."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

from dataclasses import field
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import (
    ByteTokenizer,
    Documents,
    Files,
    HuggingFaceDataset,
    HuggingFaceTokenizer,
    PrepareConfig,
    SentencePieceTokenizer,
    StandardLibrary,
    TokenizerConfig,
    TrainSentencePiece,
    UserError,
)
from maxlm.config.cli import load_config, parse, run_command
from maxlm.config.fields import BelowOne, NotEmpty, PathName, Positive, Range, config

_PROG = "python -m maxlm.data"
_USAGE = f"""From documents to prepared folders of tokens.

{_PROG} prepare PATH... --out DIR        tokenise files and folders (--help lists all keys)
{_PROG} prepare --config configs/x.py    prepare what a run's config names
{_PROG} tokenizer train PATH... --out DIR --vocab_size 32000
{_PROG} tokenizer report PATH... --tokenizer DIR

Without PATH the documents are the Python standard library's own sources. --debug shows tracebacks."""
_TRAIN, _BYTES = "train", "bytes"


@config("--")
class Input:
    """Which documents; the standard library's if nothing is named."""

    paths: tyro.conf.Positional[tuple[PathName, ...]] = ()
    """Files and folders."""
    stdlib: bool = False
    """The Python standard library's own sources."""
    hf: NotEmpty[str] | None = None
    """A Hugging Face data set."""
    subset: NotEmpty[str] | None = None
    """Subset of the Hugging Face data set."""
    split: NotEmpty[str] = HuggingFaceDataset.split
    """Split of the Hugging Face data set."""
    pattern: NotEmpty[str] = Files.pattern
    """Names taken from folders, as in the shell."""
    text_key: NotEmpty[str] = Files.text_key
    """Key or column of the text in JSON lines, parquet files and Hugging Face data sets."""

    def documents(self) -> Documents:
        if bool(self.paths) + self.stdlib + (self.hf is not None) > 1:
            raise UserError(
                "PATH, --stdlib and --hf are three different sources; name one, and mix data sets by weight"
            )
        if self.paths:
            return Files(paths=self.paths, pattern=self.pattern, text_key=self.text_key)
        if self.hf is not None:
            return HuggingFaceDataset(name=self.hf, subset=self.subset, split=self.split, text_key=self.text_key)
        return StandardLibrary()


@config("--")
class Prepare:
    """Where documents, tokenizer and shards are, and how they are cut."""

    input: tyro.conf.OmitArgPrefixes[Input] = field(default_factory=Input)
    """Which documents."""
    out: PathName | None = None
    """Folder to write."""
    config: PathName | None = None
    """Prepare the data sets of this run's config instead; no other key goes with it."""
    tokenizer: PathName = _TRAIN
    """`train`, `bytes`, a .model file, a tokenizer.json, or a folder that `tokenizer train` wrote."""
    train: TrainSentencePiece = field(default_factory=TrainSentencePiece)
    """How the tokenizer is trained."""
    validation_fraction: BelowOne = PrepareConfig.validation_fraction
    """Share of the documents held out; chosen by a hash of the text."""
    shard_tokens: Positive[int] = PrepareConfig.shard_tokens
    """Tokens in one shard file, about."""
    workers: Annotated[int, Range(ge=0, note="0 means one for each core")] = PrepareConfig.workers
    """Tokenising processes; 0: one for each core."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of counting it."""


@config("--")
class Train:
    """On which documents a tokenizer is trained, and how."""

    input: tyro.conf.OmitArgPrefixes[Input] = field(default_factory=Input)
    """Which documents."""
    out: PathName
    """Folder to write the tokenizer to."""
    train: tyro.conf.OmitArgPrefixes[TrainSentencePiece] = field(default_factory=TrainSentencePiece)
    """How it is trained."""
    max_bytes: Positive[int] = 20_000_000
    """Text that the report measures, from the beginning of the input."""


@config("--")
class TokenizerReport:
    """Which tokenizer is measured, on which documents."""

    input: tyro.conf.OmitArgPrefixes[Input] = field(default_factory=Input)
    """Which documents."""
    tokenizer: PathName
    """`bytes`, a .model file, a tokenizer.json, or a folder with a tokenizer: one that `tokenizer train` wrote, or
    the folder `tokenizer` in prepared data."""
    max_bytes: Positive[int] = 20_000_000
    """Text to measure, from the beginning of the input."""


def main(argv: list[str]) -> None:
    arguments = [argument for argument in argv if argument != "--debug"]
    match arguments:
        case [] | ["-h" | "--help"] | ["tokenizer"] | ["tokenizer", "-h" | "--help"]:
            print(_USAGE)
        case ["prepare", *rest]:
            _prepare(rest)
        case ["tokenizer", "train", *rest]:
            _train(parse(Train, rest, prog=f"{_PROG} tokenizer train", description="Train a tokenizer.", flags=True))
        case ["tokenizer", "report", *rest]:
            description = "Measure a tokenizer's compression."
            _report(parse(TokenizerReport, rest, prog=f"{_PROG} tokenizer report", description=description, flags=True))
        case _:
            words = " ".join(arguments[:2])
            raise UserError(f"unknown command {words!r}; use prepare, tokenizer train or tokenizer report")


def _prepare(argv: list[str]) -> None:
    command = parse(Prepare, argv, prog=f"{_PROG} prepare", description="Tokenise documents.", flags=True)
    from maxlm.data.prepare import ensure_prepared, prepare  # here, so that --help is instant

    if command.config is not None:
        if command != Prepare(config=command.config):
            raise UserError(f"--config {command.config} says how to prepare the data; leave out all other keys")
        data = load_config(command.config).data
        ensure_prepared(data)
        for dataset in data.datasets:
            _show(Path(dataset.path))
        return
    if command.out is None:
        raise UserError("--out is missing; name the folder to write, for example --out data/mine")
    config = PrepareConfig(
        documents=command.input.documents(),
        tokenizer=command.train if command.tokenizer == _TRAIN else _named_tokenizer(command.tokenizer),
        validation_fraction=command.validation_fraction,
        shard_tokens=command.shard_tokens,
        workers=command.workers,
        strict=command.strict,
    )
    prepare(config, Path(command.out))
    _show(Path(command.out))


def _show(folder: Path) -> None:
    """The figures of a finished folder."""
    from maxlm.data.shards import Split, open_prepared

    info = open_prepared(folder, verify=False).info
    print(f"{folder}: vocabulary {info.vocab_size:,}, tokenizer {info.tokenizer_fingerprint[:12]}, {info.dtype}")
    for split in Split:
        tokens, documents, size = info.tokens(split), info.documents(split), info.text_bytes(split)
        ratio = f", {size / tokens:.3f} bytes/token" if tokens else ""
        print(f"  {split.value:<11}{documents:>12,} documents {tokens:>16,} tokens {size:>16,} bytes of text{ratio}")
    if info.unreadable or info.empty:
        print(f"  left out: {info.unreadable:,} unreadable and {info.empty:,} empty documents")


def _train(command: Train) -> None:
    from maxlm.data.sources import Unreadable, iterate_documents
    from maxlm.data.train_tokenizer import train_sentencepiece

    out, unreadable = Path(command.out), Unreadable()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; name a new folder")
    texts = (document.text for document in iterate_documents(command.input.documents(), unreadable))
    train_sentencepiece(command.train, texts, out)
    print(f"wrote {out}")
    _report(TokenizerReport(input=command.input, tokenizer=command.out, max_bytes=command.max_bytes))


def _report(command: TokenizerReport) -> None:
    from maxlm.data.sources import Unreadable, first_bytes, iterate_documents
    from maxlm.data.tokenizers import open_tokenizer
    from maxlm.data.train_tokenizer import measure, report

    tokenizer, unreadable = open_tokenizer(_named_tokenizer(command.tokenizer)), Unreadable()
    documents = iterate_documents(command.input.documents(), unreadable)
    print(report(tokenizer, measure(tokenizer, first_bytes(documents, command.max_bytes))))
    if unreadable.count:
        print(unreadable.summary())


def _named_tokenizer(name: str) -> TokenizerConfig:
    """The tokenizer that a word on the command line means."""
    from maxlm.data.tokenizers import saved_tokenizer

    path = Path(name)
    if name == _BYTES:
        return ByteTokenizer()
    if path.is_dir():
        return saved_tokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path=name)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path=name)
    raise UserError(
        f"--tokenizer {name}: must be train, bytes, a .model file, a .json file or a folder with a tokenizer"
    )


if __name__ == "__main__":
    run_command(main)
