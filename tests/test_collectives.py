"""What the audit reads from compiled programs, and what it says of every layout."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_run
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from test_layouts import LAYOUTS

from maxlm.config import UserError
from maxlm.plan.audit import forbidden
from maxlm.plan.collectives import UNKNOWN, Collective, CollectiveKind, collectives, summed
from maxlm.plan.compiled import CompiledStep, Memory, compile_step, compiler_report
from maxlm.plan.hlo import Program, Runs
from maxlm.plan.machines import (
    CpuMachine,
    GpuMachine,
    Platform,
    TpuMachine,
    memory_limit,
    parse_machine,
    requirements,
)
from maxlm.plan.tables import print_compiled
from maxlm.sharding import make_layout

HLO = Path(__file__).parent / "hlo"
D, F, V, LAYERS = 4096, 11_008, 32_000, 2  # of the programs in hlo/: LLaMA 7B's widths, two layers
BFLOAT16, FLOAT32 = 2, 4


def mesh_shape(**sizes: int) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in ("data", "fsdp", "stage", "seq", "tensor", "expert")}


def figures(found: list[Collective]) -> Counter:
    """(kind, axes, bytes each, overlaps) -> runs."""
    counts: Counter = Counter()
    for one in found:
        assert one.runs.exact
        counts[one.kind, one.axes, one.bytes_each, one.asynchronous] += one.runs.count
    return counts


def test_chains_of_permutes_in_nested_loops_without_trip_counts():
    """TPU v5p:2x4x4, fsdp 32. The products with gate_proj gather and scatter while they multiply, both ways round a
    ring: 32 hops of a shard, in 8 turns of a loop that counts 0, 2, ..., 14, in each layer."""
    found = collectives(Program((HLO / "tpu_windowed.txt").read_text()), mesh_shape(fsdp=32))
    shard = D // 32 * F * BFLOAT16
    assert figures(found) == {
        (CollectiveKind.PERMUTE, ("fsdp",), shard, True): 2 * LAYERS * 32,
        (CollectiveKind.ALL_GATHER, ("fsdp",), D * F * BFLOAT16, False): LAYERS,
        (CollectiveKind.ALL_REDUCE, ("fsdp",), V * D * FLOAT32, False): 1,
    }
    permutes = sum(one.sent for one in found if one.kind is CollectiveKind.PERMUTE)
    assert permutes == 2 * LAYERS * 32 * shard


def test_fused_scatters_and_combined_sums():
    """TPU v5p:4x4x4, data 2 x fsdp 32, where the compiler's own mesh runs the other way than ours."""
    found = collectives(Program((HLO / "tpu_scatter.txt").read_text()), mesh_shape(data=2, fsdp=32))
    layer = 4 * D * D + 3 * D * F
    assert figures(found) == {
        (CollectiveKind.REDUCE_SCATTER, ("fsdp",), D * F * BFLOAT16, False): LAYERS,  # a fusion of all-reduce and slice
        (
            CollectiveKind.ALL_REDUCE,
            ("fsdp",),
            (D * D + F * D) * BFLOAT16,
            False,
        ): LAYERS,  # o_proj and down_proj as one
        (CollectiveKind.ALL_REDUCE, ("data",), layer // 32 * BFLOAT16, False): LAYERS,
        (CollectiveKind.ALL_REDUCE, ("data",), V * D // 32 * BFLOAT16, False): 1,
        (CollectiveKind.ALL_GATHER, ("fsdp",), D * F * BFLOAT16, False): LAYERS,
        (CollectiveKind.ALL_GATHER, ("fsdp",), V * D * BFLOAT16, False): 1,
    }


def test_starts_of_several_arrays():
    """H200 x 8, fsdp 8: a start's shape holds operands and results, several of each where the compiler joined them."""
    found = collectives(Program((HLO / "gpu.txt").read_text()), mesh_shape(fsdp=8))
    assert figures(found) == {
        (CollectiveKind.ALL_GATHER, ("fsdp",), D * D * BFLOAT16, True): LAYERS,
        (CollectiveKind.REDUCE_SCATTER, ("fsdp",), (4 * D * D + D * F) * BFLOAT16, True): LAYERS,
        (CollectiveKind.REDUCE_SCATTER, ("fsdp",), 2 * D * F * BFLOAT16, True): LAYERS,
        (CollectiveKind.REDUCE_SCATTER, ("fsdp",), V * D * BFLOAT16, True): 1,
        (CollectiveKind.ALL_REDUCE, ("fsdp",), 2 * D * FLOAT32, True): LAYERS,  # two norms
        (CollectiveKind.ALL_REDUCE, ("fsdp",), 3 * FLOAT32, False): 1,  # the loss's sums, waited for at once
    }


def program(instruction):
    return Program(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4]{{0}} {instruction}\n}}\n")


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor"), 8),
        ("replica_groups={}", ("data", "fsdp", "tensor"), 8),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("replica_groups=[4,2]<=[8]", ("tensor",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", ("data",), 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",), 2),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2,'d'=2] {'a','c'}", ("data", "fsdp"), 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp"), 4),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'c'}", ("fsdp",), 2),
    ],
)
def test_every_notation_of_groups(groups, axes, size):
    text = (
        f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4]{{0}} all-reduce(%x), {groups}, to_apply=%add\n}}\n"
    )
    (one,) = collectives(Program(text), {"data": 2, "fsdp": 2, "tensor": 2})
    assert (one.axes, one.group) == (axes, size)
    assert one.sent == 2 * 16 * (size - 1) // size


