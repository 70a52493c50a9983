"""Checkpoints of arrays that are made, and read, layer by layer."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from run_folder import make_run, parameters_of
from xla_flags import xla_flags

from maxlm.checkpoint import manifest, retention, store
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.store import Deferred
from maxlm.config import CheckpointConfig, UserError
from maxlm.data.tokenizers import Bytes
from maxlm.hub.models import pieces_of
from maxlm.hub.names import Piece
from maxlm.inference.load import ONE_DEVICE, deferred_run, load_run
from maxlm.shapes import Array, Constant, Part, Role, arrays
from maxlm.sharding import make_layout
from maxlm.training.keeper import Keeper
from maxlm.training.spikes import Spikes
from maxlm.training.state import init_state

RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "stack": RNG.standard_normal((3, 300, 1100)).astype(np.float32),  # each layer is cut into chunks, unevenly
    "small": RNG.standard_normal((5, 3)).astype(np.float32),
    "numbers": RNG.standard_normal(4).astype(np.float32),
    "half": RNG.standard_normal((2, 7, 3)).astype(ml_dtypes.bfloat16),
    "whole": RNG.standard_normal((2, 400, 900)).astype(np.float32),
    "counts": RNG.integers(-9, 9, (3, 4), np.int32),
    "flags": np.array([[True, False], [False, False]]),
    "zeros": np.zeros((2, 3), np.float32),
    "scalar": np.array(7, np.int32),
}
WHOLE = {"whole", "flags", "scalar"}


def deferred(name: str) -> Deferred:
    array = ARRAYS[name]
    read = lambda number: array if number is None else np.asarray(array[number])
    return Deferred(shape=array.shape, dtype=array.dtype, by_layer=name not in WHOLE, read=read)


def same(found: Any, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert np.asarray(found).tobytes() == wanted.tobytes()


def wanted(these: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    here = SingleDeviceSharding(jax.devices()[0])
    return {name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=here) for name, one in these.items()}


def open_deferred(folder: Path, these: dict[str, np.ndarray]) -> dict[str, Deferred]:
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        return checkpointer.restore_params(None, wanted(these), deferred=True).params


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deferred")
    with pytest.MonkeyPatch.context() as patch, Checkpointer(folder, CheckpointConfig()) as checkpointer:
        patch.setattr(store, "_CHUNK_BYTES", 1 << 20)
        checkpointer.save(0, params={name: deferred(name) for name in ARRAYS}, optimizer={}, meta={})
    return folder


def test_written_by_layer(written: Path) -> None:
    """Every number is there for devices, for the host, and layer by layer; the checksums are those of the files."""
    assert manifest.verify(written / "0", 0) == []
    with Checkpointer(written, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore_params(None, wanted(ARRAYS))
    opened = open_deferred(written, ARRAYS)
    for name, array in ARRAYS.items():
        same(restored.params[name], array)
        same(opened[name].read(None), array)
        assert (opened[name].shape, opened[name].dtype) == (array.shape, array.dtype)
        if name not in WHOLE:
            assert opened[name].by_layer
            for number in opened[name].numbers:
                same(opened[name].read(number), np.asarray(array[number]))


def test_what_was_written_whole_is_read_whole(tmp_path: Path) -> None:
    """By layer only where the layers were on devices of their own."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    these = {name: ARRAYS[name] for name in ("half", "whole", "counts", "flags", "scalar")}
    cut = {"half": PartitionSpec("a"), "whole": PartitionSpec(None, "a")}
    put = lambda name: jax.device_put(these[name], NamedSharding(mesh, cut.get(name, PartitionSpec())))
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(3, params={name: put(name) for name in these}, optimizer={}, meta={})
    opened = open_deferred(tmp_path, these)
    assert opened["half"].by_layer and not opened["whole"].by_layer
    for name, array in these.items():
        same(opened[name].read(None), array)
    for number in opened["half"].numbers:
        same(opened["half"].read(number), these["half"][number])


