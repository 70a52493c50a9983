"""All groups of cases."""

from __future__ import annotations

from collections.abc import Iterator

from faults import checkpoints, documents, environment, kills, operations, ranks, settings, values, writers
from faults.case import Case


def all_cases() -> Iterator[Case]:
    """Every case, group by group."""
    yield from ranks.cases()
    yield from kills.cases()
    yield from operations.cases()
    yield from settings.cases()
    yield from values.cases()
    yield from writers.cases()
    yield from checkpoints.cases()
    yield from environment.cases()
    yield from documents.cases()
