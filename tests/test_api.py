"""maxlm from Python: names that load nothing until they are used, each function, its errors, and the documents."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from helpers import FLOAT32, packed_batch, plainly, run_decoder, small_run
from run_folder import BYTE_MODEL, make_run, parameters_of
from xla_flags import xla_flags

import maxlm
import maxlm.train
from maxlm.config import (
    ByteTokenizer,
    Capacity,
    ClassHead,
    DataConfig,
    EngineConfig,
    Experts,
    Files,
    LmHead,
    ObserveConfig,
    PrepareConfig,
    RunConfig,
    SamplingConfig,
    ShardingConfig,
    TopKRouter,
    UserError,
    serialize,
    with_experts,
)
from maxlm.config.cli import parse_run
from maxlm.data.loader import open_batches
from maxlm.data.shards import Split
from maxlm.data.tokenizers import Bytes
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.models import Tokens
from maxlm.sharding import make_layout
from maxlm.training.step import make_trainer

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.M | re.S)
COMMANDS = (
    "train",
    "average",
    "compare",
    "convert",
    "generate",
    "evaluate",
    "check",
    "inspect",
    "launch",
    "data",
    "plan",
    "scaling",
    "serve",
    "chat",
    "quantize",
    "synthesize",
)
SMALL = {
    "model.d_model": 32,
    "model.n_layers": 1,
    "model.blocks.0.attention.n_heads": 2,
    "model.blocks.0.attention.n_kv_heads": 2,
    "model.blocks.0.attention.head_dim": 16,
    "model.blocks.0.mlp.d_ff": 48,
    "train.steps": 3,
    "train.seq_len": 32,
    "train.eval_batches": 1,
    "observe.sample_tokens": 0,
    "data.datasets.0.prepare.tokenizer.max_sentences": 5_000,
}
"""Overrides that make the examples of docs/api.md quick."""


@pytest.fixture(autouse=True)
def private_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


# Names


def test_importing_loads_no_array_library() -> None:
    code = (
        "import sys, maxlm\n"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'grain'}\n"
        "assert 'make_trainer' in dir(maxlm) and maxlm.__version__\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert maxlm.load_config('tiny').run_dir == 'runs/tiny'\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "maxlm.load_run\n"
        "assert 'jax' in sys.modules\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_for_people_and_for_type_checkers() -> None:
    for name in maxlm.__all__:
        assert getattr(maxlm, name).__doc__, name
    assert set(maxlm.__all__) <= set(dir(maxlm))
    typed = {}
    for node in ast.walk(ast.parse((ROOT / "maxlm/__init__.py").read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                typed |= {alias.asname or alias.name: f"{line.module}.{alias.name}" for alias in line.names}
    assert typed == maxlm._HOMES and set(typed) == set(maxlm.__all__)
    with pytest.raises(AttributeError, match="module 'maxlm' has no attribute 'nothing'"):
        maxlm.nothing  # noqa: B018


def test_a_command_stays_a_module() -> None:
    assert maxlm.train.__name__ == "maxlm.train" and maxlm.run is maxlm.train.main


# Configs


@pytest.mark.parametrize("name", ["tiny", ROOT / "configs/tiny.py", str(ROOT / "configs" / "tiny.py")])
def test_a_config_by_name_and_by_path(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name does not depend on the folder
    assert maxlm.load_config(name) == maxlm.load_config(ROOT / "configs/tiny.py")


def test_the_command_takes_a_bare_name_too() -> None:
    asked = parse_run(["--config", "tiny", "--train.steps=7"], prog="train", description="")
    assert asked.config == maxlm.load_config("tiny", {"train.steps": 7})


def test_a_file_of_that_name_comes_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("")
    with pytest.raises(UserError, match=r"--config tiny: neither a Python file nor a saved config\.json"):
        maxlm.load_config("tiny")


def test_the_config_of_a_run(tmp_path: Path) -> None:
    serialize.save(small_run(), tmp_path / "config.json")
    assert maxlm.load_config(tmp_path / "config.json") == small_run()


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("train.steps", 7, 7),
        ("optimizer.learning_rate", 1e-5, 1e-5),
        ("optimizer.clip_norm", None, None),
        ("data.verify", False, False),
        ("execution.dtype", maxlm.load_config("llama7b").execution.dtype, "bfloat16"),
        ("observe.sample_prompt", "--x = 1\n", "--x = 1\n"),
        ("model.remat", "dots", "dots"),  # a key of old
    ],
)
def test_an_override_changes_its_key_and_no_other(key: str, value: Any, found: Any) -> None:
    before = serialize.flatten(maxlm.load_config("tiny"))
    after = serialize.flatten(maxlm.load_config("tiny", {key: value}))
    assert after == {**before, "execution.remat" if key == "model.remat" else key: found} != before


@pytest.mark.parametrize(
    ("name", "overrides", "complaint"),
    [
        ("tinny", {}, r"--config tinny: no such file; did you mean tiny\w*"),
        ("configs/nothing.txt", {}, "--config configs/nothing.txt: no such file"),
        ("tiny", {"train.stepz": 3}, "unknown key --train.stepz; did you mean --train.steps?"),
        ("tiny", {"train.steps": "three"}, "--train.steps: .three. is not a whole number"),
        ("tiny", {"train.steps": 0}, "train.steps = 0 must be positive"),
    ],
)
def test_a_wrong_config_is_one_line(name: str, overrides: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        maxlm.load_config(name, overrides)
    assert "\n" not in str(caught.value)


# Logits


def loaded(sharding: ShardingConfig = ShardingConfig(data=1), devices: int = 1, **changes: Any) -> LoadedRun:
    config = dataclasses.replace(small_run(model=BYTE_MODEL, sharding=sharding), execution=FLOAT32)
    return LoadedRun(
        config=config,
        layout=make_layout(sharding, jax.devices()[:devices]),
        step=0,
        **{"parameters": parameters_of(config), "tokenizer": Bytes(), **changes},
    )


@pytest.fixture(scope="module")
def run() -> Iterator[LoadedRun]:
    """With a generator that compiles one program."""
    small = functools.partial(Generator, engine=EngineConfig(slots=2, tokens_per_step=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maxlm.inference.load.Generator", small)
        yield loaded()


def plain_logits(ids: Any, positions: Any, segments: Any = None) -> np.ndarray:
    """The decoder on one device, and the head in float64."""
    config = small_run(model=BYTE_MODEL)
    parameters = parameters_of(config)
    hidden = run_decoder(config.model, parameters, plainly(), jnp.asarray(ids), Tokens(positions, segments)).hidden
    return np.asarray(hidden, np.float64) @ np.asarray(parameters["unembed"], np.float64).T


LAYOUTS = {
    "one device": (ShardingConfig(data=1), 1),
    "data": (ShardingConfig(data=2), 2),
    "fsdp x tensor": (ShardingConfig(data=1, fsdp=2, tensor=2), 4),
    "stage x seq": (ShardingConfig(data=1, stage=2, seq=2), 4),
}


@pytest.mark.parametrize(("sharding", "devices"), LAYOUTS.values(), ids=LAYOUTS)
def test_logits_are_those_of_the_plain_decoder(sharding: ShardingConfig, devices: int) -> None:
    """Of three rows of nine, which no mesh cuts evenly."""
    ids = np.random.default_rng(0).integers(0, BYTE_MODEL.vocab_size, (3, 9))
    logits = loaded(sharding, devices).model.logits(ids)
    assert logits.shape == (3, 9, BYTE_MODEL.vocab_size) and logits.dtype == jnp.float32
    assert logits.sharding.device_set <= set(jax.devices()[:devices])
    want = plain_logits(ids, jnp.broadcast_to(jnp.arange(9), (3, 9)))
    np.testing.assert_allclose(logits, want, atol=2e-5, rtol=1e-5)


def test_logits_go_through_the_whole_head() -> None:
    """In float64 from the plain decoder's hidden states: normalised rows, a factor, a bias, a cap; on a mesh."""
    sharding = ShardingConfig(data=1, fsdp=2, tensor=2)
    model = dataclasses.replace(BYTE_MODEL, head=LmHead(bias=True, scale=0.5, soft_cap=3.0, normalized=True))
    config = dataclasses.replace(small_run(model=model, sharding=sharding), execution=FLOAT32)
    bias = np.random.default_rng(1).normal(size=model.vocab_size).astype(np.float32)
    parameters = {**parameters_of(config), "unembed_bias": jnp.asarray(bias)}
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (4, 9))
    positions = jnp.broadcast_to(jnp.arange(9), ids.shape)
    hidden = run_decoder(model, parameters, plainly(), jnp.asarray(ids), Tokens(positions)).hidden
    table = np.asarray(parameters["unembed"], np.float64)
    table /= np.sqrt((table**2).sum(1, keepdims=True))
    want = 3 * np.tanh((0.5 * np.asarray(hidden, np.float64) @ table.T + bias) / 3)
    run = LoadedRun(
        config=config, layout=make_layout(sharding, jax.devices()[:4]), step=0, parameters=parameters, tokenizer=Bytes()
    )
    np.testing.assert_allclose(run.model.logits(ids), want, atol=2e-5, rtol=1e-5)


