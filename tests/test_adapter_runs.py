"""Runs with an adapter: a base that is read and stays what it is, checkpoints of what is trained, and their use."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model
from run_folder import BYTE_MODEL, make_run, parameters_of

import maxlm
from maxlm import convert, quantize
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.state_hash import state_hash
from maxlm.checkpoint.store import Store, named_leaves
from maxlm.config import (
    AdamW,
    Adapter,
    BaseFormat,
    CheckpointConfig,
    ChosenModel,
    ConstantSchedule,
    GatedMlp,
    Lora,
    ObserveConfig,
    RunConfig,
    UserError,
    serialize,
)
from maxlm.data.tokenizers import Bytes
from maxlm.hub.adapted import load_adapters
from maxlm.hub.models import open_base
from maxlm.inference.load import deferred_run
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
    np.testing.assert_allclose(loaded.model(ids), trained.run.model(ids), atol=1e-5)  # on another number of devices


@pytest.mark.slow
def test_it_continues_texts(trained: Result[Any]) -> None:
    loaded, prompt = maxlm.load_run(folder(trained)), "the "
    found = loaded.generate(prompt, max_new_tokens=4, sampling=maxlm.SamplingConfig(temperature=0)).tokens
    ids = [*loaded.tokenizer.prompt_ids(prompt), *found]
    logits = np.asarray(loaded.model([ids]))[0]
    np.testing.assert_array_equal(found, logits[-len(found) - 1 : -1].argmax(-1))


def test_adapters_to_be_served_are_of_the_model(base: RunConfig, trained: Result[Any], tmp_path: Path) -> None:
    chosen, place = ChosenModel(run=base.run_dir), str(folder(trained))
    [(name, adapter)] = load_adapters(chosen, [f"mine={place}"]).items()
    assert name == "mine"
    assert_equal(adapter.parameters, trained.run.parameters["adapter"])
    earlier = ChosenModel(run=base.run_dir, step=1)
    for model, words, match in (
        (chosen, ["mine"], "--adapter mine must be NAME=DIR"),
        (chosen, [f"mine={place}"] * 2, "comes twice"),
        (chosen, ["mine=" + base.run_dir], "the run has no adapter"),
        (chosen, [f"mine={tmp_path}/none"], "not a run folder"),
        (earlier, [f"mine={place}"], r"its adapter is of the base .*checkpoints/2 .*, the model is .*checkpoints/1"),
    ):
        with pytest.raises(UserError, match=match):
            load_adapters(model, words)


class Broken(Exception):
    pass


def test_a_run_that_was_broken_off_comes_to_the_same_end(
    base: RunConfig, trained: Result[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error; test_task_kills.py kills one."""
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


def test_a_base_that_is_gone_or_another_is_told_in_one_line(
    base: RunConfig, trained: Result[Any], tmp_path: Path
) -> None:
    run_dir, place = shutil.copytree(folder(trained), tmp_path / "run"), Path(base.run_dir)
    config = with_adapter(base, run_dir)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS + 1))
    loads = (maxlm.load_run, lambda run_dir: deferred_run(run_dir), lambda _: maxlm.run(longer))
    away = place.rename(tmp_path / "away")
    try:
        for load in loads:
            with pytest.raises(
                UserError, match=r"base .*/run/?.* cannot be read .*bring it back, or (put a link|name in)"
            ):
                load(run_dir)
        make_run_again(place, base)
        for load in loads:
            with pytest.raises(UserError, match=r"is not the one that it was trained on: it has fingerprint [^\n]*$"):
                load(run_dir)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        away.rename(place)


def make_run_again(run_dir: Path, base: RunConfig) -> None:
    """Another model of the same sizes in that folder."""
    Bytes().save(run_dir / "tokenizer")
    serialize.save(base, run_dir / "config.json")
    with Checkpointer(run_dir / "checkpoints", base.checkpoint) as checkpointer:
        meta = {"tokenizer": Bytes().fingerprint}
        checkpointer.save(2, params=parameters_of(base, seed=9), optimizer={"count": jnp.zeros(())}, meta=meta)


