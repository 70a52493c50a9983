"""A run, from an empty folder to a report, in the order in which it happens, for any recipe.

First reading: `run` alone. What a step computes is in `maxlm/training/step.py`, what a run is for in `maxlm/recipes/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from maxlm.checkpoint.lock import lock_run, require_seen
from maxlm.checkpoint.reference import Reference
from maxlm.compile_cache import enable_compilation_cache, keep_freed_memory, release_compiler_memory
from maxlm.config import RunConfig, UserError, serialize
from maxlm.config.changes import changes, check_allowed
from maxlm.config.phases import Skip
from maxlm.observe.console import Console
from maxlm.observe.guard import reason
from maxlm.observe.kernel_choices import KernelChoices
from maxlm.observe.profiler import ProfileWindow
from maxlm.observe.report import report_step
from maxlm.observe.run_log import Finished, RunLog
from maxlm.processes.interruption import Interruption
from maxlm.processes.joining import joined, on_rank_0
from maxlm.processes.same import code_fingerprint, require_same
from maxlm.processes.watchdog import Watchdog
from maxlm.sharding import Layout, all_devices, make_layout, only_cpus
from maxlm.training.keeper import Keeper, require_finite
from maxlm.training.objective import Batch, Objective
from maxlm.training.recovery import Recovery
from maxlm.training.spikes import Spikes
from maxlm.training.stability import without_window
from maxlm.training.state import TrainState
from maxlm.training.step import StepOutput, Trainer, make_trainer
from maxlm.training.warm_start import Start
from maxlm.training.watch import watch_row

R = TypeVar("R")


class Feed(Protocol):
    """Where batches come from."""

    fingerprint: str
    """Of all that decides the batches. A run goes on only with the feed that it began with."""
    memory: dict[str, Any]
    """What decides later batches beside step and state, as JSON. Checkpoints have it; a run that goes on gets it."""

    def next(self, step: int, state: TrainState) -> Batch:
        """The batch of a step, counted from 0, as `Objective.arrays` says; asked for in order, from any step on."""
        ...

    def close(self) -> None: ...


class Measure(Protocol):
    """Something to learn about the state now and then."""

    name: str
    """`NAMEs.jsonl` of the run folder gets a row of each measurement, TensorBoard and W&B its numbers under `NAME/`."""
    every: int
    """Steps between measurements; 0: none but the one at the end, which all have."""

    def __call__(self, step: int, state: TrainState) -> Mapping[str, float | str | list[list[float]] | None]:
        """The row, without the step; of lists of points [x, y] the report draws a picture. Every process calls it."""
        ...

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        """The row as the console says it."""
        ...


class Vocabulary(Protocol):
    """A tokenizer, as far as a run folder keeps it."""

    @property
    def fingerprint(self) -> str: ...

    def save(self, folder: Path) -> None: ...


def _nothing(step: int, state: TrainState) -> Any:
    return None


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[R]):
    """What one task adds to the loop. R: what its run is, to who goes on with it."""

    objective: Objective
    feed: Feed
    measures: tuple[Measure, ...] = ()
    stride: int = 1
    """Steps that belong together: a run is saved, and stops, at multiples of it alone."""
    start: Start | None = None
    """Reads `checkpoint.init_from` for a new run; and, where the model has an adapter, whenever a run goes on."""
    frozen: Callable[[Any, dict[str, Any] | None], tuple[Any, Reference]] | None = None
    """Reads `TrainState.frozen`, in the shapes of `objective.frozen`; what the run's checkpoint says of it comes beside
    them, None in a new run. `functools.partial(read_reference, place)` reads another run's parameters."""
    tokenizer: Vocabulary | None = None
    """Copied to the run folder; None: the task has no text."""
    outcome: Callable[[int, TrainState], R] = _nothing
    """`Result.run`, from the steps done and the last state. Every process calls it."""


