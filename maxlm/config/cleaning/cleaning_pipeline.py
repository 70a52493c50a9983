"""A pipeline: steps, one after the other."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.cleaning.duplicate_steps import (
    ExactDocuments,
    ExactSpans,
    ExactSubstrings,
    NearDuplicates,
    SemanticDuplicates,
)
from maxlm.config.cleaning.text_steps import NormaliseUnicode
from maxlm.config.fields import Filled, config

TextStep = NormaliseUnicode
"""They change documents."""
RuleStep = NormaliseUnicode
"""They drop documents by what is measured of each."""
Comparing = ExactDocuments | ExactSpans | NearDuplicates | ExactSubstrings | SemanticDuplicates
"""They look at all documents together."""
CleaningStep = TextStep | RuleStep | Comparing


@config("")
class CleaningPipeline:
    """What is done to each document, in this order, until a step drops it."""

    steps: Annotated[tuple[CleaningStep, ...], Filled(note="name at least one step")]
    """In their order."""
