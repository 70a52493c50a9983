"""What is cleaned, and how: all that decides which bytes come out."""

from __future__ import annotations

import enum

from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.data import Files, StandardLibrary
from maxlm.config.fields import Positive, config


class KeptOfRemoved(enum.Enum):
    """What `removed/` holds of a document that a step dropped or changed."""

    TEXTS = "texts"
    """Its text, as the step was given it."""
    VERDICTS = "verdicts"
    """Where it stands, and why, without the text."""


@config("")
class CleaningJob:
    """A pipeline and its input."""

    pipeline: CleaningPipeline
    """What is done."""
    documents: Files | StandardLibrary
    """Where the text comes from."""
    part_bytes: Positive[int] = 64 << 20
    """The input is cut into parts of about so many bytes, between files, which processes work at on their own; a file
    of more is one part."""
    removed: KeptOfRemoved = KeptOfRemoved.TEXTS
    """What is kept of what was dropped or changed."""
