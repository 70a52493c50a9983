"""What a step of cleaning is: a function of one document, which measures, changes, tags or drops it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

Tag = str | int | float | bool | None | list[Any] | dict[str, Any]
"""A value of JSON."""
_NOTHING: Mapping[str, int] = MappingProxyType({})
_NO_TAGS: Mapping[str, Tag] = MappingProxyType({})


class Page(NamedTuple):
    """A document on its way through a pipeline."""

    id: str
    """Where it stands, as `file` or `file:row`: no other one has it."""
    text: str
    tags: Mapping[str, Tag] = _NO_TAGS
    """What its record says beside the text (`url`, `license`, `score`, ...), and what steps found (`language`, ...)."""


class Limit(NamedTuple):
    """A rule: what is measured of a document, and the values that it may have."""

    rule: str
    """Of a few words, as the report shows it: `mean word length`."""
    least: float = -math.inf
    most: float = math.inf
    unit: str = "share"
    """What the value counts; most are shares, from 0 to 1."""

    def allows(self, value: float) -> bool:
        """Not NaN."""
        return self.least <= value <= self.most


class Finding(NamedTuple):
    """What a step says of one document. It is dropped if the last of `values` is beyond its limit."""

    values: tuple[float, ...] = ()
    """Of the step's limits, in their order; none after the first that is beyond its limit (`measured`)."""
    seen: str = ""
    """What was found where a number says too little: the language, the word, the address."""
    text: str | None = None
    """What the text becomes; None: it stays as it is. An empty one is dropped."""
    changes: Mapping[str, int] = _NOTHING
    """Of each rule that changed the text, how often it did."""
    tags: Mapping[str, Tag] = _NO_TAGS
    """What is known of the document from now on."""


class DocumentStep(Protocol):
    """A pure function of a document: the same finding for the same page, whatever came before it."""

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The rules by which it drops; none for a step that only changes or tags."""

    def __call__(self, page: Page) -> Finding: ...


def measured(limits: tuple[Limit, ...], values: Iterable[float]) -> tuple[float, ...]:
    """The values up to the first that is beyond its limit; an iterator is not asked for more."""
    found = []
    for limit, value in zip(limits, values, strict=False):
        found.append(value)
        if not limit.allows(value):
            break
    return tuple(found)


def broken(limits: tuple[Limit, ...], finding: Finding) -> Limit | None:
    """The rule that the document breaks; None: it is kept."""
    for limit, value in zip(limits, finding.values, strict=False):
        if not limit.allows(value):
            return limit
    return None
