"""Bytes and links of every mesh axis: against the collectives that the compilers write, and formulas from papers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aot import require_compiler

from maxlm.config import (
    MESH_AXES,
    Capacity,
    Context,
    Dispatch,
    Dropless,
    Experts,
    Kto,
    Preference,
    Remat,
    RunConfig,
    ShardingConfig,
    SlicesAxis,
    Task,
    TopKRouter,
    Zero,
    with_experts,
)
from maxlm.config.cli import load_config
from maxlm.config.serialize import save
from maxlm.plan.machines import parse_machine
from maxlm.plan.traffic import AxisTraffic, Link, estimate_traffic, torus_dims

ROOT = Path(__file__).parent.parent
D, F, V, T = 4096, 11_008, 32_000, 2048
LAYER = 4 * D * D + 3 * D * F
"""Parameters of a layer's matrices in LLaMA 7B."""

_COMPILE = """
import json, sys
from pathlib import Path
from maxlm.config import RunConfig
from maxlm.config.serialize import load
from maxlm.plan.machines import parse_machine, prepare_compiler
target = parse_machine(sys.argv[1])
prepare_compiler(target)
from maxlm.plan.compiled import compile_step
found = compile_step(load(RunConfig, Path(sys.argv[2])), target).collectives
print(json.dumps([[one.axes, one.sent] for one in found if one.sent]))
"""


def seven_b(
    *, batch_size: int = 16, micro_batches: int = 1, remat: Remat = Remat.FULL, n_layers: int = 4, **sharding: Any
) -> RunConfig:
    """LLaMA 7B with few layers; all axes are 1 but those named."""
    config = load_config("configs/llama7b.py")
    return replace(
        config,
        model=replace(config.model, n_layers=n_layers, remat=remat),
        train=replace(config.train, batch_size=batch_size, micro_batches=micro_batches, seq_len=T),
        sharding=ShardingConfig(**({"data": 1} | sharding)),
    )


def mixture(dispatch: Dispatch, **sharding: Any) -> RunConfig:
    """Layers of Mixtral 8x7B's experts on LLaMA 7B's attention."""
    config = seven_b(n_layers=2, **sharding)
    experts = Experts(n_experts=8, d_ff=14_336, router=TopKRouter(top_k=2), dispatch=dispatch)
    return replace(config, model=with_experts(config.model, experts))


def by_axis(config: RunConfig, target: str) -> dict[str, int]:
    sent: Counter[str] = Counter()
    for one in estimate_traffic(config, parse_machine(target)):
        sent[one.axis] += one.sent
    return dict(sent)


def only(traffic: list[AxisTraffic]) -> AxisTraffic:
    (one,) = traffic
    return one


