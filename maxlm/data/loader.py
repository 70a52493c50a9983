"""Batches by number: batch i is a function of the prepared data, the mixture, the seed, the sizes and i alone."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import (
    CausalLm,
    DataConfig,
    FillInMiddle,
    MiddleLevel,
    Prediction,
    Purpose,
    Stretch,
    UserError,
    serialize,
)
from maxlm.config.prediction_rules import broken_window_rules
from maxlm.config.predictions import arrays_beside, parts
from maxlm.data.exercises import answer_maker, maker, turner
from maxlm.data.orders import endless, mix, place_after, ranges
from maxlm.data.packing import Batch, Windows, pack
from maxlm.data.predicted_windows import Predicted, PredictedRecords, PredictedWindows, TurnedWindows, beside
from maxlm.data.record_windows import NO_TEXT, RecordWindows
from maxlm.data.shards import FORMAT_VERSION, Prepared, Split, check_one_tokenizer, open_prepared

_PREFETCH = 2
_PROBED_ELEMENTS = 64
_PROBED_ROWS = 2
_LATER = {"level": "context", "positions": "two"}
"""Keys of predictions that earlier versions did not have, with the values that do what these did."""
OF_TEXTS = ("text_record", "text_number", "text_value")
"""Arrays of a batch that have a column for each text of a row."""


class Batches:
    """Batches of one split, by number. Made by `open_batches`.

    The training order: each data set is shuffled anew for every epoch and has its own epochs; the data sets alternate
    in proportion to their weights, which Grain rounds down to hundredths of the smallest. What is in `data.past` is
    left out, and its steps count in the numbers of batches. The validation order: the same mixture, unshuffled, until
    the first data set is used up.
    """

    def __init__(
        self,
        opened: Sequence[Prepared],
        weights: Sequence[float],
        seed: int,
        batch_size: int,
        seq_len: int,
        split: Split,
        texts: bool,
        virtual: int,
        predict: Sequence[Prediction],
        past: Sequence[Stretch] = (),
    ) -> None:
        self.batch_size, self.seq_len, self.split = batch_size, seq_len, split
        self.tokenizer, self._virtual = opened[0].tokenizer, virtual
        self._predict = predict
        self._beside = arrays_beside(predict)
        self._windows = [
            _windows(data, split, seq_len, virtual, one, seed) for data, one in zip(opened, predict, strict=True)
        ]
        self.texts: int | None = None
        """The most texts in a row of those sets that have texts, S; None: the batches do not tell of them."""
        if texts:
            self.texts = max(windows.most_texts for windows in self._windows if isinstance(windows, RecordWindows))
        of_records = [windows if isinstance(windows, RecordWindows) else None for windows in self._windows]
        self.beside: dict[str, npt.NDArray[np.float32]] = {}
        """What else is known of each text, by its number: further arrays of the batches, as `text_value`; 0 where there
        is no text."""
        self._first_texts = np.cumsum([0, *(windows.n_texts if windows else 0 for windows in of_records)])
        self.n_texts = int(self._first_texts[-1])
        self.largest_value = max((windows.largest_value for windows in of_records if windows), default=0.0)
        self.shortened = sum(windows.shortened for windows in self._windows if isinstance(windows, RecordWindows))
        """Records that are longer than a window, and lose their oldest turns."""
        for data, windows in zip(opened, self._windows, strict=True):
            if not len(windows):
                raise _too_small(data, split, seq_len)
        self.windows_of_each = tuple(map(len, self._windows))
        """Windows of each data set: those of an epoch."""
        self._firsts = np.cumsum([0, *self.windows_of_each])
        place = place_after(past, seq_len, weights)
        self.first = sum(one.steps for one in past)
        """The number of the first batch."""
        self._drawn = place.drawn
        if split is Split.TRAIN:
            self._order = endless(self._firsts, weights, seed, place.behind)
        else:
            self._order = mix(ranges(self._firsts), weights)
        self.n_windows: int | None = None
        """Those that do not fill a batch are in none, if there is a full one. None: without end."""
        self.n_batches: int | None = None
        """None: without end."""
        if split is Split.VALIDATION:
            self.n_windows = len(self._order)
            self.n_batches = max(1, self.n_windows // batch_size)
        self.tokens = sum(data.info.tokens(split) for data in opened)
        """Tokens in the split, with bos and eos, over all data sets."""
        self.bytes_per_token: float | None = None
        if all(isinstance(one, CausalLm) for one in predict):
            self.bytes_per_token = sum(
                weight / sum(weights) * data.info.text_bytes(split) / data.info.counted(split)
                for data, weight in zip(opened, weights, strict=True)
            )
        """UTF-8 bytes of text for each token that counts (a document's first token does not), in the mixture.
        A loss of l nats a token is l / log(2) / bytes_per_token bits a byte. None: what is predicted is not the text,
        each token once."""
        self.fingerprint = self._fingerprint(opened, weights, seed, past)
        """SHA-256 in hex of all that decides the order and contents of the batches; where the folders lie does not."""
        self.contents = self._hash(self._texts_and_tokenizer(opened))
        """The same of what decides their texts, in whatever order."""

    def __getitem__(self, step: int) -> Batch:
        """All rows of batch number `step`, counted from 0.

        Raises:
            IndexError: `step` lies outside.
        """
        return self.rows(step, slice(None))

    def __iter__(self) -> Iterator[Batch]:
        """One after the other: of training without end, of validation all."""
        numbers = itertools.count(self.first) if self.n_batches is None else range(self.n_batches)
        return (self[step] for step in numbers)

    def rows(self, step: int, rows: slice | Sequence[int]) -> Batch:
        """Some rows of batch number `step`: arrays `[len(rows), seq_len]`, see `maxlm.data.packing.pack`; where more
        than the next token is asked, also those that `config.predictions.arrays_beside` names.

        Where `texts` is not None, also what losses of whole texts read; text s of a row is its segment s + 1:
            text_ends: float32 [len(rows), seq_len]; 1 at the last token of each text, else 0.
            text_record, text_number: int32 [len(rows), texts]; which record of the row each text is of, and its number,
                counted through all data sets; NO_TEXT where the row has no such text.
            text_value: float32 [len(rows), texts]; see `maxlm.data.texts.Text`.

        A validation split with fewer windows than a batch makes one batch, in which the last rows have no loss.

        Raises:
            IndexError: `step` or a row lies outside.
        """
        if step < self.first or (self.n_batches is not None and step >= self.n_batches):
            raise IndexError(f"batch {step} of {self.n_batches}")
        wanted = range(self.batch_size)[rows] if isinstance(rows, slice) else rows
        if any(not 0 <= row < self.batch_size for row in wanted):
            raise IndexError(f"rows {list(wanted)} of a batch of {self.batch_size}")
        numbers = [self._drawn + (step - self.first) * self.batch_size + row for row in wanted]
        lacking = np.array([self.n_windows is not None and number >= self.n_windows for number in numbers], np.bool_)
        elements = np.array([self._order[0 if no else n] for n, no in zip(numbers, lacking, strict=True)], np.int64)
        return self._of_windows(elements, lacking, numbers)

    def once(self) -> Iterator[Batch]:
        """Batches that have each window once, in the order of the files; the last may have rows without loss."""
        n_windows = int(self._firsts[-1])
        for start in range(0, n_windows, self.batch_size):
            elements = np.arange(start, start + self.batch_size)
            yield self._of_windows(
                np.where(elements < n_windows, elements, 0), elements >= n_windows, elements.tolist()
            )

    def _of_windows(
        self, elements: npt.NDArray[np.int64], lacking: npt.NDArray[np.bool_], draws: Sequence[int]
    ) -> Batch:
        """Windows by number, counted through all data sets; those that are `lacking` have no loss and no texts.
        `draws`: which random numbers each has, so that it is another example in a later epoch."""
        sources = np.searchsorted(self._firsts, elements, side="right") - 1
        windows = [(int(source), int(n)) for source, n in zip(sources, elements - self._firsts[sources], strict=True)]
        tokens = np.empty((len(elements), self.seq_len + 1), np.int32)
        begins, counts = np.zeros(tokens.shape, np.bool_), np.empty(tokens.shape, np.bool_)
        predicted: dict[int, Batch] = {}
        for row, (source, number) in enumerate(windows):
            of_source = self._windows[source]
            if isinstance(of_source, Predicted):
                predicted[row] = of_source.row(number, draws[row])
            else:
                of_source.fill(number, tokens[row], begins[row], counts[row])
        batch = pack(tokens, begins, counts)
        batch |= {name: values for name, values in beside(batch).items() if name in self._beside}
        if predicted:
            batch = {name: values.copy() for name, values in batch.items()}  # inputs and targets may share memory
        for row, arrays in predicted.items():
            for name in batch:
                batch[name][row] = arrays[name]
        batch["loss_mask"][lacking] = 0
        return batch if self.texts is None else batch | self._texts(windows, lacking)

    def _texts(self, windows: Sequence[tuple[int, int]], lacking: npt.NDArray[np.bool_]) -> Batch:
        """What `rows` says of texts; none in the rows that are `lacking`."""
        rows = len(windows)
        ends = np.zeros((rows, self.seq_len), np.float32)
        whose = np.full((rows, 2, self.texts or 0), NO_TEXT, np.int32)
        values = np.zeros((rows, self.texts or 0), np.float32)
        for row in np.flatnonzero(~lacking).tolist():
            source, number = windows[row]
            of_records = self._windows[source]
            assert isinstance(of_records, RecordWindows), "only such have texts"
            whose[row], values[row], places = of_records.texts(number, self.texts or 0)
            whose[row, 1, : len(places)] += self._first_texts[source]
            ends[row, places] = 1
        found: Batch = {"text_ends": ends} | dict(zip(OF_TEXTS, (whose[:, 0], whose[:, 1], values), strict=True))
        there = found["text_number"] != NO_TEXT
        return found | {name: np.where(there, values[whose[:, 1]], 0) for name, values in self.beside.items()}

    def _fingerprint(
        self, opened: Sequence[Prepared], weights: Sequence[float], seed: int, past: Sequence[Stretch]
    ) -> str:
        decides = self._texts_and_tokenizer(opened) | {
            "batch_size": self.batch_size,
            "seed": seed,
            "weights": list(weights) if len(weights) > 1 else [],
            # Should a version of Grain ever shuffle in another way, this tells.
            "order": [self._order[i] for i in range(min(_PROBED_ELEMENTS, len(self._order)))],
        }
        if past:
            decides["past"] = [[one.windows, one.seq_len, *one.weights] for one in past]
        if not all(isinstance(one, CausalLm) for one in self._predict):
            first = self.rows(self.first, range(min(_PROBED_ROWS, self.batch_size)))
            # Should numpy ever draw other numbers, the rows tell.
            rows = hashlib.sha256(b"".join(first[name].tobytes() for name in sorted(first))).hexdigest()
            asked = [[type(one).__name__, _as_ever(serialize.to_dict(one))] for one in self._predict]
            decides["predict"] = asked, rows
        return self._hash(decides)

    def _texts_and_tokenizer(self, opened: Sequence[Prepared]) -> dict[str, Any]:
        return ({"virtual": self._virtual} if self._virtual else {}) | {
            "format": FORMAT_VERSION,
            "split": self.split.value,
            "seq_len": self.seq_len,
            "tokenizer": self.tokenizer.fingerprint,
            "shards": [
                [[one for one in shard.sha256s if one is not None] for shard in data.info.shards(self.split)]
                for data in opened
            ],
        }

    @staticmethod
    def _hash(decides: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def open_batches(
    config: DataConfig,
    *,
    batch_size: int,
    seq_len: int,
    split: Split,
    purpose: Purpose | None = None,
    virtual: int = 0,
    predict: Prediction | None = None,
) -> Batches:
    """Open the prepared folders of `config` for batches of `batch_size` windows of `seq_len` tokens.

    Validation leaves out the data sets that were prepared with `validation_fraction = 0`, and those of weight 0.

    Args:
        config: the folders.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        split: of the data.
        purpose: what all folders must be prepared for, to have batches with `texts`; None: whatever they are for.
        virtual: `ModelConfig.virtual_tokens`, which stand before each text, at its positions 0, 1, ...
        predict: what is asked of the texts of a data set that does not say it; None: the next token.

    Raises:
        UserError: a folder was prepared for something else, is not finished or damaged; the data sets' tokenizers
            differ, or lack a special token; a split has fewer tokens than a window.
    """
    opened = [open_prepared(Path(dataset.path), verify=config.verify, splits=[split]) for dataset in config.datasets]
    for data in opened:
        _check_purpose(data, purpose)
    check_one_tokenizer(opened)
    asked = [dataset.predict or predict or CausalLm() for dataset in config.datasets]
    chosen = list(zip(opened, config.weights, asked, strict=True))
    if split is Split.VALIDATION:
        chosen = [one for one in chosen if one[1]]
        chosen = [one for one in chosen if one[0].info.prepare.validation_fraction] or chosen[:1]
    return Batches(
        [data for data, _, _ in chosen],
        [weight for _, weight, _ in chosen],
        config.seed,
        batch_size,
        seq_len,
        split,
        purpose is not None,
        virtual,
        [one for _, _, one in chosen],
        config.past if split is Split.TRAIN else (),
    )


def _as_ever(value: Any) -> Any:
    """A prediction as earlier versions of maxlm knew it, where it asks for nothing that they did not."""
    if isinstance(value, dict):
        return {key: _as_ever(one) for key, one in value.items() if key not in _LATER or _LATER[key] != one}
    return [_as_ever(one) for one in value] if isinstance(value, list) else value


def _windows(
    data: Prepared, split: Split, seq_len: int, virtual: int, predict: Prediction, seed: int
) -> Windows | RecordWindows | Predicted:
    stream, tokenizer, key = data.stream(split), data.tokenizer, f"{data.folder}: predict"
    causal = isinstance(predict, CausalLm)
    if broken := [line for where, one in parts(predict, key) for line in broken_window_rules(where, one, seq_len)]:
        raise UserError("\n".join(broken))
    if not data.info.of_records:
        if causal:
            return Windows(stream, seq_len, virtual=virtual)
        if isinstance(predict, FillInMiddle) and predict.level is MiddleLevel.DOCUMENT:
            return TurnedWindows(stream, seq_len, turner(predict, tokenizer, key), seed=seed)
        return PredictedWindows(stream, seq_len, maker(predict, tokenizer, key), seed=seed)
    head = 0 if tokenizer.bos_id is None else 1
    made = None if causal else answer_maker(predict, tokenizer, key)
    try:
        if made is not None:
            return PredictedRecords(stream, seq_len, made, filler=tokenizer.eos_id, head=head)
        return RecordWindows(stream, seq_len, filler=tokenizer.eos_id, head=head, virtual=virtual)
    except UserError as error:
        raise UserError(f"{data.folder}: {error}") from error


def _check_purpose(data: Prepared, purpose: Purpose | None) -> None:
    there = data.info.purpose
    if there is Purpose.PROMPTS:
        raise UserError(
            f"{data.folder}: was prepared as prompts, of which nothing can be learned without answers; prepare it in "
            f"another folder with purpose = {'sft' if purpose is None else purpose.value}, if its records have answers"
        )
    if purpose is not None and there is not purpose:
        made = "running text" if there is None else f"purpose = {there.value}"
        raise UserError(
            f"{data.folder}: was prepared as {made}, the task reads records with purpose = {purpose.value}; prepare it "
            f"again with documents = Conversations(purpose={purpose})"
        )


def global_batches(
    batches: Batches, sharding: jax.sharding.NamedSharding, first_step: int
) -> Generator[dict[str, jax.Array], None, None]:
    """Batches from number `first_step` on as global arrays with the given sharding of rows and tokens; what there is of
    each text has that of rows alone.

    A thread makes two batches ahead. Each process reads only the rows that its devices hold, so the order of tokens
    does not depend on how many processes there are. Close the generator to stop the thread; what fails in the thread
    is raised here.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread, contextlib.ExitStack() as stack:
        ahead: deque[Future[dict[str, jax.Array]]] = deque()
        stack.callback(lambda: [future.cancel() for future in ahead])
        step = first_step
        while True:
            while len(ahead) <= _PREFETCH and (batches.n_batches is None or step < batches.n_batches):
                ahead.append(thread.submit(_global_batch, batches, sharding, step))
                step += 1
            if not ahead:
                return
            yield ahead.popleft().result()


def _global_batch(batches: Batches, sharding: jax.sharding.NamedSharding, step: int) -> dict[str, jax.Array]:
    by_row = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    held = sharding.addressable_devices_indices_map((batches.batch_size, batches.seq_len)).values()
    rows = sorted({row for index in held if index for row in range(batches.batch_size)[index[0]]})
    place = np.zeros(batches.batch_size, np.int64)
    place[rows] = np.arange(len(rows))

    def make(name: str, values: npt.NDArray[Any]) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
            assert index is not None, "only devices of this process are asked for"
            return values[place[index[0]]][:, index[1]]

        shape, of_text = (batches.batch_size, values.shape[1]), name in (*OF_TEXTS, *batches.beside)
        return jax.make_array_from_callback(shape, by_row if of_text else sharding, part, dtype=values.dtype)

    return {name: make(name, values) for name, values in batches.rows(step, rows).items()}


def _too_small(data: Prepared, split: Split, seq_len: int) -> UserError:
    info, tokens = data.info, data.info.tokens(split)
    shorter = f"use train.seq_len <= {tokens - 1}" if tokens > 1 else ""
    if split is Split.TRAIN:
        remedy = f"prepare more text or {shorter}" if shorter else "prepare more text"
        return UserError(
            f"{data.folder}: {tokens} tokens to train on are less than one window of train.seq_len = {seq_len} and the "
            f"token after it; {remedy}"
        )
    remedies = [shorter] if shorter else []
    needed, there = seq_len + 1, info.tokens(Split.TRAIN) + tokens
    single = info.cut_document is not None or info.documents(Split.TRAIN) == 1
    if single and 4 * needed < there:  # what is held out grows with the fraction
        fraction = math.ceil(150 * needed / there) / 100
        remedies.append(f"prepare it in another folder with prepare.validation_fraction = {fraction}")
    elif not info.prepare.validation_fraction:
        remedies.append("prepare it in another folder with prepare.validation_fraction > 0")
    return UserError(
        f"{data.folder}: the {tokens} tokens held out are less than one window of train.seq_len = {seq_len} and the "
        f"token after it; {', or '.join([*remedies, 'set train.eval_batches = 0'])}"
    )
