"""What changes while a run goes on: each phase does what it says, on the windows that come next, and may be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grain import MapDataset
from helpers import small_model, small_run, with_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import BYTE_MODEL, make_run
from test_loader import make
from test_recipes import TRUE, D, Regression
from train_runs import Bench, rows

import maxlm
from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import (
    AdamW,
    CheckpointConfig,
    ConstantSchedule,
    DataConfig,
    Dataset,
    ExactReward,
    GroupedQuery,
    Grpo,
    NoiseScale,
    ObserveConfig,
    Phase,
    Recovered,
    Rollback,
    Rope,
    RunConfig,
    ShardingConfig,
    Stretch,
    TrainMedusa,
    UserError,
    linear_ramp,
)
from maxlm.config.phases import Skip
from maxlm.config.serialize import load
from maxlm.data.loader import Batches, open_batches
from maxlm.data.orders import drawn_of_each, place_after
from maxlm.data.shards import Split
from maxlm.evaluate import main as evaluate
from maxlm.plan.__main__ import main as plan
from maxlm.sharding import Layout, make_layout
from maxlm.training import make_trainer
from maxlm.training.loop import Recipe, Result, run
from maxlm.training.objective import Batch, BatchArray
from maxlm.training.state import TrainState

# What a step is


def with_phases(*phases: Phase, **train: Any) -> RunConfig:
    return small_run(steps=100, phases=phases, **train)


def test_a_phase_changes_what_it_names_and_keeps_the_rest() -> None:
    config = with_phases(
        Phase(start=10, batch_size=16, micro_batches=2),
        Phase(start=30, seq_len=64, rope=Rope(theta=5e5)),
        Phase(start=50, weights=(2.0,)),
    )
    sizes = [(now.train.batch_size, now.train.micro_batches, now.train.seq_len) for now in map(config.at, (9, 10, 30))]
    assert sizes == [(8, 1, 32), (16, 2, 32), (16, 2, 64)]
    thetas = [config.at(step).model.blocks[0].attention.position.theta for step in (29, 30, 99)]  # type: ignore[union-attr]
    assert thetas == [1e4, 5e5, 5e5]
    assert [config.at(step).data.weights for step in (49, 50)] == [(1.0,), (2.0,)]
    last = config.at(60)
    assert last.train.phases == () and last.train.steps == 100 and last.at(60) == last
    assert last.data.past == (
        Stretch(windows=80, seq_len=32, weights=(1.0,), steps=10),
        Stretch(windows=320, seq_len=32, weights=(1.0,), steps=20),
        Stretch(windows=320, seq_len=64, weights=(1.0,), steps=20),
    )
    # 10 x 8 x 32, 20 x 16 x 32, 20 x 16 x 64, and 10 more
    assert config.tokens(60) == last.tokens(60) == 2560 + 10_240 + 20_480 + 10_240
    assert config.tokens(10) == 2560 and config.tokens(0) == 0
    assert config.most_demanding.train.seq_len == 64


def test_rope_is_that_of_layers_that_see_everything() -> None:
    """As Gemma 3 raises it: layers with a window keep theirs (arXiv:2503.19786, section 2)."""
    (block,) = small_model().blocks
    near = dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=8))
    config = dataclasses.replace(
        with_phases(Phase(start=1, rope=Rope(theta=1e6))), model=small_model(blocks=(near, block))
    )
    assert [one.attention.position.theta for one in config.at(1).model.blocks] == [1e4, 1e6]  # type: ignore[union-attr]


def test_windows_passed_over_are_behind_and_are_no_tokens() -> None:
    config = with_phases(Phase(start=10, batch_size=16))
    now = config.at(12, [Skip(4, 100), Skip(10, 7)])
    assert [(one.windows, one.steps) for one in now.data.past] == [(32, 4), (100, 0), (48, 6), (7, 0)]
    assert now.tokens(12) == config.tokens(12) == (80 + 32) * 32


def test_a_ramp_worked_by_hand() -> None:
    """From 4 to 12 sequences of 10 tokens by 4, over 1200 tokens: 600 at 4 (15 steps), 600 at 8 (7.5 steps)."""
    assert linear_ramp(4, 12, by=4, tokens=1200, seq_len=10, micro_batch=4) == (
        Phase(start=15, batch_size=8, micro_batches=2),
        Phase(start=23, batch_size=12, micro_batches=3),
    )
    # GPT-3's: 32 thousand to 3.2 million tokens; half of the way is at half of the size, but for one stage
    ramp = linear_ramp(16, 1552, by=16, tokens=12e9, seq_len=2048)
    config = small_run(batch_size=16, seq_len=2048, steps=10**6, phases=ramp)
    half = next(phase for phase in ramp if config.tokens(phase.start) >= 6e9)
    assert half.batch_size == pytest.approx(784, abs=32)
    assert config.tokens(ramp[-1].start) == pytest.approx(12e9, rel=0.01)
    with pytest.raises(UserError, match=r"first = 4, last = 10, by = 4: last must be first and one or more times by"):
        linear_ramp(4, 10, by=4, tokens=1200, seq_len=10)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            with_phases(Phase(start=10, batch_size=12)),
            r"train.phases.0 \(from step 10 on\): train.batch_size = 12 is not a multiple of 8 .*; use 8 or 16",
        ),
        (
            with_phases(Phase(start=5, batch_size=16), Phase(start=10, seq_len=128)),
            r"^train.phases.1 \(from step 10 on\): train.seq_len = 128 is longer than model.max_seq_len = 64",
        ),
        (
            with_phases(Phase(start=10), Phase(start=10)),
            r"train.phases.1.start = 10 is not after train.phases.0.start = 10; use at least 11",
        ),
        (
            with_phases(Phase(start=10, early=Recovered())),
            r"train.phases.0.early: before the first of train.phases there is none that the loss recovers from",
        ),
        (
            with_phases(Phase(start=10), Phase(start=60, early=Recovered(every=51))),
            r"train.phases.1.early.every = 51 leaves no measurement in the 50 steps .*; use at most 50",
        ),
        (
            with_phases(Phase(start=10), Phase(start=60, early=Recovered(every=10)), eval_batches=0),
            r"train.phases.1.early needs the held-out loss, and train.eval_batches = 0 measures none; .* None for all",
        ),
        (with_phases(Phase(start=100)), r"train.phases.0.start = 100 is not before train.steps = 100; use at most 99"),
        (
            with_phases(Phase(start=1, weights=(1.0, 2.0))),
            r"train.phases.0.weights has 2 numbers for the 1 of data.datasets; give one for each",
        ),
        (
            dataclasses.replace(
                with_phases(Phase(start=1, rope=Rope(theta=1e6))), model=with_attention(small_model(), position=None)
            ),
            r"train.phases.0.rope finds no layer with a Rope and no window in this model",
        ),
        (
            dataclasses.replace(with_phases(Phase(start=1)), task=TrainMedusa()),
            r"train.phases are of task = Pretrain and Sft, not of TrainMedusa",
        ),
        (
            dataclasses.replace(
                small_run(),
                data=DataConfig(datasets=(Dataset(path="a"),), past=(Stretch(windows=8, seq_len=32, weights=(1.0,)),)),
                task=Grpo(rewards=(ExactReward(),)),
            ),
            r"data.past is of text that is read in order, which task = Grpo does not; leave it empty",
        ),
        (
            dataclasses.replace(
                small_run(rollback=Rollback(before=10, patience=5)), checkpoint=CheckpointConfig(every=5)
            ),
            r"checkpoint.keep_last = 2 may leave no checkpoint from before a spike: .* 15 steps .*; use at least 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_phase(config: RunConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.validate(8)


def test_weights_that_read_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights = \(0.0, 0.0\) are all 0"):
        Phase(start=1, weights=(0.0, 0.0))
    with pytest.raises(UserError, match="every weight is 0"):
        DataConfig(datasets=(Dataset(path="a", weight=0.0),))


# Which windows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=1, max_size=3).filter(any))
def test_windows_of_each_set_are_counted(n: int, weights: list[float]) -> None:
    """Against the order itself."""
    labels = [MapDataset.source([i]).repeat() for i, weight in enumerate(weights) if weight]
    order = MapDataset.mix(labels, [weight for weight in weights if weight]) if len(labels) > 1 else labels[0]
    there = [order[k] for k in range(n)]
    assert drawn_of_each(n, weights) == [there.count(i) for i in range(len(weights))]


def test_a_set_goes_on_at_the_same_share_of_its_tokens() -> None:
    """100 windows of 16 tokens of one set are 25 of 64, 30 are 7.5: the eighth begins no earlier."""
    behind = lambda n, weights=(1.0,): Stretch(windows=n, seq_len=16, weights=weights)
    assert place_after([behind(100)], 64, (1.0,)) == ((25,), 0)
    assert place_after([behind(30)], 64, (1.0,)) == ((8,), 0)
    assert place_after([behind(30), behind(5)], 16, (1.0,)) == ((0,), 35)
    there_and_back = [behind(30), Stretch(windows=2, seq_len=64, weights=(1.0,))]
    assert place_after(there_and_back, 16, (1.0,)) == ((40,), 0)
    assert place_after([behind(100, (3.0, 1.0)), behind(10, (0.0, 1.0))], 16, (1.0, 1.0)) == ((75, 35), 0)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, ...]:
    folder = tmp_path_factory.mktemp("data")
    return make(folder, "a", 150, 1), make(folder, "b", 60, 2)


def reads(config: RunConfig, steps: Sequence[int]) -> Iterator[bytes]:
    """The windows of these steps, in their order."""
    for step in steps:
        yield from (row.tobytes() for row in opened(config.at(step))[step]["inputs"])


@functools.cache
def opened(now: RunConfig) -> Batches:
    return open_batches(now.data, batch_size=now.train.batch_size, seq_len=now.train.seq_len, split=Split.TRAIN)


def of(sets: Sequence[Dataset], weights: Sequence[float], *phases: Phase, **train: Any) -> RunConfig:
    weighed = tuple(dataclasses.replace(one, weight=weight) for one, weight in zip(sets, weights, strict=True))
    return dataclasses.replace(
        small_run(**{"seq_len": 16, "steps": 40, "phases": phases, **train}), data=DataConfig(datasets=weighed)
    )


def test_batches_of_any_size_read_one_order(datasets: tuple[Dataset, ...]) -> None:
    """4 x 6, 3 x 10 and 5 x 2 rows: the first 64 of the mixture, none lost and none twice."""
    ramp = of(datasets, (3, 1), Phase(start=4, batch_size=10), Phase(start=7, batch_size=2), batch_size=6)
    flat = of(datasets, (3, 1), batch_size=1)
    assert list(reads(ramp, range(12))) == list(reads(flat, range(64)))
    assert opened(ramp.at(5)).first == 4
    with pytest.raises(IndexError):
        opened(ramp.at(5))[3]


def test_no_set_starts_over_when_the_mixture_changes(datasets: tuple[Dataset, ...]) -> None:
    """What is read of each set is the beginning of its own order, through all phases; one has weight 0 at first."""
    phases = Phase(start=5, weights=(1.0, 0.5)), Phase(start=9, weights=(0.2, 1.0), batch_size=4)
    found = list(reads(of(datasets, (1, 0), *phases), range(15)))
    for i, dataset in enumerate(datasets):
        alone = list(reads(of(datasets, (1 - i, i), batch_size=1), range(100)))
        own = [window for window in found if window in set(alone)]
        assert len(own) > 10 and own == alone[: len(own)], dataset.path
    assert not set(found[:40]) & set(alone)  # of the second, which had weight 0


def test_longer_windows_go_on_where_shorter_ones_were(datasets: tuple[Dataset, ...]) -> None:
    """5 batches of 8 x 16 tokens are 20 windows of 32: the epoch of those goes on with its 21st."""
    grown = of(datasets[:1], (1,), Phase(start=5, seq_len=32, batch_size=4))
    long = of(datasets[:1], (1,), seq_len=32, batch_size=1)
    assert list(reads(grown, range(5, 9))) == list(reads(long, range(20, 36)))


def test_what_is_passed_over_is_read_by_nobody(datasets: tuple[Dataset, ...]) -> None:
    config = of(datasets, (3, 1))
    flat = list(reads(of(datasets, (3, 1), batch_size=1), range(80)))
    now = config.at(4, [Skip(3, 20)])
    assert [row.tobytes() for row in opened(now)[4]["inputs"]] == flat[32 + 20 : 40 + 20]


# Runs


class Rows(Regression):
    """A regression whose batches are as large as the config says."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        super().__init__(layout, taught=False)
        n = config.train.batch_size
        self.arrays = {
            "x": BatchArray((n, D), jnp.float32, ("batch", None)),
            "y": BatchArray((n,), jnp.float32, ("batch",)),
        }


