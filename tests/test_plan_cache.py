"""The cache of compiled steps: what it answers, and what makes it ask again."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import small_model, small_run

from maxlm.config import ObserveConfig, ShardingConfig, UserError
from maxlm.plan import cache, machines
from maxlm.plan.collectives import Collective, CollectiveKind
from maxlm.plan.compiled import CompiledStep, Memory
from maxlm.plan.hlo import Runs
from maxlm.plan.kernels import Kernel, Maker
from maxlm.plan.machines import CpuMachine, GpuMachine, parse_machine, prepare_compiler
from maxlm.plan.out_of_memory import Allocation, Buffer, DoesNotFit

BUFFER = Buffer(
    size=512, shape="bf16[16,16]", operation="jit(step)/x", source="maxlm/a.py:1", allocation=Allocation.OUTPUT
)
STEP = CompiledStep(
    memory=Memory(arguments=1, temporary=2, peak=3),
    largest=(BUFFER, dataclasses.replace(BUFFER, number=3)),
    collectives=(Collective(CollectiveKind.PERMUTE, ("data", "fsdp"), 2, Runs(7, exact=False), 64, "jit(step)", True),),
    kernels=(Kernel(maker=Maker.CUDNN, name="__cudnn$fmha", calls=2, runs=Runs(8), source=""),),
    spills=None,
    forbidden=("a line",),
    cpu_seconds=1.25,
)
REFUSED = DoesNotFit(message="no", wanted=20, available=10, largest=(BUFFER,), cpu_seconds=0.5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and the targets that the stand-in for the compiler was asked for."""
    calls: list[str] = []

    def compile_step(config: Any, target: Any) -> CompiledStep | DoesNotFit:
        calls.append(str(target))
        if config.train.batch_size > 1000:
            raise UserError("too large")
        return REFUSED if config.train.batch_size > 100 else STEP

    monkeypatch.setattr(cache, "compile_step", compile_step)
    monkeypatch.setenv("MAXLM_PLAN_CACHE", str(tmp_path / "plan"))
    return calls


@pytest.mark.parametrize(("batch_size", "answer"), [(8, STEP), (128, REFUSED)])
def test_the_second_answer_equals_the_first_and_asks_nobody(asked: list[str], batch_size: int, answer: Any) -> None:
    config = small_run(batch_size=batch_size)
    assert [cache.cached_compile(config, CpuMachine(8)) for _ in range(2)] == [(answer, False), (answer, True)]
    assert asked == ["cpu:8"]
    (file,) = cache.cache_folder().iterdir()
    assert json.loads(file.read_text())["kind"] == type(answer).__name__
    # Where a run writes and reads its data is nothing to the compiler.
    elsewhere = dataclasses.replace(config, run_dir="runs/other", observe=ObserveConfig(sample_tokens=1))
    assert cache.cached_compile(elsewhere, CpuMachine(8)) == (answer, True) and len(asked) == 1


def test_mistakes_are_not_kept(asked: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(UserError):
            cache.cached_compile(small_run(batch_size=1024), CpuMachine(8))
    assert len(asked) == 2


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'{"kind": []}', b'{"kind": "Other"}', b'{"kind": "CompiledStep"}']
    + [f'{{"kind": "DoesNotFit", "largest": {value}}}'.encode() for value in ("{}", "null", "[]", "3")],
)
def test_a_damaged_file_is_written_anew(asked: list[str], damage: bytes) -> None:
    config = small_run()
    cache.cached_compile(config, CpuMachine(8))
    (file,) = cache.cache_folder().iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert cache.cached_compile(config, CpuMachine(8)) == (STEP, False)
    assert len(asked) == 2 and file.read_bytes() == whole
    assert list(cache.cache_folder().iterdir()) == [file]


def test_another_digit_is_not_believed(asked: list[str]) -> None:
    cache.cached_compile(small_run(), CpuMachine(8))
    (file,) = cache.cache_folder().iterdir()
    whole = file.read_text()
    file.write_text(re.sub(r"(\d)(?=,)", lambda digit: str((int(digit[1]) + 1) % 10), whole, count=1))
    assert file.read_text() != whole
    assert cache.cached_compile(small_run(), CpuMachine(8)) == (STEP, False) and len(asked) == 2


def test_an_answer_of_another_shape_is_asked_again(asked: list[str]) -> None:
    """As a file is that another version of this project wrote."""
    cache.cached_compile(small_run(), CpuMachine(8))
    (file,) = cache.cache_folder().iterdir()
    stored = json.loads(file.read_text())
    del stored["kernels"], stored["sha256"]
    stored["more"] = 1
    file.write_text(json.dumps(stored | {"sha256": cache._checksum(stored)}))
    assert cache.cached_compile(small_run(), CpuMachine(8)) == (STEP, False) and len(asked) == 2


