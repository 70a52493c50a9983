"""What is in the way of larger machines: each with a config that has just that."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from maxlm.config import Dropless, Experts, RunConfig, ShardingConfig, TopKRouter, with_experts
from maxlm.config.cli import load_config
from maxlm.plan.bound import estimate_time
from maxlm.plan.breaks import what_breaks_first
from maxlm.plan.machines import Machine, larger, parse_machine
from maxlm.plan.traffic import Link, estimate_traffic


def seven_b(*, train: dict[str, Any] | None = None, **sharding: Any) -> RunConfig:
    config = load_config("configs/llama7b.py")
    train = {"batch_size": 2048} | (train or {})
    return replace(config, train=replace(config.train, **train), sharding=ShardingConfig(**({"data": -1} | sharding)))


def lines(config: RunConfig, target: str, about: str) -> list[str]:
    return [line for line in what_breaks_first(config, parse_machine(target)) if about in line]


@pytest.mark.parametrize(
    ("target", "devices", "want"),
    [
        ("tpu:v5p:4x4x4", 4096, "tpu:v5p:16x16x16"),
        ("tpu:v5p:4x4x4", 65_536, "tpu:v5p:16x16x16:16"),
        ("tpu:v5p:1x1x1", 2, "tpu:v5p:2x2x1"),
        ("tpu:v5e:1x1", 8, "tpu:v5e:2x4"),
        ("tpu:7x:4x4x4", 1024, "tpu:7x:8x8x8"),
        ("gpu:h100:1", 4, "gpu:h100:4"),
        ("gpu:h100:4", 32, "gpu:h100:4x8"),
        ("gpu:h100:16x4", 128, "gpu:h100:32x4"),
        ("tpu:v5e:4x8", 4096, "tpu:v5e:16x16:16"),
        ("tpu:v6e:16x16", 65_536, "tpu:v6e:16x16:256"),
        ("gpu:h200:8", 4096, "gpu:h200:512x8"),
        ("gpu:h200:512x8", 4096, None),
        ("cpu:8", 4096, None),
    ],
)
def test_larger_machines(target: str, devices: int, want: str | None) -> None:
    """Each can be named, so rented."""
    assert larger(parse_machine(target), devices) == (None if want is None else parse_machine(want))


def test_the_batch_runs_out_first() -> None:
    first, *_ = what_breaks_first(seven_b(fsdp=32), parse_machine("tpu:v5p:4x4x4"))
    assert "4,096 devices" in first and "train.batch_size = 2,048" in first and "at least 4,096" in first
    # 8 times tensor, of 32 heads, and 16 of seq; a stage more needs a sequence more.
    assert "grow by tensor 32 x seq 16)" in first


def test_a_batch_that_goes_round_is_not_mentioned() -> None:
    found = what_breaks_first(
        seven_b(train={"batch_size": 65_536, "seq_len": 512}, fsdp=32), parse_machine("tpu:v5p:4x4x4")
    )
    assert not [line for line in found if "cannot be cut" in line]


def test_tokens_that_hide_the_network_do_hide_it() -> None:
    """The number that the line asks for makes computing as long as sending."""
    config = seven_b(train={"batch_size": 64, "seq_len": 256}, data=64)
    line = next(one for one in lines(config, "gpu:h100:8x8", "sharding.data = 64 sends") if "over network" in one)
    has, needs = (
        int(number.replace(",", "")) for number in re.findall(r"has ([\d,]+) tokens.*needs ([\d,]+)", line)[0]
    )
    assert has == 256 < needs
    enough = replace(config, train=replace(config.train, batch_size=64 * -(-needs // 256)))
    machine: Machine = parse_machine("gpu:h100:8x8")
    bound = estimate_time(enough, machine, estimate_traffic(enough, machine))
    assert bound is not None
    network = next(one.seconds for one in estimate_traffic(enough, machine) if one.link is Link.NETWORK)
    assert bound.compute_seconds == pytest.approx(network, rel=0.2)
    assert bound.compute_seconds > (network or 0)


def test_a_pipeline_with_few_micro_batches() -> None:
    (line,) = lines(seven_b(train={"micro_batches": 16}, stage=8), "gpu:h200:8x8", "idle")
    assert "30%" in line  # 7 / 23
    assert "use 64 for 10%, or more" in line  # 7 / 71; 56, a round less, leaves 7 / 63
    assert not lines(seven_b(train={"micro_batches": 64}, stage=8), "gpu:h200:8x8", "idle")


def test_micro_batches_that_the_batch_must_be_cut_into() -> None:
    """27 of 4 stages are seven rounds, the last one not full; 28 need a batch that 2 x 28 divides."""
    config = seven_b(train={"micro_batches": 27, "batch_size": 2160}, fsdp=2, stage=4)
    (line,) = lines(config, "gpu:h200:8", "idle")
    assert "idle 13%" in line and "use 28 for 10%, with a train.batch_size that 56 divides" in line


def test_fsdp_over_a_whole_torus() -> None:
    assert lines(seven_b(fsdp=64), "tpu:v5p:4x4x4", "whole torus")
    assert not lines(seven_b(fsdp=32), "tpu:v5p:4x4x4", "whole torus")
    assert not lines(seven_b(fsdp=64), "gpu:h200:8x8", "whole torus")
    assert lines(seven_b(fsdp=64), "tpu:v5p:4x4x4", "no multiple of 128")


def test_fsdp_over_each_whole_slice() -> None:
    """Half of the axis, and twice the data that there is."""
    config = seven_b(fsdp=64, data=2, slices=2)
    (line,) = lines(config, "tpu:v5p:4x4x4:2", "whole torus")
    assert "use 32 with sharding.data = 4" in line


def test_axes_that_no_larger_machine_is_a_multiple_of() -> None:
    config = seven_b(train={"micro_batches": 24}, data=8, stage=3)
    config = replace(config, model=replace(config.model, n_layers=33))
    (line,) = lines(config, "gpu:h200:3x8", "besides sharding.data")
    assert "take 3 devices, which do not divide 4,096;" in line


def test_experts_without_a_buffer() -> None:
    experts = Experts(n_experts=64, d_ff=1408, router=TopKRouter(top_k=6), dispatch=Dropless())
    config = seven_b(fsdp=8, expert=8)
    worst, bounded = (
        lines(
            replace(config, model=with_experts(config.model, replace(experts, dispatch=Dropless(buffer=buffer)))),
            "tpu:v5p:4x4x4",
            "Dropless",
        )
        for buffer in (None, 2)
    )
    assert worst and not bounded


def test_a_batch_beyond_any_known_one() -> None:
    config = seven_b(train={"batch_size": 65_536}, fsdp=32)
    (line,) = lines(config, "tpu:v5p:4x4x4", "arXiv:1812.06162")
    assert f"{65_536 * 2048:,}" in line


def test_a_processor_breaks_nothing() -> None:
    assert what_breaks_first(seven_b(fsdp=8), parse_machine("cpu:8")) == []


def test_more_devices_need_no_micro_batches() -> None:
    """What one box cuts to save memory, a larger machine shares out: the batch it asks for is the same."""
    once, cut = (
        lines(seven_b(train={"micro_batches": parts, "batch_size": 1024}, fsdp=8), "gpu:h200:8", "cannot be cut")
        for parts in (1, 32)
    )
    assert once == cut and "use at least 4,096" in once[0]
