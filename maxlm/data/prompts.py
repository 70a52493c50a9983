"""Prompts by number: what a model is asked, and the records that its answers are judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import DataConfig, Purpose, UserError
from maxlm.data.conversation_formats import Example, Turn, read
from maxlm.data.orders import endless
from maxlm.data.shards import (
    FORMAT_VERSION,
    Prepared,
    Split,
    check_one_tokenizer,
    not_finished,
    open_prepared,
    read_info,
)

_PROBED = 64


class Prompt(NamedTuple):
    """One of a split."""

    number: int
    """In the split, counted through all data sets of prompts."""
    ids: tuple[int, ...]
    """As the model is asked: the conversation by the template, up to where the assistant's turn begins."""
    turns: list[Turn]
    """The conversation so far; whole, also where `max_tokens` has left its oldest turns out of the ids."""
    record: Mapping[str, Any]
    """All that the file has of it."""


class Prompts:
    """Those of one split, by number. Made by `open_prompts`."""

    def __init__(self, opened: Sequence[Prepared], weights: Sequence[float], seed: int, split: Split) -> None:
        self.tokenizer = opened[0].tokenizer
        self.folders = tuple(data.folder for data in opened)
        self._streams = [data.stream(split) for data in opened]
        self._starts = [stream.starts() for stream in self._streams]
        self._firsts = np.cumsum([0] + [data.info.documents(split) for data in opened])
        self._order = endless(self._firsts, weights, seed)
        decides = {
            "format": FORMAT_VERSION,
            "split": split.value,
            "tokenizer": self.tokenizer.fingerprint,
            "shards": [[shard.sha256s for shard in data.info.shards(split)] for data in opened],
            "seed": seed,
            "weights": list(weights) if len(weights) > 1 else [],
            # Should a version of Grain ever shuffle in another way, this tells.
            "order": [self._order[n] for n in range(_PROBED)],
        }
        self.fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        """SHA-256 in hex of all that decides the order and contents of the prompts; where the folders lie does not."""

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, number: int) -> Prompt:
        """
        Raises:
            IndexError: `number` lies outside.
            UserError: a file holds what cannot be, or has become shorter since it was checked.
            MachineFailure: the disk fails.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"prompt {number} of {len(self)}")
        source = int(np.searchsorted(self._firsts, number, side="right")) - 1
        stream, own = self._streams[source], number - int(self._firsts[source])
        start, stop = (int(at) for at in self._starts[source][own : own + 2])
        ids = np.empty(stop - start, np.int32)
        stream.read(start, ids, np.zeros(ids.shape, np.bool_), np.empty(ids.shape, np.bool_))
        record = stream.record(own)
        example = read(record, Purpose.PROMPTS)
        assert isinstance(example, Example), "a prompt is of a conversation"
        return Prompt(number, tuple(ids.tolist()), example.prompt, record)

    def drawn(self, n: int) -> Prompt:
        """The n-th of a stream without end, counted from 0: a function of the folders, `data.seed`, the weights and n.

        Each data set is shuffled anew for every epoch and has its own epochs; the data sets alternate in proportion to
        their weights.
        """
        return self[self._order[n]]


def open_prompts(config: DataConfig, split: Split) -> Prompts | None:
    """The prompts of those folders of `config` that were prepared as such; None: of validation, which holds none.

    Raises:
        UserError: no folder was; one is not finished or damaged; or their tokenizers differ.
    """
    opened, weights = list[Prepared](), list[float]()
    for dataset in config.datasets:
        info = read_info(folder := Path(dataset.path))
        if info is None:
            raise not_finished(folder)
        if info.purpose is Purpose.PROMPTS:
            opened.append(open_prepared(folder, verify=config.verify, splits=[split]))
            weights.append(dataset.weight)
    if not opened:
        folders = ", ".join(dataset.path for dataset in config.datasets)
        raise UserError(
            f"{folders}: prepared for something else, and the task reads prompts that it writes answers to; prepare a "
            "data set with documents = Conversations(purpose=Purpose.PROMPTS)"
        )
    check_one_tokenizer(opened)
    there = [pair for pair in zip(opened, weights, strict=True) if pair[0].info.documents(split)]
    return Prompts([data for data, _ in there], [weight for _, weight in there], config.seed, split) if there else None