@pytest.mark.parametrize("cut", [(), ("a",), (None, "a"), (None, None, "a")], ids=str)
def test_training_writes_large_layers_apart(tmp_path: Path, cut: tuple[str | None, ...]) -> None:
    """However the stack is cut over devices; no chunk is of two layers, or larger than the limit of a chunk."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    draw = np.random.default_rng(1)
    large, small = draw.standard_normal((2, 512, 512), np.float32), draw.standard_normal((3, 511, 512), np.float32)
    these = {"large": large, "small": small, "table": large.reshape(1024, 512)}
    spec = {"large": PartitionSpec(*cut)}
    put = {
        name: jax.device_put(one, NamedSharding(mesh, spec.get(name, PartitionSpec()))) for name, one in these.items()
    }
    with pytest.MonkeyPatch.context() as patch, Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        patch.setattr(store, "_CHUNK_BYTES", 1 << 19)
        checkpointer.save(3, params=put, optimizer={}, meta={}, stacks=("large", "small", "absent"))
        checkpointer.wait()
        restored = checkpointer.restore_latest(params=wanted(these), optimizer={})
    opened = open_deferred(tmp_path, these)
    assert {name: one.by_layer for name, one in opened.items()} == {"large": True, "small": False, "table": False}
    chunk = (
        tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/3/params/", "path": "large/"},
            }
        )
        .result()
        .chunk_layout.read_chunk.shape
    )
    assert chunk[0] == 1 and np.prod(chunk) * 4 <= 1 << 19
    for name, array in these.items():
        same(restored.params[name], array)
        same(opened[name].read(None), array)
    same(opened["large"].read(1), large[1])


def test_a_run_keeps_its_stacks_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training saves, `deferred_run` reads layer by layer."""
    monkeypatch.setattr(store, "_LAYER_BYTES", 1)
    config = make_run(tmp_path)
    layout = make_layout(ONE_DEVICE, jax.devices()[:1])
    identity = {"data": "", "tokenizer": Bytes().fingerprint}
    with Keeper(config, layout, identity, allow_change=(), warn=lambda line: None) as keeper:
        keeper.save(init_state(parameters_of(config), {}), 3, {}, Spikes(config, {}), {})
    run = deferred_run(Path(config.run_dir), step=3)
    by_name = store.named_leaves(run.parameters)
    for array in arrays(config.model):
        assert by_name[array.name].by_layer == (array.dims[0] == "layers"), array.name


def test_a_run_of_an_earlier_version() -> None:
    folder = Path(__file__).parent / "formats/1/run"
    loaded, opened = load_run(folder), deferred_run(folder)
    layer, whole = pieces_of(opened.parameters), jax.tree.map(np.asarray, loaded.parameters)
    jax.tree.map(lambda one, array: same(one.read(None), array), opened.parameters, whole)
    for array in arrays(loaded.config.model):
        at = (array.stacked - 1,) if array.dims[0] == "layers" else ()
        (found,) = layer([Piece(array, at)])
        same(found, pieces_of(whole)([Piece(array, at)])[0])


def test_one_layer_at_a_time(tmp_path: Path) -> None:
    """A layer is gone before the one after the next is made, whichever array they are of."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def read(number: int | None) -> np.ndarray:
        nonlocal most
        made = np.full((64, 64), number, np.float32)
        alive.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in alive))
        return made

    one = Deferred(shape=(6, 64, 64), dtype=np.dtype(np.float32), by_layer=True, read=read)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(0, params={"a": one, "b": one, "c": one}, optimizer={}, meta={})
    assert len(alive) == 18 and most <= 2


@pytest.mark.parametrize("name", ["exp[1]", "a*b?", "new\nline", "\udcff\udcfe", "a\\b", "x" * 250], ids=ascii)
def test_any_name_of_a_folder(tmp_path: Path, name: str) -> None:
    """Also after the checkpointer is closed, which has speakable names for such folders for as long as it is open."""
    these = {"half": ARRAYS["half"]}
    with Checkpointer(tmp_path / name, CheckpointConfig()) as checkpointer:
        checkpointer.save(0, params={"half": deferred("half")}, optimizer={}, meta={})
    same(open_deferred(tmp_path / name, these)["half"].read(1), these["half"][1])


def test_an_error_of_the_source_is_said_as_it_is(tmp_path: Path) -> None:
    def read(number: int | None) -> np.ndarray:
        if number == 1:
            raise UserError("model.safetensors: is cut off; download it again")
        return np.zeros(4, np.float32)

    one = Deferred(shape=(3, 4), dtype=np.dtype(np.float32), by_layer=True, read=read)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with pytest.raises(UserError, match=r"^model\.safetensors: is cut off; download it again$"):
            checkpointer.save(0, params={"a": one}, optimizer={}, meta={})
        assert checkpointer.steps() == []


def test_an_orbax_that_writes_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no longer calls our method must not leave a step that looks whole."""
    monkeypatch.delattr(store._DeferredHandler, "_open_and_write")
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with pytest.raises((UserError, TypeError)):
            checkpointer.save(0, params={"small": deferred("small")}, optimizer={}, meta={})
            checkpointer.wait()
        assert checkpointer.steps() == []


