"""The least time of a step: against published examples, FLOPs of published runs, and rules worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from maxlm.config import (
    Adafactor,
    Capacity,
    DistillContext,
    Dropless,
    Dtype,
    Experts,
    Kto,
    Preference,
    Remat,
    RunConfig,
    ShardingConfig,
    SimPo,
    Task,
    TopKRouter,
    llama,
    with_experts,
)
from maxlm.config.cli import load_config
from maxlm.hardware import CHIPS
from maxlm.plan.bound import TimeBound, estimate_time, memory_bytes
from maxlm.plan.machines import parse_machine
from maxlm.plan.traffic import estimate_traffic
from maxlm.shapes import flops_per_token, parameter_count


def seven_b(*, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **sharding: Any) -> RunConfig:
    config = load_config("configs/llama7b.py")
    return replace(
        config,
        model=replace(config.model, **(model or {})),
        train=replace(config.train, **({"batch_size": 64} | (train or {}))),
        sharding=ShardingConfig(**({"data": 1} | sharding)),
    )


def bound(config: RunConfig, target: str) -> TimeBound:
    machine = parse_machine(target)
    found = estimate_time(config, machine, estimate_traffic(config, machine))
    assert found is not None
    return found


def test_gpt3_took_314_zettaflops() -> None:
    """Brown et al. 2020 (arXiv:2005.14165), table D.1: 3.14e23 FLOPs for 300B tokens, by 6 N D. Their MLP has two
    matrices of 4 D, ours three of 8/3 D: as many parameters."""
    gpt3 = llama(vocab_size=50_257, d_model=12_288, n_layers=96, n_heads=96, d_ff=32_768, max_seq_len=2048)
    assert flops_per_token(gpt3, 2048, Remat.FULL).parameters_term * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_chinchilla_took_what_gopher_did() -> None:
    """Hoffmann et al. 2022 (arXiv:2203.15556): 5.76e23 FLOPs for 70B parameters (table 4: 80 layers of 8192, 64 heads)
    and 1.4T tokens of 2048 at a time. Theirs has relative positions, of about 5 billion parameters."""
    chinchilla = llama(vocab_size=32_000, d_model=8192, n_layers=80, n_heads=64, d_ff=21_845, max_seq_len=2048)
    assert flops_per_token(chinchilla, 2048, Remat.FULL).total * 1.4e12 == pytest.approx(5.76e23, rel=0.05)


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.FULL])
def test_compute_by_hand(remat: Remat) -> None:
    """2 FLOPs a parameter and token forward, 4 backward, 2 more for the layers with remat "full"; causal attention
    L N H T a token for each of its products: 2 forward, 5 backward, 2 again."""
    config = seven_b(model={"remat": remat}, fsdp=8)
    found = bound(config, "gpu:h200:8")
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    again = 1 if remat is Remat.FULL else 0
    products = 7 + 2 * again
    # A down projection need not be computed again.
    flops = 6 * (layers + 32_000 * 4096) + 2 * again * (layers - 32 * 4096 * 11_008) + products * 32 * 4096 * 2048
    assert found.compute_seconds == pytest.approx(64 * 2048 * flops / 8 / 989.4e12, rel=0.005)
    assert (found.limited_by, found.step_seconds) == ("compute", found.compute_seconds)
    useful = 6 * (layers + 32_000 * 4096) + 6 * 32 * 4096 * 2048  # the mask leaves half of attention's 12 L D T
    assert found.mfu_ceiling == pytest.approx(useful / flops, rel=0.005)


@pytest.mark.parametrize(
    ("task", "parts", "reads"),
    [
        (Preference(), 1, 1),
        (Preference(), 2, 1),
        (DistillContext(), 2, 1),
        (Preference(loss=Kto()), 1, 1),
        (Preference(loss=Kto()), 2, 3),  # before the first micro-batch the policy and the reference; then the reference
        (Preference(reference_ahead=True), 2, 0),
        (Preference(loss=SimPo()), 2, 0),
    ],
    ids=["dpo", "dpo cut", "context cut", "kto", "kto cut", "ahead", "simpo"],
)
def test_what_a_step_only_reads_takes_time(task: Task, parts: int, reads: int) -> None:
    """A third of training's products, each time; and all matrices once more from memory, and from other devices."""
    config = seven_b(model={"remat": Remat.NONE}, train={"micro_batches": parts}, fsdp=8)
    alone, asked = bound(config, "gpu:h200:8"), bound(replace(config, task=task), "gpu:h200:8")
    N = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096
    once = 64 * 2048 * (2 * N + 2 * 32 * 4096 * 2048) / 8 / 989.4e12
    assert asked.compute_seconds - alone.compute_seconds == pytest.approx(reads * once, rel=0.005)
    assert asked.mfu_ceiling == pytest.approx(alone.mfu_ceiling * alone.step_seconds / asked.step_seconds)
    gathered = asked.traffic_seconds["fsdp"] - alone.traffic_seconds["fsdp"]
    # One is a gather, where a step of training is two and a scatter.
    assert gathered == pytest.approx(reads * alone.traffic_seconds["fsdp"] / 3, rel=0.02)
    more = asked.memory_seconds - alone.memory_seconds
    assert reads * 2 * N / 8 / 4.8e12 <= more <= reads * alone.memory_seconds / 3


