"""Names of machines: what they stand for, what is said of wrong ones, and where compilers come from."""

from __future__ import annotations

import importlib.metadata
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm.config import UserError
from maxlm.hardware import CHIPS
from maxlm.plan import machines
from maxlm.plan.machines import (
    GPUS,
    TPUS,
    CpuMachine,
    GpuMachine,
    Machine,
    Platform,
    TpuMachine,
    installed,
    memory_limit,
    missing_compiler,
    parse_machine,
    prepare_compiler,
    requirements,
)

GIB = 2**30

PIP = f"{sys.executable} -m pip install"


@pytest.mark.parametrize(
    ("text", "target", "devices"),
    [
        ("cpu:8", CpuMachine(8), 8),
        ("tpu:v4:4x4x4", TpuMachine("v4", "4x4x4"), 64),  # two cores a chip, one device
        ("tpu:v5e:1x1", TpuMachine("v5e", "1x1"), 1),
        ("tpu:v6e:16x16", TpuMachine("v6e", "16x16"), 256),
        ("tpu:7x:2x2x1", TpuMachine("7x", "2x2x1"), 8),  # two devices a chip
        ("tpu:v5p:4x4x4:2", TpuMachine("v5p", "4x4x4", 2), 128),
        ("tpu:v5p:4x4x4:1", TpuMachine("v5p", "4x4x4"), 64),
        ("tpu:7x:4x4x4:4", TpuMachine("7x", "4x4x4", 4), 512),
        ("tpu:v5p:16x16x24:11", TpuMachine("v5p", "16x16x24", 11), 67_584),
        ("tpu:v5e:16x16:256", TpuMachine("v5e", "16x16", 256), 65_536),
        ("gpu:b200:8", GpuMachine("b200", 1, 8), 8),
        ("gpu:a100:4x2", GpuMachine("a100", 4, 2), 8),
        ("gpu:h200:8192x8", GpuMachine("h200", 8192, 8), 65_536),
    ],
)
def test_names_of_machines(text: str, target: Machine, devices: int) -> None:
    assert parse_machine(text) == target
    assert target.devices == devices
    assert parse_machine(str(target)) == target