def test_pieces_are_read_once(tmp_path: Path) -> None:
    """A layer stays for all tensors that have a part of it, and goes with the first that has none."""
    asked: list[tuple[str, int | None]] = []

    def recording(name: str) -> Deferred:
        def read(number: int | None) -> np.ndarray:
            asked.append((name, number))
            return deferred(name).read(number)

        return Deferred(shape=ARRAYS[name].shape, dtype=ARRAYS[name].dtype, by_layer=name not in WHOLE, read=read)

    def part(name: str, *at: int) -> Piece:
        shape, dims = ARRAYS[name].shape, ("layers", "experts", "embed")[: ARRAYS[name].ndim]
        return Piece(Array(name, shape, dims, Constant(0.0), Role.OTHER, Part.MLP), at)

    pieces = pieces_of({name: recording(name) for name in ("half", "counts", "whole")})
    steps = [
        [part("half", 0, 0)],
        [part("half", 0, 6), part("counts", 0)],
        [part("half", 1, 2), part("counts", 0, 1)],
        [part("whole", 1)],
        [part("whole", 0, 5)],
    ]
    for parts in steps:
        for one, found in zip(parts, pieces(parts), strict=True):
            same(found, np.asarray(ARRAYS[one.array.name][one.at]))
    assert asked == [("half", 0), ("counts", 0), ("half", 1), ("whole", None)]


# What a process of its own is for: to be killed, to have small files, to be measured. This file is the child.


def big(layers: int, ends: int | None = None) -> Deferred:
    """Layers of 8 MiB that do not compress; making that of number `ends` kills the process."""

    def read(number: int | None) -> np.ndarray:
        if number == ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.random.default_rng(number).standard_normal((1024, 2048), np.float32)

    return Deferred(shape=(layers, 1024, 2048), dtype=np.dtype(np.float32), by_layer=True, read=read)


def child_main(what: str, folder: Path) -> None:
    checkpointer = Checkpointer(folder, CheckpointConfig())
    checkpointer.save(1, params={"a": big(1)}, optimizer={}, meta={})
    checkpointer.wait()
    match what:
        case "killed":
            checkpointer.save(2, params={"a": big(6, ends=4)}, optimizer={}, meta={})
        case "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            try:
                checkpointer.save(2, params={"a": big(6)}, optimizer={}, meta={})
                checkpointer.wait()
            except UserError as error:
                print("RESULT", json.dumps(str(error)))
        case "measured":
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            checkpointer.save(2, params={"a": big(24)}, optimizer={}, meta={})
            checkpointer.wait()
            shape = jax.ShapeDtypeStruct((24, 1024, 2048), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
            opened = checkpointer.restore_params(2, {"a": shape}, deferred=True).params["a"]
            whole = all(opened.read(number).shape == (1024, 2048) for number in opened.numbers)
            print("RESULT", json.dumps([whole, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))


def child(what: str, folder: Path) -> tuple[int, Any]:
    """Exit status, and what it printed."""
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, __file__, what, folder], env=env, capture_output=True, text=True, timeout=120
    )
    found = re.search(r"^RESULT (.*)$", done.stdout, re.M)
    assert found or done.returncode, done.stdout + done.stderr
    return done.returncode, json.loads(found[1]) if found else None


@pytest.mark.parametrize("what", ["killed", "full"])
def test_a_step_that_was_not_written_to_its_end(tmp_path: Path, what: str) -> None:
    status, said = child(what, tmp_path)
    if what == "killed":
        assert status == -signal.SIGKILL
    else:
        assert said.startswith(
            f"{tmp_path / '2'}: checkpoint could not be written (File too large); step 1 is the last"
        )
    assert retention.finished(tmp_path) == [1] and retention.unsealed(tmp_path) == []
    assert all(not manifest.exists(path) for path in tmp_path.iterdir() if path.name != "1")
    opened = open_deferred(tmp_path, {"a": np.zeros((1, 1024, 2048), np.float32)})["a"]
    same(opened.read(0), big(1).read(0))


def test_memory(tmp_path: Path) -> None:
    """Of 192 MiB in layers of 8 MiB, few layers are ever in memory, written and read."""
    _, (whole, kib) = child("measured", tmp_path)
    assert whole
    assert kib / 1024 < 120


if __name__ == "__main__":
    child_main(sys.argv[1], Path(sys.argv[2]))
