"""The table of chips against what others say of them: jax, the architectures' arithmetic, and the chips' compilers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from aot import require_compiler
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.measuring import contest
from maxlm.config import Dtype
from maxlm.hardware import CHIPS, PEAKS, Peak, Switched, Torus
from maxlm.plan import machines
from maxlm.plan.machines import GPUS, TPUS, parse_machine

ROOT = Path(__file__).parent.parent
SMALLEST = {chip: f"tpu:{chip}:2x2" + "x1" * (chip in ("v4", "v5p", "7x")) for chip in TPUS}


def ask_compiler(target: str, script: str, *arguments: str) -> str:
    """What the script, which finds `machine(name)`, writes; in a process of its own, set up for the target."""
    setup = """
import sys
from maxlm.plan.compiled import target_devices
from maxlm.plan.machines import parse_machine
machine = lambda name: target_devices(parse_machine(name))
"""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(machines.COMPILERS)]))
    environment: Mapping[str, str] = os.environ | machines.environment(parse_machine(target)) | {"PYTHONPATH": path}
    command: Sequence[str] = [sys.executable, "-c", setup + script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_target_has_a_chip() -> None:
    """Those that no compiler is told of are for arithmetic."""
    assert set(CHIPS) >= {*TPUS, *GPUS}
    for chip in CHIPS:
        assert isinstance(CHIPS[chip].network, Torus if chip in TPUS else Switched)
        assert parse_machine(f"tpu:{chip}:{SMALLEST[chip].split(':')[-1]}" if chip in TPUS else f"gpu:{chip}:2")


@pytest.mark.parametrize(
    ("chip", "version", "cores"),
    [("v4", "TPU_V4", 2), ("v5e", "TPU_V5E", 1), ("v5p", "TPU_V5P", 2), ("v6e", "TPU_V6E", 1), ("7x", "TPU_7X", 1)],
)
def test_tpus_as_pallas_knows_them(chip: str, version: str, cores: int) -> None:
    """Pallas counts for one core. It has no float8 of v5p, and no int8 of v4, which Google's pages do have."""
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], cores)
    ours = CHIPS[chip]
    assert ours.peak.of(Dtype.BFLOAT16) == pytest.approx(cores * info.bf16_ops_per_second, rel=0.003)
    if chip != "v5p":  # of which it has 2460 GB/s, where Google's page has 2765
        assert ours.bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.03)
    # The compiler keeps a little for itself.
    assert 0.88 < ours.memory / (cores * info.hbm_capacity_bytes) <= 1
    if info.int8_ops_per_second:
        assert ours.peak.int8 == pytest.approx(cores * info.int8_ops_per_second / 1e12, rel=0.003)
    if info.fp8_ops_per_second:
        assert ours.peak.float8 == pytest.approx(cores * info.fp8_ops_per_second / 1e12, rel=0.005)


@pytest.mark.parametrize(
    ("chip", "multiplied_a_cycle", "ghz"),
    # Multiply-adds of a multiprocessor's matrix units, and the clock under them, of the architectures' whitepapers.
    [("a100", 1024, 1.41), ("h100", 2048, 1.83), ("h200", 2048, 1.83), ("b200", 4096, 1.85)],
)
def test_gpu_peaks_are_units_times_clock(chip: str, multiplied_a_cycle: int, ghz: float) -> None:
    peak = CHIPS[chip].peak
    assert peak.bfloat16 == pytest.approx(2 * multiplied_a_cycle * GPUS[chip].multiprocessors * ghz / 1e3, rel=0.01)
    assert peak.bfloat16 is not None and peak.int8 is not None
    assert peak.float32 == pytest.approx(peak.bfloat16 / 2) and peak.int8 == pytest.approx(2 * peak.bfloat16, rel=1e-3)


@pytest.mark.parametrize(
    ("chip", "pins", "gigabits_a_pin", "links", "bytes_a_link"),
    [("a100", 5120, 3.186, 12, 25e9), ("h100", 5120, 5.238, 18, 25e9), ("h200", 6144, 6.25, 18, 25e9)],
)
def test_gpu_bandwidths_are_wires_times_rate(
    chip: str, pins: int, gigabits_a_pin: float, links: int, bytes_a_link: float
) -> None:
    """Of the memory (data sheets), and of NVLink (third and fourth generation)."""
    network = CHIPS[chip].network
    assert isinstance(network, Switched)
    assert CHIPS[chip].bandwidth == pytest.approx(pins * gigabits_a_pin * 1e9 / 8, rel=1e-3)
    assert network.within_host == links * bytes_a_link


def test_the_kernels_table_has_the_same_peaks() -> None:
    """Kernels import nothing of the rest, so their benchmark has a table of its own."""
    ours = {f"tpu_{chip}" if chip in TPUS else chip: CHIPS[chip].peak.bfloat16 for chip in CHIPS}
    assert {chip: peak for chip, peak in ours.items() if chip.startswith("tpu_") or chip in GPUS} == contest._PEAK


