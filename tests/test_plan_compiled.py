"""What is read from compiled train steps: memory, largest arrays, kernels, spills, and why one does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import cattrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import ROOT, devices, require_compiler
from helpers import small_run
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from maxlm.config import ShardingConfig, UserError
from maxlm.config.cli import parse_run
from maxlm.plan import compiled, machines
from maxlm.plan.collectives import Collective, CollectiveKind
from maxlm.plan.compiled import CompiledStep, compile_step, compiler_report
from maxlm.plan.hlo import Program, Runs
from maxlm.plan.kernels import Kernel, Maker, kernels, spilled, total_spills
from maxlm.plan.machines import CpuMachine, parse_machine
from maxlm.plan.out_of_memory import Allocation, Buffer, DoesNotFit, largest_arrays, parse_refusal
from maxlm.plan.tables import print_compiled
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention_forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attention_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Function properties for crowded_mosaic_gpu_kernel
    1024 bytes stack frame, 1020 bytes spill stores, 980 bytes spill loads
ptxas info    : Function properties for crowded_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""


# --- On this machine's compiler ---


def test_arguments_are_the_shards_of_the_state_and_the_batch() -> None:
    config = small_run(sharding=ShardingConfig(fsdp=8))
    trainer = make_trainer(config, make_layout(config.sharding, jax.devices()[:8]))
    arrays = jax.tree.leaves((trainer.state, trainer.batch))
    shards = sorted(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    text = trainer.step.lower(trainer.state, trainer.batch).compile().as_text() or ""
    found = [one for one in largest_arrays(Program(text), count=10_000) if one.allocation is Allocation.ARGUMENT]
    assert sorted(one.size for one in found for _ in range(one.number)) == shards
    assert any("embed" in one.operation for one in found)


def test_a_step_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(*arguments: Any) -> Any:
        warnings.warn("Some donated buffers were not usable: f32[4].\nSee a page.", stacklevel=1)
        return make_trainer(*arguments)

    monkeypatch.setattr(compiled, "make_trainer", warning)
    step = compile_step(small_run(sharding=ShardingConfig(fsdp=8)), CpuMachine(8))
    assert isinstance(step, CompiledStep)
    assert step.memory.peak > step.memory.arguments > 0 and step.cpu_seconds > 0
    assert step.spills is None and step.kernels == ()
    assert step.warnings == ("Some donated buffers were not usable: f32[4].",)
    assert "the compiler warns: Some donated" in printed(step)


def test_the_largest_arrays_have_a_line_of_the_model(tmp_path: Path) -> None:
    """In a process of its own, as for a user: jax keeps what it has traced, and with it the lines that it was traced
    from, and XLA what it has compiled."""
    words = ["--config", "tiny", "--train.loss_chunk=8", "--target", "cpu:1", "--compile", "--json"]
    environment = os.environ | {"MAXLM_PLAN_CACHE": str(tmp_path), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "maxlm.plan", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sources = {one["source"] for one in json.loads(done.stdout)["largest"] if one["source"]}
    assert any(source.startswith("maxlm/models/") for source in sources), done.stdout
    for source in sources:
        file, line = source.split(":")
        assert len((ROOT / file).read_text().splitlines()) >= int(line)


def test_what_exceeds_the_limit_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose compiler refuses nothing."""
    fits = compile_step(small_run(), CpuMachine(8))
    assert isinstance(fits, CompiledStep)
    monkeypatch.setattr(compiled, "memory_limit", lambda target: fits.memory.peak)
    assert isinstance(compile_step(small_run(), CpuMachine(8)), CompiledStep)
    monkeypatch.setattr(compiled, "memory_limit", lambda target: fits.memory.peak - 1)
    refused = compile_step(small_run(), CpuMachine(8))
    assert isinstance(refused, DoesNotFit)
    assert (refused.wanted, refused.available) == (fits.memory.peak, fits.memory.peak - 1)
    assert refused.largest == fits.largest
    size = r"[\d.]+ [MG]iB"
    assert re.fullmatch(rf"needs {size}, 0.00 MiB too much: a program may have {size}", refused.message)
    assert not refused.at_least and "at least" not in printed(refused)


