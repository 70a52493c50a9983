"""All groups of cases."""

from __future__ import annotations

from collections.abc import Iterator

from faults import checkpoints, environment, kills, operations, ranks
from faults.case import Case


def all_cases() -> Iterator[Case]:
    """Every case, group by group."""
    yield from ranks.cases()
    yield from kills.cases()
    yield from operations.cases()
    yield from checkpoints.cases()
    yield from environment.cases()
