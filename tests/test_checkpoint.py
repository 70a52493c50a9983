"""Checkpoints: exact round trips over meshes, and what damage, kills and a full disk do to them."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from xla_flags import xla_flags

from maxlm.checkpoint import manifest, retention, store
from maxlm.checkpoint.checkpointer import Checkpointer, Restored
from maxlm.checkpoint.lock import lock_run
from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import CheckpointConfig, UserError
from maxlm.inspect import main as inspect_main

ROOT = Path(__file__).parent.parent


def layout(shape: tuple[int, ...]) -> Any:
    """A function from an array's shape to its sharding: dims that divide are cut over the axes, in order."""
    names = ("a", "b", "c")[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )

    def sharding(leaf: Any) -> NamedSharding:
        cut = [n if i < leaf.ndim and leaf.shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(names)]
        return NamedSharding(mesh, PartitionSpec(*cut[: leaf.ndim]))

    return sharding


@functools.cache
def host_state(step: int, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Parameters and optimizer state that are a function of the step, with scalars and two dtypes."""
    rng = np.random.default_rng(step)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "embed": draw(16, 24),
        "layers": [{"q_proj": draw(8, 8, 3).astype(jnp.bfloat16)}, {"scale": draw(5)}],
    }
    opt = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)[1]  # moments that are not zero
    return jax.tree.map(np.asarray, (params, opt))


def state(step: int, tx: optax.GradientTransformation, sharding: Any) -> tuple[Any, Any]:
    host = host_state(step, tx)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding(a), lambda index: a[index]), host)


def abstract(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(a)), tree)


def assert_equal(found: Any, wanted: Any) -> None:
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(wanted))
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert f.dtype == w.dtype
        np.testing.assert_array_equal(np.asarray(f), np.asarray(w))


ADAMW = optax.adamw(1e-3)


class Run:
    """A checkpointer on eight devices whose warnings are kept."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.sharding = layout((8,))
        self.checkpointer = Checkpointer(folder, CheckpointConfig(**config), warn=self.warnings.append)

    def save(self, *numbers: int) -> None:
        for step in numbers:
            params, opt = state(step, ADAMW, self.sharding)
            self.checkpointer.save(step, params=params, optimizer=opt, meta={"data": {"position": step}})
        self.checkpointer.wait()

    def restore(self) -> Restored | None:
        params, opt = abstract(host_state(0, ADAMW), self.sharding)
        return self.checkpointer.restore_latest(params=params, optimizer=opt)

    def assert_restores(self, step: int) -> None:
        restored = self.restore()
        assert restored is not None
        assert restored.step == step
        assert restored.meta == {"data": {"position": step}}
        assert_equal((restored.params, restored.optimizer), host_state(step, ADAMW))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2 and 3; tests copy it."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    Run(folder, keep_last=3).save(1, 2, 3)
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Run:
    shutil.copytree(written, tmp_path / "checkpoints")
    return Run(tmp_path / "checkpoints", keep_last=3)


@pytest.mark.parametrize("tx", [ADAMW, optax.adafactor(1e-3, min_dim_size_to_factor=8), optax.sgd(1.0)])
def test_round_trip_over_meshes(tmp_path: Path, tx: optax.GradientTransformation) -> None:
    meta = {"data": {"position": 12, "order": [1, 2]}, "note": "ü", "none": None, "loss": 1.5}
    previous, hashes = layout((8,)), set()
    params, opt = state(7, tx, previous)
    for i, shape in enumerate([(4,), (2, 4), (1,), (2, 2, 2)]):
        folder = tmp_path / str(i)
        with Checkpointer(folder, CheckpointConfig()) as checkpointer:
            checkpointer.save(7, params=params, optimizer=opt, meta=meta)
            sharding = layout(shape)
            targets = abstract((params, opt), sharding)
            restored = checkpointer.restore_latest(params=targets[0], optimizer=targets[1])
        assert restored is not None
        assert (restored.step, restored.meta) == (7, meta)
        assert_equal((restored.params, restored.optimizer), host_state(7, tx))
        for leaf, target in zip(
            jax.tree.leaves((restored.params, restored.optimizer)), jax.tree.leaves(targets), strict=True
        ):
            assert leaf.sharding == target.sharding
        hashes.add(state_hash(folder, 7))
        params, opt = restored.params, restored.optimizer
    assert len(hashes) == 1  # whatever mesh wrote it, whatever folder it lies in


def test_donated_buffers_are_saved_as_they_were(tmp_path: Path) -> None:
    sharding = layout((8,))
    x = jax.device_put(jnp.zeros((1 << 20,)), sharding(jnp.zeros((1 << 20,))))
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for i in range(3):
            checkpointer.save(i, params=x, optimizer={}, meta={})
            for _ in range(5):
                x = step(x)
        restored = checkpointer.restore_latest(params=abstract(x, sharding), optimizer={})
    assert restored is not None
    assert np.unique(np.asarray(restored.params)).tolist() == [10.0]


def test_state_hash_sees_every_part(tmp_path: Path) -> None:
    sharding = layout((2,))

    def hashed(name: str, step: int = 3, bump: int = 0, count: int = 0, position: int = 0, note: str = "") -> str:
        params, opt = state(1, ADAMW, sharding)
        params["embed"] = params["embed"].at[3, 4].set(jnp.nextafter(params["embed"][3, 4], bump * 9.0) if bump else 0)
        meta = {"data": {"position": position}, "note": note, "time": time.time()}
        with Checkpointer(tmp_path / name, CheckpointConfig()) as checkpointer:
            checkpointer.save(step, params=params, optimizer=(opt, jnp.int32(count)), meta=meta)
        return state_hash(tmp_path / name, step)

    base = hashed("base")
    assert hashed("again", note="other") == base
    others = [hashed("p", bump=1), hashed("o", count=1), hashed("s", step=4), hashed("d", position=1)]
    assert len({base, *others}) == 5


def test_params_alone_and_meta(run: Run) -> None:
    params = abstract(host_state(0, ADAMW)[0], layout((2, 4)))
    for asked, step in ((None, 3), (2, 2)):
        restored = run.checkpointer.restore_params(asked, params)
        assert (restored.step, restored.optimizer) == (step, None)
        assert_equal(restored.params, host_state(step, ADAMW)[0])
    assert run.checkpointer.read_meta(1) == {"data": {"position": 1}}
    with pytest.raises(UserError, match=r"no finished checkpoint of step 9; there are \[1, 2, 3\]"):
        run.checkpointer.restore_params(9, params)
    with pytest.raises(UserError, match="no finished checkpoint"):
        Checkpointer(run.folder / "none", CheckpointConfig()).restore_params(None, params)


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


@pytest.mark.slow
def test_one_flipped_bit_anywhere_is_never_restored(run: Run) -> None:
    rng = random.Random(0)
    files = files_of(run.folder / "3")
    assert any(path.name == manifest.NAME for path in files) and any("ocdbt" in str(path) for path in files)
    targets = [*files, *rng.choices(files, k=max(0, 100 - len(files)))]
    for path in targets:
        original = path.read_bytes()
        changed = bytearray(original)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        run.warnings.clear()
        run.assert_restores(2)
        assert len(run.warnings) == 1
        assert (
            f"{run.folder / '3'}: checkpoint refused: {path.relative_to(run.folder / '3').as_posix()}: "
            in run.warnings[0]
        )
        path.write_bytes(original)
    run.assert_restores(3)


@pytest.mark.slow
def test_every_file_truncated_or_deleted_or_added(run: Run) -> None:
    step = run.folder / "3"
    for path in files_of(step):
        original = path.read_bytes()
        for content in (original[: len(original) // 2], b""):
            path.write_bytes(content)
            run.warnings.clear()
            run.assert_restores(2)
            assert path.name in run.warnings[0]
        path.unlink()
        run.warnings.clear()
        run.assert_restores(2)
        if path.name != manifest.NAME:  # without its manifest the step is not damaged but unfinished
            assert f"{path.name}: missing" in run.warnings[0]
        path.write_bytes(original)
    (step / "params" / "more").write_text("")
    run.assert_restores(2)
    assert "params/more: not in the manifest" in run.warnings[-1]


def test_a_manifest_of_another_step_is_refused(run: Run) -> None:
    shutil.copytree(run.folder / "2", run.folder / "4")
    run.assert_restores(3)
    assert "is that of step 2; this folder is step 4" in run.warnings[0]


def test_without_verification_sizes_still_count(run: Run) -> None:
    fast = Run(run.folder, verify=False)
    data = max(files_of(run.folder / "3" / "params"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    fast.assert_restores(2)
    assert "bytes, expected" in fast.warnings[0]
    data.write_bytes(data.read_bytes() + b"\0")
    for path in files_of(run.folder / "3" / "params"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"checkpoint\.verify = False let a damaged step through"):
        fast.restore()


def test_all_damaged_is_an_error_and_never_a_new_start(run: Run) -> None:
    for step in (1, 2, 3):
        (run.folder / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoints \[1, 2, 3\] are all damaged"):
        run.restore()
    assert len(run.warnings) == 3


def test_nothing_finished_is_a_new_start_that_is_said(tmp_path: Path, run: Run) -> None:
    assert Run(tmp_path / "empty").restore() is None
    shutil.copytree(run.folder / "2", run.folder / "1.writing.orbax-checkpoint-tmp")
    for step in (1, 2, 3):
        shutil.rmtree(run.folder / str(step))
    assert run.restore() is None
    assert run.warnings == [
        f"{run.folder}: no finished checkpoint, only 1.writing.orbax-checkpoint-tmp; starting from step 0"
    ]
    run.save(1)
    assert [path.name for path in run.folder.iterdir()] == ["1"]


def test_without_any_manifest_nothing_starts_and_nothing_is_lost(run: Run) -> None:
    for step in (1, 2, 3):
        (run.folder / str(step) / manifest.NAME).unlink()
    before = files_of(run.folder)
    with pytest.raises(UserError, match=r"\[1, 2, 3\] have no manifest.json.*--seal 3"):
        run.restore()
    with pytest.raises(UserError, match="--seal 3"):
        run.checkpointer.restore_params(None, abstract(host_state(0, ADAMW)[0], run.sharding))
    assert files_of(run.folder) == before
    assert inspect_main([str(run.folder.parent), "--seal", "3", "--verify"]) == 0
    run.assert_restores(3)
    with pytest.raises(UserError, match=r"--seal 3: .* has no step 3 without a manifest; there are \[1, 2\]"):
        inspect_main([str(run.folder.parent), "--seal", "3"])
    shutil.rmtree(run.folder / "2" / "params" / "d")
    with pytest.raises(UserError, match=r"--seal 2: .* is not whole"):
        inspect_main([str(run.folder.parent), "--seal", "2"])


def test_a_newest_step_without_a_manifest_is_named_and_kept(run: Run) -> None:
    (run.folder / "3" / manifest.NAME).unlink()
    run.assert_restores(2)
    assert len(run.warnings) == 1 and f"{run.folder / '3'}: has no manifest.json" in run.warnings[0]
    run.save(3)
    assert sorted(path.name for path in run.folder.iterdir()) == ["1", "2", "3", "3.set-aside"]


@pytest.mark.parametrize(
    "name",
    ["exp[1]", "a*b?", "with space", "#1 %41 {x}", "new\nline", "ünï", "\udcff\udcfe", "a\\b", "-dash", "x" * 250],
    ids=ascii,
)
def test_any_name_of_a_folder(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path / name / "checkpoints")
    run.checkpointer.prepare()
    run.save(1)
    run.assert_restores(1)
    assert not run.warnings
    (tmp_path / "link").symlink_to(tmp_path / name)
    Run(tmp_path / "link" / "checkpoints").assert_restores(1)
    moved = (tmp_path / name).rename(tmp_path / "plain") / "checkpoints"
    Run(moved).assert_restores(1)  # nothing in it knows where it was written
    assert state_hash(moved, 1)


def test_a_step_is_sealed_only_once_it_opens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax looks for its own files with glob, and finds none in such a folder."""
    monkeypatch.setattr(store, "_PLAIN", re.compile(".*", re.DOTALL))
    odd = Run(run.folder.parent / "exp[1]")
    with pytest.raises(UserError, match="could not be written"):
        odd.save(1)
    assert odd.checkpointer.steps() == []


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [_folder, _deep, _dangling, _pipe])
@pytest.mark.parametrize("name", [manifest.NAME, "meta/metadata"])
def test_what_is_not_a_file_any_more_is_damaged(run: Run, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(run.folder / "3" / name)
    run.assert_restores(2)
    assert len(run.warnings) == 1 and f"checkpoint refused: {name}: " in run.warnings[0]
    assert inspect_main([str(run.folder.parent), "--verify"]) == 1
    run.save(3)
    assert (run.folder / "3.set-aside").exists()


def test_the_folder_is_tried_before_the_first_step(tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError, match="checkpoints cannot be written there") as caught:
            Checkpointer(folder, CheckpointConfig()).prepare()
        return str(caught.value)

    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nothing")
    assert "it is a file, or a link to nothing" in refused(tmp_path / "file")
    assert "it is a file, or a link to nothing" in refused(tmp_path / "dangling")
    assert "Not a directory" in refused(tmp_path / "file" / "checkpoints")
    assert "File name too long" in refused(Path(str(tmp_path) + ("/" + "x" * 200) * 20))
    resource_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource_limit[1]))
        assert "File too large" in refused(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource_limit)
    assert list((tmp_path / "full").iterdir()) == []


def test_a_folder_that_was_replaced_is_not_written(run: Run) -> None:
    run.checkpointer.prepare()
    run.save(4)
    moved = run.folder.parent.rename(run.folder.parent.with_name("moved"))
    run.folder.mkdir(parents=True)
    with pytest.raises(UserError, match="was removed or replaced while this run was using it"):
        run.save(5)
    assert list(run.folder.iterdir()) == [] and (moved / "checkpoints" / "4").exists()


def test_other_trees_are_named_and_do_not_walk_back(run: Run) -> None:
    params, opt = abstract(host_state(0, ADAMW), run.sharding)
    embed = params["embed"]

    def refused(params: Any, opt: Any = opt) -> str:
        with pytest.raises(UserError) as caught:
            run.checkpointer.restore_latest(params=params, optimizer=opt)
        assert run.warnings == []
        assert str(run.folder / "3") in str(caught.value) and "config" in str(caught.value)
        return str(caught.value)

    wide = jax.ShapeDtypeStruct((16, 32), embed.dtype, sharding=embed.sharding)
    assert "params leaf embed is float32[16, 24] in the checkpoint and float32[16, 32] in this run" in refused(
        {**params, "embed": wide}
    )
    half = jax.ShapeDtypeStruct((16, 24), jnp.bfloat16, sharding=embed.sharding)
    assert "bfloat16[16, 24] in this run" in refused({**params, "embed": half})
    assert "params leaf unembed float32[16, 24] is missing in the checkpoint" in refused({**params, "unembed": embed})
    assert "params leaf embed float32[16, 24] of the checkpoint is unknown" in refused({"layers": params["layers"]})
    other = abstract(optax.adafactor(1e-3).init(params), run.sharding)
    assert "optimizer leaf 0/v_row/embed" in refused(params, other)


def test_keep_rule(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2, keep_every=4)
    run.save(*range(1, 12))
    assert run.checkpointer.steps() == [4, 8, 10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "4", "8"]
    run.assert_restores(11)


def test_the_old_step_stays_until_the_new_one_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, keep_last=1)
    run.save(1)
    seen: list[list[int]] = []
    write = manifest.write

    def watched(*args: Any, **kwargs: Any) -> manifest.Manifest:
        seen.append(run.checkpointer.steps())
        return write(*args, **kwargs)

    monkeypatch.setattr(manifest, "write", watched)
    run.save(2)
    assert seen == [[1]]
    assert run.checkpointer.steps() == [2]


def test_leftovers_of_a_kill_are_removed_by_the_next_save_only(run: Run) -> None:
    (run.folder / "3").rename(run.folder / "3.writing")  # killed before it was sealed
    shutil.copytree(run.folder / "2", run.folder / "4.writing.orbax-checkpoint-tmp")
    shutil.copytree(run.folder / "2", run.folder / "0.deleting")
    (run.folder / "notes").mkdir()
    run.assert_restores(2)
    assert len(list(run.folder.iterdir())) == 6 and run.warnings == []
    run.save(3)
    assert sorted(path.name for path in run.folder.iterdir()) == ["1", "2", "3", "notes"]
    assert len(run.warnings) == 3 and all("unfinished checkpoint" in line for line in run.warnings)
    run.assert_restores(3)


def test_a_damaged_newest_step_is_set_aside_and_replaced(run: Run) -> None:
    (run.folder / "3" / "meta" / "metadata").write_text("{}")
    run.assert_restores(2)
    run.save(3)
    assert sorted(path.name for path in run.folder.iterdir()) == ["1", "2", "3", "3.set-aside"]
    run.assert_restores(3)
    assert "3.set-aside: checkpoint 3, which this run did not continue from" in run.warnings[-1]
    first = (run.folder / "3.set-aside" / manifest.NAME).read_bytes()
    (run.folder / "3" / "meta" / "metadata").write_text("{}")
    again = Run(run.folder, keep_last=3)
    again.assert_restores(2)
    again.save(3)
    assert [path.name for path in retention.set_aside(run.folder)] == ["3.set-aside", "3.set-aside-2"]
    assert (run.folder / "3.set-aside" / manifest.NAME).read_bytes() == first


def test_a_refused_step_is_set_aside_even_if_the_next_save_passes_it(run: Run) -> None:
    (run.folder / "3" / "meta" / "metadata").write_text("{}")
    run.assert_restores(2)
    run.save(5)
    assert run.checkpointer.steps() == [1, 2, 5]  # 3 does not count as one of the three to keep
    assert [path.name for path in retention.set_aside(run.folder)] == ["3.set-aside"]


def test_saving_the_same_step_again_writes_nothing(run: Run) -> None:
    run.assert_restores(3)
    before = {path: path.stat().st_mtime_ns for path in files_of(run.folder)}
    run.save(3)
    assert {path: path.stat().st_mtime_ns for path in files_of(run.folder)} == before
    run.save(4, 4)
    assert run.checkpointer.steps() == [2, 3, 4]


def test_only_jax_arrays_and_shardings(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(TypeError, match="params leaf x is a ndarray"):
        checkpointer.save(1, params={"x": np.ones(3)}, optimizer={}, meta={})
    checkpointer.save(1, params={"x": jnp.ones(3)}, optimizer={}, meta={})
    with pytest.raises(TypeError, match="params leaf x has no sharding"):
        checkpointer.restore_latest(params={"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, optimizer={})
    with pytest.raises(UserError, match="mount the bucket"):
        Checkpointer(Path("gs://bucket/run"), CheckpointConfig())


def test_an_error_while_sealing_reaches_check(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        params, opt = state(4, ADAMW, run.sharding)
        run.checkpointer.save(4, params=params, optimizer=opt, meta={})
        with pytest.raises(UserError, match=r"4: .*\(No space left on device\); step 3 is the last finished one"):
            while True:
                run.checkpointer.check()
                time.sleep(0.01)
    run.checkpointer.check()  # said once
    run.save(4)  # and the next attempt may succeed
    run.assert_restores(4)


def test_lock(tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "run"
    with lock_run(run_dir):
        code = "import sys; from pathlib import Path; from maxlm.checkpoint.lock import lock_run\n"
        code += "with lock_run(Path(sys.argv[1])): pass"
        other = subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode != 0
        wanted = (
            f"UserError: run_dir = {run_dir}: run folder in use by process {os.getpid()} on host {socket.gethostname()}"
        )
        assert wanted in other.stderr
        (run_dir / "lock").unlink()
        other = subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, capture_output=True, text=True)
        assert f"UserError: run_dir = {run_dir}: run folder in use by another process" in other.stderr
    with lock_run(run_dir), (run_dir / "lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), lock_run(tmp_path / "file" / "run"):
        pass


def test_a_lock_on_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"), lock_run(tmp_path / "run"):
        pass


# Tests with processes of their own. This file, run as a script, is the child.


def child(*args: object, devices: int = 2) -> subprocess.Popen[str]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def big_state(step: int, sharding: Any) -> tuple[Any, Any]:
    """8 MB that do not compress, so that a save takes a while."""
    x = np.random.default_rng(step).standard_normal((1 << 20,)).astype(np.float32)
    return {"x": jax.device_put(x, sharding(x))}, {"moment": jax.device_put(-x, sharding(x))}


def save_for_ever(folder: Path) -> None:
    sharding = layout((2,))
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_last=2, keep_every=5))
    targets = abstract(big_state(0, sharding), sharding)
    restored = checkpointer.restore_latest(params=targets[0], optimizer=targets[1])
    step = restored.step if restored else 0
    while True:
        step += 1
        params, opt = big_state(step, sharding)
        print("save", step, flush=True)
        checkpointer.save(step, params=params, optimizer=opt, meta={"data": {"position": step}})


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.nightly)])
def test_kill_at_any_moment(tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    sharding = layout((4,))
    last = 0
    for _ in range(kills):
        process = child("save_for_ever", tmp_path)
        assert process.stdout is not None
        for _ in range(rng.randint(3, 5)):
            line = process.stdout.readline()
            assert line.startswith("save "), process.communicate()
        begun = int(line.split()[1])
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        warnings: list[str] = []
        checkpointer = Checkpointer(tmp_path, CheckpointConfig(), warn=warnings.append)
        finished = checkpointer.steps()
        assert all(manifest.verify(tmp_path / str(step), step) == [] for step in finished)
        params, opt = abstract(big_state(0, sharding), sharding)
        restored = checkpointer.restore_latest(params=params, optimizer=opt)
        assert restored is not None and restored.step == finished[-1] > last
        assert restored.step >= begun - 2  # save() of the step before waited for this one
        assert restored.meta == {"data": {"position": restored.step}}
        assert_equal((restored.params, restored.optimizer), big_state(restored.step, sharding))
        assert set(range(5, restored.step + 1, 5)) <= set(finished)
        assert warnings == []
        last = restored.step


def save_until_the_disk_is_full(folder: Path, limit: str) -> None:
    """Two good steps, then one that the disk (or a limit on the size of files) does not take."""
    sharding = layout((2,))
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_last=9))
    seen = ""
    for step in range(1, 9):
        if limit == "rlimit" and step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        params, opt = big_state(step, sharding)
        try:
            checkpointer.save(step, params=params, optimizer=opt, meta={})
            while checkpointer._pending is not None:
                checkpointer.check()
                time.sleep(0.01)
        except UserError as error:
            seen = str(error)
            break
    targets = abstract(big_state(0, sharding), sharding)
    restored = checkpointer.restore_latest(params=targets[0], optimizer=targets[1])
    assert restored is not None
    assert_equal((restored.params, restored.optimizer), big_state(restored.step, sharding))
    shutil.rmtree(folder / "1")  # the user makes room
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpointer.save(10, params=params, optimizer=opt, meta={})
    checkpointer.close()
    print("RESULT", json.dumps({"error": seen, "restored": restored.step, "steps": checkpointer.steps()}))


@pytest.mark.parametrize("limit", ["rlimit", "tmpfs"])
def test_full_disk(tmp_path: Path, limit: str) -> None:
    mounted = False
    if limit == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)]
        mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("no right to mount a small file system")
    try:
        output, errors = child("save_until_the_disk_is_full", tmp_path / "run", limit).communicate(timeout=60)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    result = json.loads(result_line(output, errors))
    cause = "File too large" if limit == "rlimit" else "No space left on device"
    step = result["restored"]
    assert result["error"].startswith(f"{tmp_path / 'run' / str(step + 1)}: checkpoint could not be written ({cause}")
    assert f"step {step} is the last finished one" in result["error"] and "\n" not in result["error"]
    assert result["steps"] == [*range(2, step + 1), 10]
    assert "ERROR:absl" not in errors  # said once, by us


def result_line(output: str, errors: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output + errors
    return lines[-1].removeprefix("RESULT ")


def two_processes(index: str, port: str, folder: Path) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index), initialization_timeout=60)
    warnings: list[str] = []
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_last=3), warn=warnings.append)
    sharding = layout((4, 2))
    for step in (1, 2, 3):
        params, opt = state(step, ADAMW, sharding)
        checkpointer.save(step, params=params, optimizer=opt, meta={"data": {"position": step}})
    checkpointer.wait()
    jax.experimental.multihost_utils.sync_global_devices("saved")
    if index == "0":
        (folder / "3" / "meta" / "metadata").write_text("{}")
    targets = abstract(host_state(0, ADAMW), sharding)
    restored = checkpointer.restore_latest(params=targets[0], optimizer=targets[1])
    assert restored is not None
    same = jax.jit(lambda a, b: jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x, y: (x == y).all(), a, b)))
    right = bool(same((restored.params, restored.optimizer), state(restored.step, ADAMW, sharding)))
    params, opt = state(4, ADAMW, sharding)
    checkpointer.save(4, params=params, optimizer=opt, meta={})
    checkpointer.close()
    jax.experimental.multihost_utils.sync_global_devices("closed")
    if index == "0":
        for step in checkpointer.steps():
            (folder / str(step) / "meta" / "metadata").write_text("{}")
    try:
        Checkpointer(folder, CheckpointConfig(), warn=warnings.append).restore_latest(params=params, optimizer=opt)
        refused = ""
    except UserError as error:
        refused = str(error)
    result = {"step": restored.step, "meta": restored.meta, "right": right, "warnings": warnings, "refused": refused}
    print("RESULT", json.dumps(result), flush=True)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [child("two_processes", i, port, tmp_path / "run", devices=4) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads(result_line(*output)) for output in outputs)
    for result in (first, second):
        assert (result["step"], result["meta"], result["right"]) == (2, {"data": {"position": 2}}, True)
    assert "3: checkpoint refused: meta/metadata" in first["warnings"][0] and second["warnings"] == []
    assert "are all damaged" in first["refused"] and second["refused"].endswith(f"step 0: {first['refused']}")
    assert retention.finished(tmp_path / "run") == [1, 2, 4]
    assert [path.name for path in retention.set_aside(tmp_path / "run")] == ["3.set-aside"]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["save_for_ever", folder]:
            save_for_ever(Path(folder))
        case ["save_until_the_disk_is_full", folder, limit]:
            save_until_the_disk_is_full(Path(folder), limit)
        case ["two_processes", index, port, folder]:
            two_processes(index, port, Path(folder))
