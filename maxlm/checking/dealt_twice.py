"""The order of the data: batch i is the same whenever it is asked for, in order, by number and in parts."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from maxlm.checking.verdicts import CheckRow
from maxlm.config import ByteTokenizer, DataConfig, Files, PrepareConfig, Purpose, RunConfig
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.packing import Batch
from maxlm.data.prepare import prepare
from maxlm.data.shards import Split, read_info
from maxlm.sharding import Layout

BATCHES = 6
_DOCUMENTS = 40


def data_order(config: RunConfig, data: DataConfig, layout: Layout) -> Iterator[CheckRow]:
    """Of the data that the config names, if it is prepared; else of as many small data sets, with their weights.

    Args:
        config: small.
        data: as the config had it.
        layout: where the batches go.
    """
    with contextlib.ExitStack() as stack:
        whose = "its own data"
        if not is_prepared(data):
            data, whose = _made_up(data, Path(stack.enter_context(tempfile.TemporaryDirectory()))), "made-up text"
        train = replace(config.train, batch_size=8)
        data = replace(data, verify=False)  # the shards of a large data set take longer to hash than a minute
        deal = lambda: open_batches(data, batch_size=train.batch_size, seq_len=train.seq_len, split=Split.TRAIN)
        wrong = list(differences(deal, layout))
    first = f"; first: {wrong[0]}" if wrong else ""
    note = f"differences over {BATCHES} batches of {whose}{first}"
    yield CheckRow.at_most("data: the same order twice", len(wrong), 0, note)


def is_prepared(data: DataConfig) -> bool:
    """Whether every folder holds text that batches can be made of."""
    infos = [read_info(Path(one.path)) for one in data.datasets]
    return all(info is not None and info.purpose is not Purpose.PROMPTS for info in infos)


def differences(deal: Callable[[], Batches], layout: Layout) -> Iterator[str]:
    """A word for each way to ask that gave something else than batch 0, 1, ... of the first opening."""
    batches, again = deal(), deal()
    truth = [batches[i] for i in range(BATCHES)]
    if batches.fingerprint != again.fingerprint:
        yield "fingerprint of a second opening"
    for i in reversed(range(BATCHES)):
        if not _equal(again[i], truth[i]):
            yield f"batch {i} of a second opening, backwards"
        odd, even = (again.rows(i, range(start, batches.batch_size, 2)) for start in (1, 0))
        both = {name: np.stack([even[name], odd[name]], 1).reshape(x.shape) for name, x in truth[i].items()}
        if not _equal(both, truth[i]):
            yield f"batch {i} in halves"
    start = BATCHES // 2
    sharding = layout.sharding(layout.activation("batch", "seq"))
    with contextlib.closing(global_batches(again, sharding, start)) as feed:
        for i, batch in enumerate(itertools.islice(feed, BATCHES - start), start):
            if not _equal({name: np.asarray(x) for name, x in batch.items()}, truth[i]):
                yield f"batch {i} of a run that goes on from {start}"


def _equal(some: Batch, others: Batch) -> bool:
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in others)


def _made_up(data: DataConfig, folder: Path) -> DataConfig:
    """As many data sets with the same weights, each of a few documents of random letters."""
    datasets = []
    for number, one in enumerate(data.datasets):
        generator, texts = np.random.default_rng(number), folder / f"texts{number}"
        texts.mkdir()
        for i in range(_DOCUMENTS):
            letters = generator.integers(ord("a"), ord("z") + 1, generator.integers(20, 600)).astype(np.uint8)
            (texts / f"{i}.txt").write_bytes(letters.tobytes())
        made = PrepareConfig(
            documents=Files(paths=(str(texts),)), tokenizer=ByteTokenizer(), validation_fraction=0.0, workers=1
        )
        prepare(made, folder / f"data{number}")
        datasets.append(replace(one, path=str(folder / f"data{number}"), prepare=None))
    return replace(data, datasets=tuple(datasets))
