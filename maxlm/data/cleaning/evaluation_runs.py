"""Evaluations as runs of words, in memory: which are there, and of which items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maxlm.config import Files, UserError
from maxlm.config.cleaning.decontamination_steps import EvaluationSet
from maxlm.config.fields import shown
from maxlm.data.cleaning.hashed_words import FoundWords, Hashes, Punctuation, runs, words
from maxlm.data.cleaning.key_tables import KeyTable
from maxlm.data.documents import Document, Unreadable
from maxlm.data.input_files import counted, input_files
from maxlm.data.sources import file_documents

_SPREAD = 16  # most runs of a training document are in no evaluation, and are to be passed over at once
_LEAST_WORDS, _MOST_WORDS = 8, 13


class Item(NamedTuple):
    """What a model will be asked."""

    id: str
    """Its file, and row where a file has many."""
    hashes: Hashes
    """Of its words."""


class EvaluationItems(NamedTuple):
    """The items of a set."""

    name: str
    items: tuple[Item, ...]
    length: int
    """Words in a run."""


def plain_words(text: str) -> FoundWords:
    """Words in small letters without punctuation (GPT-3, appendix C)."""
    return words(text, Punctuation.REMOVED)


def read_set(config: EvaluationSet, length: int | None) -> EvaluationItems:
    """The items of a set, in the order of its files.

    Raises:
        UserError: a path is missing, a record has not the keys, something cannot be read, or there is no item.
    """
    unreadable = Unreadable()
    items = list[Item]()
    for file in input_files(Files(paths=config.paths, pattern=config.pattern), unreadable, None):
        with counted(file, unreadable):
            items += [_item(one, config) for one in file_documents(file, None, unreadable)]
    if unreadable.count:
        raise UserError(f"{config.name}: {unreadable.examples[0]}; mend it, or leave it out with pattern")
    if length is None:
        lengths = [len(item.hashes) for item in items]
        length = int(np.clip(np.percentile(lengths, 5), _LEAST_WORDS, _MOST_WORDS)) if lengths else _MOST_WORDS
    if not any(len(item.hashes) >= length for item in items):
        raise UserError(
            f"{config.name}: has {len(items)} items, and none of {length} words; set words = {_LEAST_WORDS}, or name "
            "other files"
        )
    return EvaluationItems(config.name, tuple(items), length)


def _item(document: Document, config: EvaluationSet) -> Item:
    if document.row is None:
        return Item(document.file, plain_words(document.text).hashes)
    place = f"{document.file}:{document.row}"
    record = json.loads(document.text)
    chosen = [_under(key, record, place) for key in config.keys] if config.keys else list(record.values())
    return Item(place, plain_words("\n".join(_strings(chosen))).hashes)


def _under(key: str, record: dict[str, Any], place: str) -> Any:
    """The value under a key, or under a way of keys, `choices.text`.

    Raises:
        UserError: there is none.
    """
    value: Any = record
    for name in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or name not in value:
            there = f"has {sorted(value)[:8]}" if isinstance(value, dict) else f"there is no object before {name}"
            raise UserError(f"{place}: has no key {shown(key)} ({there}); set keys of the evaluation")
        value = value[name]
    return value


def _strings(value: Any) -> Iterator[str]:
    """All text in a value, in its order: of answers to choose from, too."""
    match value:
        case str():
            yield value
        case list():
            for inner in value:
                yield from _strings(inner)
        case dict():
            yield from _strings(list(value.values()))


class EvaluationIndex:
    """The runs of all sets whose runs are of one length."""

    def __init__(self, length: int, sets: Sequence[EvaluationItems]) -> None:
        self.length, self.sets = length, sets
        hashes = [runs(item.hashes, length) for one in sets for item in one.items]
        self._table = KeyTable.of(np.unique(np.concatenate(hashes)), _SPREAD)

    @property
    def size(self) -> int:
        """Runs, each once."""
        return len(self._table.keys)

    @property
    def nbytes(self) -> int:
        """In memory, without the items: at most 136 a run."""
        return self._table.nbytes

    def find(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Of each run of a text's words the number of the same run here; -1: there is none."""
        return self._table.find(runs(hashes, self.length))


def indices(sets: Sequence[EvaluationItems]) -> tuple[EvaluationIndex, ...]:
    """One for each length of runs."""
    lengths = sorted({one.length for one in sets})
    return tuple(EvaluationIndex(length, [one for one in sets if one.length == length]) for length in lengths)


def covered(found: npt.NDArray[np.bool_], length: int, bridge: int = 0) -> npt.NDArray[np.bool_]:
    """[n + length - 1]; of the words of a text those that lie in runs that are found.

    Args:
        found: [n]; of each run of `length` words.
        length: words in a run.
        bridge: words between two such words that count, too.
    """
    steps = np.zeros(len(found) + length, np.int64)
    at = np.flatnonzero(found)
    np.add.at(steps, at, 1)
    np.add.at(steps, at + length, -1)
    inside = np.cumsum(steps)[:-1] > 0
    if bridge:
        places = np.flatnonzero(inside)
        for i in np.flatnonzero((np.diff(places) > 1) & (np.diff(places) <= bridge + 1)):
            inside[places[i] : places[i + 1]] = True
    return inside


def stretches(inside: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last (not included) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