@pytest.mark.parametrize("seq_len", [4096, 131_072])
def test_the_ceiling_of_mfu_is_never_above_one(seq_len: int) -> None:
    """Not even where attention is most of the work, and nothing is computed again."""
    train = {"seq_len": seq_len}
    found = bound(seven_b(model={"remat": Remat.NONE, "max_seq_len": seq_len}, train=train, fsdp=8), "gpu:h200:8")
    assert 0.5 < found.mfu_ceiling <= 1


def test_tokens_days_and_device_hours() -> None:
    """Llama 2 7B took 184,320 hours of A100 for 2T tokens (arXiv:2307.09288, table 2): more than the bound says, and
    not three times as much."""
    config = load_config("configs/llama2_7b.py")
    config = replace(config, sharding=ShardingConfig(data=1, fsdp=8), model=replace(config.model, remat=Remat.NONE))
    found = bound(config, "gpu:h100:8")
    tokens = config.train.steps * config.train.batch_size * config.train.seq_len
    assert tokens == pytest.approx(2e12, rel=1e-3)
    assert found.tokens_per_day * found.days == pytest.approx(tokens)
    assert found.device_hours == pytest.approx(found.days * 24 * 8)
    on_a100 = found.device_hours * 989.4 / 312
    assert 184_320 / 3 < on_a100 < 184_320


def test_micro_batches_change_nothing_but_what_they_repeat() -> None:
    one, four = (bound(seven_b(train={"micro_batches": n}, fsdp=8), "gpu:h200:8") for n in (1, 4))
    assert one.compute_seconds == four.compute_seconds
    assert four.traffic_seconds["fsdp"] == pytest.approx(4 * one.traffic_seconds["fsdp"], rel=1e-3)
    assert four.memory_seconds > one.memory_seconds
    assert four.tokens_per_day == pytest.approx(one.tokens_per_day)


def test_a_pipeline_waits_for_its_bubble() -> None:
    """(S - 1) / (M + S - 1) of the time (arXiv:1811.06965, section 2.3)."""
    found = bound(seven_b(train={"micro_batches": 8}, stage=4, data=2), "gpu:h200:8")
    assert found.bubble == pytest.approx(3 / 11)
    assert found.step_seconds == pytest.approx(found.compute_seconds * 11 / 8)
    assert found.limited_by == "compute"


def test_short_batches_are_limited_by_the_network() -> None:
    found = bound(seven_b(train={"batch_size": 64, "seq_len": 256}, data=64), "gpu:h200:8x8")
    assert found.limited_by == "axis data over network"
    assert found.step_seconds > found.compute_seconds
    assert found.mfu_ceiling < 0.5


