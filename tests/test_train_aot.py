"""The train step through the chips' own compilers: two layers of LLaMA 7B's widths, with kernels, on a sharded mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import pytest
from aot import Case, compile_all, complaints, require_compiler

from configs import llama7b
from maxlm.config import Backend, KernelConfig, Remat, ShardingConfig
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

GIB = 2**30


def step(kernels: KernelConfig, sharding: ShardingConfig, micro_batches: int = 1) -> Any:
    """Lowers the step of a run of one sequence a data shard and micro-batch, 4096 tokens each."""
    config = llama7b.get_config()

    def lower(devices: Sequence[Any]) -> jax.stages.Lowered:
        sizes = sharding.sizes(len(devices))
        run = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, n_layers=2, kernels=kernels, remat=Remat.NAMES),
            sharding=sharding,
            train=dataclasses.replace(
                config.train,
                batch_size=sizes["data"] * sizes["fsdp"] * micro_batches,
                seq_len=4096,
                micro_batches=micro_batches,
            ),
        )
        trainer = make_trainer(run, make_layout(sharding, devices))
        return trainer.step.lower(trainer.state, trainer.batch)

    return lower


def cases(chip: str) -> dict[str, Case]:
    """The step with every kernel of ours. As "auto" makes it, tests/test_plan_aot.py compiles it for both chips."""
    attention = ("attention_forward", "attention_backward")
    ours = {"tpu_v5p": Backend.TPU, "h200": Backend.GPU}[chip]
    sharding = ShardingConfig(data=1, fsdp=-1, tensor=2)
    # Gathers of weights, sums of gradients and of tensor-parallel products; TPUs overlap some as chains of permutes.
    kinds = {"all-gather", "all-reduce", "reduce-scatter"}
    if chip == "tpu_v5p":
        kinds |= {"collective-permute"}
    return {
        "every kernel": Case(
            step(KernelConfig(attention=ours, glu=ours), sharding),
            (*attention, "glu_forward"),
            3 * GIB,
            collectives=kinds,
        ),
        "pipeline": Case(
            step(KernelConfig(attention=ours), ShardingConfig(data=1, fsdp=-1, stage=2), 2),
            attention,
            4 * GIB,
            collectives=kinds | {"collective-permute"},
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("chip", [pytest.param("tpu_v5p", marks=pytest.mark.nightly), "h200"])
def test_the_train_step_compiles(chip: str) -> None:
    require_compiler(chip)
    programs = cases(chip)
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]
