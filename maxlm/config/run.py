"""The whole of a run, and the rules that hold between its parts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, assert_never

from maxlm.config.data import DataConfig, Stretch
from maxlm.config.errors import UserError
from maxlm.config.execution import DelayedScaling, ExecutionConfig, Float8Products, PlainProducts
from maxlm.config.fields import Changes, Fraction, NotEmpty, NotNegative, PathName, Positive, Range, Seed, config, shown
from maxlm.config.layout_rules import broken_layout_rules
from maxlm.config.model import ModelConfig
from maxlm.config.optimizer import AdamW, OptimizerConfig, ParameterFormat
from maxlm.config.phases import Phase, Rollback, Skip, as_begun, broken_phase_rules, checkpoints_needed, with_rope
from maxlm.config.prediction_rules import broken_prediction_rules
from maxlm.config.reinforcement import Grpo, Ppo
from maxlm.config.schedule import schedule_remark
from maxlm.config.sharding import ShardingConfig
from maxlm.config.stability import NoiseScale, SpikeRule
from maxlm.config.task import Pretrain, Sft, Task, TrainMedusa
from maxlm.config.task_rules import broken_task_rules

_HELD_OUT_TOKENS = 2**20


@config("step range: ", changes=Changes.NOTHING, kw_only=False)
class StepRange:
    """The steps first, first + 1, ..., last - 1; written `first:last` on the command line."""

    first: NotNegative[int]
    """The first step of them."""
    last: NotNegative[int]
    """The step after the last of them."""

    def __post_init__(self) -> None:
        if self.first >= self.last:
            raise UserError(f"step range {self.first}:{self.last} must satisfy 0 <= first < last")

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """What `str` gave.

        Raises:
            UserError: it is something else.
        """
        found = re.fullmatch(r"(\d{1,20}):(\d{1,20})", text, re.ASCII)
        if found is None:
            raise UserError(f"step range {shown(text)} must be FIRST:LAST, for example 10:13")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


@config("train.", changes=Changes.TRAINING)
class TrainConfig:
    """Length, batch and rhythm of training."""

    steps: Positive[int]
    """Optimizer steps in all."""
    batch_size: Annotated[Positive[int], Changes.IDENTITY]
    """Sequences a step, over all devices and micro-batches."""
    seq_len: Annotated[Positive[int], Changes.IDENTITY]
    """Tokens in a sequence."""
    micro_batches: Positive[int] = 1
    """Parts that a step's batch is cut into, one after the other, to save memory; the result is the same, but for the
    balancing losses of experts, which are about one part each."""
    seed: Seed = 0
    """Initial parameters, and everything else that is random."""
    z_loss: NotNegative[float] = 0.0
    """Weight of log(Z)^2 in the loss, which keeps the logits from drifting (PaLM, arXiv:2204.02311: 1e-4)."""
    max_z_loss: NotNegative[float] = 0.0
    """Weight of the square of the largest logit in the loss, to the same end (Baichuan 2, arXiv:2309.10305: 2e-4)."""
    embedding_gradient: Fraction = 1.0
    """What the gradient of the embeddings that enter the first layer is multiplied by (GLM-130B, arXiv:2210.02414:
    0.1); what modules of `model.mtp` look up passes its whole gradient."""
    loss_chunk: Positive[int] = 1024
    """Tokens, on one device, whose logits exist at one time."""
    max_skipped_steps: Annotated[Positive[int], Changes.NOTHING] = 10
    """Steps in a row with a loss or gradient that is not finite, and therefore skipped, before the run stops. In
    float16 those alone count that came with the least loss scale."""
    spikes: SpikeRule = field(default_factory=SpikeRule)
    """Which finite steps are skipped."""
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    """Whether the gradient's noise is measured."""
    log_every: Annotated[Positive[int], Changes.NOTHING] = 10
    """Steps between lines of the console and rows of metrics.jsonl."""
    eval_every: Annotated[int, Range(ge=0, note="0 measures only at the end"), Changes.NOTHING] = 1000
    """Steps between measurements of the held-out loss; 0: only at the end."""
    eval_batches: Annotated[Annotated[int, Range(ge=0, note="0 measures nothing")] | None, Changes.NOTHING] = None
    """Batches of each such measurement, the first ones of the validation split; None: the whole split, or as much of it
    as holds a million tokens; 0: no measurement at all."""
    profile_steps: Annotated[StepRange | None, Changes.NOTHING] = None
    """Steps to record with the profiler, as FIRST:LAST."""
    phases: tuple[Phase, ...] = ()
    """What changes on the way, and from which step on: size of the batch, length of sequences, mixture, RoPE
    (docs/phases.md). A run that goes on may change those that have not begun."""
    rollback: Rollback | None = None
    """What is done about a spike of the loss; None: nothing."""

    def held_out_batches(self, available: int) -> int:
        """How many batches a measurement takes of a validation split of so many."""
        if self.eval_batches is None:
            return min(available, math.ceil(_HELD_OUT_TOKENS / (self.batch_size * self.seq_len)))
        return min(available, self.eval_batches)


