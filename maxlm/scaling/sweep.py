"""Runs over budgets and sizes: one config and one folder each, which maxlm.train takes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, assert_never

from maxlm.config import (
    BlockConfig,
    ConstantSchedule,
    GroupedQuery,
    InverseSqrtSchedule,
    LatentAttention,
    ModelConfig,
    Muon,
    Pretrain,
    RunConfig,
    Schedule,
    UserError,
    serialize,
)
from maxlm.config.errors import EXIT_INTERRUPTED
from maxlm.config.fields import INT_MAX, Filled, NotNegative, PathName, Positive, config
from maxlm.observe.metrics import read_rows
from maxlm.scaling.laws import FLOPS_PER_PARAMETER_TOKEN
from maxlm.scaling.measured_runs import SizeOf, size_of, steps_done, training_flops

_MULTIPLE = 8
"""Of d_ff."""


@config("--")
class Sweep:
    """Which runs."""

    budgets: Annotated[tuple[Positive[float], ...], Filled(note="give FLOPs, such as 1e17 3e17 1e18")] = ()
    """Training FLOPs, as maxlm counts them. A run for each with each width."""
    widths: Annotated[tuple[Positive[int], ...], Filled(note="give values of d_model, such as 256 512 768")] = ()
    """d_model of the models. head_dim stays, so that each is as many heads wide; d_ff grows as d_model does, to a
    multiple of 8."""
    aspect: Positive[float] | None = None
    """d_model for each layer: the number of layers is d_model / aspect, rounded; None: as in the base config."""
    learning_rate_power: NotNegative[float] = 0.5
    """The peak learning rate is that of the base config times (its d_model / d_model)^power; 0: the same for all. With
    model.mup_base_width it is always the same, as muP scales it itself."""
    measurements: Positive[int] = 10
    """Of the held-out loss in each run, which are its curve."""
    fewest_steps: Positive[int] = 10
    """Runs that would have fewer are left out."""
    out: PathName = "runs/sweep"
    """Folder of the configs and of the run folders."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    budget: float
    config: RunConfig

    @property
    def tokens(self) -> int:
        train = self.config.train
        return train.steps * train.batch_size * train.seq_len

    @property
    def parameters(self) -> int:
        """All of them."""
        return size_of(self.config, SizeOf.TOTAL)

    @property
    def flops(self) -> float:
        """As counted; as near to the budget as whole steps are."""
        return training_flops(self.config, self.tokens)

    @property
    def six_nd(self) -> float:
        return FLOPS_PER_PARAMETER_TOKEN * self.parameters * self.tokens


def plan(base: RunConfig, sweep: Sweep) -> tuple[list[PlannedRun], list[str]]:
    """The runs, and a line for each that is left out and for what is seldom meant.

    Learning-rate schedules are as long as their run, with the base config's shares of warm-up and decay: a run that is
    stopped half-way down another's schedule has a higher loss (arXiv:2203.15556, section 3 and appendix B).

    Raises:
        UserError: the base config cannot be scaled so, or no run is left.
    """
    if not isinstance(base.task, Pretrain) or base.model.adapter is not None or base.checkpoint.init_from is not None:
        raise UserError("a sweep trains whole models on text from the start; use a config whose task is Pretrain()")
    runs, notes = list[PlannedRun](), list[str]()
    if isinstance(base.optimizer.schedule, ConstantSchedule | InverseSqrtSchedule):
        notes.append(
            f"optimizer.schedule = {type(base.optimizer.schedule).__name__} does not come down at a run's end, as laws "
            "expect it to; CosineSchedule() does"
        )
    for budget in sweep.budgets:
        for width in sweep.widths:
            model = scaled(base.model, width, sweep.aspect)
            name = f"{budget:.3g}_d{width}_l{model.n_layers}".replace("+", "")
            sized = replace(base, model=model)
            per_step = training_flops(sized, base.train.batch_size * base.train.seq_len)
            steps = round(budget / per_step)
            if not sweep.fewest_steps <= steps <= INT_MAX:
                notes.append(
                    f"{name}: would have {steps:,} steps, must have {sweep.fewest_steps:,} to {INT_MAX:,}; left out: "
                    "use another budget, width or train.batch_size"
                )
                continue
            made = _config(sized, steps, sweep, base.model.d_model, name)
            made.validate(_devices(made))
            runs.append(PlannedRun(name=name, budget=budget, config=made))
    if not runs:
        raise UserError("\n".join(notes))
    return runs, notes


