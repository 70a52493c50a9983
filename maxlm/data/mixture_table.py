"""How much of each data set a run reads, and how often: in all and in each stretch of its mixture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from maxlm.config import RunConfig, UserError
from maxlm.config.phases import broken_phase_rules
from maxlm.config.prediction_rules import default_prediction
from maxlm.config.reinforcement import Reinforced
from maxlm.config.weighting import capped_weights
from maxlm.data.loader import open_batches
from maxlm.data.orders import drawn_of_each, place_after, proportions
from maxlm.data.shards import Split, read_info

_ROUNDED = 1e-3
"""How far a share may be from what was asked for, as a part of it, before it is said."""


@dataclass(frozen=True)
class MixtureStretch:
    """What some steps read of each data set; the tuples are in the order of `data.datasets`."""

    first: int
    """Steps done before."""
    last: int
    """Steps done after."""
    weights: tuple[float, ...]
    windows: tuple[int, ...]
    tokens: tuple[int, ...]
    """Of these windows."""
    epochs: tuple[float, ...]
    """These windows, by those that the data set has."""

    @property
    def asked(self) -> list[float]:
        """Shares of windows, as the weights say."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def dealt(self) -> list[float]:
        """Shares of windows as they come in the long run: weights are rounded (`orders.mix`)."""
        counts = proportions(self.weights)
        return [count / sum(counts) for count in counts]

    @property
    def shares(self) -> list[float]:
        """Of the tokens."""
        return [tokens / sum(self.tokens) for tokens in self.tokens]


@dataclass(frozen=True)
class SourceUse:
    """A data set, and what the whole run reads of it."""

    path: str
    tokens: int
    """To train on, on disk."""
    text_bytes: int
    """UTF-8 bytes of their text."""
    capacity: int
    """Tokens of its windows, as the run's first steps cut them."""
    drawn: int
    """Tokens that the run reads."""
    before: float
    """Epochs that are behind when it begins (`data.past`)."""
    epochs: float
    """Epochs of the run itself."""


@dataclass(frozen=True)
class MixtureUse:
    """What a run reads."""

    sources: tuple[SourceUse, ...]
    stretches: tuple[MixtureStretch, ...]
    """Steps in which the weights stay, one after the other."""

    @property
    def budget(self) -> int:
        """Tokens of all batches."""
        return sum(source.drawn for source in self.sources)


def use_of(run: RunConfig) -> MixtureUse:
    """What a run of this config reads, window for window as the loader deals them; spikes that are passed over are not
    known before.

    Raises:
        UserError: the config is refused, its task draws no windows, or a data set is not prepared or too small.
    """
    if isinstance(run.task, Reinforced):
        raise UserError(f"task = {type(run.task).__name__} reads prompts; a mixture is of tasks that read windows")
    train, n_datasets = run.train, len(run.data.datasets)
    held_out = train.eval_batches != 0
    if failures := broken_phase_rules(
        train.phases, steps=train.steps, n_datasets=n_datasets, model=run.model, held_out=held_out
    ):
        raise UserError("\n".join(failures))
    stretches, before = list[MixtureStretch](), list[float]()
    windows_of_each: tuple[int, ...] = ()
    for first, last in itertools.pairwise([0, *(phase.start for phase in train.phases), train.steps]):
        now = run.at(first)
        T, data = now.train.seq_len, dataclasses.replace(now.data, verify=False)
        batches = open_batches(
            data,
            batch_size=now.train.batch_size,
            seq_len=T,
            split=Split.TRAIN,
            virtual=now.model.virtual_tokens,
            predict=default_prediction(now.task),
        )
        there = batches.windows_of_each
        place = place_after(data.past, T, data.weights)
        begun = drawn_of_each(place.drawn, data.weights)
        if not stretches:
            before = [(b + n) / size for b, n, size in zip(place.behind, begun, there, strict=True)]
            windows_of_each = there
        done = drawn_of_each(place.drawn + (last - first) * now.train.batch_size, data.weights)
        windows = tuple(after - n for after, n in zip(done, begun, strict=True))
        found = MixtureStretch(
            first,
            last,
            data.weights,
            windows,
            tuple(n * T for n in windows),
            tuple(n / size for n, size in zip(windows, there, strict=True)),
        )
        if stretches and stretches[-1].weights == data.weights:
            found = _joined(stretches.pop(), found)
        stretches.append(found)
    return MixtureUse(tuple(_sources(run, stretches, before, windows_of_each)), tuple(stretches))


def _joined(one: MixtureStretch, after: MixtureStretch) -> MixtureStretch:
    def sums(name: str) -> tuple[Any, ...]:
        return tuple(a + b for a, b in zip(getattr(one, name), getattr(after, name), strict=True))

    return MixtureStretch(one.first, after.last, one.weights, sums("windows"), sums("tokens"), sums("epochs"))