def test_a_folder_that_cannot_be_written_keeps_nothing(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAXLM_PLAN_CACHE", str(tmp_path / "file" / "plan"))
    assert [cache.cached_compile(small_run(), CpuMachine(8)) for _ in range(2)] == [(STEP, False)] * 2
    assert len(asked) == 2


def test_a_full_disk_leaves_nothing_behind(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert cache.cached_compile(small_run(), CpuMachine(8)) == (STEP, False)
    assert list(cache.cache_folder().iterdir()) == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MAXLM_PLAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "maxlm" / "plan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "maxlm" / "plan"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # who has no name
    assert cache.cache_folder() is None


def key(config: Any = None, target: str = "cpu:8") -> str:
    return cache.cache_key(cache.ingredients(config or small_run(), parse_machine(target)))


def test_every_part_of_config_and_target_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "sources_hash", lambda root: "")
    base = small_run()
    changed = [
        key(small_run(small_model(n_layers=3))),
        key(small_run(sharding=ShardingConfig(fsdp=2))),
        key(small_run(micro_batches=2)),
        key(dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, learning_rate=0.5))),
        key(base, "cpu:4"),
        key(base, "gpu:h200:8"),
        key(base, "tpu:v5p:2x2x2"),
    ]
    assert key(base) == key(small_run()) and len({key(base), *changed}) == 1 + len(changed)


VARIABLES = """
XLA_FLAGS LIBTPU_INIT_ARGS XLA_PYTHON_CLIENT_MEM_FRACTION JAX_ENABLE_X64 TPU_ACCELERATOR_TYPE CUDA_ROOT
MOSAIC_GPU_DUMP_SASS MEGASCALE_NUM_SLICES NVIDIA_TF32_OVERRIDE
"""


@pytest.mark.parametrize("name", VARIABLES.split())
def test_variables_that_compilers_read_change_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = key()
    monkeypatch.setenv(name, "another")
    assert key() != before
    monkeypatch.setenv("UNRELATED", "another")
    with_variable = key()
    monkeypatch.delenv("UNRELATED")
    assert key() == with_variable


@pytest.mark.parametrize("target", [CpuMachine(8), GpuMachine("h200", 1, 8)])
def test_preparing_again_changes_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Any) -> None:
    """As a search does not, which asks for one candidate after the other."""
    monkeypatch.setattr(os, "environ", os.environ | {"XLA_FLAGS": "--xla_cpu_use_thunk_runtime=true"})
    monkeypatch.setattr(machines, "COMPILERS", tmp_path)
    monkeypatch.setattr(machines, "missing_compiler", lambda target: None)
    monkeypatch.setattr(machines.sys, "path", list(machines.sys.path))
    keys, paths = set(), set()
    for _ in range(3):
        prepare_compiler(target)
        keys.add(key(target=str(target)))
        paths.add(tuple(machines.sys.path))
    assert len(keys) == len(paths) == 1
    assert os.environ["XLA_FLAGS"].startswith("--xla_cpu_use_thunk_runtime=true --xla_")


def test_versions_change_the_key() -> None:
    values = cache.ingredients(small_run(), CpuMachine(8))
    assert {"jax", "jaxlib", "flax", "optax"} <= set(values["packages"])
    for package in values["packages"]:
        other = copy.deepcopy(values)
        other["packages"][package] += ".1"
        assert cache.cache_key(other) != cache.cache_key(values)


def test_a_compiler_beside_the_environment_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machines.sys, "path", [])
    for version in ("0.0.1", "0.0.2"):
        folder = tmp_path / version / f"libtpu-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n")
        monkeypatch.setattr(machines, "COMPILERS", tmp_path / version)
        assert cache.ingredients(small_run(), CpuMachine(8))["packages"] == {"libtpu": version}


def test_every_change_of_the_sources_changes_the_key(tmp_path: Path) -> None:
    def written(**files: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return cache.sources_hash(root)

    base = {"maxlm__a.py": "1", "kernels_pallas__tuning__h200.json": "{}"}
    changes: list[dict[str, str]] = [
        base | {"maxlm__a.py": "2"},
        base | {"kernels_pallas__tuning__h200.json": "[]"},
        base | {"maxlm__b.py": ""},
        {"maxlm__b.py": "1", "kernels_pallas__tuning__h200.json": "{}"},
    ]
    hashes = {written(**files) for files in [base, *changes]}
    assert len(hashes) == 1 + len(changes)
    assert written(**base, docs__a="") == written(**base)  # and nothing else does
