"""What changes while a run goes on: phases, and going back from a spike of the loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Annotated, NamedTuple

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Filled, NotNegative, Positive, config, shown
from maxlm.config.model import BlockConfig, ModelConfig
from maxlm.config.position import Rope

Weights = Annotated[tuple[NotNegative[float], ...], Filled(note="give a number for each of data.datasets")]


@config("train.phases[].early.", changes=Changes.TRAINING)
class Recovered:
    """Begin a phase once the held-out loss has recovered from the one before it, as Llama 3 made contexts longer in
    stages, each until "performance on short-context evaluations has recovered completely" (arXiv:2407.21783, section
    3.4.2).

    What counts is the held-out loss in windows and by the mixture of before the phase that is under way: measured as
    that one begins, and every so many steps from then on, with its RoPE.
    """

    every: Positive[int] = 100
    """Steps between measurements."""
    tolerance: NotNegative[float] = 0.0
    """Nats a token by which the loss may still be higher."""


@config("train.phases[].", changes=Changes.TRAINING)
class Phase:
    """What is different from a step on, to the end of the run or until a later phase says otherwise. Schedules count
    steps through all phases.

    Llama 3 (arXiv:2407.21783, section 3.4) has an initial phase, six stages of longer contexts, and annealing.
    """

    start: Positive[int]
    """Steps done when it begins; at the latest, if it may be `early`."""
    early: Recovered | None = None
    """When it begins before that; None: it does not. Later phases keep their starts."""
    batch_size: Positive[int] | None = None
    """`train.batch_size` from then on; None: as before."""
    micro_batches: Positive[int] | None = None
    """`train.micro_batches` from then on; None: as before."""
    seq_len: Positive[int] | None = None
    """`train.seq_len` from then on; None: as before. `model.max_seq_len` is that of the longest."""
    weights: Weights | None = None
    """The weight of each data set from then on, in the order of `data.datasets`, 0 for one that is not read; None: as
    before."""
    rope: Rope | None = None
    """RoPE from then on, of the layers that have one and no window; None: as before."""

    def __post_init__(self) -> None:
        if self.weights is not None and not any(self.weights):
            raise UserError(
                f"train.phases[].weights = {shown(self.weights)} are all 0, so that nothing is read; raise one of them"
            )


@config("train.rollback.", changes=Changes.TRAINING)
class Rollback:
    """Go back from a spike of the loss to a checkpoint before it, and go on after the batches around it (PaLM,
    arXiv:2204.02311, section 5.1: to about 100 steps before, past 200 to 500 batches)."""

    margin: Positive[float] = 0.5
    """A step is high if its loss is above the median of the latest `window` ones that were not by more than this, in
    nats a token; or if its loss, gradient or update is not finite, beyond the overflows that a loss scale answers."""
    window: Positive[int] = 100
    """Losses that the median is of; a phase begins without any, and no finite loss is high before there are so many."""
    patience: Positive[int] = 20
    """High steps in a row that are a spike; `train.max_skipped_steps` that are not finite are one, too."""
    before: NotNegative[int] = 100
    """Steps from the checkpoint to the first high one, at least, if there is such a checkpoint."""
    skip: NotNegative[int] = 100
    """Batches that are never read, beyond those read since that checkpoint."""
    at_most: Positive[int] = 3
    """Spikes of a run to go back from; the next one ends it."""


class Skip(NamedTuple):
    """Windows of the data that a run passes over."""

    start: int
    """Steps done when they are passed over."""
    windows: int
    """Of the length that sequences have then."""


def linear_ramp(
    first: int, last: int, *, by: int, tokens: float, seq_len: int, micro_batch: int | None = None
) -> tuple[Phase, ...]:
    """Phases of a batch that grows in a straight line over the tokens seen, in equal stages (GPT-3, arXiv:2005.14165,
    appendix B: from 32 thousand tokens to 3.2 million over the first 4 to 12 billion).

    The batch before the first phase is `train.batch_size = first`.

    Args:
        first, last: sequences of a batch, before and after.
        by: by how many sequences it grows at a time.
        tokens: seen when it has come to `last`.
        seq_len: `train.seq_len`.
        micro_batch: the most sequences of a micro-batch, which every size is then cut into; None: leave
            `train.micro_batches` as it is.

    Raises:
        UserError: `last` is not `first` and a multiple of `by`.
    """
    if first <= 0 or by <= 0 or last <= first or (last - first) % by:
        raise UserError(
            f"linear_ramp: first = {first}, last = {last}, by = {by}: last must be first and one or more times by"
        )
    sizes = range(first, last + 1, by)
    each = tokens / (len(sizes) - 1)
    starts = itertools.accumulate(max(1, round(each / (size * seq_len))) for size in sizes[:-1])

    def parts(size: int) -> int | None:
        if micro_batch is None:
            return None
        return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= micro_batch)

    return tuple(
        Phase(start=start, batch_size=size, micro_batches=parts(size))
        for start, size in zip(starts, sizes[1:], strict=True)
    )


def broken_phase_rules(
    phases: tuple[Phase, ...], *, steps: int, n_datasets: int, model: ModelConfig, held_out: bool
) -> list[str]:
    """A line for each broken rule of phases that is not one of their values.

    Args:
        phases: of `train`.
        steps: of `train`.
        n_datasets: in `data`.
        model: of the run.
        held_out: whether the run measures its held-out loss.
    """
    failures = []
    for i, (one, after) in enumerate(itertools.pairwise(phases), start=1):
        if after.start <= one.start:
            failures.append(
                f"train.phases.{i}.start = {after.start} is not after train.phases.{i - 1}.start = {one.start}; use at "
                f"least {one.start + 1}, or change their order"
            )
    for i, phase in enumerate(phases):
        failures += _broken_early_rules(phases, i, held_out)
        if phase.start >= steps:
            failures.append(
                f"train.phases.{i}.start = {phase.start} is not before train.steps = {steps}; use at most {steps - 1}, "
                "or leave the phase out"
            )
        if phase.weights is not None and len(phase.weights) != n_datasets:
            failures.append(
                f"train.phases.{i}.weights has {len(phase.weights)} numbers for the {n_datasets} of data.datasets; "
                "give one for each, 0 for a data set that is not read"
            )
        if phase.rope is not None and not any(map(_takes_rope, model.layers)):
            failures.append(
                f"train.phases.{i}.rope finds no layer with a Rope and no window in this model; leave it None"
            )
    return failures


def _broken_early_rules(phases: tuple[Phase, ...], i: int, held_out: bool) -> list[str]:
    if (early := phases[i].early) is None:
        return []
    key = f"train.phases.{i}.early"
    if i == 0:
        return [f"{key}: before the first of train.phases there is none that the loss recovers from; use None"]
    if not held_out:
        return [
            f"{key} needs the held-out loss, and train.eval_batches = 0 measures none; use None for all, or a number"
        ]
    between = phases[i].start - phases[i - 1].start
    if early.every > between:
        return [
            f"{key}.every = {early.every} leaves no measurement in the {between} steps from train.phases.{i - 1}.start "
            f"to train.phases.{i}.start; use at most {between}"
        ]
    return []


def as_begun(phases: tuple[Phase, ...], trained: tuple[Phase, ...], step: int) -> tuple[Phase, ...]:
    """Phases with the starts of those that have begun early.

    Args:
        phases: as they are declared.
        trained: as the checkpoint after `step` steps has them.
        step: so many.
    """
    moved = list(phases)
    for i, (mine, theirs) in enumerate(zip(phases, trained, strict=False)):
        early = mine.early is not None and theirs.start <= min(step, mine.start)
        if early and dataclasses.replace(mine, start=theirs.start) == theirs:
            moved[i] = theirs
    return tuple(moved)


def with_rope(model: ModelConfig, rope: Rope) -> ModelConfig:
    """The model with another RoPE in the layers that have one and no window."""

    def changed(block: BlockConfig) -> BlockConfig:
        if not _takes_rope(block):
            return block
        return dataclasses.replace(block, attention=dataclasses.replace(block.attention, position=rope))

    return dataclasses.replace(
        model,
        blocks=tuple(map(changed, model.blocks)),
        first_blocks=tuple(map(changed, model.first_blocks)),
    )


def _takes_rope(block: BlockConfig) -> bool:
    return isinstance(block.attention.position, Rope) and block.attention.window is None


def checkpoints_needed(rollback: Rollback, every: int) -> int:
    """Newest checkpoints to keep, so that one is left from before a spike when it is noticed."""
    return 1 + math.ceil((rollback.before + rollback.patience) / every)