@pytest.mark.parametrize(
    ("words", "raised", "match"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17M of 16M.\nmore",
            UserError,
            "vmem.*16M.$",
        ),
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
            "allocating on stack for %grouped_weight_gradient.3 = bf16[16,768,2048] custom-call(%a)\nSee more",
            UserError,
            r"CompileTimeScopedVmemOom: Ran out .* vmem .* for %grouped_weight_gradient\.3$",
        ),
        ("INTERNAL: a bug", jax.errors.JaxRuntimeError, "a bug"),
    ],
)
def test_other_errors_of_compilers(
    monkeypatch: pytest.MonkeyPatch, words: str, raised: type[Exception], match: str
) -> None:
    """Memory next to the cores that a kernel lacks is a mistake in the choice of the kernel; the rest are bugs."""

    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(raised, match=match):
        compile_step(small_run(), CpuMachine(8))


def test_a_refusal_in_unknown_words_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: the program exceeds HBM capacity")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    monkeypatch.setattr(compiled, "memory_limit", lambda target: 2**30)
    refused = compile_step(small_run(), CpuMachine(8))
    assert isinstance(refused, DoesNotFit) and refused.largest == ()
    assert (refused.wanted, refused.available, refused.at_least) == (2**30 + 1, 2**30, True)
    assert "needs at least 1.00 GiB" in printed(refused)
    report = compiler_report(refused)
    assert not report.fits and report.details["peak_at_least"] is True


def test_output_of_compilers_is_kept_from_the_reader(capfd: pytest.CaptureFixture[str]) -> None:
    with compiled._compiler_output() as log:
        os.write(1, b"one ")
        os.write(2, b"two")
    assert log == ["one two"] and capfd.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError), compiled._compiler_output():
        os.write(1, b"a hint")
        _ = 1 / 0
    assert capfd.readouterr() == ("", "a hint")
    with pytest.raises(UserError), compiled._compiler_output():  # it tells the reason itself
        os.write(1, b"a hint")
        raise UserError("too large")
    assert capfd.readouterr() == ("", "")


def test_the_last_words_of_a_compiler_that_ends_the_process_are_told(tmp_path: Path) -> None:
    script = (
        "import os; from maxlm.plan import compiled\n"
        "with compiled._compiler_output():\n    os.write(1, b'check failed: reason'); os.abort()"
    )
    variables = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGABRT and done.stderr.endswith("check failed: reason")
    assert list(tmp_path.iterdir()) == []


# --- On the console ---


def printed(result: CompiledStep | DoesNotFit, *, cached: bool = False) -> str:
    file = io.StringIO()
    print_compiled(compiler_report(result), Console(file=file, width=120), cached=cached)
    return file.getvalue()


def test_tables_say_what_is_not_exact_and_repeat_nothing() -> None:
    buffer = Buffer(size=2**30, shape="f32[4]", operation="a", source="", allocation=Allocation.TEMPORARY)
    one = Collective(CollectiveKind.ALL_REDUCE, ("fsdp",), 8, Runs(3), 8_000_000, "a", False)
    step = CompiledStep(
        memory=compiled.Memory(arguments=1, temporary=2, peak=3),
        largest=(buffer, dataclasses.replace(buffer, operation="b", number=2), dataclasses.replace(buffer, size=1)),
        collectives=(one,),
        kernels=(),
        spills=None,
        forbidden=(),
        cpu_seconds=7,
    )
    text = printed(step)
    assert "a device sends 0.042 GB a step" in text and "after 7 CPU seconds" in text
    guessed = dataclasses.replace(step, collectives=(one, dataclasses.replace(one, runs=Runs(1, exact=False))))
    text = printed(guessed, cached=True)
    assert "a device sends at least 0.056 GB a step" in text and "from the cache; it took 7 CPU seconds" in text
    refused = DoesNotFit(message="no", wanted=2, available=1, largest=step.largest, cpu_seconds=7)
    rows = [line.split() for line in printed(refused).splitlines() if line.startswith("f32[4]")]
    assert rows == [["f32[4]", "1.00", "GiB", "3", "temporary"], ["f32[4]", "0.00", "MiB", "1", "temporary"]]


# --- Kernels in texts ---