@dataclass(frozen=True, kw_only=True)
class Result(Generic[R]):
    """How a call of `run` ended."""

    step: int
    """Steps done since the start of the run."""
    interrupted: bool
    """A signal asked it to stop before the last step; all is saved."""
    loss: float | None
    """Of the last batch, as in metrics.jsonl; None if this call made no step."""
    files: Finished | None
    """Report and picture; None when interrupted, or on other processes than the first."""
    run: R
    """`Recipe.outcome` of the last state: a `maxlm.inference.load.LoadedRun`, where the task is about text."""


class Failure(NamedTuple):
    """Of a measurement."""

    name: str
    step: int
    error: Exception

    def __str__(self) -> str:
        return f"{self.name} after step {self.step:,} failed: {reason(self.error)}"


class Unmeasured(UserError):
    """A measurement failed; the run was trained and saved all the same."""

    def __init__(self, failure: Failure, steps: int) -> None:
        self.exit_code = failure.error.exit_code if isinstance(failure.error, UserError) else 1
        again = ", and the same command measures again" if failure.step == steps else ""
        super().__init__(f"{failure}; all {steps:,} steps are trained and saved{again}")
        self.__cause__ = failure.error


def run(
    config: RunConfig, make_recipe: Callable[[RunConfig, Layout], Recipe[R]], *, allow_change: Sequence[str] = ()
) -> Result[R]:
    """Run `config` to its last step, or until SIGTERM or SIGINT.

    The recipe is made once the devices are there and the run folder is locked. What only watches the run (metrics,
    TensorBoard, a measurement) may fail without ending it; `RunLog` and `_measure` say how it is told.

    Args:
        config: all of it.
        make_recipe: what the run is for.
        allow_change: keys of the config, or groups of them, that may differ from what the checkpoint in the run folder
            was trained with, whatever that does (docs/checkpoints.md).

    Raises:
        UserError: the config does not fit the devices, the data, or what the run folder holds; the folder is in use or
            cannot be written; a checkpoint could not be written; or the recipe could not be made.
        Diverged: train.max_skipped_steps steps in a row had a loss, gradient or update that is not finite, or there was
            one more spike than train.rollback goes back from; or the state is not finite when it is to be saved.
        Unmeasured: all is trained and saved, but a measurement failed.
    """
    check_allowed(config, allow_change)
    train, run_dir = config.train, Path(config.run_dir)
    if only_cpus():
        keep_freed_memory()

    # An error is told to the other ranks before anything is closed, which may wait for them.
    with Interruption() as interruption, contextlib.ExitStack() as stack, joined(config.limits) as ranks:
        # ---- Devices, folder, recipe ---------------------------------------------------------------------------------
        allowed = {"--allow_change": list(allow_change)}
        require_same("settings and code", serialize.flatten(config) | allowed | code_fingerprint())
        devices = all_devices()
        is_main = jax.process_index() == 0
        config.validate(len(devices))
        cache_folder = enable_compilation_cache()
        layout = make_layout(config.sharding)
        holder = on_rank_0("open the run folder", lambda: stack.enter_context(lock_run(run_dir)))
        require_seen(run_dir, holder)
        phases = stack.enter_context(contextlib.closing(_Phases(config, layout, make_recipe)))
        recipe, trainer = phases.recipe, phases.trainer  # of the first; parameters and optimizer are those of all
        require_same("data", _identity(recipe))

        # ---- State: from the newest intact checkpoint, or new --------------------------------------------------------
        console = Console(enabled=is_main)
        keeper = stack.enter_context(
            Keeper(config, layout, _identity(recipe), allow_change=allow_change, warn=console.warning)
        )
        state = keeper.restore(trainer.state)
        phases.config = config = keeper.config
        start = int(state.step) if state is not None else 0
        recipe.feed.memory |= keeper.meta.get("feed", {})
        spikes, recovery = Spikes(config, keeper.meta), Recovery(config, keeper.meta, phases.held_out)
        origin = "not read, as the run has a checkpoint of its own"
        begin = None
        if recipe.start is not None and (state is None or config.model.adapter is not None):
            begin = recipe.start(trainer, state, keeper.meta.get("base"))
            keeper.base = begin.base
            for change in begin.changes:
                console.warning(f"checkpoint.init_from: another {change}")
            if state is None:
                origin = f"starting from the parameters of step {begin.step:,}, with a new optimizer"
            else:
                origin = "read again, as the adapter's base"
            state = begin.state
            require_finite(state, f"checkpoint.init_from = {config.checkpoint.init_from}", "name another checkpoint")
        frozen = None
        if recipe.frozen is not None:
            frozen, keeper.reference = recipe.frozen(recipe.objective.frozen, keeper.meta.get("frozen"))
        keeper.begin()
        if is_main and recipe.tokenizer is not None and not (keeper.meta and (run_dir / "tokenizer").exists()):
            recipe.tokenizer.save(run_dir / "tokenizer")
        if is_main and begin is not None and not keeper.meta:
            begin.keep(run_dir)
        done = on_rank_0("look at the report", lambda: start == train.steps and report_step(run_dir) == start)
        log = stack.enter_context(
            RunLog(
                config,
                run_dir,
                resume_step=start,
                is_main=is_main,
                devices=devices,
                console=console,
                measures=[*(measure.name for measure in recipe.measures), *(["rollback"] if train.rollback else [])],
                only_say=done,
            )
        )
        log.say(f"compiled programs are kept in {cache_folder}" if cache_folder else "compiled programs are not kept")
        for line in config.remarks():
            log.warning(line)
        if recipe.start is not None:
            log.say(f"checkpoint.init_from = {config.checkpoint.init_from}: {origin}")

        # ---- Compile -------------------------------------------------------------------------------------------------
        phases.go_to(start, spikes.skipped, log)
        if start < train.steps:
            state = phases.compile(start, state, frozen, log)
            recovery.begins(start, state, log.say)
        else:
            assert state is not None, "without a checkpoint there are steps to do"
            state = dataclasses.replace(state, frozen=frozen)
            log.say(f"all {start:,} steps are done; a larger train.steps would go on from here")

        # ---- Train ---------------------------------------------------------------------------------------------------
        watchdog = stack.enter_context(Watchdog(config.limits))
        profile = ProfileWindow(config.train.profile_steps, run_dir, log.say, log.switched_off)
        ranks.begin_loop()
        ranks.meet("compile the train step")
        interruption.loop_begins()
        log.start_clock(start, config.tokens(start))
        log.progress(start)

        output: StepOutput | None = None
        batch: Batch | None = None
        interrupted = False
        failed: list[Failure] = []
        step = start
        while step < train.steps and not interrupted:
            if step == phases.end:
                with watchdog.off_duty():
                    state = phases.enter(step, spikes.skipped, state, log)
                    recovery.begins(step, state, log.say)
            # The host runs one step ahead of the device, and looks at a step's figures while the next one is computed.
            before, batch_before = output, batch
            batch = phases.recipe.feed.next(step, state)
            if (every := config.observe.watch) and (step + 1) % every == 0:
                with watchdog.off_duty():
                    _watch(phases.trainer, log, step + 1, state, batch)
            watchdog.step(step)
            with profile.step(step, wait_for=state), jax.transfer_guard("disallow"):
                state, output = phases.program(state, batch)
            step += 1
            log.progress(step)
            spike = None
            if before is not None:
                where = functools.partial(_where_not_finite, phases.trainer, watchdog, state, batch_before)
                spike = spikes.look(step - 1, before, where)
            keeper.check()

            is_last = step == train.steps
            whole = step % phases.recipe.stride == 0
            interrupted = not is_last and whole and interruption.reached(step, train.steps)
            saves = step % config.checkpoint.every == 0 or is_last or interrupted
            if step == 1 or step % train.log_every == 0 or is_last or interrupted:
                figures = {name: value.tolist() for name, value in jax.device_get(output.figures).items()}
                log.step(step, phases.config.tokens(step), figures)
            recovers = recovery.asks(step)
            if spike is None and (saves or recovers or step == phases.end):
                where = functools.partial(_where_not_finite, phases.trainer, watchdog, state, batch)
                spike = spikes.look(step, output, where)
            if spike is not None:
                profile.close(wait_for=state)
                with watchdog.off_duty():
                    interruption.goes_back(step)
                    state, output = keeper.go_back(spike, state), None
                    step = int(state.step)
                    interrupted |= interruption.went_back(step)
                    skip = spikes.go_back(spike, step, keeper.meta)
                    log.went_back(step, skip.windows, spike.first, spike.found, spike.what)
                    spikes.config = recovery.config = phases.config = keeper.config
                    recovery.remember(keeper.meta)
                    state = phases.enter(step, spikes.skipped, state, log)
                    recovery.begins(step, state, log.say)
                continue
            for measure in phases.recipe.measures:
                if measure.every and step % measure.every == 0 and not is_last:
                    with watchdog.off_duty():
                        _measure(measure, log, step, state, failed)
            if recovers:
                with log.pause(), watchdog.off_duty():
                    if (now := recovery.look(step, state, log.say)) is not None:
                        keeper.config = spikes.config = recovery.config = phases.config = now
                        phases.end = step
            if saves:
                jax.block_until_ready(state)
                with log.pause(), watchdog.off_duty():
                    keeper.save(state, step, phases.recipe.feed.memory, spikes, recovery.memory)
        watchdog.rest()
        profile.close(wait_for=state)
        keeper.wait()
        loss = None if output is None else float(output.figures["loss"])
        if interrupted:
            log.say(f"stopped by a signal after step {step:,}; all is saved, the same command goes on")
            ranks.meet("end the run")
            return Result(step=step, interrupted=True, loss=loss, files=None, run=phases.recipe.outcome(step, state))

        # ---- Last measurements and report ----------------------------------------------------------------------------
        files = Finished.found(run_dir) if is_main else None
        if not done:
            for measure in phases.recipe.measures:
                there = functools.partial(log.has_measured, measure.name, step)  # a run killed below comes here again
                if not on_rank_0("look at earlier measurements", there):
                    _measure(measure, log, step, state, failed, last=True)
            complete = None if any(failure.step == step for failure in failed) else step
            files = log.finish(keeper.listed(), complete=complete) if is_main else None
        if failed:
            raise Unmeasured(failed[-1], step)
        ranks.meet("end the run")
        return Result(step=step, interrupted=False, loss=loss, files=files, run=phases.recipe.outcome(step, state))


