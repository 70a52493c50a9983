"""The whole of a run, and the rules that hold between its parts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from maxlm.config.data import DataConfig
from maxlm.config.errors import UserError, require_positive
from maxlm.config.execution import ExecutionConfig
from maxlm.config.layout_rules import broken_layout_rules
from maxlm.config.model import LmHead, ModelConfig
from maxlm.config.optimizer import AdamW, OptimizerConfig
from maxlm.config.sharding import ShardingConfig
from maxlm.config.task import Pretrain, Task

_HELD_OUT_TOKENS = 2**20


@dataclass(frozen=True)
class StepRange:
    """The steps first, first + 1, ..., last - 1; written `first:last` on the command line."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise UserError(f"step range {self.first}:{self.last} must satisfy 0 <= first < last")

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """What `str` gave.

        Raises:
            UserError: it is something else.
        """
        first, _, last = text.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise UserError(f"step range {text!r} must be FIRST:LAST, for example 10:13")
        return cls(int(first), int(last))

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and rhythm of training."""

    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Sequences a step, over all devices and micro-batches."""
    seq_len: int
    """Tokens in a sequence."""
    micro_batches: int = 1
    """Parts that a step's batch is cut into, one after the other, to save memory; the result is the same, but for the
    balancing losses of experts, which are about one part each."""
    seed: int = 0
    """Initial parameters, and everything else that is random."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, which keeps the logits from drifting (PaLM, arXiv:2204.02311: 1e-4)."""
    loss_chunk: int = 1024
    """Tokens, on one device, whose logits exist at one time."""
    max_skipped_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, and therefore skipped, before the run stops."""
    log_every: int = 10
    eval_every: int = 1000
    """Steps between measurements of the held-out loss; 0: only at the end."""
    eval_batches: int | None = None
    """Batches of each such measurement, the first ones of the validation split; None: the whole split, or as much of it
    as holds a million tokens; 0: no measurement at all."""
    profile_steps: StepRange | None = None
    """Steps to record with the profiler, as FIRST:LAST."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "seq_len", "micro_batches", "loss_chunk", "max_skipped_steps", "log_every"):
            require_positive(f"train.{key}", getattr(self, key))

    def held_out_batches(self, available: int) -> int:
        """How many batches a measurement takes of a validation split of so many."""
        if self.eval_batches is None:
            return min(available, math.ceil(_HELD_OUT_TOKENS / (self.batch_size * self.seq_len)))
        return min(available, self.eval_batches)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is written, and what is kept of it. The last step is always written."""

    every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this, too; 0: none."""
    verify: bool = True
    """Compare checksums before restoring."""
    init_from: str | None = None
    """Run folder, or RUN_DIR/checkpoints/STEP, whose parameters a new run starts from, with a new optimizer; a dense
    MLP becomes every expert of a mixture of the same d_ff (arXiv:2212.05055). Not read once the run has a
    checkpoint."""

    def __post_init__(self) -> None:
        require_positive("checkpoint.every", self.every)
        require_positive("checkpoint.keep_last", self.keep_last)


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Where figures go, besides the console, metrics.jsonl and TensorBoard."""

    wandb_project: str | None = None
    """Weights & Biases project to log to (package wandb)."""
    sample_prompt: str = ""
    """What the sampled continuation at the end of training starts with."""
    sample_tokens: int = 64
    """Length of that sample; 0: none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    task: Task = field(default_factory=Pretrain)
    """What is learned."""
    target: str | None = None
    """Machine that the config is meant for, as maxlm.plan names it (tpu:v5p:4x4x4); training does not read it."""
    run_dir: str = "runs/default"
    """Folder of checkpoints, metrics and the report. The same command on the same folder continues the run."""

    def __post_init__(self) -> None:
        if moved := vars(self.model)["moved"]:
            object.__setattr__(self, "execution", dataclasses.replace(self.execution, **moved))
            object.__setattr__(self, "model", dataclasses.replace(self.model, moved=None))

    def broken_layout_rules(self, n_devices: int) -> list[str]:
        """A line for each broken rule of `layout_rules.py`, which hold between model, batch and mesh."""
        return broken_layout_rules(
            self.model,
            self.sharding,
            self.execution,
            n_devices=n_devices,
            batch_size=self.train.batch_size,
            seq_len=self.train.seq_len,
            micro_batches=self.train.micro_batches,
        )

    def validate(self, n_devices: int) -> None:
        """Check every rule that holds between parts of the config.

        Raises:
            UserError: one line for each broken rule: key, value, rule, and a value that would work.
        """
        model, train, failures = self.model, self.train, self.broken_layout_rules(n_devices)
        if train.seq_len > model.max_seq_len:
            failures.append(
                f"train.seq_len = {train.seq_len} is longer than model.max_seq_len = {model.max_seq_len}; "
                f"use at most {model.max_seq_len} or raise model.max_seq_len"
            )
        if isinstance(self.task, Pretrain) and not isinstance(model.head, LmHead):
            failures.append(
                f"model.head = {type(model.head).__name__} gives no logits, which task = Pretrain learns; use LmHead"
            )
        if self.observe.sample_tokens and not model.decodes:
            failures.append(
                f"observe.sample_tokens = {self.observe.sample_tokens} needs a model that can decode, but one with an "
                "ExpertChoiceRouter looks at later tokens; use 0"
            )
        if failures:
            raise UserError("\n".join(failures))