def test_permutes_that_keep_what_they_have_send_nothing():
    (still,) = collectives(program("collective-permute(%x), source_target_pairs={{0,0},{1,1}}"), {"data": 2})
    (swap,) = collectives(program("collective-permute(%x), source_target_pairs={{0,1},{1,0}}"), {"data": 2})
    assert (still.axes, still.sent, swap.axes, swap.sent) == ((), 0, ("data",), 16)


@pytest.mark.parametrize(
    "instruction",
    [
        "all-reduce(%x), replica_groups=@new",
        "all-reduce(%x), replica_groups={{}}",
        "all-reduce(%x), replica_groups={{0,1,2},{3}}",  # groups of several sizes
        "all-reduce(%x), replica_groups={{4,5},{6,7}}",  # devices that the mesh has not
        "all-reduce(%x), replica_groups=mesh['a'=4] {'a':(1)2}",  # a part of an axis
        "collective-permute(%x), source_target_pairs=@new",
    ],
)
def test_of_an_unknown_notation_the_axes_are_unknown(instruction):
    """What it does to memory must still be told."""
    (one,) = collectives(program(instruction), {"data": 2, "fsdp": 2})
    assert (one.axes, one.group, one.bytes_each) == (UNKNOWN, 4, 16)
    console = Console(file=io.StringIO(), width=120)
    memory = Memory(arguments=1, temporary=1, peak=1)
    step = CompiledStep(
        memory=memory, largest=(), collectives=(one,), kernels=(), spills=None, forbidden=(), cpu_seconds=0
    )
    print_compiled(compiler_report(step), console)
    assert "written in a way that is not known; counted as all" in console.file.getvalue()


def test_a_token_has_no_bytes_and_no_pairs_send_nothing():
    text = "ENTRY %m (x: f32[4]) -> f32[4] {\n  ROOT %r = (f32[4]{0}, token[], pred[8]{0}, s4[8]{0}) "
    (one,) = collectives(Program(text + "all-reduce(%x), replica_groups={}\n}\n"), {"data": 2})
    assert one.bytes_each == 16 + 0 + 8 + 4
    (one,) = collectives(program("collective-permute(%x), source_target_pairs={}"), {"data": 2})
    assert (one.axes, one.sent) == ((), 0)


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(function, *, spec=P(("data", "fsdp")), length=64):
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((length,), jnp.float32, sharding=NamedSharding(mesh(), spec))
    return jax.jit(mapped).lower(x).compile().as_text()


