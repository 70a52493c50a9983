"""Steps about text that training and evaluation have in common."""

from __future__ import annotations

import enum
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Filled, Fraction, NotEmpty, NotNegative, PathName, Positive, Range, config, shown


@config("steps[].sets[].")
class EvaluationSet:
    """Items that a model will be examined by."""

    name: NotEmpty[str]
    """As the report calls it."""
    paths: Annotated[tuple[PathName, ...], Filled(note="name files or folders")]
    """Files and folders; of JSON lines, CSV and parquet each record is an item, of other files the whole text."""
    pattern: NotEmpty[str] = "*"
    """Names taken from folders, as in the shell."""
    keys: tuple[NotEmpty[str], ...] = ()
    """Of a record, those whose texts are the item, in this order; `choices.text` is a key of an object. Empty: all that
    hold text, in the record's order."""


class OverlapMeasure(enum.Enum):
    """When an item of an evaluation is contaminated."""

    WORDS = "words"
    """By the share of its words that lie in runs seen in training (Llama 3, arXiv:2407.21783, section 5.1.4)."""
    RUNS = "runs"
    """By the share of its runs that are seen in training (PaLM, arXiv:2204.02311, section 8)."""


@config("steps[].training.")
class KeepTraining:
    """Training documents stay as they are: the report is what is wanted."""


@config("steps[].training.")
class DropTraining:
    """Training documents that have runs of an evaluation go."""

    most: NotNegative[int] = 0
    """Words in such runs that a document may have and stay."""


@config("steps[].training.")
class CutTraining:
    """The runs go, with what is around them; the pieces that are left stay, with an empty line between them (GPT-3,
    arXiv:2005.14165, appendix C, where each becomes a document of its own)."""

    around: NotNegative[int] = 200
    """Characters before and after a run that go with it."""
    least_piece: NotNegative[int] = 200
    """Characters of the shortest piece that stays."""
    most_pieces: Positive[int] = 10
    """Documents that are cut into more pieces than this go as a whole; short pieces count."""


@config("steps[].")
class Decontaminate:
    """Find runs of words that training documents have in common with evaluations; report contaminated items, and drop
    or cut training documents. Words are in small letters without punctuation, as GPT-3's are."""

    sets: Annotated[tuple[EvaluationSet, ...], Filled(note="name at least one evaluation")]
    """The evaluations."""
    report: PathName
    """JSON file to write: of each set the contaminated items, how much of each, and in which documents."""
    words: Annotated[int, Range(ge=2, le=100)] | None = 13
    """Words in a run: 13 in GPT-3, 8 in PaLM and Llama 3, 10 in Llama 2; None: for each set the 5th percentile of its
    items' lengths, but from 8 to 13 (GPT-3, appendix C). Items of fewer words cannot be found, and are counted."""
    common: Positive[int] | None = 10
    """Runs in more training documents than this are phrases, and ignored (GPT-3); None: none is."""
    measure: OverlapMeasure = OverlapMeasure.WORDS
    """When an item is contaminated."""
    least: Fraction = 0.0
    """Share by that measure above which it is: 0 for any overlap as in GPT-3, 0.7 with RUNS in PaLM (from there on), in
    Llama 3 by what each set's scores show."""
    bridge: NotNegative[int] = 0
    """Words between two runs in an item that are counted as seen, too: a simple form of the 4 words that may differ in
    Llama 2 (arXiv:2307.09288, appendix A.6); each side must be a run by itself."""
    training: KeepTraining | DropTraining | CutTraining = CutTraining()
    """What becomes of training documents."""

    def __post_init__(self) -> None:
        names = [one.name for one in self.sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"steps[].sets: {shown(twice[0])} names two, which the report could not tell apart; give each its own"
            )