def scaled(base: ModelConfig, width: int, aspect: float | None) -> ModelConfig:
    """The model in another width, with as many layers as the aspect says.

    Raises:
        UserError: it has attention of another kind than `GroupedQuery`, or the width is no whole number of its heads.
    """
    first, entries = len(base.first_blocks), len(base.blocks)
    layers = width / (base.d_model / base.n_layers if aspect is None else aspect)
    repeats = max(1, round((layers - first) / entries))
    return replace(
        base,
        d_model=width,
        n_layers=first + entries * repeats,
        first_blocks=tuple(_scaled_block(block, base.d_model, width) for block in base.first_blocks),
        blocks=tuple(_scaled_block(block, base.d_model, width) for block in base.blocks),
    )


def _scaled_block(block: BlockConfig, base: int, width: int) -> BlockConfig:
    match block.attention:
        case GroupedQuery(n_heads=base_heads, n_kv_heads=base_kv) as attention:
            heads, rest = divmod(width * base_heads, base)
            if rest or not heads:
                unit = base // math.gcd(base, base_heads)
                raise UserError(
                    f"--widths {width} is no whole number of heads: the base config has {base_heads} for d_model = "
                    f"{base}; use a multiple of {unit}"
                )
            kv = next(n for n in range(max(1, heads * base_kv // base_heads), 0, -1) if heads % n == 0)
        case LatentAttention():
            raise UserError("a sweep scales GroupedQuery attention alone; the base config has LatentAttention")
        case _:
            assert_never(block.attention)
    d_ff = max(1, round(block.mlp.d_ff * width / base / _MULTIPLE)) * _MULTIPLE
    return replace(block, attention=replace(attention, n_heads=heads, n_kv_heads=kv), mlp=replace(block.mlp, d_ff=d_ff))


def _config(sized: RunConfig, steps: int, sweep: Sweep, base_width: int, name: str) -> RunConfig:
    train, optimizer = sized.train, sized.optimizer
    power = 0.0 if sized.model.mup_base_width is not None else sweep.learning_rate_power
    factor = (base_width / sized.model.d_model) ** power
    if isinstance(optimizer, Muon):
        optimizer = replace(optimizer, adam_learning_rate=optimizer.adam_learning_rate * factor)
    return replace(
        sized,
        train=replace(train, steps=steps, eval_every=max(1, steps // sweep.measurements), profile_steps=None),
        optimizer=replace(
            optimizer,
            learning_rate=optimizer.learning_rate * factor,
            schedule=_as_long(optimizer.schedule, steps / train.steps),
        ),
        checkpoint=replace(sized.checkpoint, every=min(sized.checkpoint.every, steps)),
        observe=replace(sized.observe, sample_tokens=0),
        run_dir=f"{sweep.out}/{name}",
    )


def _as_long(schedule: Schedule, factor: float) -> Schedule:
    """The schedule of a run that is `factor` times as long."""
    # Its lengths are its keys in steps; everything else of a schedule is a share.
    names = [one.name for one in fields(schedule) if one.name.endswith("_steps") and getattr(schedule, one.name)]
    return replace(schedule, **{name: round(getattr(schedule, name) * factor) for name in names})


def _devices(config: RunConfig) -> int:
    """The fewest that its mesh is for."""
    mesh = config.sharding
    return math.prod(max(1, n) for n in (mesh.data, mesh.fsdp, mesh.stage, mesh.seq, mesh.tensor, mesh.expert))


def config_file(run: PlannedRun) -> Path:
    """Beside the run's folder."""
    return Path(f"{run.config.run_dir}.json")


def write_configs(runs: Sequence[PlannedRun]) -> None:
    """A file for each run."""
    for run in runs:
        config_file(run).parent.mkdir(parents=True, exist_ok=True)
        serialize.save(run.config, config_file(run))


def command(run: PlannedRun) -> list[str]:
    """What trains it."""
    return [sys.executable, "-m", "maxlm.train", "--config", str(config_file(run))]


def is_finished(run: PlannedRun) -> bool:
    """Whether its last step is done and measured."""
    folder, steps = Path(run.config.run_dir), run.config.train.steps
    if steps_done(folder) < steps:
        return False
    rows = read_rows(folder / "evals.jsonl")
    return run.config.train.eval_batches == 0 or (bool(rows) and rows[-1]["step"] >= steps)


def run_all(runs: Sequence[PlannedRun], tell: Callable[[str], None]) -> int:
    """Train those that are not finished, one after the other, each going on where it was stopped.

    Returns:
        0, or EXIT_INTERRUPTED when one was stopped by a signal.

    Raises:
        UserError: one failed.
    """
    for number, run in enumerate(runs, 1):
        if is_finished(run):
            tell(f"{number} of {len(runs)}: {run.name} is finished")
            continue
        tell(f"{number} of {len(runs)}: {run.name}")
        code = subprocess.run(command(run), check=False).returncode
        if code == EXIT_INTERRUPTED:
            return code
        if code:
            raise UserError(f"{run.name}: training ended with exit code {code}; mend it, and give the same command")
    return 0