def test_platforms_and_chips() -> None:
    assert [parse_machine(text).platform for text in ("cpu:1", "tpu:v5e:2x2", "gpu:h100:8")] == list(Platform)
    assert CpuMachine(8).hardware is None
    assert TpuMachine("7x", "2x2x1").hardware is CHIPS["7x"]
    assert GpuMachine("a100", 1, 8).hardware is CHIPS["a100"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("tpu:v5:4x4x4", "tpu:v5p:4x4x4"),
        ("tpu:v5p:4x4", "tpu:v5p:4x4x4"),
        ("tpu:v5e:4x4x4", "tpu:v5e:8x8"),
        ("tpu:tpu7x:2x2x1", "tpu:7x:2x2x1"),
        ("TPU:V5P:4x4x4", "tpu:v5p:4x4x4"),
        ("v5p:4x4x4", "tpu:v5p:4x4x4"),
        ("tpu:v5p", "tpu:v5p:4x4x4"),
        ("tpu:v5p:4x4x0", "tpu:v5p:4x4x4"),
        ("tpu:v5p:4x4x4:0", "tpu:v5p:4x4x4"),
        ("tpu:v5p:4x4x4:two", "tpu:v5p:4x4x4"),
        ("tpu:v5p:4x4x4:2:2", "tpu:v5p:4x4x4"),
        ("tpu:v5p:04x4x4", "tpu:v5p:4x4x4"),
        ("gpu:b20:8", "gpu:b200:8"),
        ("gpu:h200:8x", "gpu:h200:8"),
        ("gpu:h200:0", "gpu:h200:8"),
        ("gpu:h200:0x8", "gpu:h200:2x8"),
        ("gpu:h200:-8", "gpu:h200:8"),
        ("gpu:h200:1e3", "gpu:h200:8"),
        ("gpu:h200:" + 5000 * "9", "gpu:h200:8"),
        ("a100", "gpu:a100:8"),
        ("cpu", "cpu:8"),
        ("cpu:0", "cpu:8"),
        ("cpu:٨", "cpu:8"),
        ("", "cpu:8"),
    ],
)
def test_unknown_machines_name_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match="is unknown; use a name like ") as caught:
        parse_machine(wrong)
    assert near in str(caught.value).split("use a name like")[1] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("tpu:v5p:3x5x7", "first two sizes must be even; use tpu:v5p:4x4x8, tpu:v5p:4x4x4"),
        ("tpu:v4:1x2x2", "first two sizes must be even; use tpu:v4:2x2x1"),
        ("tpu:v5e:3x3", "first two sizes must be even; use tpu:v5e:2x4"),
        ("tpu:v6e:5x5:4", "first two sizes must be even; use tpu:v6e:4x8, tpu:v6e:4x4"),
        ("tpu:v5e:32x16", "a slice has 16x16 at most; use tpu:v5e:16x16, or several slices, such as tpu:v5e:16x16:2"),
        ("tpu:v6e:8x32", "a slice has 16x16 at most"),
        ("tpu:v5p:32x32x32", "a slice has 8960 chips at most; use tpu:v5p:16x20x28, or several slices"),
        ("gpu:h200:16", "a host has 8 GPUs at most; use gpu:h200:2x8"),
        ("gpu:b200:72", "a host has 8 GPUs at most; use gpu:b200:9x8"),
        ("gpu:h200:4x9", "a host has 8 GPUs at most; use gpu:h200:5x8"),
    ],
)
def test_machines_that_nobody_has(wrong: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_machine(wrong)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    for name in re.findall(r"[tg]pu:\w+:[\dx:]+", str(caught.value).split("; use")[1]):
        parse_machine(name)


@pytest.mark.parametrize("name", TPUS)
def test_every_rentable_topology_is_a_name(name: str) -> None:
    """Google's pages: v5e and v6e; and for the others some of the shapes of their tables."""
    flat = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
    cubes = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 4x4x12 8x8x8 8x8x12 8x8x16 8x16x16 16x16x16"
    for shape in (flat if name in ("v5e", "v6e") else cubes).split():
        assert parse_machine(f"tpu:{name}:{shape}").devices == math.prod(map(int, shape.split("x"))) * (
            1 + (name == "7x")
        )


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    assert memory_limit(CpuMachine(8)) is None
    assert memory_limit(TpuMachine("v5e", "4x4", 2)) == 15.75 * GIB
    assert memory_limit(TpuMachine("v4", "4x4x4")) == 30.75 * GIB
    assert memory_limit(GpuMachine("h200", 1, 8)) == int(150_754_820_096 * 0.75)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert memory_limit(GpuMachine("h200", 1, 8)) == 150_754_820_096 // 2
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")  # its newer name; jax refuses both
    with pytest.raises(UserError, match=r"are both set, which jax refuses; unset XLA_PYTHON_CLIENT_MEM_FRACTION"):
        memory_limit(GpuMachine("h200", 1, 8))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert memory_limit(GpuMachine("h200", 1, 8)) == int(150_754_820_096 * 0.9)
    assert memory_limit(TpuMachine("v5e", "4x4")) == 15.75 * GIB
    for wrong in ("most", "nan", "-0.5", "90"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(
            UserError, match=rf"XLA_CLIENT_MEM_FRACTION = '{wrong}' must be a fraction up to 1, such as"
        ):
            memory_limit(GpuMachine("h200", 1, 8))


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages with jax's description and nothing else, and no folder of compilers."""
    metadata = importlib.metadata.distribution("jax").read_text("METADATA")
    assert metadata is not None
    folder = tmp_path / f"jax-{importlib.metadata.version('jax')}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(metadata)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(machines, "COMPILERS", tmp_path / "compilers")
    return tmp_path


def pretend(folder: Path, **versions: str) -> None:
    for name, version in versions.items():
        package = folder / f"{name}-{version}.dist-info"
        package.mkdir()
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_missing_compiler_comes_with_the_line_that_installs_it(nothing_installed: Path) -> None:
    version = importlib.metadata.version("jax")
    same = f"<={version},>={version}"
    assert missing_compiler(CpuMachine(8)) is None
    advice = missing_compiler(TpuMachine("v5p", "4x4x4"))
    assert advice is not None
    assert re.fullmatch(
        rf"no compiler for tpu:v5p:4x4x4: make compilers, or {PIP} --no-deps 'libtpu==[\d.]+\*'", advice
    )
    with pytest.raises(UserError) as caught:
        prepare_compiler(GpuMachine("b200", 2, 8))
    assert str(caught.value) == (
        f"no compiler for gpu:b200:2x8: make compilers, or {PIP} --no-deps "
        f"'jax-cuda13-plugin{same}' 'jax-cuda13-pjrt{same}' 'nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14' absl-py"
    )
    tpu = requirements(Platform.TPU)[0].removeprefix("libtpu==").replace("*", "1")
    pretend(
        nothing_installed,
        libtpu=tpu,
        jax_cuda13_plugin=version,
        jax_cuda13_pjrt=version,
        absl_py="2.5",
        nvidia_nvvm="13.5.37",
    )
    assert missing_compiler(TpuMachine("v5p", "4x4x4")) is None
    advice = missing_compiler(GpuMachine("h200", 1, 8))
    assert advice is not None and advice.endswith(f"{PIP} --no-deps 'nvidia-cuda-nvcc>=13,<14'")


def test_a_compiler_of_another_jax_counts_as_missing(nothing_installed: Path) -> None:
    """It may crash."""
    version = importlib.metadata.version("jax")
    names = {"libtpu": "0.0.1.7", "jax_cuda13_plugin": "0.9.9", "jax_cuda13_pjrt": version, "absl_py": "2"}
    pretend(nothing_installed, **names, nvidia_nvvm="14.0", nvidia_cuda_nvcc="13.5.37")
    advice = missing_compiler(TpuMachine("v5p", "4x4x4"))
    assert advice == (
        f"no compiler for tpu:v5p:4x4x4: libtpu 0.0.1.7 does not go with jax {version}; make compilers, or "
        f"{PIP} --no-deps '{requirements(Platform.TPU)[0]}'"
    )
    advice = missing_compiler(GpuMachine("h200", 1, 8))
    assert advice == (
        f"no compiler for gpu:h200:1x8: jax-cuda13-plugin 0.9.9, nvidia-nvvm 14.0 does not go with jax {version}; make "
        f"compilers, or {PIP} --no-deps '{requirements(Platform.GPU)[0]}' 'nvidia-nvvm>=13,<14'"
    )


@pytest.mark.parametrize(
    ("found", "wanted", "suits"),
    [
        ("0.0.42.1", "libtpu==0.0.42.*", True),
        ("0.0.42.1.dev20260801+nightly", "libtpu==0.0.42.*", True),
        ("0.0.5", "libtpu==0.0.50.*", False),
        ("0.12.0.1", "jax-cuda13-plugin<=0.12.0.1,>=0.12.0.1", True),
        ("0.12.0", "jax-cuda13-plugin<=0.12.0.1,>=0.12.0.1", False),
        ("0.10.2", "jax-cuda13-plugin<=0.12.0.1,>=0.12.0.1", False),
        ("13.5.37", "nvidia-nvvm>=13,<14", True),
        ("14.0", "nvidia-nvvm>=13,<14", False),
        ("2.5.1", "absl-py", True),
    ],
)
def test_versions_that_suit(found: str, wanted: str, suits: bool) -> None:
    assert machines._suits(found, wanted) is suits


@pytest.mark.parametrize("text", [None, "", "Metadata-Version: 2.1\n", "Name: libtpu\n"])
def test_half_an_installation_does_not_count(nothing_installed: Path, text: str | None) -> None:
    folder = nothing_installed / "broken-1.0.dist-info"
    folder.mkdir()
    if text is not None:
        (folder / "METADATA").write_text(text)
    assert set(installed()) == {"jax"}


def test_names_are_read_without_jax() -> None:
    """It must be told of the target before it is imported, and a plan by arithmetic has no time for it."""
    script = "import sys; from maxlm.plan import machines; machines.parse_machine('cpu:8'); print('jax' in sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_gpus_are_all_told_to_the_compiler_in_full() -> None:
    for name in GPUS:
        text = machines.gpu_config(name)
        assert f"device_memory_size: {CHIPS[name].memory} " in text and "{" + "gpu" not in text
        assert text.count("{") == text.count("}")