@config("checkpoint.", changes=Changes.NOTHING)
class CheckpointConfig:
    """When the state is written, and what is kept of it. The last step is always written."""

    every: Positive[int] = 1000
    """Steps between checkpoints."""
    keep_last: Positive[int] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, Range(ge=0, note="0 keeps none of them")] = 0
    """Keep every checkpoint whose step is a multiple of this, too; 0: none."""
    verify: bool = True
    """Compare checksums before restoring."""
    init_from: PathName | None = None
    """Run folder, RUN_DIR/checkpoints/STEP, or a published model, hf:DIR or gguf:FILE, whose parameters a new run
    starts from, with a new optimizer; a dense MLP becomes every expert of a mixture of the same d_ff
    (arXiv:2212.05055). Not read once the run has a checkpoint."""


@config("observe.", changes=Changes.NOTHING)
class ObserveConfig:
    """Where figures go, besides the console, metrics.jsonl and TensorBoard."""

    watch: Annotated[int, Range(ge=0, note="0 watches nothing")] = 0
    """Steps between rows of watch.jsonl, with norms of gradients, parameters, updates and activations of every layer;
    each costs about a step more; 0: none."""
    wandb_project: NotEmpty[str] | None = None
    """Weights & Biases project to log to (package wandb)."""
    sample_prompt: str = ""
    """What the sampled continuation at the end of training starts with."""
    sample_tokens: Annotated[int, Range(ge=0, note="0 draws no sample")] = 64
    """Length of that sample; 0: none."""


@config("limits.", changes=Changes.NOTHING)
class LimitsConfig:
    """How long something may take before a run says so, or ends."""

    join_s: Positive[float] | None = None
    """Seconds until every process of the run must have come; None: 300, or 60 where all are on one machine."""
    prepare_s: Positive[float] = 86400.0
    """Seconds that the other processes wait for rank 0 to prepare the data, or to choose a checkpoint."""
    silent_s: Positive[float] | None = None
    """Seconds without a sign of life after which a process is given up, and with it the run; None: 10, or 60 over
    several machines."""
    step_s: Positive[float] | None = None
    """Seconds of a step after which the stacks of all threads are printed; None: 20 times the median of the latest
    steps, at least 60."""
    end_stuck_run: bool = False
    """End the run then, with exit code 1."""


def _read(data: DataConfig, train: TrainConfig, windows: int, steps: int) -> DataConfig:
    """With so many more windows behind."""
    more = Stretch(windows=windows, seq_len=train.seq_len, weights=data.weights, steps=steps)
    return dataclasses.replace(data, past=(*data.past, more))