def _sources(
    run: RunConfig, stretches: Sequence[MixtureStretch], before: Sequence[float], windows: Sequence[int]
) -> Iterator[SourceUse]:
    for i, dataset in enumerate(run.data.datasets):
        info = read_info(Path(dataset.path))
        assert info is not None, "it has been opened"
        yield SourceUse(
            path=dataset.path,
            tokens=info.tokens(Split.TRAIN),
            text_bytes=info.text_bytes(Split.TRAIN),
            capacity=windows[i] * run.train.seq_len,
            drawn=sum(one.tokens[i] for one in stretches),
            before=before[i],
            epochs=sum(one.epochs[i] for one in stretches),
        )


def notes_on(use: MixtureUse, *, most_epochs: float, least_epochs: float) -> list[str]:
    """A line for each thing that is seldom meant: also for each data set that is read more or less often than so."""
    found = []
    drawn = [source for source in use.sources if source.drawn]
    if use.budget > (there := sum(source.tokens for source in drawn)):
        found.append(
            f"the run reads {use.budget:,} tokens, its data sets have {there:,}: {use.budget / there:.3g} epochs on "
            "average"
        )
    for source in use.sources:
        epochs = source.before + source.epochs
        if not source.drawn:
            found.append(f"{source.path}: is never read; give it a weight, or leave it out")
        elif epochs > most_epochs:
            found.append(
                f"{source.path}: is read {epochs:.3g} times, more than {most_epochs:g}, from where on repeated text "
                "is worth less and less (arXiv:2305.16264); lower its weight, or see --cap"
            )
        elif epochs < least_epochs:
            found.append(
                f"{source.path}: {epochs:.2%} of it is read, less than {least_epochs:.0%}; a part of it would do, "
                "or raise its weight"
            )
    for stretch in use.stretches:
        for source, asked, dealt in zip(use.sources, stretch.asked, stretch.dealt, strict=True):
            if abs(dealt - asked) > _ROUNDED * asked:
                found.append(
                    f"{source.path}: {asked:.3%} of the windows are asked for, {dealt:.3%} are dealt from step "
                    f"{stretch.first:,} on: weights are rounded down to hundredths of the smallest"
                )
    return found


def capped(use: MixtureUse, most_epochs: float) -> tuple[float, ...]:
    """Weights with which the run reads no data set more often.

    Raises:
        UserError: its weights change on the way, or it reads more than so many epochs of all.
    """
    if len(use.stretches) > 1 or any(source.before for source in use.sources):
        raise UserError(
            "--cap is of a run whose weights stay and that begins with its data; of others set the weights of the "
            "last phase so that the epochs in all are few enough"
        )
    sizes = [source.capacity for source in use.sources]
    return capped_weights(use.stretches[0].weights, sizes, use.budget, most_epochs)


def as_json(use: MixtureUse, notes: Sequence[str]) -> dict[str, Any]:
    """All figures: tokens, shares from 0 to 1, epochs."""
    stretches = [
        {**dataclasses.asdict(one), "asked": one.asked, "dealt": one.dealt, "shares": one.shares}
        for one in use.stretches
    ]
    sources = [{**dataclasses.asdict(one), "share": one.drawn / use.budget} for one in use.sources]
    return {"tokens": use.budget, "sources": sources, "stretches": stretches, "notes": list(notes)}


def tables_of(use: MixtureUse) -> Iterator[Table]:
    """The whole run, with the columns of LLaMA's table (arXiv:2302.13971, table 1) and some more; and its stretches,
    where there are several."""
    behind = any(source.before for source in use.sources)
    several = len(use.stretches) > 1
    columns = ["source", "tokens", "text"]
    columns += ([] if several else ["weight", "asked"]) + ["sampling", "tokens drawn"]
    whole = _table([*columns, *(["epochs before"] if behind else []), "epochs"])
    for i, source in enumerate(use.sources):
        cells = [f"{source.tokens:,}", _bytes(source.text_bytes)]
        if not several:
            cells += [f"{use.stretches[0].weights[i]:g}", f"{use.stretches[0].asked[i]:.2%}"]
        cells += [f"{source.drawn / use.budget:.2%}", f"{source.drawn:,}"]
        cells += [f"{source.before:.3f}"] if behind else []
        whole.add_row(Text(source.path), *cells, f"{source.epochs:.3f}")
    yield whole
    if not several:
        return
    parts = _table(["source", "weight", "asked", "sampling", "tokens drawn", "epochs"], before=["steps"])
    for stretch in use.stretches:
        for i, source in enumerate(use.sources):
            steps = "" if i else f"{stretch.first:,} to {stretch.last:,}"
            cells = [f"{stretch.weights[i]:g}", f"{stretch.asked[i]:.2%}", f"{stretch.shares[i]:.2%}"]
            parts.add_row(steps, Text(source.path), *cells, f"{stretch.tokens[i]:,}", f"{stretch.epochs[i]:.3f}")
        parts.add_section()
    yield parts


def _table(columns: Sequence[str], before: Sequence[str] = ()) -> Table:
    """Columns of words, then one of words and those of numbers."""
    table = Table()
    for name in before:
        table.add_column(name)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True, overflow="fold")
    return table


def _bytes(size: int) -> str:
    """In decimal units, as papers give disk sizes."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