def test_axes_share_nvlink_and_not_ici() -> None:
    sharding = {"fsdp": 4, "tensor": 2}
    short = {"batch_size": 4, "seq_len": 256}
    gpu = bound(seven_b(train=short, **sharding), "gpu:h200:8")
    assert gpu.limited_by == "axis fsdp over NVLink"
    assert gpu.step_seconds == pytest.approx(sum(gpu.traffic_seconds.values()))
    tpu = bound(seven_b(train=short, **sharding), "tpu:v5p:2x2x2")
    assert tpu.limited_by == "axis fsdp over ICI"
    assert tpu.step_seconds == pytest.approx(max(tpu.traffic_seconds.values()))


def test_a_few_tokens_are_limited_by_the_memory() -> None:
    """Adam reads value, gradient (twice, as it clips) and two moments, and writes three of them: 32 bytes a parameter;
    each of forward, repeated and two backward products reads or writes a matrix in bfloat16: 8."""
    config = seven_b(train={"batch_size": 1, "seq_len": 16})
    config = replace(config, train=replace(config.train, loss_chunk=16))
    found = bound(config, "gpu:h200:1")
    count = parameter_count(config.model)
    tables = count.embedding + count.unembedding
    want = 32 * count.total + 8 * (count.total - tables) + (2 * 2 + 2 * 4) * count.unembedding
    assert found.limited_by == "memory"
    assert found.memory_seconds == pytest.approx(want / 4.8e12, rel=0.03)


def test_optimizers_that_keep_less_move_less() -> None:
    config = seven_b()
    sizes = config.sharding.sizes(1)
    adam, small, factored = (
        memory_bytes(replace(config, optimizer=optimizer), sizes)
        for optimizer in (config.optimizer, replace(config.optimizer, moment_dtype=Dtype.BFLOAT16), Adafactor())
    )
    total = parameter_count(config.model).total
    assert adam - small == pytest.approx(4 * total)
    assert adam - factored == pytest.approx(16 * total, rel=2e-3)  # its factors are a thousandth of that


def test_experts_read_all_weights_for_few_tokens() -> None:
    """With a token for each expert the weights are nearly all that moves."""
    experts = Experts(n_experts=64, d_ff=1408, router=TopKRouter(top_k=1, normalize=False), dispatch=Dropless())
    config = seven_b(train={"batch_size": 1, "seq_len": 64})
    config = replace(config, model=with_experts(config.model, experts), train=replace(config.train, loss_chunk=64))
    dense = seven_b(train={"batch_size": 1, "seq_len": 64})
    dense = replace(dense, train=replace(dense.train, loss_chunk=64))
    sizes = config.sharding.sizes(1)
    counts = [parameter_count(one.model).total for one in (config, dense)]
    more = memory_bytes(config, sizes) - memory_bytes(dense, sizes)
    assert more == pytest.approx((32 + 8) * (counts[0] - counts[1]), rel=0.05)
    capacity = replace(experts, dispatch=Capacity())
    padded = replace(config, model=with_experts(seven_b().model, capacity))
    assert memory_bytes(padded, sizes) == pytest.approx(memory_bytes(config, sizes), rel=0.01)


def test_float32_runs_at_its_own_peak() -> None:
    config = seven_b(model={"compute_dtype": Dtype.FLOAT32}, fsdp=8)
    half = bound(seven_b(fsdp=8), "gpu:h200:8")
    peak = CHIPS["h200"].peak
    assert peak.bfloat16 is not None
    ratio = bound(config, "gpu:h200:8").compute_seconds / half.compute_seconds
    assert ratio == pytest.approx(peak.bfloat16 / peak.float32)


def test_nothing_is_known_of_a_processor() -> None:
    machine = parse_machine("cpu:8")
    config = seven_b(fsdp=8)
    assert estimate_time(config, machine, estimate_traffic(config, machine)) is None
