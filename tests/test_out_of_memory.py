"""Messages of the TPU's compiler that memory does not suffice, and the largest arrays of compiled programs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import plan_memory
from maxlm.plan.hlo import Program
from maxlm.plan.out_of_memory import Allocation, largest_arrays, parse_refusal, with_sources
from maxlm.plan.source_lines import SourceLines

HLO = Path(__file__).parent / "hlo"
GIB = 2**30
LIMIT = round(15.75 * GIB)


def test_a_refusal_before_anything_is_compiled_has_two_numbers() -> None:
    """libtpu 0.0.42, configs/tiny.py with 8192 sequences on v5e:2x2."""
    refusal = parse_refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.99G) exceeds "
        "available HBM (15.75G).",
        LIMIT,
    )
    assert refusal is not None
    assert (refusal.wanted / GIB, refusal.available / GIB) == (pytest.approx(17.99), pytest.approx(15.75))
    assert refusal.at_least  # nothing but the temporaries, and these not laid out
    assert refusal.largest == () and refusal.message.endswith("available HBM (15.75G).")


def test_a_refusal_in_a_third_wording() -> None:
    """As its strings have it."""
    refusal = parse_refusal(
        "RESOURCE_EXHAUSTED: Compilation failure: Aborting compilation early because it's unlikely to have enough "
        "device memory. Requires 42.50G, has 31.25G available. If more detailed logging is desired, set --xla...",
        LIMIT,
    )
    assert refusal is not None and (refusal.wanted, refusal.available) == (42.5 * GIB, 31.25 * GIB)
    assert refusal.at_least


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. The program (20.1 GiB) exceeds HBM capacity (15.75 GiB).",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: no room.\n\n  1. Size: much",
        "RESOURCE_EXHAUSTED: CompileTimeHbmOom: vmem would have been enough.",
        "RESOURCE_EXHAUSTED: out of hbm",
    ],
)
def test_a_refusal_in_unknown_words_is_one(words: str) -> None:
    """Its verdict counts, though nobody knows by how much."""
    refusal = parse_refusal(words, LIMIT)
    assert refusal is not None and refusal.message == words.splitlines()[0]
    assert (refusal.wanted, refusal.available, refusal.at_least) == (LIMIT + 1, LIMIT, True)


@pytest.mark.parametrize(("used", "of"), [("20.1 GiB", "15.75 GiB"), ("20.1GiB", "15.75G"), ("20.1GB", "15.75GB")])
def test_units_in_other_spellings(used: str, of: str) -> None:
    refusal = parse_refusal(f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used {used} of {of} hbm.", 1)
    assert refusal is not None and (refusal.wanted, refusal.available) == (round(20.1 * GIB), LIMIT)


def test_a_refusal_with_a_list() -> None:
    """libtpu 0.0.42: eight turns of a scan that keep 40,000 x 4,096 float32 each, on a v5e of 7,597 MiB."""
    refusal = parse_refusal((HLO / "tpu_out_of_memory.txt").read_text(), LIMIT)
    assert refusal is not None
    assert refusal.available == round(7.42 * GIB) and not refusal.at_least
    assert refusal.wanted - refusal.available == round(1.32 * 2**20)  # not what it calls used
    assert refusal.message.endswith("Used 7.42G of 7.42G hbm. Exceeded hbm capacity by 1.32M.")
    saved = refusal.largest[0]
    assert saved.size == pytest.approx(8 * 40_000 * 4096 * 4, rel=2e-3)
    assert saved.shape == "f32[8,40000,4096]" and saved.allocation is Allocation.TEMPORARY
    assert saved.operation == "jit(<lambda>)/jvp()/broadcast_in_dim"
    kinds = [(one.allocation, one.shape) for one in refusal.largest]
    assert kinds.count((Allocation.ARGUMENT, "f32[40000,4096]")) == 1
    assert kinds.count((Allocation.OUTPUT, "f32[40000,4096]")) == 1
    assert kinds.count((Allocation.PROGRAM, "")) == 1  # overlays
    assert len(kinds) == 14


@pytest.mark.parametrize(
    "other",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating from HBM.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space smem.\n Arguments are in hbm.",
        "INTERNAL: something else",
        "",
    ],
)
def test_other_errors_are_not_about_hbm(other: str) -> None:
    assert parse_refusal(other, LIMIT) is None


def program(*lines: str, head: str = "") -> str:
    return (
        f"HloModule m\n{head}\nENTRY %main (x: f32[4]) -> f32[4] {{\n"
        + "".join(f"  {line}\n" for line in lines)
        + "}\n"
    )


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        # Size, shape and padding as the compiler's messages have them (github.com/google/trax issue 1343,
        # DifferentiableUniverseInitiative/flowpm issue 27).
        ("f32[8,40000,4096]{2,1,0:T(8,128)}", 8 * 40_000 * 4096 * 4),
        ("s32[8388608,8,4]{2,1,0:T(8,128)}", 32 * GIB),
        ("s32[8388608,8,4]{0,2,1:T(4,128)}", GIB),
        ("s32[]{:T(128)}", 4),
        ("bf16[4096,4096]{1,0:T(8,128)(2,1)}", 32 * 2**20),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("f32[1000]{0:T(1024)}", 4096),
        ("pred[4,4096]{1,0:T(4,128)(4,1)}", 4 * 4096),
        ("f32[3,5]{1,0}", 60),
        ("f32[3,5]", 60),
    ],
)
def test_padding_counts(shape: str, padded: int) -> None:
    (one,) = largest_arrays(Program(program(f"ROOT %r = {shape} add(%x, %y)")))
    assert one.size == padded
    assert one.shape == shape.split("{")[0]


def test_memory_next_to_the_cores_views_and_starts_do_not_count() -> None:
    text = program(
        "%x = f32[4]{0} parameter(0), metadata={op_name=\"state['w']\"}",
        "%near = f32[900]{0:T(1024)S(1)} copy(%x)",
        "%tuple = (f32[4]{0}, f32[900]{0}) tuple(%x, %near)",
        "%gather = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={}",
        "%all = f32[8]{0} all-gather-done(%gather)",
        "ROOT %r = f32[4]{0} bitcast(%x)",
    )
    found = largest_arrays(Program(text))
    assert [(one.shape, one.allocation) for one in found] == [
        ("f32[8]", Allocation.TEMPORARY),
        ("f32[4]", Allocation.ARGUMENT),
    ]
    assert found[1].operation == "state['w']"


def test_alike_arrays_are_one_with_their_number() -> None:
    line = '%{} = f32[64]{{0}} exp(%x), metadata={{op_name="jit(f)/exp"}}'
    (one,) = largest_arrays(Program(program(line.format("a"), line.format("b"), "ROOT " + line.format("c"))))
    assert (one.number, one.size) == (3, 256)


def test_what_a_scan_saves_is_found_once_and_its_fusions_inside_not_at_all() -> None:
    """On this machine's compiler: a scan that keeps [8, 64, 256], and writes it slice by slice in place."""

    def loss(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(carry @ jnp.ones((256, 256))), None

        return jax.lax.scan(body, x, length=8)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(jnp.zeros((64, 256))).compile().as_text() or ""
    found = largest_arrays(Program(text), count=100)
    saved = [one for one in found if one.size == 8 * 64 * 256 * 4]
    assert saved and saved[0] == found[0]
    assert sum(one.number for one in saved) <= 2  # as it begins, and as the way back takes it
    assert {one.shape for one in found if one.allocation is Allocation.ARGUMENT} == {"f32[64,256]"}


def test_an_operation_leads_to_the_line_of_the_model(tmp_path: Path) -> None:
    """Of a module in a folder `maxlm` that calls another package, the line of the call."""
    (tmp_path / "maxlm").mkdir()
    file = tmp_path / "maxlm" / "fake.py"
    file.write_text(
        "import jax\nimport jax.numpy as jnp\n\n\ndef outer(x):\n    return inner(x) + 1\n\n\n"
        "def inner(x):\n    y = x @ x\n    return jax.nn.logsumexp(y, axis=0)\n"
    )
    spec = importlib.util.spec_from_file_location("fake", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = jax.jit(module.outer).lower(jnp.zeros((32, 32))).compile().as_text() or ""
    lines = SourceLines(text, tmp_path)
    found = {
        line.split('op_name="')[1].split('"')[0]: lines.of(line) for line in text.splitlines() if "op_name=" in line
    }
    assert found["jit(outer)/dot_general"] == "maxlm/fake.py:10"
    assert found["jit(outer)/add"] == "maxlm/fake.py:6"
    inside = {source for name, source in found.items() if name.endswith(("/exp", "/log"))}
    assert inside == {"maxlm/fake.py:11"}
    assert {SourceLines(text, tmp_path / "maxlm").of(line) for line in text.splitlines()} == {""}


def test_a_text_without_tables_has_no_lines() -> None:
    assert SourceLines(program("ROOT %r = f32[4]{0} exp(%x)")).of(", metadata={stack_frame_id=3}") == ""


def test_a_refusals_list_gets_the_lines_of_the_program() -> None:
    head = (
        f'FileNames\n1 "{Path(__file__).parents[1]}/maxlm/models/block.py"\n\nFunctionNames\n1 "f"\n\nFileLocations\n'
        "1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}\n\n"
        "StackFrames\n1 {file_location_id=1 parent_frame_id=1}\n"
    )
    text = program(
        'ROOT %r = f32[4]{0} exp(%x), metadata={op_name="jit(<lambda>)/jvp()/broadcast_in_dim" stack_frame_id=1}',
        head=head,
    )
    refusal = parse_refusal((HLO / "tpu_out_of_memory.txt").read_text(), LIMIT)
    assert refusal is not None
    with_lines = with_sources(refusal.largest, Program(text))
    assert with_lines[0].source == "maxlm/models/block.py:7"
    assert {one.source for one in with_lines[1:]} == {""}
    assert [one.size for one in with_lines] == [one.size for one in refusal.largest]


def test_what_a_tpu_refuses_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's program that is too large was compiled all the same."""
    answer = {"fits": False, "peak_bytes": {"compiled": 7}, "compile_cpu_seconds": 1, "message": "too large"}
    done = subprocess.CompletedProcess([], 3, stdout=json.dumps(answer), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    assert plan_memory.compiled("tiny", "tpu:v5e:2x2", []) == {"error": "too large"}
    assert plan_memory.compiled("tiny", "gpu:h200:8", []) == {"compiled": 7, "compile_cpu_seconds": 1}


def test_measurements_are_written_one_by_one_with_their_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [("tiny", "cpu:8", []), ("tiny", "cpu:4", []), ("tiny", "cpu:2", [])]
    old = {"config": "tiny", "target": "cpu:2", "overrides": [], "compiled": 5, "predicted": 4}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"versions": {"jax": "0.1"}, "rows": [old]}))

    def compiled(config: str, target: str, overrides: list[str]) -> dict[str, int]:
        if target == "cpu:4":
            raise KeyboardInterrupt
        return {"compiled": 6}

    monkeypatch.setattr(plan_memory, "rows", lambda: rows)
    monkeypatch.setattr(plan_memory, "compiled", compiled)
    monkeypatch.setattr(plan_memory, "predicted", lambda *row: 4)
    monkeypatch.setattr(plan_memory, "installed", lambda: {"jax": "0.2", "libtpu": "0.0.3", "rich": "1"})
    monkeypatch.setattr(sys, "argv", ["plan_memory", "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        plan_memory.main()
    report = json.loads(file.read_text())
    new = {"config": "tiny", "target": "cpu:8", "overrides": [], "compiled": 6, "predicted": 4}
    assert report["rows"] == [new | {"versions": {"jax": "0.2", "libtpu": "0.0.3"}}, old]
    assert plan_memory._versions(report) == "jax 0.1 and 0.2, libtpu 0.0.3"