@pytest.mark.parametrize("noted", [True, False], ids=["trip count noted", "from the condition"])
def test_nested_loops_multiply(noted):
    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "fsdp")), None

    def outer(x, _):
        return jax.lax.pmax(jax.lax.scan(inner, x, length=5)[0] * 2, "data"), None

    text = compiled_text(lambda x: jax.lax.scan(outer, x, length=3)[0])
    if not noted:
        text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
        assert "known_trip_count" not in text
    runs = {one.axes: one.runs for one in collectives(Program(text), mesh().shape)}
    assert runs == {("fsdp",): Runs(15), ("data",): Runs(3)}


def test_a_loop_whose_end_depends_on_data_counts_once_and_says_so():
    body = lambda x: jax.lax.psum(x, "fsdp") / 4 + 1
    text = compiled_text(lambda x: jax.lax.while_loop(lambda x: jax.lax.psum(x[0], ("data", "fsdp")) < 1e3, body, x))
    assert {one.runs for one in collectives(Program(text), mesh().shape)} == {Runs(1, exact=False)}


@pytest.mark.parametrize(
    ("function", "kind", "payload", "sent"),
    [
        # 8 float32 a device, over fsdp = 4
        (lambda x: jax.lax.psum(x, "fsdp"), CollectiveKind.ALL_REDUCE, 32, 48),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:8], CollectiveKind.ALL_GATHER, 128, 96),
        (lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), 4), CollectiveKind.REDUCE_SCATTER, 32, 24),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), CollectiveKind.ALL_TO_ALL, 32, 24),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]), CollectiveKind.PERMUTE, 32, 32),
    ],
)
def test_bytes_of_each_kind(function, kind, payload, sent):
    (one,) = collectives(Program(compiled_text(function)), mesh().shape)
    assert (one.kind, one.axes, one.bytes_each, one.sent) == (kind, ("fsdp",), payload, sent)


def test_alike_collectives_are_summed_most_bytes_first():
    one = Collective(CollectiveKind.ALL_REDUCE, ("data",), 2, Runs(3), 100, "a", False)
    big = dataclasses.replace(one, bytes_each=10_000)
    merged = summed([one, big, dataclasses.replace(one, operation="b", runs=Runs(4, exact=False))])
    assert merged == [(big, 1), (dataclasses.replace(one, operation="a | b", runs=Runs(7, exact=False)), 2)]


EXCEPTIONS = {
    # The processor's compiler changes the layout of a small weight gradient through an all-to-all over seq.
    name: {"only experts, Ulysses and virtual stages exchange all with all"}
    for name, sharding in LAYOUTS.items()
    if sharding.seq > 1
}


QUICK = {"data8", "fsdp8", "seq8", "zero1", "zero2", "fsdp2_seq2_tensor2_sp"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in LAYOUTS])
def test_no_layout_breaks_its_rules(name):
    step = compile_step(small_run(sharding=LAYOUTS[name]), CpuMachine(8))
    assert isinstance(step, CompiledStep)
    assert {line.split(": ")[-1] for line in step.forbidden} <= EXCEPTIONS.get(name, set())
    sizes = LAYOUTS[name].sizes(8)
    assert {axis for one in step.collectives for axis in one.axes} <= {axis for axis, n in sizes.items() if n > 1}


def rules_broken(sharding, *found, log=""):
    return forbidden(make_layout(sharding), found, matrix_bytes=1000, log=log)


