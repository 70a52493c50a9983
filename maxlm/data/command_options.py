"""Options of `python -m maxlm.data` that several of its commands take, and those of tokenizers and mixtures."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

import tyro

from maxlm.config import Documents, Files, HuggingFaceDataset, StandardLibrary, TrainSentencePiece, UserError
from maxlm.config.fields import Filled, Fraction, NotEmpty, NotNegative, PathName, Positive, Range, Seed, config, shown


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
class Train:
    """On which documents a tokenizer is trained, and how."""

    input: tyro.conf.OmitArgPrefixes[Input] = field(default_factory=Input)
    """Which documents."""
    out: PathName
    """Folder to write the tokenizer to."""
    train: tyro.conf.OmitArgPrefixes[TrainSentencePiece] = field(default_factory=TrainSentencePiece)
    """How it is trained."""
    weights: tuple[Positive[float], ...] = ()
    """Train on a mixture: a number for each PATH, its share of the bytes; none: on all of the text."""
    sample_bytes: Positive[int] = 100_000_000
    """Text of such a mixture, at most; less where a PATH has less than its share."""
    max_bytes: Positive[int] = 20_000_000
    """Text that the report measures, from the beginning of the input."""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.input.paths):
            raise UserError(
                f"--weights has {len(self.weights)} numbers for {len(self.input.paths)} PATHs; give one for each"
            )


@config("--")
class TokenizerReport:
    """Which tokenizers are measured, on which documents."""

    input: tyro.conf.OmitArgPrefixes[Input] = field(default_factory=Input)
    """Which documents."""
    tokenizer: Annotated[tuple[PathName, ...], Filled(note="name one or more")]
    """`bytes`, a .model file, a tokenizer.json, or a folder with a tokenizer: one that `tokenizer train` wrote, or
    the folder `tokenizer` in prepared data. Several are compared."""
    by: NotEmpty[str] | None = None
    """Key of records that says what kind of text it is, such as language; None: the ending of the file's name."""
    eos: NotEmpty[str] | None = None
    """The token of a tokenizer.json that ends a document; None: found by its name."""
    bos: str | None = None
    """The token of a tokenizer.json that begins a document; empty: none; None: found by its name."""
    max_bytes: Positive[int] = 20_000_000
    """Text to measure, from the beginning of the input; with --by of each kind."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if self.by is not None and not self.input.paths:
            raise UserError(f"--by {shown(self.by)} is a key of records in files; name files or folders")


@config("--")
class ExtendTokenizer:
    """Which tokenizer is extended, and by what."""

    tokenizer: PathName
    """The tokenizer whose tokens keep their ids: a sentencepiece .model, a tokenizer.json, or a folder with one."""
    more: Annotated[tuple[PathName, ...], Filled(note="name one or more"), tyro.conf.arg(name="from")]
    """Tokenizers of the same kind, trained on other text, whose tokens are added in this order."""
    out: PathName
    """Folder to write."""
    eos: NotEmpty[str] | None = None
    """The token of a tokenizer.json that ends a document; None: found by its name."""
    bos: str | None = None
    """The token of a tokenizer.json that begins a document; empty: none; None: found by its name."""


@config("--")
class MixOptions:
    """What is told of a run's mixture."""

    most_epochs: Positive[float] = 4.0
    """Data sets that are read more often are told; up to four epochs are almost as good as new text (Muennighoff et al.
    2023, arXiv:2305.16264)."""
    least_epochs: Fraction = 0.05
    """Data sets of which less than this is read are told."""
    cap: Positive[float] | None = None
    """Show weights, too, with which no data set is read more than so many times; None: not."""
    json: bool = False
    """Print one JSON object instead of tables."""


@config("--")
class RegmixOptions:
    """Which mixtures are tried in small runs, and what is wanted of them."""

    out: PathName = "runs/regmix.jsonl"
    """File of a row of JSON for each run; those that it has are not run again."""
    runs: Annotated[int, Range(ge=3)] = 24
    """Small runs on random mixtures around the config's weights, which are the first. At least two more than there are
    data sets, for a good law many more (RegMix: 512 for 17 data sets)."""
    rounds: Positive[int] = 4
    """How often a law is fitted and its best weights are run: the law of the next round has that run too, so that it is
    mended where it was wrong."""
    targets: tuple[NotNegative[float], ...] = ()
    """Weights of the held-out losses of all data sets in the one that is to be low; none: the config's weights."""
    seed: Seed = 0
    """Of the mixtures."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if self.targets and not any(self.targets):
            raise UserError("--targets are all 0, so that nothing is wanted; raise one of them")


@config("--")
class WeighOptions:
    """Which folders, and how they are weighed by size."""

    folders: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name prepared folders")]]
    """Folders that `prepare` wrote."""
    alpha: Fraction
    """Each is weighed by its tokens to this power: 1 is as large as they are, 0 all alike, 0.3 what XLM-R
    (arXiv:1911.02116) and mT5 (arXiv:2010.11934) take for languages."""
    tokens: Positive[float] | None = None
    """Tokens that a run reads, to show epochs of; None: it is not said."""
    cap: Positive[float] | None = None
    """Read none more than so many times; None: no limit."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if self.cap is not None and self.tokens is None:
            raise UserError(f"--cap {self.cap:g} needs a budget; say --tokens 1e9, too")