def test_a_token_sees_no_later_one_though_experts_have_little_room(run: LoadedRun) -> None:
    """As in decoding, every choice is computed."""
    experts = Experts(n_experts=4, d_ff=24, router=TopKRouter(top_k=2), dispatch=Capacity(factor=0.5, group_size=8))
    config = dataclasses.replace(run.config, model=with_experts(BYTE_MODEL, experts))
    full = dataclasses.replace(run, config=config, parameters=parameters_of(config)).model
    ids = np.random.default_rng(1).integers(0, BYTE_MODEL.vocab_size, (2, 20))
    other = np.where(np.arange(20) < 13, ids, ids[::-1])
    np.testing.assert_allclose(full.logits(other)[:, :13], full.logits(ids)[:, :13], atol=1e-5)
    np.testing.assert_allclose(full.logits(ids[:, :13]), full.logits(ids)[:, :13], atol=1e-5)


def test_a_single_row_and_other_arrays(run: LoadedRun) -> None:
    ids = [5, 0, 263, 17]
    row = run.model.logits(ids)
    assert row.shape == (4, BYTE_MODEL.vocab_size)
    for same in (np.asarray(ids, np.uint8 if max(ids) < 256 else np.uint16), jnp.asarray(ids), tuple(ids)):
        np.testing.assert_array_equal(run.model.logits(same), row)
    np.testing.assert_array_equal(run.model.logits([ids])[0], row)