def test_a_peak_is_written_once() -> None:
    """A kind of device that is a target has the very peak of that target."""
    targeted = {chip.peak for chip in CHIPS.values()}
    assert {id(peak) for peak in PEAKS.values() if peak in targeted} <= {id(chip.peak) for chip in CHIPS.values()}
    assert targeted <= set(PEAKS.values())


def test_peaks_by_format() -> None:
    assert Peak(2, 1).of(Dtype.BFLOAT16) == 2e12 and Peak(2, 1).of(Dtype.FLOAT32) == 1e12
    assert Peak(None, 1).of(Dtype.BFLOAT16) is None


def test_a_tpus_memory_is_what_its_compiler_says() -> None:
    """From its message about a program that cannot fit. Of three chips libtpu 0.0.42 gives 0.01 GiB more than
    0.0.50 does; the table has what both of them give."""
    require_compiler("tpu_v5p")
    script = """
import jax
for chip, name in zip(sys.argv[1::2], sys.argv[2::2]):
    one = jax.sharding.SingleDeviceSharding(machine(name)[0])
    try:
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((200 << 30,), "int8", sharding=one)).compile()
    except jax.errors.JaxRuntimeError as error:
        print(chip, str(error).split("exceeds available HBM (")[1].split("G)")[0])
"""
    flat = [word for pair in SMALLEST.items() for word in pair]
    said = dict(line.split() for line in ask_compiler("tpu:v5p:2x2x1", script, *flat).splitlines())
    assert said.keys() == set(TPUS)
    for chip, size in said.items():
        assert -0.005 < float(size) - CHIPS[chip].memory / 2**30 < 0.015, chip


@pytest.mark.slow
@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == "h200" else pytest.mark.nightly) for c in GPUS])
def test_a_gpus_compiler_takes_what_we_say_of_it(chip: str) -> None:
    """And our kernels know by its name which chip it is, so that "auto" keeps Hopper's to Hopper."""
    require_compiler("h200")
    script = """
import jax
import jax.numpy as jnp
from kernels_pallas import flash_attention, masks
from kernels_pallas.dispatch import explain
from kernels_pallas.targets import target_of
devices = machine(sys.argv[1])
one = jax.sharding.SingleDeviceSharding(devices[0])
square = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=one)
compiled = jax.jit(lambda x: jax.nn.silu(x @ x)).lower(square).compile()
target = target_of(devices[0].device_kind, devices[0].platform)
q = jax.ShapeDtypeStruct((1, 2048, 8, 128), jnp.bfloat16)
plan = explain(flash_attention, q, q, q, mask=masks.causal, segment_ids=None, target=target)
print(__import__("json").dumps([len(devices), target.name, target.hopper, plan.backend, "gpu" in plan.refused]))
"""
    answer = json.loads(ask_compiler(f"gpu:{chip}:8", script, f"gpu:{chip}:2x8"))
    hopper = chip in ("h100", "h200")
    assert answer[:3] == [16, chip, hopper]
    assert hopper or (answer[3] != "gpu" and answer[4])


def test_machines_of_every_size() -> None:
    """The compilers build the machine that a target names, with as many devices."""
    require_compiler("tpu_v5p")
    names = [
        *SMALLEST.values(), "tpu:v5e:1x1", "tpu:7x:1x1x1", "tpu:v5e:8x4", "tpu:v6e:16x16", "tpu:v5p:2x4x8",
        "tpu:v5p:2x2x3", "tpu:v5p:16x20x28", "tpu:v4:12x12x24", "tpu:7x:4x4x576", "tpu:v4:2x2x1:2", "tpu:v5p:4x4x4:3",
        "tpu:v5e:16x16:256",
    ]  # fmt: skip
    script = "print([len(machine(name)) for name in sys.argv[1:]])"
    assert json.loads(ask_compiler(names[0], script, *names)) == [parse_machine(name).devices for name in names]


@pytest.mark.slow
def test_shapes_that_we_refuse_the_compiler_refuses() -> None:
    """Of 2 x 2 chips a host; larger slices than a pod it would take."""
    require_compiler("tpu_v5p")
    shapes = ["v5p:3x5x7", "v5p:2x3x2", "v5p:1x2x2", "v4:3x4x4", "v5e:3x3", "v5e:4x6", "v6e:2x1", "v6e:2x6", "v5e:1x8"]
    script = """
import jax
from jax.experimental import topologies
for name in sys.argv[1:]:
    try:
        topologies.get_topology_desc(platform="tpu", topology_name=name)
        print("takes")
    except jax.errors.JaxRuntimeError:
        print("refuses")
"""
    said = ask_compiler("tpu:v5p:2x2x1", script, *shapes).split()

    def ours(shape: str) -> str:
        try:
            return "takes" if parse_machine(f"tpu:{shape}").platform else ""
        except machines.UserError:
            return "refuses"

    assert said == [ours(shape) for shape in shapes]
