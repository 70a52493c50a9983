"""Runs with an adapter: a base that is read once and stays what it is, checkpoints of what is trained, and their use."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model
from run_folder import BYTE_MODEL, make_run

import maxlm
from maxlm import convert, quantize
from maxlm.checkpoint.state_hash import state_hash
from maxlm.checkpoint.store import Store, named_leaves
from maxlm.config import (
    Adapter,
    AdamW,
    BaseFormat,
    CheckpointConfig,
    ConstantSchedule,
    Lora,
    ObserveConfig,
    RunConfig,
    UserError,
)
from maxlm.inference.load import deferred_run
from maxlm.models import declared
from maxlm.models.weights.kinds import Quantised
from maxlm.models.weights.normal_float import NormalFloat4
from maxlm.recipes.pretrain import FileFeed
from maxlm.shapes import arrays
from maxlm.training.loop import Result

pytestmark = pytest.mark.usefixtures("programs_kept")

LORA = Lora(rank=2, targets=("q_proj", "v_proj", "mlp/up_proj"))
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run without an adapter."""
    return make_run(tmp_path_factory.mktemp("base"), model=BYTE_MODEL)


def with_adapter(base: RunConfig, run_dir: Path, adapter: Adapter = Adapter(kind=LORA), **checkpoint: Any) -> RunConfig:
    """A few steps on that run's model."""
    place = {"init_from": base.run_dir, "every": 2, **checkpoint}
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, adapter=adapter),
        train=dataclasses.replace(base.train, steps=STEPS, eval_batches=1, eval_every=0, log_every=1),
        optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule()),
        checkpoint=CheckpointConfig(**place),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(run_dir),
    )


@pytest.fixture(scope="module")
def trained(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Result[Any]:
    """A run with an adapter, to its end."""
    return maxlm.run(with_adapter(base, tmp_path_factory.mktemp("trained") / "run"))


def folder(result: Result[Any]) -> Path:
    return Path(result.run.config.run_dir)


def stored(run_dir: Path, step: int = STEPS) -> dict[str, tuple[str, tuple[int, ...]]]:
    return Store().record((run_dir / "checkpoints" / str(step)).absolute()).items["params"]


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_checkpoint_has_what_is_trained_alone(base: RunConfig, trained: Result[Any]) -> None:
    model = trained.run.config.model
    wanted = {array.name: ("float32", array.shape) for array in arrays(model) if array.trained}
    assert stored(folder(trained)) == wanted
    assert all(name.startswith("adapter/") for name in wanted)
    size = lambda run_dir, step: sum(
        file.stat().st_size for file in (run_dir / "checkpoints" / str(step)).rglob("*") if file.is_file()
    )
    numbers = sum(array.size for array in arrays(model) if array.trained)
    assert numbers * 4 * 3 < size(folder(trained), STEPS) < sum(array.size for array in arrays(base.model)) * 4
    optimizer = Store().record((folder(trained) / "checkpoints" / str(STEPS)).absolute()).items["optimizer"]
    moments = [shape for name, (_, shape) in optimizer.items() if "/mu/" in name or "/nu/" in name]
    assert sum(np.prod(shape, dtype=int) for shape in moments) == 2 * numbers


def test_the_base_is_untouched_and_the_adapter_has_learned(base: RunConfig, trained: Result[Any]) -> None:
    there = maxlm.load_run(base.run_dir).parameters
    found = trained.run.parameters
    assert_equal({name: found[name] for name in there}, there)
    moved = [name for name, leaf in named_leaves(found["adapter"]).items() if name.endswith("/b") and np.any(leaf)]
    assert len(moved) == 3


def test_it_is_loaded_as_any_run(trained: Result[Any]) -> None:
    loaded = maxlm.load_run(folder(trained))
    assert_equal(loaded.parameters, trained.run.parameters)
    ids = np.arange(12)[None]
    assert_equal(loaded.model(ids), trained.run.model(ids))
    [one] = loaded.generate(["the "], max_new_tokens=3)
    ids = list(loaded.tokenizer.prompt_ids("the "))
    for token in loaded.generate("the ", max_new_tokens=3, sampling=maxlm.SamplingConfig(temperature=0)).tokens:
        assert token == int(np.asarray(loaded.model([ids]))[0, -1].argmax())
        ids.append(token)


class Broken(Exception):
    pass


def test_a_run_that_was_broken_off_comes_to_the_same_end(
    base: RunConfig, trained: Result[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FileFeed.next

    def breaks(self: FileFeed, step: int, state: Any) -> Any:
        if step == 3:
            raise Broken
        return real(self, step, state)

    config = with_adapter(base, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(FileFeed, "next", breaks)
        maxlm.run(config)
    moved = shutil.copytree(base.run_dir, tmp_path / "moved")
    config = with_adapter(base, tmp_path / "run", init_from=str(moved))
    maxlm.run(config)
    ends = [state_hash(run_dir / "checkpoints", STEPS) for run_dir in (tmp_path / "run", folder(trained))]
    assert ends[0] == ends[1]


def test_a_base_that_is_gone_or_another_is_told_in_one_line(base: RunConfig, tmp_path: Path) -> None:
    place = shutil.copytree(base.run_dir, tmp_path / "base")
    config = with_adapter(base, tmp_path / "run", init_from=str(place))
    maxlm.run(config)
    other = make_run(tmp_path / "other") if (tmp_path / "other").mkdir() is None else None
    assert other is not None
    shutil.rmtree(place)
    with pytest.raises(UserError, match=r"run: the adapter's base .*base/checkpoints/2 cannot be read .* bring it back"):
        maxlm.load_run(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be read"):
        deferred_run(tmp_path / "run")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS + 1))
    with pytest.raises(UserError, match=r"^checkpoint\.init_from = .*cannot be read[^\n]*$"):
        maxlm.run(longer)
    shutil.copytree(Path(base.run_dir), place)
    for step in (1, 2):  # what lies in the folder now is another model
        shutil.rmtree(place / "checkpoints" / str(step))
    shutil.copytree(Path(base.run_dir) / "checkpoints" / "1", place / "checkpoints" / "2")
