"""Prompts that a model is asked, and what else is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from maxlm.data.conversation_formats import Turn


class Prompt(NamedTuple):
    """One of a split."""

    number: int
    """In the split, over all data sets of prompts."""
    ids: tuple[int, ...]
    """As the model is asked: bos, template, the beginning of the assistant's turn."""
    turns: list[Turn]
    """The conversation so far."""
    record: Mapping[str, Any]
    """All of it, as it was written."""