def test_what_does_not_fit_is_told_before_anything_is_read(
    base: RunConfig, trained: Result[Any], tmp_path: Path
) -> None:
    config = with_adapter(base, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"model\.adapter is laid on a model that is there: checkpoint\.init_from is None"
    ):
        maxlm.run(dataclasses.replace(config, checkpoint=CheckpointConfig()))
    wider = small_model(vocab_size=272)
    adapter = config.model.adapter
    with pytest.raises(UserError, match=r"embed: it has \[264, 32\], this model \[272, 32\]"):
        maxlm.run(dataclasses.replace(config, model=dataclasses.replace(wider, adapter=adapter)))
    for model in (base.model, config.model):
        on_it = dataclasses.replace(config, model=model, checkpoint=CheckpointConfig(init_from=str(folder(trained))))
        with pytest.raises(UserError, match=r"has an adapter; merge it \(python -m maxlm\.convert --from run:"):
            maxlm.run(on_it)


def test_full_parts_begin_as_the_base_and_are_kept(base: RunConfig, tmp_path: Path) -> None:
    config = with_adapter(base, tmp_path / "run", Adapter(kind=LORA, full=("unembed",)), every=1)
    config = dataclasses.replace(config, optimizer=AdamW(learning_rate=1e-6, schedule=ConstantSchedule()))
    result = maxlm.run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)))
    assert "unembed" in stored(tmp_path / "run", 1) and "embed" not in stored(tmp_path / "run", 1)
    there = maxlm.load_run(base.run_dir).parameters
    moved = np.abs(np.asarray(result.run.parameters["unembed"]) - np.asarray(there["unembed"])).max()
    assert 0 < moved < 2e-6
    assert_equal(maxlm.load_run(tmp_path / "run").parameters, result.run.parameters)


@pytest.mark.nightly
def test_a_base_of_few_bits(tmp_path: Path) -> None:
    """From a run, and from one that is quantised already: the same to the bit, and untouched by training."""
    (tmp_path / "base").mkdir()
    block = dataclasses.replace(BYTE_MODEL.blocks[0], mlp=GatedMlp(d_ff=64))
    base = make_run(tmp_path / "base", model=dataclasses.replace(BYTE_MODEL, d_model=64, blocks=(block,)))
    quantised = tmp_path / "quantised"
    quantize.main(["--run", base.run_dir, "--method", "nf4", "--out", str(quantised), "--speed_tokens", "0"])
    adapter = Adapter(kind=LORA, base=BaseFormat.NF4)
    result = maxlm.run(with_adapter(base, tmp_path / "run", adapter))
    found, there = result.run.parameters, maxlm.load_run(quantised).parameters
    assert isinstance(found["blocks"]["0"]["mlp"]["up_proj"], NormalFloat4)
    assert_equal({name: found[name] for name in there}, there)
    assert set(stored(tmp_path / "run")) == {name for name in named_leaves(found) if name.startswith("adapter/")}
    from_quantised = maxlm.run(with_adapter(base, tmp_path / "again", adapter, init_from=str(quantised)))
    assert_equal(from_quantised.run.parameters, found)
    assert_equal(maxlm.load_run(tmp_path / "again").parameters, found)
    # What is converted or merged later is the base that was trained on, not the one before it was rounded.
    deferred = deferred_run(tmp_path / "run").parameters["blocks"]["0"]["mlp"]["up_proj"]
    dense = found["blocks"]["0"]["mlp"]["up_proj"].dense(jnp.float32)
    np.testing.assert_array_equal(np.stack([deferred.read(i) for i in range(2)]), dense)
    for other, match in (
        (
            Adapter(kind=LORA, base=BaseFormat.INT8),
            "is held as NormalFloat4 there, and not as model.adapter.base = INT8",
        ),
        (dataclasses.replace(adapter, full=("unembed",)), "unembed: it is quantised there, and model.adapter.full"),
    ):
        with pytest.raises(UserError, match=match):
            maxlm.run(with_adapter(base, tmp_path / "other", other, init_from=str(quantised)))


def test_a_published_base(base: RunConfig, trained: Result[Any], tmp_path: Path) -> None:
    convert.main(["--from", f"run:{base.run_dir}", "--to", f"hf:{tmp_path}/hf"])
    result = maxlm.run(with_adapter(base, tmp_path / "run", init_from=f"hf:{tmp_path}/hf"))
    assert_equal(result.run.parameters, trained.run.parameters)
    loaded = maxlm.load_run(tmp_path / "run")
    assert_equal(loaded.parameters, result.run.parameters)
    assert loaded.chat is None and (tmp_path / "run" / "published").is_dir()
    deferred = deferred_run(tmp_path / "run", open_base=open_base).parameters
    assert_equal(jax.tree.map(lambda leaf: leaf.read(None), deferred), result.run.parameters)
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="is not the one that it was trained on"):
        maxlm.load_run(tmp_path / "run")
