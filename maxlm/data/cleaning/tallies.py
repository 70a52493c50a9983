"""What a pipeline did to documents: counts that add up over parts, in any order, to the same sums."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from maxlm.data.cleaning.findings import Finding, Limit, Page, broken

NOTHING_LEFT = "nothing left"
"""The rule of a step that leaves no text."""
_SAMPLES = 8
ELLIPSIS = "\u2026"
_SHOWN = 400
"""Characters of a sample."""
_BEFORE, _COMPARED = 80, 600
"""Characters shown before the first change of a document, and in all."""


class Shown(NamedTuple):
    """A document for people to look at."""

    order: str
    """The samples are those for which this hash of the id is smallest: an even draw that no order of work changes."""
    id: str
    why: str
    text: str
    """Its beginning; of a changed one what it was about the first change."""
    after: str | None = None
    """Of a changed one, what it became there."""


def _order(page: Page) -> str:
    return hashlib.blake2b(page.id.encode(errors="replace"), digest_size=8).hexdigest()


def excerpt(text: str, begin: int = 0, length: int = _SHOWN) -> str:
    """So many characters from there on, with an ellipsis at each end that is none of the text's."""
    return ELLIPSIS * (begin > 0) + text[begin : begin + length] + ELLIPSIS * (begin + length < len(text))


def _shown(page: Page, why: str = "") -> Shown:
    return Shown(_order(page), page.id, excerpt(why), excerpt(page.text))


def _changed(page: Page, finding: Finding, text: str) -> Shown:
    """`text`: what the page became."""
    begin = max(0, _first_difference(page.text, text) - _BEFORE)
    why = ", ".join(f"{rule}: {count:,}" for rule, count in finding.changes.items())
    return Shown(
        _order(page), page.id, excerpt(why), excerpt(page.text, begin, _COMPARED), excerpt(text, begin, _COMPARED)
    )


def _first_difference(one: str, other: str) -> int:
    """The place of the first character that is another, by halves; the length of the shorter one if none is."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _wanted(samples: list[Shown], order: str) -> bool:
    return len(samples) < _SAMPLES or order < samples[-1].order


def _keep(samples: list[Shown], new: Shown) -> None:
    if len(samples) < _SAMPLES or new < samples[-1]:
        samples.append(new)
        samples.sort()
        del samples[_SAMPLES:]


@dataclass
class StepTally:
    """Of one step."""

    seen: int = 0
    """Documents."""
    seen_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents, by rule."""
    dropped_bytes: int = 0
    changed: int = 0
    """Documents."""
    changes: Counter[str] = field(default_factory=Counter)
    """How often, by rule."""
    removed_bytes: int = 0
    """Of documents that stayed; less than nothing if they grew."""
    values: dict[str, Counter[str]] = field(default_factory=dict)
    """Of each rule how many documents had which value, to two digits."""
    samples: list[Shown] = field(default_factory=list)
    """Of those dropped."""
    changed_samples: list[Shown] = field(default_factory=list)
    """Of those changed."""

    def note(self, page: Page, size: int, limits: tuple[Limit, ...], finding: Finding, left: int | None) -> None:
        """One document more. `left`: its bytes afterwards; None: it was dropped."""
        self.seen += 1
        self.seen_bytes += size
        for limit, value in zip(limits, finding.values, strict=False):
            self.values.setdefault(limit.rule, Counter())[f"{value:.2g}"] += 1
        if left is None:
            why = verdict(limits, finding)
            self.dropped[why.rule] += 1
            self.dropped_bytes += size
            _keep(self.samples, _shown(page, str(why)))
        elif finding.text is not None:
            self.changed += 1
            self.changes.update(finding.changes)
            self.removed_bytes += size - left
            if _wanted(self.changed_samples, _order(page)):
                _keep(self.changed_samples, _changed(page, finding, finding.text))

    def add(self, other: StepTally) -> None:
        for name in ("seen", "seen_bytes", "dropped_bytes", "changed", "removed_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        self.changes.update(other.changes)
        for rule, values in other.values.items():
            self.values.setdefault(rule, Counter()).update(values)
        for sample in other.samples:
            _keep(self.samples, sample)
        for sample in other.changed_samples:
            _keep(self.changed_samples, sample)


class DropVerdict(NamedTuple):
    """Why a document was dropped."""

    rule: str
    value: float | None
    limit: Limit | None
    seen: str

    def __str__(self) -> str:
        if self.limit is None:
            return self.rule
        bound = (
            f"at least {self.limit.least:g}" if (self.value or 0) < self.limit.least else f"at most {self.limit.most:g}"
        )
        named = f" ({self.seen})" if self.seen else ""
        return f"{self.rule} = {self.value:.4g}{named}, must be {bound}"

    def record(self) -> dict[str, Any]:
        """For `removed/`: rule, value seen, threshold."""
        if self.limit is None:
            return {"rule": self.rule}
        bounds = {"least": self.limit.least, "most": self.limit.most}
        return {
            "rule": self.rule,
            "value": self.value if self.value is None or math.isfinite(self.value) else str(self.value),
            **{name: bound for name, bound in bounds.items() if math.isfinite(bound)},
            **({"seen": self.seen} if self.seen else {}),
        }


def verdict(limits: tuple[Limit, ...], finding: Finding) -> DropVerdict:
    """Of a finding by which a document is dropped."""
    limit = broken(limits, finding)
    if limit is None:
        return DropVerdict(NOTHING_LEFT, None, None, finding.seen)
    return DropVerdict(limit.rule, finding.values[-1], limit, finding.seen)


@dataclass
class PassTally:
    """Of one run through the documents."""

    steps: list[StepTally]
    kept: int = 0
    kept_bytes: int = 0
    samples: list[Shown] = field(default_factory=list)
    """Of those kept."""
    blank: int = 0
    """Documents without a letter, which no step is given."""
    unreadable: int = 0
    examples: list[str] = field(default_factory=list)
    """Of what could not be read."""

    def keep(self, page: Page, size: int) -> None:
        self.kept += 1
        self.kept_bytes += size
        _keep(self.samples, _shown(page))

    def add(self, other: PassTally) -> None:
        """Parts are added in their order, for the examples' sake."""
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            mine.add(theirs)
        self.kept += other.kept
        self.kept_bytes += other.kept_bytes
        for sample in other.samples:
            _keep(self.samples, sample)
        self.blank += other.blank
        self.unreadable += other.unreadable
        self.examples = (self.examples + other.examples)[:5]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "steps": [vars(step) for step in self.steps]}

    @classmethod
    def of(cls, record: dict[str, Any]) -> PassTally:
        """Of what `record` gave."""
        steps = [
            StepTally(
                **{
                    **one,
                    "dropped": Counter(one["dropped"]),
                    "changes": Counter(one["changes"]),
                    "values": {rule: Counter(values) for rule, values in one["values"].items()},
                    "samples": [Shown(*sample) for sample in one["samples"]],
                    "changed_samples": [Shown(*sample) for sample in one["changed_samples"]],
                }
            )
            for one in record["steps"]
        ]
        return cls(**{**record, "steps": steps, "samples": [Shown(*sample) for sample in record["samples"]]})