def _measure(
    measure: Measure, log: RunLog, step: int, state: TrainState, failed: list[Failure], *, last: bool = False
) -> None:
    """What fails is said at once, and once more when all is saved; the run goes on."""
    jax.block_until_ready(state)
    with log.pause():
        try:
            row = measure(step, state)
        except Exception as error:
            if jax.process_count() > 1 and not last:
                raise  # the others may be in the midst of it
            failed.append(Failure(measure.name, step, error))
            log.warning(str(failed[-1]))
            return
        log.measured(measure.name, step, row, measure.line(step, row))


def _watch(trainer: Trainer, log: RunLog, step: int, state: TrainState, batch: Batch) -> None:
    """A row of watch.jsonl about the step to come, the `step`th; what fails is said once, and the run goes on."""
    jax.block_until_ready(state)
    with log.pause():
        try:
            row = watch_row(trainer.model, trainer.look(state, batch))
        except Exception as error:
            if jax.process_count() > 1:
                raise  # the others may be in the midst of it
            log.switched_off("observe.watch", reason(error))
        else:
            log.watched(step, row)


def _identity(recipe: Recipe) -> dict[str, str | None]:
    tokenizer = None if recipe.tokenizer is None else recipe.tokenizer.fingerprint
    return {"tokenizer": tokenizer, "data": recipe.feed.fingerprint}


