"""`python -m maxlm.evaluate --run RUN_DIR`: held-out loss, perplexity and bits per byte of a trained model."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import contextlib
import dataclasses
import itertools
import json
import math
from dataclasses import field
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import ShardingConfig, UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import NotNegative, PathName, Positive, config

_DESCRIPTION = """Held-out loss, perplexity and bits per byte of a trained model.

Reads the validation split of the data sets that the run's config names (relative paths start from the folder you are
in), in windows of its train.seq_len. Exit code 2: one line says what was wrong."""


@config("--")
class EvaluateOptions:
    """What to measure, and on how much."""

    run: Annotated[PathName, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the training run."""
    step: NotNegative[int] | None = None
    """Checkpoint to use; None: the newest intact one."""
    batches: Positive[int] | None = None
    """Batches to measure, from the first; None: as many as training measured, see train.eval_batches."""
    whole: bool = False
    """Measure the whole split, as far as it fills batches."""
    batch_size: Positive[int] | None = None
    """Windows in a batch; None: train.batch_size of the run. With 1, --whole measures every window."""
    sharding: ShardingConfig = field(default_factory=lambda: ShardingConfig(data=1))
    """One device by default; --sharding.data=-1 shares the batches out over all of them."""
    json: bool = False
    """Print one JSON object: run, step, loss, perplexity, bits_per_byte, tokens."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the run folder, the checkpoint, the data or an option does not fit.
    """
    options = parse(EvaluateOptions, argv, prog="python -m maxlm.evaluate", description=_DESCRIPTION, flags=True)
    if options.whole and options.batches is not None:
        raise UserError(f"--batches = {options.batches} and --whole exclude each other; leave out one of them")

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.data.loader import global_batches, open_batches
    from maxlm.data.shards import Split
    from maxlm.evaluation.perplexity import held_out
    from maxlm.inference.load import load_run
    from maxlm.training.step import make_trainer

    enable_compilation_cache()
    run = load_run(Path(options.run), step=options.step, sharding=options.sharding)
    as_trained = run.config.train
    batch_size = options.batch_size or as_trained.batch_size
    train = dataclasses.replace(as_trained, batch_size=batch_size, micro_batches=1, profile_steps=None)
    config = dataclasses.replace(run.config, train=train)
    config.validate(run.layout.mesh.size)
    batches = open_batches(config.data, batch_size=train.batch_size, seq_len=train.seq_len, split=Split.VALIDATION)
    if batches.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"{config.data.datasets[0].path}: prepared with tokenizer {batches.tokenizer.fingerprint[:12]}..., the run "
            f"{options.run} uses {run.tokenizer.fingerprint[:12]}...; prepare the data with the run's tokenizer"
        )
    assert batches.n_batches is not None and batches.n_windows is not None, "a validation split has an end"
    # The windows that training measured, in batches of any size; all of them, where it measured none.
    windows = as_trained.batch_size * as_trained.held_out_batches(batches.n_windows // as_trained.batch_size)
    n_batches = options.batches or max(1, windows // train.batch_size)
    if options.whole or not (options.batches or windows):
        n_batches = batches.n_batches
    trainer = make_trainer(config, run.layout)
    sharding = run.layout.sharding(run.layout.activation("batch", "seq"))
    with contextlib.closing(global_batches(batches, sharding, 0)) as feed:
        result = held_out(
            trainer.evaluate,
            run.parameters,
            itertools.islice(feed, n_batches),
            bytes_per_token=batches.bytes_per_token,
        )
    if not math.isfinite(result.loss):
        raise UserError(f"{options.run}: the held-out loss of step {run.step} is {result.loss}; use an earlier --step")
    if options.json:
        print(json.dumps({"run": options.run, "step": run.step, **dataclasses.asdict(result)}))
    else:
        print(
            f"step {run.step}: held-out loss {result.loss:.4f} nats/token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits/byte ({result.tokens} tokens)"
        )


if __name__ == "__main__":
    run_command(main)