@config("", changes=Changes.IDENTITY)
class RunConfig:
    """Everything that decides a training run."""

    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """What it reads."""
    train: TrainConfig
    """How long, and in which batches."""
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    """What makes a step of the gradients."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """Where its parts lie on many devices."""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """In which numbers, with what saved for the backward pass, by which kernels."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept of it."""
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    """What is told of it."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """How long something may take."""
    task: Task = field(default_factory=Pretrain)
    """What is learned."""
    target: Annotated[NotEmpty[str] | None, Changes.NOTHING] = None
    """Machine that the config is meant for, as maxlm.plan names it (tpu:v5p:4x4x4); training does not read it."""
    run_dir: Annotated[PathName, Changes.NOTHING] = "runs/default"
    """Folder of checkpoints, metrics and the report. The same command on the same folder continues the run."""

    def __post_init__(self) -> None:
        if moved := vars(self.model)["moved"]:
            object.__setattr__(self, "execution", dataclasses.replace(self.execution, **moved))
            object.__setattr__(self, "model", dataclasses.replace(self.model, moved=None))

    def at(self, step: int, skipped: Sequence[Skip] = ()) -> RunConfig:
        """What decides a step, counted from 0, as a config without phases: `train.batch_size`, `micro_batches` and
        `seq_len`, the data sets' weights and the model's RoPE are those of its phase, and `data.past` has what earlier
        ones have read. So batch number `step` of that config is the one that the step reads.

        Args:
            step: which.
            skipped: what the run has passed over before it.
        """
        train, data, model, begun = dataclasses.replace(self.train, phases=()), self.data, self.model, 0
        ahead: list[Phase | Skip] = [*self.train.phases, *skipped]
        for change in sorted(ahead, key=lambda one: one.start):  # at one step, phases first
            if change.start > step:
                break
            if steps := change.start - begun:
                data = _read(data, train, steps * train.batch_size, steps)
            begun = change.start
            match change:
                case Skip():
                    data = _read(data, train, change.windows, 0)
                case Phase():
                    sizes = {key: getattr(change, key) for key in ("batch_size", "micro_batches", "seq_len")}
                    train = dataclasses.replace(train, **{key: n for key, n in sizes.items() if n is not None})
                    if change.weights is not None:
                        pairs = zip(data.datasets, change.weights, strict=True)
                        sets = tuple(dataclasses.replace(one, weight=weight) for one, weight in pairs)
                        data = dataclasses.replace(data, datasets=sets)
                    if change.rope is not None:
                        model = with_rope(model, change.rope)
                case _:
                    assert_never(change)
        return dataclasses.replace(self, train=train, data=data, model=model)

    def as_begun(self, trained: RunConfig, step: int) -> RunConfig:
        """With the starts of phases that had begun early in a run, as its checkpoint after `step` steps has them."""
        phases = as_begun(self.train.phases, trained.train.phases, step)
        return dataclasses.replace(self, train=dataclasses.replace(self.train, phases=phases))

    def tokens(self, step: int) -> int:
        """In the batches of so many steps."""
        now = self.at(step)
        earlier = [one for one in now.data.past if one.steps]
        here = step - sum(one.steps for one in earlier)
        return sum(one.windows * one.seq_len for one in earlier) + here * now.train.batch_size * now.train.seq_len

    @property
    def most_demanding(self) -> RunConfig:
        """The config of the phase with the most tokens in a micro-batch, and of those with the most in a batch.

        Raises:
            UserError: the phases are none of this config's.
        """
        if failures := self._broken_phase_rules():
            raise UserError("\n".join(failures))

        def tokens(one: RunConfig) -> tuple[float, int]:
            whole = one.train.batch_size * one.train.seq_len
            return whole / one.train.micro_batches, whole

        return max((self.at(step) for step in (0, *(phase.start for phase in self.train.phases))), key=tokens)

    def broken_layout_rules(self, n_devices: int, micro_batches: int | None = None) -> list[str]:
        """A line for each broken rule of `layout_rules.py`, which hold between model, batch and mesh; of the config
        with another number of micro-batches, if one is given."""
        return broken_layout_rules(
            self.model,
            self.sharding,
            self.execution,
            n_devices=n_devices,
            batch_size=self.train.batch_size,
            seq_len=self.train.seq_len,
            micro_batches=micro_batches or self.train.micro_batches,
        )

    def validate(self, n_devices: int) -> None:
        """Check every rule that holds between parts of the config.

        Raises:
            UserError: one line for each broken rule: key, value, rule, and a value that would work.
        """
        of_phases, told = self._broken_phase_rules(), self._failures(n_devices)
        failures = [*of_phases, *self._failures_of_changes(), *told]
        for i, phase in enumerate(() if of_phases else self.train.phases):
            new = [line for line in self.at(phase.start)._failures(n_devices) if line not in told]
            told += new
            failures += [f"train.phases.{i} (from step {phase.start:,} on): {line}" for line in new]
        if failures:
            raise UserError("\n".join(failures))

    def _broken_phase_rules(self) -> list[str]:
        return broken_phase_rules(
            self.train.phases,
            steps=self.train.steps,
            n_datasets=len(self.data.datasets),
            model=self.model,
            held_out=self.train.eval_batches != 0,
        )

    def _failures_of_changes(self) -> list[str]:
        """Of what only tasks can have whose batches are functions of their number."""
        train, task, failures = self.train, type(self.task).__name__, []
        if train.phases and not isinstance(self.task, Pretrain | Sft):
            failures.append(f"train.phases are of task = Pretrain and Sft, not of {task}; leave them out")
        if (rollback := train.rollback) is None:
            return failures
        if not isinstance(self.task, Pretrain | Sft):
            failures.append(f"train.rollback is of task = Pretrain and Sft, not of {task}; use None")
        if self.model.adapter is not None:
            failures.append("train.rollback restores whole models, and model.adapter is laid on one; use None")
        needed = checkpoints_needed(rollback, self.checkpoint.every)
        if self.checkpoint.keep_last < needed:
            failures.append(
                f"checkpoint.keep_last = {self.checkpoint.keep_last} may leave no checkpoint from before a spike: "
                f"train.rollback looks back over {rollback.before + rollback.patience} steps (before + patience), and "
                f"checkpoint.every = {self.checkpoint.every}; use at least {needed}"
            )
        return failures

    def _failures(self, n_devices: int) -> list[str]:
        """A line for each broken rule of a config whose phases are left aside."""
        model, train, failures = self.model, self.train, self.broken_layout_rules(n_devices)
        if train.seq_len > model.max_seq_len:
            failures.append(
                f"train.seq_len = {train.seq_len} is longer than model.max_seq_len = {model.max_seq_len}; "
                f"use at most {model.max_seq_len} or raise model.max_seq_len"
            )
        failures += broken_task_rules(
            self.task,
            model,
            init_from=self.checkpoint.init_from,
            sample_tokens=self.observe.sample_tokens,
            batch_size=train.batch_size,
            rhythm={"train.steps": train.steps, "checkpoint.every": self.checkpoint.every},
        )
        failures += broken_prediction_rules(
            self.task, self.data.datasets, model, seq_len=train.seq_len, sample_tokens=self.observe.sample_tokens
        )
        if isinstance(self.task, TrainMedusa):
            failures += self._failures_of_medusa()
        elif model.medusa is not None:
            failures.append(
                f"model.medusa has heads, which task = {type(self.task).__name__} does not train; use TrainMedusa"
            )
        if model.mtp is not None:
            failures += self._failures_of_mtp(model.mtp.depth)
        if model.adapter is not None and self.checkpoint.init_from is None:
            failures.append(
                "model.adapter is laid on a model that is there: checkpoint.init_from is None; name its run, or hf:DIR"
            )
        if self.data.past and isinstance(self.task, Grpo | Ppo):
            failures.append(
                f"data.past is of text that is read in order, which task = {type(self.task).__name__} does not; leave "
                "it empty"
            )
        if not isinstance(self.execution.products, PlainProducts):
            frozen = "under model.adapter" if model.adapter is not None else "in task = TrainMedusa"
            if model.adapter is not None or isinstance(self.task, TrainMedusa):
                failures.append(
                    f"execution.products = {type(self.execution.products).__name__} is for weights that are trained, "
                    f"and {frozen} they are not; use PlainProducts"
                )
        match self.execution.products:
            case Float8Products(scaling=DelayedScaling()) if self._has_pipeline(n_devices):
                failures.append(
                    "execution.products.scaling = DelayedScaling takes the largest number of a step, and a pipeline "
                    f"(sharding.stage = {self.sharding.stage}) adds up those of its micro-batches; use CurrentScaling, "
                    "or sharding.stage = 1"
                )
        if self.optimizer.parameter_format is not ParameterFormat.FLOAT32:
            failures += self._failures_of_format(n_devices)
        if model.mup_base_width is not None and not isinstance(self.optimizer, AdamW):
            failures.append(
                f"model.mup_base_width = {model.mup_base_width} has rules for AdamW alone, not for "
                f"{type(self.optimizer).__name__}; use AdamW, or None"
            )
        if self.observe.sample_tokens and not model.decodes:
            failures.append(
                f"observe.sample_tokens = {self.observe.sample_tokens} needs a model that can decode, but with "
                f"{model.looks_ahead} it looks at later tokens; use 0"
            )
        if train.profile_steps is not None and train.profile_steps.last > train.steps:
            failures.append(
                f"train.profile_steps = {train.profile_steps} ends after train.steps = {train.steps}; use steps up to "
                f"{train.steps}, or None"
            )
        if train.noise_scale.measure:
            failures += self._failures_of_noise(n_devices)
        return failures

    def _has_pipeline(self, n_devices: int) -> bool:
        return self.sharding.stage != 1 and self.sharding.sizes(n_devices)["stage"] > 1

    def _failures_of_noise(self, n_devices: int) -> list[str]:
        """Of a run that compares gradients of micro-batches."""
        key = "train.noise_scale.measure = True"
        if self.train.micro_batches == 1:
            return [f"{key} compares micro-batches, but train.micro_batches = 1; use at least 2, or False"]
        if self._has_pipeline(n_devices):
            return [
                f"{key} needs the gradient of each micro-batch, which a pipeline (sharding.stage = "
                f"{self.sharding.stage}) does not form; use sharding.stage = 1, or False"
            ]
        return []

    def _failures_of_format(self, n_devices: int) -> list[str]:
        """Of a run that holds its parameters in fewer bits, and so has gradients of as many."""
        key, failures = f"optimizer.parameter_format = {self.optimizer.parameter_format.value}", []
        if self.model.adapter is not None:
            failures.append(f"{key} is for models that are trained as a whole, not for model.adapter; use float32")
        if self.sharding.float32_gradients:
            failures.append(f"{key} has no gradients in float32; use float32, or sharding.float32_gradients = False")
        if self._has_pipeline(n_devices):
            failures.append(
                f"{key} would add the gradients of a pipeline's micro-batches (sharding.stage = {self.sharding.stage}) "
                "in as few bits; use float32, or sharding.stage = 1"
            )
        return failures

    def _failures_of_medusa(self) -> list[str]:
        """Of a run that trains heads."""
        failures, medusa = [], self.model.medusa
        if medusa is None:
            failures.append("task = TrainMedusa trains the heads of model.medusa, which is None; use MedusaHeads")
        elif self.train.seq_len <= medusa.n_heads:
            failures.append(
                f"model.medusa.n_heads = {medusa.n_heads} guess beyond the windows of train.seq_len = "
                f"{self.train.seq_len}; use fewer heads"
            )
        if self.checkpoint.init_from is None:
            failures.append(
                "task = TrainMedusa trains heads of a model that is there: checkpoint.init_from is None; name its run"
            )
        return failures

    def _failures_of_mtp(self, depth: int) -> list[str]:
        """Of a run with modules that predict further tokens."""
        failures = []
        if not isinstance(self.task, Pretrain | Sft):
            failures.append(
                f"model.mtp has modules, which task = {type(self.task).__name__} does not train; use model.mtp = None, "
                "which leaves out those that checkpoint.init_from has"
            )
        if self.train.seq_len <= depth:
            failures.append(
                f"model.mtp.depth = {depth} predicts beyond the windows of train.seq_len = {self.train.seq_len}; use a "
                "smaller depth"
            )
        return failures

    def remarks(self) -> list[str]:
        """A line for each choice that can be made and is seldom meant."""
        remark = schedule_remark(self.optimizer.schedule, self.train.steps)
        return [] if remark is None else [remark]
