"""The training run, from an empty folder to a report, in the order in which it happens.

First reading: `pretrain` alone. What a step computes is in `maxlm/training/step.py`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.checkpoint import manifest
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.lock import lock_run
from maxlm.compile_cache import enable_compilation_cache, release_compiler_memory
from maxlm.config import RunConfig, UserError, serialize
from maxlm.data.loader import Batches, global_batches, open_batches
from maxlm.data.prepare import ensure_prepared
from maxlm.data.shards import Split
from maxlm.data.tokenizers import Tokenizer
from maxlm.evaluation.perplexity import HeldOut, held_out
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.observe.console import Console
from maxlm.observe.kernel_choices import KernelChoices
from maxlm.observe.metrics import ExpertMetrics, read_rows
from maxlm.observe.profiler import ProfileWindow
from maxlm.observe.report import SavedCheckpoint
from maxlm.observe.run_log import Finished, RunLog
from maxlm.processes import Interruption, initialize_distributed
from maxlm.sharding import Layout, make_layout
from maxlm.training import StepMetrics, Trainer, make_trainer
from maxlm.training.state import TrainState
from maxlm.training.warm_start import warm_start


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of `pretrain` ended."""

    step: int
    """Steps done since the start of the run."""
    interrupted: bool
    """A signal asked it to stop before the last step; all is saved."""
    loss: float | None
    """Cross-entropy of the last batch, nats a token; None if this call made no step."""
    files: Finished | None
    """Report and picture; None when interrupted, or on other processes than the first."""


class Diverged(UserError):
    """The loss or the gradient was not finite for too many steps in a row."""

    exit_code = 1