def compiled(config: RunConfig, target: str, folder: Path) -> dict[tuple[str, ...], int]:
    """Bytes that a device sends along each set of axes, by the target's compiler."""
    save(config, folder / "run.json")
    command = [sys.executable, "-c", _COMPILE, target, str(folder / "run.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    sent: Counter[tuple[str, ...]] = Counter()
    for axes, size in json.loads(done.stdout.splitlines()[-1]):
        sent[tuple(axes)] += size
    return dict(sent)


def learns(task: Task, config: RunConfig) -> RunConfig:
    return replace(config, task=task, checkpoint=replace(config.checkpoint, init_from="runs/other"))


GPU = "gpu:h200:8"
COMPILED = {
    "data": (seven_b(data=8), GPU, 1.0),
    "data, micro-batches": (seven_b(data=8, micro_batches=2), GPU, 1.0),
    "fsdp": (seven_b(fsdp=8), GPU, 1.0),
    "fsdp, micro-batches": (seven_b(fsdp=8, micro_batches=2), GPU, 1.0),
    "fsdp, nothing again": (seven_b(fsdp=8, remat=Remat.NONE), GPU, 1.0),
    "ZeRO-1": (seven_b(fsdp=8, zero=Zero.OPTIMIZER), GPU, 1.0),
    "ZeRO-2": (seven_b(fsdp=8, zero=Zero.GRADIENTS, micro_batches=2), GPU, 1.0),
    "tensor": (seven_b(tensor=8), GPU, 1.0),
    "tensor, nothing again": (seven_b(tensor=8, remat=Remat.NONE), GPU, 1.0),
    "seq, gathered": (seven_b(seq=8), GPU, 1.0),
    "seq, ring": (seven_b(seq=8, context=Context.RING), GPU, 1.0),
    "seq, ring, names": (seven_b(seq=8, context=Context.RING, remat=Remat.NAMES), GPU, 1.0),
    "seq, Ulysses": (seven_b(seq=8, context=Context.ULYSSES), GPU, 1.0),
    "stage": (seven_b(stage=2, data=4, micro_batches=4), GPU, 1.0),
    "virtual stages": (seven_b(stage=2, data=4, micro_batches=4, virtual_stages=2), GPU, 1.0),
    "stage x fsdp": (seven_b(stage=2, fsdp=4, micro_batches=4), GPU, 1.0),
    "data x fsdp": (seven_b(data=2, fsdp=4), GPU, 1.0),
    "fsdp x tensor": (seven_b(fsdp=4, tensor=2), GPU, 1.0),
    "expert, worst case": (mixture(Dropless(), expert=8), GPU, 1.0),
    "expert, buffer": (mixture(Dropless(buffer=2), expert=8), GPU, 1.0),
    "expert, capacity": (mixture(Capacity(), expert=8), GPU, 1.0),
    "expert x fsdp": (mixture(Dropless(buffer=2), expert=4, fsdp=2), GPU, 1.0),
    # The loss of log-probabilities gathers its table again for the gradient.
    "fsdp, reference": (learns(Preference(), seven_b(fsdp=8)), GPU, 0.971),
    "tensor, reference": (learns(Preference(), seven_b(tensor=8)), GPU, 1.0),
    "fsdp, asked first": (learns(Preference(loss=Kto()), seven_b(fsdp=8, micro_batches=2)), GPU, 1.0),
    # Gathers in float32 what remat makes again (GPU).
    "sequence parallel": (seven_b(tensor=8, sequence_parallel=True), GPU, 0.86),
    # The gradients of k and v arrive by all-to-all, those of their projections by permutes.
    "fsdp x seq x tensor": (seven_b(fsdp=2, seq=2, tensor=2), GPU, 0.875),
    # The down projection is kept.
    "float32 gradients": (seven_b(fsdp=8, float32_gradients=True), GPU, 1.04),
    "data, TPU": (seven_b(data=4), "tpu:v5p:2x2x1", 1.0),
    "tensor, TPU": (seven_b(tensor=4), "tpu:v5p:2x2x1", 1.0),
    "the whole torus": (seven_b(fsdp=64, batch_size=64), "tpu:v5p:4x4x4", 1.0),
    # Sums the gradient of the looked-up table as a whole, and scatters no gradient along a narrow last dim.
    "data x fsdp, TPU": (seven_b(data=2, fsdp=32, batch_size=64), "tpu:v5p:4x4x4", 0.87),
    # The table that is looked up is gathered in bfloat16, too.
    "fsdp, TPU": (seven_b(fsdp=4), "tpu:v5p:2x2x1", 1.04),
    "sequence parallel, TPU": (seven_b(tensor=4, sequence_parallel=True), "tpu:v5p:2x2x1", 1.0),
}
"""Name -> config, target, and how much of the compiled program's bytes the estimate has."""
OFTEN = {"stage x fsdp", "expert, capacity", "fsdp x seq x tensor"}
"""Each axis once; the others, of which TPU programs take a minute and more, by night."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    name if name in OFTEN else pytest.param(name, marks=pytest.mark.nightly) for name in COMPILED
])  # fmt: skip
def test_bytes_are_those_of_the_compiled_program(name: str, tmp_path: Path) -> None:
    config, target, share = COMPILED[name]
    require_compiler("tpu_v5p" if target.startswith("tpu") else "h200")
    want, found = compiled(config, target, tmp_path), by_axis(config, target)
    assert sum(found.values()) == pytest.approx(share * sum(want.values()), rel=0.02)
    assert {axis for axes in want for axis in axes} == set(found)
    for axis, size in found.items():
        alone = sum(sent for axes, sent in want.items() if axes == (axis,))
        together = sum(sent for axes, sent in want.items() if axis in axes)
        assert 0.8 * alone <= size <= 1.15 * together


def test_zero_sends_one_and_a_half_times_what_data_parallelism_does() -> None:
    """Rajbhandari et al. 2020 (arXiv:1910.02054), section 7: 3 Psi numbers for stage 3, 2 Psi for stages 1 and 2."""
    more, fewer = 12, 4

    def of_layers(**sharding: Any) -> float:
        """Bytes of a layer, whose matrices are nearly all of it."""
        sizes = [sum(by_axis(seven_b(n_layers=n, **sharding), GPU).values()) for n in (more, fewer)]
        return (sizes[0] - sizes[1]) / (more - fewer)

    assert of_layers(data=8) == pytest.approx(2 * LAYER * 2 * 7 / 8, rel=1e-3)
    assert of_layers(fsdp=8) == pytest.approx(3 * LAYER * 2 * 7 / 8, rel=1e-3)
    # Ours sums gradients in bfloat16 and gathers updates in float32.
    assert of_layers(fsdp=8, zero=Zero.GRADIENTS) == pytest.approx(LAYER * (2 + 4) * 7 / 8, rel=1e-3)


def test_megatron_sums_four_activations_a_layer() -> None:
    """arXiv:1909.08053, section 3; with sequence parallelism as many bytes (arXiv:2205.05198, section 4.2.2)."""
    activation = 16 * T * D * 2

    def of_layer(**changes: Any) -> float:
        sizes = [by_axis(seven_b(n_layers=n, tensor=8, remat=Remat.NONE, **changes), GPU)["tensor"] for n in (5, 4)]
        return sizes[0] - sizes[1]

    assert of_layer() == pytest.approx(4 * 2 * activation * 7 / 8, rel=1e-3)
    assert of_layer(sequence_parallel=True) == pytest.approx(4 * 2 * activation * 7 / 8, rel=1e-3)


def test_micro_batches_repeat_what_parameters_cost_and_not_what_tokens_cost() -> None:
    once, twice = (by_axis(seven_b(fsdp=4, tensor=2, micro_batches=n), GPU) for n in (1, 2))
    assert twice["fsdp"] == pytest.approx(2 * once["fsdp"], rel=1e-3)
    assert twice["tensor"] == once["tensor"]


def test_an_axis_over_two_hosts_sends_a_sixteenth_of_an_array_over_the_network() -> None:
    """Of the 15/16 of an array that each of 16 GPUs sends, 14/16 stay in its host: the halves of the array meet once,
    and eight cards carry them."""
    config = seven_b(fsdp=16)
    near, far = estimate_traffic(config, parse_machine("gpu:h200:2x8"))
    assert (near.link, far.link) == (Link.NVLINK, Link.NETWORK)
    assert near.sent == pytest.approx(14 * far.sent)
    assert near.sent + far.sent == by_axis(config, "tpu:v5p:4x2x2")["fsdp"]
    assert far.seconds == pytest.approx(far.sent / 50e9)
    assert near.seconds == pytest.approx(near.sent / 450e9)


@pytest.mark.parametrize(
    ("target", "sharding", "network"),
    [
        ("gpu:h200:2x8", {"data": 2, "fsdp": 8}, {"data"}),
        ("gpu:h200:2x8", {"data": 2, "fsdp": 8, "slices": 2}, {"data"}),
        ("gpu:h200:2x8", {"data": 2, "tensor": 8, "slices": 2}, {"data"}),
        ("gpu:h200:2x8", {"fsdp": 2, "tensor": 8}, {"fsdp"}),
        ("gpu:h200:2x8", {"tensor": 16}, {"tensor"}),
        ("tpu:v5p:2x2x2:2", {"data": 2, "fsdp": 8, "slices": 2}, {"data"}),
        ("tpu:v5p:2x2x2:2", {"stage": 2, "fsdp": 8, "slices": 2, "slices_axis": SlicesAxis.STAGE}, {"stage"}),
        ("tpu:v5p:4x2x2", {"data": 2, "fsdp": 8}, set()),
    ],
)
def test_which_axis_crosses_hosts_or_slices(target: str, sharding: dict[str, Any], network: set[str]) -> None:
    traffic = estimate_traffic(seven_b(**sharding, micro_batches=2), parse_machine(target))
    assert {one.axis for one in traffic if one.link is Link.NETWORK} == network
    near = Link.ICI if target.startswith("tpu") else Link.NVLINK
    assert {one.link for one in traffic} <= {near, Link.NETWORK}


@pytest.mark.parametrize(
    ("fsdp", "other", "tokens"),
    [({"fsdp": 8}, {"data": 16}, 2550), ({"fsdp": 16}, {"data": 8}, 1275)],
    ids=["one dim", "two dims"],
)
def test_tokens_that_hide_fsdp_on_v5p(fsdp: dict[str, int], other: dict[str, int], tokens: int) -> None:
    """From C / W = 4.59e14 / 1.8e11 = 2550 tokens a chip on computing hides fsdp's gathers, over one dim of a torus of
    v5p; over two dims from half of that ("How to Scale Your Model", training)."""
    config = seven_b(**fsdp, **other, remat=Remat.NONE, batch_size=128, n_layers=100)
    (one,) = (one for one in estimate_traffic(config, parse_machine("tpu:v5p:4x4x8")) if one.axis == "fsdp")
    assert one.seconds is not None
    compute_of_token = 6 * 100 * LAYER / 459e12
    n = fsdp["fsdp"]
    assert one.seconds / compute_of_token == pytest.approx(tokens * (n - 1) / n, rel=0.03)


def test_an_all_to_all_on_a_ring_takes_a_quarter_of_a_gather_of_the_same_array() -> None:
    """The same book, sharding. Rematerialisation gathers k and v once more, or exchanges q, k, v and the output."""

    def again(context: Context) -> float:
        seconds = []
        for remat in (Remat.FULL, Remat.NONE):
            config = seven_b(seq=8, data=16, remat=remat, context=context)
            seconds += [one.seconds or 0 for one in estimate_traffic(config, parse_machine("tpu:v5p:4x4x8"))][1:]
        return seconds[0] - seconds[1]

    assert again(Context.ULYSSES) / 4 == pytest.approx(again(Context.ALL_GATHER) / 2 / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("target", "sizes", "axis", "dims"),
    [
        ("tpu:v5p:4x4x4", {"fsdp": 64}, "fsdp", {(4, 2)}),
        ("tpu:v5p:4x4x4", {"tensor": 4, "fsdp": 16}, "fsdp", {(4, 2)}),
        ("tpu:v5p:4x4x4", {"data": 2, "fsdp": 32}, "data", {(2, 1)}),
        ("tpu:v5p:2x2x1", {"fsdp": 4}, "fsdp", {(2, 1)}),
        ("tpu:v5e:8x8", {"fsdp": 8, "tensor": 8}, "fsdp", {(8, 1)}),
        ("tpu:v5e:16x16", {"fsdp": 16, "tensor": 16}, "fsdp", {(16, 2)}),
    ],
)
def test_rings_and_lines_of_a_torus(target: str, sizes: dict[str, int], axis: str, dims: set[tuple[int, int]]) -> None:
    """v4 and v5p close every dim that is a multiple of 4, v5e and v6e one of 16 ("How to Scale Your Model", TPUs)."""
    assert set(torus_dims(parse_machine(target), dict.fromkeys(MESH_AXES, 1) | sizes)[axis]) == dims


def test_the_whole_torus_sends_twice() -> None:
    """docs/plan.md: 7.63 GB where 4.63 would do, with two layers."""
    whole = by_axis(seven_b(fsdp=64, n_layers=2, batch_size=64), "tpu:v5p:4x4x4")["fsdp"]
    part = by_axis(seven_b(fsdp=32, n_layers=2, batch_size=32), "tpu:v5p:2x4x4")["fsdp"]
    assert whole == pytest.approx(7.63e9, rel=0.05)
    assert part == pytest.approx(4.63e9, rel=0.2)


def test_a_processor_has_bytes_and_no_seconds() -> None:
    one = only(estimate_traffic(seven_b(fsdp=8), parse_machine("cpu:8")))
    assert (one.link, one.seconds) == (Link.LOCAL, None)
    assert one.sent == by_axis(seven_b(fsdp=8), GPU)["fsdp"]


def test_one_device_sends_nothing() -> None:
    assert estimate_traffic(seven_b(), parse_machine("gpu:h200:1")) == []
