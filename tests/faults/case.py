"""One thing that goes wrong, what is promised for it, and how to see whether the promise holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table. Each group's module has a `cases()` that yields them, made from tables of data."""

    name: str
    """`group: what goes wrong`."""
    expected: str
    """The promise in a few words."""
    check: Callable[[Path], str]
    """Does it, in an empty folder of its own, and returns what was seen in a few words; an AssertionError where the
    promise is broken."""
    short: bool = False
    """Whether every change must pass it."""