class _Phases(Generic[R]):
    """The phases of a run, one after the other on the same state: recipe and compiled step of the one it is in."""

    def __init__(
        self, config: RunConfig, layout: Layout, make_recipe: Callable[[RunConfig, Layout], Recipe[R]]
    ) -> None:
        """
        Raises:
            UserError: the recipe of a phase cannot be made: it is tried before the first step.
        """
        for i, stretch in enumerate(config.data.past):
            if stretch.steps:
                raise UserError(
                    f"data.past.{i}.steps = {stretch.steps} says that steps of this run have read it, which its phases "
                    "say themselves; use 0"
                )
        self.config, self._layout, self._make_recipe = config, layout, make_recipe
        self._begin(config.at(0))
        self._compiled: tuple[Any, ...] = ()
        self._measures: tuple[RunConfig, Measure] | None = None
        for phase in config.train.phases:
            make_recipe(_unverified(config.at(phase.start)), layout).feed.close()

    def _begin(self, now: RunConfig) -> None:
        self._now = now
        self.recipe = self._make_recipe(now, self._layout)
        self.trainer = make_trainer(now, self._layout, self.recipe.objective)

    def enter(self, step: int, skipped: Sequence[Skip], state: TrainState, log: RunLog) -> TrainState:
        """Before a step of another phase, or one that goes on elsewhere in the data."""
        self.go_to(step, skipped, log)
        state = self.compile(step, state, state.frozen, log)
        log.start_clock(step, self.config.tokens(step))
        return state

    def go_to(self, step: int, skipped: Sequence[Skip], log: RunLog) -> None:
        """Make the recipe of a step, before which so much of the data is passed over."""
        starts = [phase.start for phase in self.config.train.phases]
        self.end = min((start for start in starts if start > step), default=self.config.train.steps)
        """Steps done when the next phase begins, or the run ends."""
        now = _unverified(self.config.at(step, skipped))
        if now == _unverified(self._now):
            return
        if different := [str(one) for one in changes(self._now, now) if not one.within(("data.past", "data.verify"))]:
            log.say(f"from step {step:,} on: {', '.join(different)}")
        memory = self.recipe.feed.memory
        self.close()
        self._begin(now)
        self.recipe.feed.memory |= memory
        log.phase(now)

    def held_out(self, now: RunConfig, step: int, state: TrainState) -> float:
        """The held-out loss by a config without phases, which may be another than the one that is under way."""
        if self._measures is None or self._measures[0] != now:  # its program is compiled once
            recipe = self._make_recipe(_unverified(now), self._layout)
            recipe.feed.close()
            self._measures = now, next(measure for measure in recipe.measures if measure.name == "eval")
        return float(self._measures[1](step, state)["eval_loss"])  # type: ignore[arg-type]

    def compile(self, step: int, state: TrainState | None, frozen: Any, log: RunLog) -> TrainState:
        """`program`, which makes steps of this phase; the state before a step, or a new one, with `frozen` in it."""
        if state is not None and any(phase.start == step for phase in self.config.train.phases):
            state = dataclasses.replace(state, stability=without_window(state.stability))
        decides = self._now.model, self._now.train
        if state is not None and decides == self._compiled:
            return dataclasses.replace(state, frozen=frozen)
        began = time.perf_counter()
        with KernelChoices(log.say), log.waiting("compiling the train step"):
            self.program, state = self.trainer.start(state, frozen)
        self._compiled = decides
        release_compiler_memory()
        log.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")
        return state

    def close(self) -> None:
        self.recipe.feed.close()


def _unverified(config: RunConfig) -> RunConfig:
    """Its data were compared with their checksums when the run began."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, verify=False))


def _where_not_finite(trainer: Trainer, watchdog: Watchdog, state: TrainState, batch: Batch | None, step: int) -> str:
    """What was not, in a few words, in the `step`th step on this batch; skipped as it was, the state is still the one
    that it began with. Looking may fail, as it takes memory: the run ends with its own error."""
    assert batch is not None, "it is that of a step"
    number: Any = np.int32(step - 1)
    try:
        with watchdog.off_duty():
            found = trainer.first_not_finite(dataclasses.replace(state, step=number), batch)
        return found or "nothing, when the step is computed again"
    except Exception as error:
        return f"not found ({reason(error)})"