def test_kernels_are_counted_with_the_loops_around_them() -> None:
    loop = """%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %a = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp(scale)/pallas_call"}
  %b.2 = f32[4]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/dot/mosaic"}
  %c = (f32[4]{0}, s8[8]{0}) custom-call(%p), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/dot"}
  %d = f32[4]{0} custom-call(%p), custom_call_target="AllocateBuffer"
  ROOT %r = (s32[], f32[4]{0}) tuple(%p, %a)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %t = pred[] constant(true)
}

%fused (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} parameter(0)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %e = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp(scale))/pallas_call"}
  %gemm_fusion_dot.7 = f32[4]{0} fusion(%x), kind=kCustom, calls=%fused, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %f = f32[4]{0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %w = (s32[], f32[4]{0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501
    found = {(one.maker, one.name): (one.calls, one.runs) for one in kernels(Program(loop))}
    assert found == {
        (Maker.MOSAIC_TPU, "scale"): (2, Runs(7)),
        (Maker.MOSAIC_GPU, "dot"): (1, Runs(6)),
        (Maker.CUBLAS, "__cublas$lt$matmul"): (1, Runs(6)),
        (Maker.TRITON, "gemm_fusion_dot"): (1, Runs(1)),
        (Maker.CUDNN, "__cudnn$fmhaSoftmax"): (1, Runs(1)),
    }
    assert kernels(Program(loop))[0].name == "scale"  # the one that runs most


def test_spills_are_those_of_the_kernels_that_the_program_calls() -> None:
    known = spilled(PTXAS)
    assert known == {"attention_forward": 0, "crowded": 2000}
    one = Kernel(maker=Maker.MOSAIC_GPU, name="attention_forward", calls=1, runs=Runs(1), source="")
    crowded = Kernel(maker=Maker.MOSAIC_GPU, name="crowded", calls=1, runs=Runs(1), source="")
    unknown = Kernel(maker=Maker.MOSAIC_GPU, name="other", calls=1, runs=Runs(1), source="")
    triton = Kernel(maker=Maker.TRITON, name="gemm", calls=1, runs=Runs(1), source="")
    assert total_spills([one, triton], known) == 0
    assert total_spills([one, crowded], known) == 2000
    assert total_spills([one, unknown], known) is None
    assert total_spills([triton], known) is None and total_spills([], known) is None


# --- On the chips' own compilers, each in a process of its own ---


def child() -> None:
    """Compiles the step of a target and config in the arguments, and prints the answer."""
    target, *arguments = sys.argv[1:]
    config = parse_run(arguments, prog="child", description="").config
    result = compile_step(config, parse_machine(target))
    print(json.dumps({"kind": type(result).__name__, "result": cattrs.unstructure(result)}))


def in_process(function: str, target: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", ""), str(machines.COMPILERS)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **machines.environment(parse_machine(target)),
        **variables,
    }
    command = [sys.executable, "-c", f"import test_plan_compiled as t; t.{function}()", target, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def compile_for(target: str, *arguments: str, **variables: str) -> CompiledStep | DoesNotFit:
    done = in_process("child", target, *arguments, **variables)
    assert done.stderr == ""  # what compilers have to say is kept
    answer = json.loads(done.stdout)
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (CompiledStep, DoesNotFit)}
    result: CompiledStep | DoesNotFit = cattrs.structure(answer["result"], kinds[answer["kind"]])
    return result


SEVEN_B = ("--config", "configs/llama2_7b.py", "--model.n_layers", "4", "--sharding.data", "1", "--sharding.fsdp", "8")


@pytest.mark.slow
def test_a_gpu_step_with_our_kernels() -> None:
    require_compiler("h200")
    step = compile_for("gpu:h200:8", *SEVEN_B, "--train.batch_size", "8", "--execution.kernels.attention", "gpu")
    assert isinstance(step, CompiledStep)
    ours = {one.name: one.runs for one in step.kernels if one.maker is Maker.MOSAIC_GPU}
    # Forward, again on the way back, and the gradients, in each of four layers.
    assert set(ours) == {"attention_forward", "attention_backward_dkv", "attention_backward_dq"}
    assert ours["attention_forward"].count in (4, 8)
    assert ours["attention_backward_dkv"] == ours["attention_backward_dq"] == Runs(4)
    assert {one.source.split(":")[0] for one in step.kernels if one.name in ours} == {"maxlm/models/ops/attention.py"}
    assert step.spills == 0


@pytest.mark.slow
def test_a_gpu_step_that_does_not_fit() -> None:
    require_compiler("h200")
    step = compile_for("gpu:h200:8", *SEVEN_B, "--train.batch_size", "8", XLA_PYTHON_CLIENT_MEM_FRACTION="0.01")
    assert isinstance(step, DoesNotFit)
    assert step.available == pytest.approx(0.01 * 140 * 2**30, rel=0.1) and step.wanted > step.available
    assert step.largest[0].size < step.wanted and not step.at_least
    assert step.message.endswith("(three quarters of the GPU's memory, or XLA_CLIENT_MEM_FRACTION)")
    assert any(one.source.startswith("maxlm/training/losses.py") for one in step.largest)


@pytest.mark.nightly
def test_a_tpu_step_that_is_refused_before_it_is_compiled() -> None:
    """It says two numbers; the arrays come from a second program that may overflow, and cannot be loaded."""
    require_compiler("tpu_v5e")
    overrides = ("--sharding.data", "1", "--sharding.fsdp", "4", "--model.n_layers", "2", "--train.batch_size", "16384")
    step = compile_for("tpu:v5e:2x2", "--config", "configs/tiny.py", *overrides)
    assert isinstance(step, DoesNotFit)
    assert step.available == round(15.75 * 2**30) and step.wanted > step.available and step.at_least
    assert "RESOURCE_EXHAUSTED" in step.message and "\n" not in step.message
    assert any(one.source.startswith("maxlm/models/") for one in step.largest)
    # What the two layers save for the way back: [layers, a device's sequences, positions, d_model].
    assert "f32[2,4096,256,256]" in {one.shape for one in step.largest}


def overflow() -> None:
    """A scan that saves 8 x 1.25 GiB on a TPU v5e whose memory is set by an option of the compiler."""
    mesh = Mesh(np.array(devices("tpu_v5e")).reshape(-1), ("data",))

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=8)
        return jnp.sum(last**2)

    shape = lambda rows, spec: jax.ShapeDtypeStruct((rows, 4096), jnp.float32, sharding=NamedSharding(mesh, spec))
    lowered = jax.jit(jax.grad(loss)).lower(shape(4 * 40_000, P("data")), shape(4096, P()))
    whole = lowered.compile()
    stats = whole.memory_analysis()
    assert stats is not None
    needed = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    limited = lambda mib, **more: {"xla_tpu_max_hbm_size_mib": mib, **more}
    lowered.compile(limited(math.ceil(needed / 2**20) + 1))
    errors = {}
    # One that even the least does not fit in, and one that all fits in but the code.
    for name, mib in (("early", 4096), ("late", math.ceil(stats.peak_memory_in_bytes / 2**20))):
        try:
            lowered.compile(limited(mib))
        except jax.errors.JaxRuntimeError as error:
            errors[name] = str(error)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # newer compilers do not load it
            lowered.compile(limited(4096, xla_tpu_no_crash_on_oom=True, **dump))
        past = max((file.read_text() for file in Path(folder).glob("*.after_optimizations.txt")), key=len)
    print(json.dumps({"needed": needed, "errors": errors, "text": past}))


@pytest.mark.slow
def test_the_tpus_verdict_is_peak_and_code() -> None:
    """And its list of allocations begins with what we find in the text of a program that may overflow."""
    require_compiler("tpu_v5e")
    found: dict[str, Any] = json.loads(in_process("overflow", "tpu:v5e:2x2").stdout)
    early = parse_refusal(found["errors"]["early"], 0)
    assert early is not None and early.largest == () and early.available == 4 * 2**30 and early.at_least
    if "late" not in found["errors"]:
        pytest.skip("this compiler finds a way with less memory, and refuses nothing late (libtpu 0.0.50)")
    late = parse_refusal(found["errors"]["late"], 0)
    assert late is not None
    assert late.wanted == pytest.approx(found["needed"], rel=1e-3) and late.wanted > late.available
    arrays = largest_arrays(Program(found["text"]))
    saved, listed = arrays[0], late.largest[0]
    assert (saved.shape, saved.operation) == (listed.shape, listed.operation) == (
        "f32[8,40000,4096]", "jit(loss)/jvp()/broadcast_in_dim",
    )  # fmt: skip
    assert saved.size == 8 * 40_000 * 4096 * 4 == pytest.approx(listed.size, rel=2e-3)
    arguments = lambda buffers: {one.shape for one in buffers if one.allocation is Allocation.ARGUMENT}
    assert arguments(arrays) == arguments(late.largest) == {"f32[40000,4096]", "f32[4096,4096]"}
