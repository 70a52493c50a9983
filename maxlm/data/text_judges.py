"""`python -m maxlm.data judge`: train the models by which steps of cleaning judge documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import Files, UserError
from maxlm.config.cleaning.score_steps import ClassifierTraining, HashedWords, NgramTraining, RunEmbeddings
from maxlm.config.cli import parse
from maxlm.config.fields import Filled, NotEmpty, PathName, config
from maxlm.data.cleaning.classifier_training import train_classifier
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.cleaning.ngram_training import measure_thirds, train_ngram_model
from maxlm.data.documents import Unreadable
from maxlm.data.sources import iterate_documents

PROG = "python -m maxlm.data judge"
USAGE = f"""Models that judge documents, for steps of `clean`.

{PROG} ngram PATH... --out DIR           an n-gram model of good text (PerplexityFilter)
{PROG} thirds PATH... --model DIR        head, middle and tail of the perplexities of these documents
{PROG} classifier CLASS=PATH... --out DIR    two or more kinds of text (QualityFilter, DomainTagger)

--help after a name lists its options."""

_Paths = tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name files or folders")]]


@config("--")
class _Ngram:
    """What the model is trained on, and how."""

    paths: _Paths
    """Files and folders."""
    out: PathName
    """Folder to write, which must not be there."""
    pattern: NotEmpty[str] = Files.pattern
    """Names taken from folders, as in the shell."""
    text_key: NotEmpty[str] = Files.text_key
    """Key or column of the text in records."""
    training: tyro.conf.OmitArgPrefixes[NgramTraining] = field(default_factory=NgramTraining)
    """How it is trained."""


@config("--")
class _Thirds:
    """What is to be cleaned, or a sample of it."""

    paths: _Paths
    """Files and folders."""
    model: PathName
    """Folder that `ngram` wrote."""
    pattern: NotEmpty[str] = Files.pattern
    """Names taken from folders, as in the shell."""
    text_key: NotEmpty[str] = Files.text_key
    """Key or column of the text in records."""


@config("--")
class _Classes:
    """Which texts are of which class, and how they are told apart."""

    classes: tyro.conf.Positional[Annotated[tuple[NotEmpty[str], ...], Filled(note="say CLASS=PATH for each")]]
    """CLASS=PATH, a file or folder, at least two: good=DIR bad=DIR."""
    out: PathName
    """Folder to write, which must not be there."""
    pattern: NotEmpty[str] = Files.pattern
    """Names taken from folders, as in the shell."""
    text_key: NotEmpty[str] = Files.text_key
    """Key or column of the text in records."""
    run: PathName | None = None
    """Folder of a run: the classifier is of the vectors that it has for texts; None: of hashed words."""
    training: tyro.conf.OmitArgPrefixes[ClassifierTraining] = field(default_factory=ClassifierTraining)
    """How it is trained."""

    def with_features(self) -> ClassifierTraining:
        """
        Raises:
            UserError: what is said of hashed words goes unused.
        """
        if self.run is None:
            return self.training
        if self.training.features != HashedWords():
            raise UserError(
                f"--run {self.run} takes the run's vectors for features; leave out --longest and --bucket_bits"
            )
        return replace(self.training, features=RunEmbeddings(run=self.run))


def main(argv: list[str], models: CleaningModels) -> int:
    """Train, and say how many documents could not be read."""
    unreadable = Unreadable()
    match argv:
        case ["ngram", *rest]:
            of = parse(_Ngram, rest, prog=f"{PROG} ngram", description="Train an n-gram model.", flags=True)
            texts = _texts(of.paths, of.pattern, of.text_key, unreadable)
            print(train_ngram_model(texts, of.training, Path(of.out)))
        case ["thirds", *rest]:
            sample = parse(_Thirds, rest, prog=f"{PROG} thirds", description="Measure thirds.", flags=True)
            texts = _texts(sample.paths, sample.pattern, sample.text_key, unreadable)
            head, middle = measure_thirds(Path(sample.model), texts)
            print(f"head up to a perplexity of {head:,.1f} a word, middle up to {middle:,.1f}")
        case ["classifier", *rest]:
            asked = parse(_Classes, rest, prog=f"{PROG} classifier", description="Train a classifier.", flags=True)
            sources: dict[str, Iterator[str]] = {}
            for word in asked.classes:
                name, equals, path = word.partition("=")
                if not (name and equals and path) or name in sources:
                    raise UserError(f"{word}: must be CLASS=PATH, each class once, as good=data/good")
                sources[name] = _texts((path,), asked.pattern, asked.text_key, unreadable)
            print(train_classifier(sources, asked.with_features(), Path(asked.out), models))
        case [] | ["-h" | "--help"]:
            print(USAGE)
        case _:
            raise UserError(f"unknown command judge {argv[0]!r}; use ngram, thirds or classifier")
    if summary := unreadable.summary():
        print(summary, file=sys.stderr)
    return unreadable.count


def _texts(paths: tuple[str, ...], pattern: str, text_key: str, unreadable: Unreadable) -> Iterator[str]:
    files = Files(paths=paths, pattern=pattern, text_key=text_key)
    return (document.text for document in iterate_documents(files, unreadable))