class Numbered:
    """Points by the number of their window. `read` gets the numbers of each batch, and may raise."""

    fingerprint = "numbered"

    def __init__(self, config: RunConfig, layout: Layout, read: Any) -> None:
        self._objective, self._layout, self._read, self._rows = (
            Rows(config, layout),
            layout,
            read,
            config.train.batch_size,
        )
        self._first = sum(one.steps for one in config.data.past)
        self._drawn = place_after(config.data.past, config.train.seq_len, config.data.weights).drawn
        self.memory: dict[str, Any] = {}

    def next(self, step: int, state: TrainState) -> Batch:
        begin = self._drawn + (step - self._first) * self._rows
        return placed(self._read(step, range(begin, begin + self._rows)), self._objective, self._layout)

    def close(self) -> None:
        pass


def points(step: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    x = np.stack([np.random.default_rng(n).normal(size=D) for n in numbers]).astype(np.float32)
    return {"x": x, "y": x @ TRUE + 1}


def placed(values: dict[str, np.ndarray], objective: Rows, layout: Layout) -> Batch:
    sharding = lambda name: layout.sharding(layout.activation(*objective.arrays[name].dims))
    return {name: jax.device_put(value, sharding(name)) for name, value in values.items()}


def regression(run_dir: Path, **train: Any) -> RunConfig:
    return dataclasses.replace(
        small_run(**{"steps": 12, "log_every": 1, "seq_len": 1, **train}),
        optimizer=AdamW(learning_rate=0.3, schedule=ConstantSchedule()),
        checkpoint=CheckpointConfig(every=3),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(run_dir),
    )


def train(config: RunConfig, read: Any = points) -> Result:
    make = lambda now, layout: Recipe(objective=Rows(now, layout), feed=Numbered(now, layout, read))
    return run(config, make)


def same_state(one: Path, other: Path, step: int = 12) -> bool:
    return len({state_hash(folder / "checkpoints", step) for folder in (one, other)}) == 1


RAMP = Phase(start=4, batch_size=16), Phase(start=8, batch_size=24, micro_batches=3)


@pytest.fixture(scope="module")
def ramped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ramp") / "run"
    read: list[int] = []

    def note(step: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        read.extend(numbers)
        return points(step, numbers)

    assert train(regression(run_dir, phases=RAMP), note).step == 12
    assert read == list(range(4 * 8 + 4 * 16 + 4 * 24))
    return run_dir


def test_a_ramp_is_steps_on_batches_of_these_sizes(ramped: Path, tmp_path: Path) -> None:
    """Against steps that are made by hand, each by a program that knows no phases."""
    layout, state, at = make_layout(ShardingConfig()), None, 0
    losses = []
    for size, parts in [(8, 1), (16, 1), (24, 3)]:
        config = regression(tmp_path, batch_size=size, micro_batches=parts)
        objective = Rows(config, layout)
        trainer = make_trainer(config, layout, objective)
        state = trainer.init() if state is None else state
        for _ in range(4):
            state, output = trainer.step(state, placed(points(0, range(at, at + size)), objective, layout))
            at += size
            losses.append(float(output.figures["loss"]))
    found = rows(ramped)
    assert [row["loss"] for row in found] == losses
    assert [row["tokens"] for row in found] == [*range(8, 33, 8), *range(48, 97, 16), *range(120, 193, 24)]


@pytest.mark.parametrize("stops", [pytest.param((7,)), pytest.param((3, 5, 11), marks=pytest.mark.nightly)])
def test_broken_off_in_any_phase_it_ends_with_the_same_bits(
    ramped: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    config = regression(tmp_path / "run", phases=RAMP)
    for stop_at in stops:

        def stop(step: int, numbers: Sequence[int], stop_at: int = stop_at) -> dict[str, np.ndarray]:
            if step == stop_at:
                raise InterruptedError
            return points(step, numbers)

        with pytest.raises(InterruptedError):
            train(config, stop)
    assert train(config).step == 12
    assert same_state(tmp_path / "run", ramped)
    assert [(row["step"], row["tokens"], row["loss"]) for row in rows(tmp_path / "run")] == [
        (row["step"], row["tokens"], row["loss"]) for row in rows(ramped)
    ]


def test_phases_that_have_begun_may_not_change_and_later_ones_may(ramped: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(ramped, tmp_path / "run"))
    (run_dir / "checkpoints" / "12").rename(run_dir / "checkpoints" / "12.set-aside")
    other = dataclasses.replace(RAMP[1], batch_size=48)
    with pytest.raises(
        UserError, match=r"train.phases.1.batch_size: .*/9 was trained with 24, the config says 48, which"
    ):
        train(regression(run_dir, phases=(RAMP[0], other)))
    with pytest.raises(UserError, match=r"train.phases: .*/9 was trained with 2 entries, the config says 1 entry"):
        train(regression(run_dir, phases=RAMP[:1]))
    later = Phase(start=10, batch_size=8, micro_batches=1)
    assert train(regression(run_dir, phases=(*RAMP, later))).step == 12
    assert rows(run_dir)[-1]["tokens"] == 32 + 64 + 2 * 24 + 2 * 8


# Of text


def text_run(folder: Path, **train: Any) -> RunConfig:
    """A run whose context grows, with another RoPE, and whose batch shrinks for it."""
    model = dataclasses.replace(BYTE_MODEL, n_layers=1, max_seq_len=32)
    phases = (Phase(start=3, seq_len=32, batch_size=16, rope=Rope(theta=5e5)),)
    made = make_run(folder, model=model, seq_len=16, batch_size=32, log_every=1, phases=phases, **train)
    return dataclasses.replace(
        made,
        observe=ObserveConfig(sample_tokens=0),
        checkpoint=CheckpointConfig(every=2, keep_last=3),
        run_dir=str(folder / "grown"),
    )


@pytest.mark.slow
def test_a_context_grows_and_the_model_that_is_loaded_has_its_rope(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = NoiseScale(measure=True)
    config = text_run(tmp_path, steps=4, eval_batches=0, micro_batches=2, noise_scale=noise)
    behind = dataclasses.replace(config.data, past=(Stretch(windows=8, seq_len=16, weights=(1.0,), steps=1),))
    with pytest.raises(UserError, match=r"data.past.0.steps = 1 says that steps of this run have read it"):
        maxlm.run(dataclasses.replace(config, data=behind))
    result = maxlm.run(config)
    attention = result.run.config.model.blocks[0].attention
    assert isinstance(attention, GroupedQuery) and attention.position == Rope(theta=5e5)
    found = [(row["step"], row["tokens"]) for row in rows(tmp_path / "grown")]
    assert found == [(step, 512 * step) for step in range(1, 5)]
    evaluate(["--run", str(tmp_path / "grown"), "--data", config.data.datasets[0].path, "--batches", "1"])
    assert "held-out loss" in capsys.readouterr().out  # of other data there is nothing behind
    loaded = maxlm.load_run(tmp_path / "grown")
    assert loaded.config.model == result.run.config.model
    assert maxlm.load_run(tmp_path / "grown", step=2).config.model == config.model != loaded.config.model


@pytest.mark.nightly
def test_a_run_of_text_that_broke_off_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal after each step in turn: the held-out loss of the end, too."""
    config = text_run(tmp_path, steps=6, eval_batches=1)
    maxlm.run(config)
    stopped = dataclasses.replace(config, run_dir=str(tmp_path / "stopped"))
    for at in range(1, 6):
        with monkeypatch.context() as patch:
            patch.setattr("maxlm.training.loop.Interruption.reached", lambda self, step, last, at=at: step == at)
            assert maxlm.run(stopped).interrupted
    maxlm.run(stopped)
    assert same_state(tmp_path / "grown", tmp_path / "stopped", 6)
    (held_out,) = rows(tmp_path / "grown", "evals")
    assert [held_out] == rows(tmp_path / "stopped", "evals") and held_out["tokens"] == 6 * 512


_TWO = """\
import dataclasses, importlib.util
from maxlm.config import Phase, Recovered, Rollback, Rope

spec = importlib.util.spec_from_file_location("base", {base!r})
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)


def get_config():
    config = base.get_config()
    early = Recovered(every=2, tolerance=9.0)
    phases = Phase(start=8, batch_size=16), Phase(start=16, early=early, batch_size=8, seq_len=64, rope=Rope(theta=5e4))
    rollback = Rollback(margin=0.02, window=1, patience=1, before=0, skip=1, at_most=100)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=24, phases=phases, rollback=rollback),
        checkpoint=dataclasses.replace(config.checkpoint, every=2),
    )
"""


@pytest.mark.nightly
def test_two_processes_change_phases_and_go_back_together(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A margin so small that noise is a spike; ranks that decided otherwise would wait for each other for ever."""
    bench = Bench.of_session(tmp_path_factory)
    config = tmp_path / "config.py"
    config.write_text(_TWO.format(base=str(bench.config)))
    with contextlib.ExitStack() as stack:
        both = bench.start_two(stack, tmp_path / "run", f"--config={config}", "--optimizer.learning_rate=0.03")
        ended = [process.end() for process in both]
    assert [one.code for one in ended] == [0, 0], ended
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 25))
    assert found[-1]["tokens"] == 8 * 256 + 8 * 512 + 8 * 512
    assert rows(tmp_path / "run", "rollbacks")
    assert [phase.start for phase in load(RunConfig, tmp_path / "run" / "config.json").train.phases] == [8, 10]


# Plan


def test_the_plan_is_of_the_largest_phase(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--config", "configs/tiny_phases.py", "--target", "cpu:1"]
    assert plan(asked) == 0
    said = capsys.readouterr().out
    assert "of 7 phases, the one with the most tokens in a micro-batch" in said and "16 x 256 tokens a step" in said
    with pytest.raises(UserError, match=r"--out would write one of train.phases alone"):
        plan([*asked, "--search", "--out", str(tmp_path / "found.json")])