def test_positions_and_segments_of_packed_rows(run: LoadedRun) -> None:
    """Their loss is the one that training would have."""
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, batch_size=4))
    batch = packed_batch(config)
    logits = np.asarray(run.model.logits(batch["inputs"], batch["segment_ids"], batch["positions"]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    trainer = make_trainer(config, run.layout)
    want, _ = trainer.evaluate(run.parameters, trainer.place(batch))
    assert (nats * batch["loss_mask"]).sum() == pytest.approx(float(want), rel=1e-5)
    without = np.asarray(run.model.logits(batch["inputs"]))
    assert np.abs(logits - without).max() > 0.1  # both matter


def test_a_shape_is_compiled_once_and_nothing_is_made_twice() -> None:
    run = loaded()
    with_segments = [np.ones((2, 8), int)] * 3
    for _ in range(2):
        for columns in (8, 9):
            run.model.logits(np.zeros((2, columns), int))
        run.model.logits(*with_segments)
    assert run.model._compiled._cache_size() == 3
    assert run.model is run.model and run.generator is run.generator


LIMIT = BYTE_MODEL.max_seq_len


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (([[0, 264]],), r"tokens hold 264; must lie in \[0, 264\), as model.vocab_size says"),
        (([-1],), r"tokens hold -1; must lie in \[0, 264\)"),
        (([[2**40]],), "tokens hold 1099511627776"),
        (([[1.0]],), "tokens are float64; must be integers"),
        (([True],), "tokens are bool; must be integers"),
        ((["text"],), "tokens are <U4; must be integers"),
        (([[1], [1, 2]],), "tokens are rows of different lengths"),
        (([],), r"tokens have the shape \[0\]; must be \[B, T\]"),
        ((3,), r"tokens have the shape \[\]"),
        (([[[3]]],), r"tokens have the shape \[1, 1, 1\]"),
        ((np.zeros((1, LIMIT + 1), int),), f"{LIMIT + 1} columns, more than model.max_seq_len = {LIMIT}; use at most"),
        (([1, 2], None, [0]), r"positions have the shape \[1\]; must be that of the tokens, \[2\]"),
        (([1], None, [LIMIT]), rf"positions hold {LIMIT}; must lie in \[0, {LIMIT}\), as model.max_seq_len says"),
        (([1], None, [0.5]), "positions are float64"),
        (([1], [[1]]), r"segment_ids have the shape \[1, 1\]"),
        (([1], [-1]), "segment_ids hold -1"),
    ],
)
def test_wrong_tokens_are_one_line(run: LoadedRun, arguments: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        run.model.logits(*arguments)
    assert "\n" not in str(caught.value)


def test_the_longest_row_and_the_last_id_pass(run: LoadedRun) -> None:
    assert run.model.logits(np.full((1, LIMIT), BYTE_MODEL.vocab_size - 1)).shape[1] == LIMIT


def test_a_model_without_logits_is_refused(run: LoadedRun) -> None:
    config = dataclasses.replace(run.config, model=dataclasses.replace(BYTE_MODEL, head=ClassHead(n_classes=2)))
    classifier = dataclasses.replace(run, config=config, parameters=parameters_of(config)).model
    with pytest.raises(UserError, match="ClassHead gives no logits"):
        classifier.logits([1])


# Text


def test_generate_takes_one_prompt_or_several(run: LoadedRun) -> None:
    ask: dict[str, Any] = {"max_new_tokens": 5, "sampling": SamplingConfig(temperature=0.7), "seed": 3}
    want = run.generator.generate(["ab", "c"], **ask)
    several = run.generate(["ab", "c"], **ask)
    assert [text.tokens for text in several] == [text.tokens for text in want]
    assert run.generate("ab", **ask).tokens == want[0].tokens  # row 0 of a batch of any size


def test_greedy_text_follows_the_logits(run: LoadedRun) -> None:
    tokens = run.tokenizer.prompt_ids("greedy")
    text = run.generate("greedy", max_new_tokens=4, sampling=SamplingConfig(temperature=0))
    for token in text.tokens:
        assert int(run.model.logits(tokens)[-1, : run.tokenizer.vocab_size].argmax()) == token
        tokens = [*tokens, token]


# Batches, training


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run folder and its data."""
    config = make_run(tmp_path_factory.mktemp("api"), batch_size=8, steps=3, log_every=1, eval_batches=1)
    return dataclasses.replace(config, observe=ObserveConfig(sample_tokens=0))


def test_batches_are_those_of_the_loader(prepared: RunConfig) -> None:
    train = prepared.train
    for split in Split:
        found = maxlm.batches(prepared, split.value)
        want = open_batches(prepared.data, batch_size=train.batch_size, seq_len=train.seq_len, split=split)
        assert found.fingerprint == want.fingerprint
        for number, batch in zip(range(3), found, strict=False):
            for name, array in want.rows(number, range(train.batch_size)).items():
                np.testing.assert_array_equal(batch[name], array)
                np.testing.assert_array_equal(found[number][name], array)
    held_out = maxlm.batches(prepared, Split.VALIDATION)
    assert len(list(held_out)) == held_out.n_batches
    with pytest.raises(IndexError):
        held_out[held_out.n_batches]


def test_batches_prepare_their_data(prepared: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    (dataset,) = prepared.data.datasets
    documents = Files(paths=(str(tmp_path / "a.txt"),))
    recipe = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), workers=1)
    new = dataclasses.replace(dataset, path=str(tmp_path / "data"), prepare=recipe)
    batch = maxlm.batches(dataclasses.replace(prepared, data=DataConfig(datasets=(new,))))[0]
    assert Bytes().decode(batch["inputs"][0].tolist()) in "some text " * 100
    missing = dataclasses.replace(new, path=str(tmp_path / "nothing"), prepare=None)
    with pytest.raises(UserError, match=str(tmp_path / "nothing")):
        maxlm.batches(dataclasses.replace(prepared, data=DataConfig(datasets=(missing,))))
    with pytest.raises(UserError, match="split = 'test' must be 'train' or 'validation'"):
        maxlm.batches(prepared, "test")


def test_a_trainer_chooses_its_layout_or_takes_one(prepared: RunConfig) -> None:
    assert maxlm.make_trainer(prepared).layout == make_layout(prepared.sharding)
    one = make_layout(ShardingConfig(data=1), jax.devices()[:1])
    assert maxlm.make_trainer(prepared, one).layout is one
    odd = dataclasses.replace(prepared, train=dataclasses.replace(prepared.train, batch_size=7))
    with pytest.raises(UserError, match="batch_size = 7"):
        maxlm.make_trainer(odd)


def test_a_finished_run_is_at_hand_without_reading_it(
    prepared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(prepared, run_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("maxlm.checkpoint.checkpointer.Checkpointer.restore_params", None)
        result = maxlm.run(config)
    assert result.step == result.run.step == 3 and not result.interrupted
    read = maxlm.load_run(config.run_dir)  # a str
    assert read.step == 3 and read.tokenizer.fingerprint == result.run.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, result.run.parameters, read.parameters)
    np.testing.assert_allclose(result.run.model.logits([1, 2, 3]), read.model.logits([1, 2, 3]), atol=1e-5)
    again = maxlm.run(config)  # nothing is left to do
    assert again.loss is None
    jax.tree.map(np.testing.assert_array_equal, again.run.parameters, read.parameters)
    assert maxlm.load_run(Path(prepared.run_dir), step=1).step == 1


# Documents


@pytest.mark.slow
def test_the_examples_of_the_document_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: the overrides of an example count, but for the sizes."""
    monkeypatch.chdir(tmp_path)
    load = maxlm.load_config
    monkeypatch.setattr(maxlm, "load_config", lambda name, overrides=None: load(name, {**(overrides or {}), **SMALL}))
    assert len(BLOCKS) == 6
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/api.md, block {number}", "exec"), names)
    rows = [json.loads(line) for line in Path("runs/api/metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(names["losses"], [row["loss"] for row in rows], rtol=1e-6)  # the loop says so
    assert names["logits"].shape == (1, len(names["ids"]), 4096)
    assert Path("runs/tuned/config.json").exists() and math.isfinite(names["tuned"].loss)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "docs/first_steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not (tmp_path / "checkout").exists(), "maxlm is here; nothing is to be installed"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/first_steps/metrics.jsonl").open()]
    assert losses[-1] < losses[0] - 0.5


# Commands


def test_the_package_lists_its_commands() -> None:
    code = "import sys, runpy; sys.argv = ['maxlm']\ntry: runpy.run_module('maxlm', run_name='__main__')\n"
    done = python("-c", code + "finally: assert 'jax' not in sys.modules and 'numpy' not in sys.modules")
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^  python -m maxlm\.(\w+) +(\S.+)$", done.stdout, re.M))
    assert set(found) == set(COMMANDS)
    assert found["evaluate"] == "held-out loss, or marks in exams, of a trained model."
    assert python("-m", "maxlm", "--help").stdout == done.stdout == python("maxlm").stdout


@pytest.mark.parametrize(("word", "remedy"), [("train", "write python -m maxlm.train"), ("trian", "use one of maxlm.")])
def test_a_word_after_the_package_is_told_the_command(word: str, remedy: str) -> None:
    done = python("-m", "maxlm", word, "--config", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: python -m maxlm {word}: ") and remedy in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_by_its_path(name: str, tmp_path: Path) -> None:
    """Where inspect.py, tokenizers.py and others would stand in the way of what they are called like."""
    file = f"maxlm/{name}.py" if (ROOT / f"maxlm/{name}.py").exists() else f"maxlm/{name}/__main__.py"
    by_path = python(file, "--help")
    assert by_path.returncode == 0, by_path.stderr
    assert by_path.stdout == python("-m", f"maxlm.{name}", "--help").stdout
    elsewhere = python(str(ROOT / file), "--nonsense", cwd=tmp_path)
    assert elsewhere.returncode == 2
    assert re.fullmatch(r"error: .+\n", elsewhere.stderr), elsewhere.stderr


def test_a_path_that_does_work(prepared: RunConfig) -> None:
    done = python("maxlm/inspect.py", prepared.run_dir, "--verify", "--json")
    assert done.returncode == 0, done.stderr
    assert [step["step"] for step in json.loads(done.stdout)["steps"]] == [1, 2]