def pretrain(config: RunConfig) -> Result:
    """Run `config` to its last step, or until SIGTERM or SIGINT.

    Raises:
        UserError: the config does not fit the devices, the data, or what the run folder holds; the folder is in use or
            cannot be written; a checkpoint could not be written.
        Diverged: train.max_skipped_steps steps in a row had a loss or gradient that is not finite.
    """
    train, run_dir = config.train, Path(config.run_dir)

    # ---- Devices -----------------------------------------------------------------------------------------------------
    initialize_distributed()
    is_main = jax.process_index() == 0
    config.validate(len(jax.devices()))
    cache_folder = enable_compilation_cache()
    layout = make_layout(config.sharding)

    with contextlib.ExitStack() as stack:
        # ---- Run folder and data -------------------------------------------------------------------------------------
        with _main_first("open the run folder or prepare the data"):
            if is_main:
                stack.enter_context(lock_run(run_dir))
                ensure_prepared(config.data)
        batches = open_batches(config.data, batch_size=train.batch_size, seq_len=train.seq_len, split=Split.TRAIN)
        tokenizer = batches.tokenizer
        if tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size = {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of the "
                f"data's tokenizer ({config.data.datasets[0].path}); use at least {tokenizer.vocab_size}"
            )
        validation = None
        if train.eval_batches:
            validation = open_batches(
                config.data, batch_size=train.batch_size, seq_len=train.seq_len, split=Split.VALIDATION
            )

        # ---- State: from the newest intact checkpoint, or new --------------------------------------------------------
        trainer = make_trainer(config, layout)
        console = Console(enabled=is_main)
        checkpoints = run_dir / "checkpoints"
        saved = stack.enter_context(Checkpointer(checkpoints, config.checkpoint, warn=console.warning))
        state = _restore(saved, trainer, batches, checkpoints)
        origin = "not read, as the run has a checkpoint of its own"
        if config.checkpoint.init_from is not None and state is None:
            begin = warm_start(config.checkpoint.init_from, config.model, layout, trainer, tokenizer.fingerprint)
            state, origin = begin.state, f"starting from the parameters of step {begin.step:,}, with a new optimizer"
        start = int(state.step) if state is not None else 0
        if start > train.steps:
            raise UserError(
                f"train.steps = {train.steps} is less than the {start} steps that {run_dir} has done; use at least "
                f"{start}, or set another run_dir"
            )
        if is_main:
            serialize.save(config, run_dir / "config.json")
            tokenizer.save(run_dir / "tokenizer")
        log = stack.enter_context(
            RunLog(config, run_dir, resume_step=start, is_main=is_main, devices=jax.devices(), console=console)
        )
        log.say(f"compiled programs are kept in {cache_folder}" if cache_folder else "compiled programs are not kept")

        if config.checkpoint.init_from is not None:
            log.say(f"checkpoint.init_from = {config.checkpoint.init_from}: {origin}")

        # ---- Compile -------------------------------------------------------------------------------------------------
        if start < train.steps:
            began = time.perf_counter()
            with KernelChoices(log.say):
                step_program, state = trainer.start(state)
            release_compiler_memory()
            log.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")
        else:
            log.say(f"all {start:,} steps are done; a larger train.steps would go on from here")
        assert state is not None, "without a checkpoint there are steps to do"

        # ---- Train ---------------------------------------------------------------------------------------------------
        interruption = stack.enter_context(Interruption())
        profile = ProfileWindow(config.train.profile_steps, run_dir, log.say)
        feed = stack.enter_context(contextlib.closing(global_batches(batches, trainer.batch_sharding, start)))
        tokens_per_step = train.batch_size * train.seq_len
        log.start_clock(start, start * tokens_per_step)

        metrics: StepMetrics | None = None
        interrupted = False
        step = start
        while step < train.steps and not interrupted:
            batch = next(feed)
            # The host runs one step ahead of the device, and looks at a step's figures while the next one is computed.
            before = metrics
            with profile.step(step, wait_for=state), jax.transfer_guard("disallow"):
                state, metrics = step_program(state, batch)
            step += 1
            if before is not None:
                _stop_if_diverged(before, step - 1, config, run_dir)
            saved.check()

            is_last = step == train.steps
            interrupted = interruption.reached(step) and not is_last
            if step % train.log_every == 0 or is_last or interrupted:
                _log_step(log, step, step * tokens_per_step, metrics, train.z_loss)
            if validation is not None and (is_last or (train.eval_every and step % train.eval_every == 0)):
                jax.block_until_ready(state)
                with log.pause():
                    result = _evaluate(trainer, state, validation, train.eval_batches)
                    log.evaluation(
                        step,
                        tokens=step * tokens_per_step,
                        loss=result.loss,
                        eval_tokens=result.tokens,
                        eval_bytes=round(result.tokens * validation.bytes_per_token),
                    )
            if step % config.checkpoint.every == 0 or is_last or interrupted:
                jax.block_until_ready(state)
                with log.pause():
                    _stop_if_diverged(metrics, step, config, run_dir)
                    _save(saved, state, step, config, batches)
        profile.close(wait_for=state)
        saved.wait()
        loss = None if metrics is None else float(metrics.loss)
        if interrupted:
            log.say(f"stopped by a signal after step {step:,}; all is saved, the same command goes on")
            return Result(step=step, interrupted=True, loss=loss, files=None)

        # ---- Sample and report ---------------------------------------------------------------------------------------
        if config.observe.sample_tokens and not _has_sample(run_dir, step):
            _sample(config, log, layout, state, tokenizer)
        files = log.finish(_saved_checkpoints(checkpoints, saved)) if is_main else None
        return Result(step=step, interrupted=False, loss=loss, files=files)


def _restore(saved: Checkpointer, trainer: Trainer, batches: Batches, folder: Path) -> TrainState | None:
    """The state of the newest intact checkpoint, None if there is none.

    Raises:
        UserError: it was trained on other data or with another tokenizer, or holds another model.
    """
    shapes = trainer.state
    restored = saved.restore_latest(params=shapes.parameters, optimizer=_optimizer_item(shapes))
    if restored is None:
        return None
    meta: dict[str, Any] = restored.meta
    for name, seen, now in (
        ("tokenizer", meta["tokenizer"], batches.tokenizer.fingerprint),
        ("data", meta["data"]["fingerprint"], batches.fingerprint),
    ):
        if seen != now:
            raise UserError(
                f"{folder / str(restored.step)}: was trained with {name} {seen[:12]}..., the config names {name} "
                f"{now[:12]}...; restore the data, data.seed, train.batch_size and train.seq_len that the run began "
                "with, or set another run_dir"
            )
    return TrainState(parameters=restored.params, **(restored.optimizer or {}))


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """All of the state but the parameters: what inference never reads."""
    return {
        "step": state.step,
        "optimizer": state.optimizer,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }


def _save(saved: Checkpointer, state: TrainState, step: int, config: RunConfig, batches: Batches) -> None:
    meta = {
        "data": {"next_batch": step, "fingerprint": batches.fingerprint},
        "tokenizer": batches.tokenizer.fingerprint,
        "config": serialize.to_dict(config),
    }
    saved.save(step, params=state.parameters, optimizer=_optimizer_item(state), meta=meta)


def _log_step(log: RunLog, step: int, tokens: int, metrics: StepMetrics, z_loss: float) -> None:
    values = jax.device_get(metrics)
    log.step(
        step,
        loss=float(values.loss),
        tokens=tokens,
        learning_rate=float(values.learning_rate),
        grad_norm=float(values.grad_norm),
        skipped_steps=int(values.skipped),
        z_loss=z_loss * float(values.log_z_squared),
        experts=_expert_metrics(values),
    )


def _expert_metrics(values: StepMetrics) -> ExpertMetrics | None:
    if values.router is None:
        return None
    return ExpertMetrics(
        auxiliary_loss=float(values.auxiliary_loss),
        moe_load_entropy=tuple(values.router.load_entropy.tolist()),
        moe_dropped_share=tuple(values.router.dropped_share.tolist()),
        moe_max_over_mean_load=tuple(values.router.max_over_mean_load.tolist()),
    )


def _stop_if_diverged(metrics: StepMetrics, step: int, config: RunConfig, run_dir: Path) -> None:
    """Raise Diverged, with a report in the run folder, once too many steps in a row were skipped."""
    in_row = int(metrics.skipped_in_row)
    if in_row < config.train.max_skipped_steps:
        return
    report = run_dir / "diverged.json"
    values = {name: str(value) for name, value in jax.device_get(metrics)._asdict().items()}
    facts = {
        "step": step,
        "skipped_in_row": in_row,
        "metrics_of_last_step": values,
        "config": serialize.to_dict(config),
    }
    if jax.process_index() == 0:
        report.write_text(json.dumps(facts, indent=2) + "\n")
    raise Diverged(
        f"step {step}: loss {values['loss']} or gradient norm {values['grad_norm']} was not finite for {in_row} steps "
        f"in a row (train.max_skipped_steps = {config.train.max_skipped_steps}); parameters are as before them, the "
        f"report is {report}; lower optimizer.learning_rate or look at the data from batch {step - in_row} on"
    )


def _evaluate(trainer: Trainer, state: TrainState, validation: Batches, n_batches: int) -> HeldOut:
    """Held-out loss over the first `n_batches` batches of the validation split."""
    feed = global_batches(validation, trainer.batch_sharding, 0)
    with contextlib.closing(feed):
        return held_out(
            trainer.evaluate, state.parameters, _first(feed, n_batches), bytes_per_token=validation.bytes_per_token
        )


def _first(batches: Iterator[dict[str, jax.Array]], n: int) -> Iterator[dict[str, jax.Array]]:
    for _, batch in zip(range(n), batches, strict=False):
        yield batch


def _sample(config: RunConfig, log: RunLog, layout: Layout, state: TrainState, tokenizer: Tokenizer) -> None:
    run = LoadedRun(
        config=config, layout=layout, parameters=state.parameters, tokenizer=tokenizer, step=int(state.step)
    )
    prompt = config.observe.sample_prompt
    (sample,) = Generator(run).generate([prompt], max_new_tokens=config.observe.sample_tokens)
    log.sample(int(state.step), prompt, sample.text)


def _has_sample(run_dir: Path, step: int) -> bool:
    return any(row["step"] == step for row in read_rows(run_dir / "samples.jsonl"))


def _saved_checkpoints(folder: Path, saved: Checkpointer) -> list[SavedCheckpoint]:
    """The finished checkpoints, as the report lists them."""
    records = [manifest.load(folder / str(step)) for step in saved.steps()]
    return [
        SavedCheckpoint(step=record.step, n_bytes=record.total_bytes, saved=datetime.fromisoformat(record.written))
        for record in records
    ]


@contextlib.contextmanager
def _main_first(task: str) -> Iterator[None]:
    """All processes wait at the end of the block for process 0; what fails there ends all of them."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # told to the others first, or they would wait for ever
        failure = error
    if jax.process_count() > 1:
        done = bool(multihost_utils.broadcast_one_to_all(np.bool_(failure is None)))
        if failure is None and not done:
            raise UserError(f"process 0 could not {task}; its message says why")
    if failure is not None:
        raise failure
