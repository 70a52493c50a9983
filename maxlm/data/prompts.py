"""Prompts by number: what a model is asked, and the records that its answers are judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import Conversations, DataConfig, Purpose, UserError
from maxlm.data.chat import find_chat_template
from maxlm.data.conversation_formats import BadRecord, Example, Turn, read
from maxlm.data.conversations import encode
from maxlm.data.orders import endless
from maxlm.data.shards import (
    CHAT,
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
    """As the model is asked: the conversation by the template, with tools, up to where the assistant's turn begins."""
    turns: list[Turn]
    """The conversation so far; whole, also where `max_tokens` has left its oldest turns out of the ids."""
    record: Mapping[str, Any]
    """All that the file has of it."""


class Prompts:
    """Those of one split, by number. Made by `open_prompts`."""

    def __init__(
        self,
        opened: Sequence[Prepared],
        weights: Sequence[float],
        seed: int,
        split: Split,
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self._opened, self._tools = tuple(opened), list(tools)
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
            "tools": self._tools,
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
            UserError: a file holds what cannot be, or has become shorter since it was checked; or the template does not
                tell a model of the tools.
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
        asked = self._told(number, self._opened[source], record) if self._tools else ids.tolist()
        return Prompt(number, tuple(asked), example.prompt, record)

    def drawn(self, n: int) -> Prompt:
        """The n-th of a stream without end, counted from 0: a function of the folders, `data.seed`, the weights and n.

        Each data set is shuffled anew for every epoch and has its own epochs; the data sets alternate in proportion to
        their weights.
        """
        return self[self._order[n]]

    def _told(self, number: int, data: Prepared, record: Mapping[str, Any]) -> list[int]:
        """The ids of a prompt with the tools; those in the folder are without."""
        documents, template = data.info.prepare.documents, find_chat_template(data.folder / CHAT)
        assert isinstance(documents, Conversations), "of prompts"
        told = {**record, "tools": self._tools}
        try:
            [text] = encode(told, template, self.tokenizer, purpose=Purpose.PROMPTS, max_tokens=documents.max_tokens)
        except BadRecord as error:
            raise UserError(f"{data.folder}: prompt {number} with the tools that are to be called: {error}") from error
        return text.ids


def open_prompts(config: DataConfig, split: Split, tools: Sequence[Mapping[str, Any]] = ()) -> Prompts | None:
    """The prompts of those folders of `config` that were prepared as such; None: of validation, which holds none.

    Args:
        config: with the folders.
        split: to open.
        tools: JSON schemas of functions that the model is told of, in place of those of the records; (): as prepared.

    Raises:
        UserError: no folder was; one is not finished or damaged; or their tokenizers differ.
    """
    opened, weights = list[Prepared](), list[float]()
    for dataset in config.datasets:
        info = read_info(folder := Path(dataset.path))
        if info is None:
            raise not_finished(folder)
        if info.purpose is Purpose.PROMPTS and dataset.weight:
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
    return (
        Prompts([data for data, _ in there], [weight for _, weight in there], config.seed, split, tools)
        if there
        else None
    )