def test_rules_can_be_broken():
    one = Collective(CollectiveKind.ALL_GATHER, ("data",), 8, Runs(1), 64, "jit(step)/f", False)
    data8, fsdp8 = LAYOUTS["data8"], LAYOUTS["fsdp8"]
    (line,) = rules_broken(data8, one)
    assert line.startswith("1 all-gather over data of 64 bytes (in jit(step)/f): data parallelism sums gradients")
    assert not rules_broken(data8, dataclasses.replace(one, kind=CollectiveKind.ALL_REDUCE))
    assert not rules_broken(fsdp8, dataclasses.replace(one, axes=("fsdp",)))
    (line,) = rules_broken(fsdp8, dataclasses.replace(one, axes=("fsdp",), kind=CollectiveKind.ALL_TO_ALL))
    assert "exchange all with all" in line
    # A sum that crosses slices goes by way of parts; of devices that nobody knows no rule can be broken.
    sliced = dataclasses.replace(make_layout(data8), config=dataclasses.replace(data8, slices=2))
    assert not forbidden(sliced, [one], matrix_bytes=1000)
    assert not rules_broken(fsdp8, dataclasses.replace(one, axes=UNKNOWN, kind=CollectiveKind.ALL_TO_ALL))
    (line,) = rules_broken(fsdp8, log="W0000 Involuntary full rematerialization. The compiler ...")
    assert "copies a whole array" in line


def test_targets():
    assert parse_machine("cpu:8") == CpuMachine(8)
    assert parse_machine("tpu:v5p:4x4x4") == TpuMachine("v5p", "4x4x4")
    assert parse_machine("tpu:7x:2x2x1").devices == 8  # two devices a chip
    assert parse_machine("gpu:h200:8") == GpuMachine("h200", 1, 8)
    assert parse_machine("gpu:h200:16x8").devices == 128
    assert memory_limit(parse_machine("cpu:8")) is None
    assert memory_limit(parse_machine("gpu:h200:8")) == int(150_754_820_096 * 0.75)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("tpu:v5:4x4x4", "tpu:v5p:4x4x4"),
        ("tpu:v5p:4x4", "tpu:v5p:4x4x4"),
        ("gpu:h20:8", "gpu:h200:8"),
        ("gpu:h200:8x", "gpu:h200:8"),
        ("cpu", "cpu:8"),
        ("cpu:0", "cpu:8"),
        ("h200", "gpu:h200:8"),
    ],
)
def test_unknown_targets_name_the_nearest(wrong, near):
    with pytest.raises(UserError) as caught:
        parse_machine(wrong)
    assert f"--target {wrong} is unknown" in str(caught.value) and near in str(caught.value)


def test_compilers_are_those_of_the_installed_jax():
    names = [re.split("[<>=]", line)[0] for line in (*requirements(Platform.TPU), *requirements(Platform.GPU))]
    assert names[:3] == ["libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"]
    assert jax.__version__ in requirements(Platform.GPU)[0]


def run_plan(*arguments):
    command = [sys.executable, "-m", "maxlm.plan", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)


def test_mistakes_on_the_command_line():
    for arguments, words in [
        (("--target", "tpu:v5p"), "--target tpu:v5p is unknown; use a name like .*tpu:v5p:2x2x1"),
        (("--target", "cpu:7", "--sharding.fsdp", "2"), "multiple of 2"),
    ]:
        done = run_plan("--config", "configs/tiny.py", "--compile", *arguments)
        assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
        assert "Traceback" not in done.stderr


def test_the_config_is_shown_without_a_target():
    done = run_plan("--config", "configs/tiny.py", "--print_config", "--sharding.fsdp", "2")
    assert done.returncode == 0 and "sharding.fsdp = 2    # the file says 1" in done.stdout


def test_the_command_on_this_machine():
    done = run_plan("--config", "configs/tiny.py", "--target", "cpu:4", "--compile", "--json", "--sharding.fsdp", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mesh"] == mesh_shape(data=2, fsdp=2) and report["fits"] and report["forbidden"] == []
    assert {tuple(one["axes"]) for one in report["collectives"]} >= {("fsdp",), ("data",)}
    assert report["memory"]["peak"] > report["memory"]["arguments"] > 0
