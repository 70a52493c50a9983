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
from maxlm.config.cleaning.score_steps import BitsPerByteFilter, DomainTagger, PerplexityFilter, QualityFilter
from maxlm.config.cleaning.text_steps import NormaliseUnicode
from maxlm.config.fields import Filled, config

TextStep = NormaliseUnicode
"""They change documents."""
RuleStep = NormaliseUnicode
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
