"""A pipeline: steps, one after the other."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.cleaning.decontamination_steps import Decontaminate
from maxlm.config.cleaning.duplicate_steps import (
    ExactDocuments,
    ExactSpans,
    ExactSubstrings,
    NearDuplicates,
    SemanticDuplicates,
)
from maxlm.config.cleaning.private_steps import PersonalData
from maxlm.config.cleaning.rule_steps import (
    ChineseQuality,
    CodeQuality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Languages,
    Licences,
    UrlList,
    WordList,
)
from maxlm.config.cleaning.score_steps import BitsPerByteFilter, DomainTagger, PerplexityFilter, QualityFilter
from maxlm.config.cleaning.source_steps import AnswersByScore, CodeHeader, GutenbergText, LatexToText, WikiText
from maxlm.config.cleaning.text_steps import C4Lines, HtmlToText, NormaliseUnicode, RepairUnicode, WebLines
from maxlm.config.fields import Filled, config

SourceStep = LatexToText | AnswersByScore | GutenbergText | WikiText | CodeHeader
"""They change documents of one kind of source."""
TextStep = NormaliseUnicode | RepairUnicode | HtmlToText | C4Lines | WebLines | SourceStep
"""They change documents."""
RuleStep = (
    GopherQuality
    | GopherRepetition
    | FineWebQuality
    | ChineseQuality
    | CodeQuality
    | Licences
    | Languages
    | UrlList
    | WordList
)
"""They drop documents by what is measured of each."""
Comparing = ExactDocuments | ExactSpans | NearDuplicates | ExactSubstrings | SemanticDuplicates
"""They look at all documents together."""
ScoreStep = PerplexityFilter | QualityFilter | DomainTagger | BitsPerByteFilter
"""They ask a model of each."""
CleaningStep = TextStep | RuleStep | PersonalData | ScoreStep | Comparing | Decontaminate


@config("")
class CleaningPipeline:
    """What is done to each document, in this order, until a step drops it."""

    steps: Annotated[tuple[CleaningStep, ...], Filled(note="name at least one step")]
    """In their order."""
