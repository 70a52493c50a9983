"""One program in two processes of four devices each: a layout whose axis crosses them computes what one device does.

The processes are real (jax.distributed, with gloo between CPUs). Each case is a pair of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import gradient_function, one_device, packed_batch, small_model, small_run
from jax.experimental import multihost_utils
from test_layouts import assert_close, loss_and_gradients
from train_runs import ROOT, STEPS, Bench, free_port, inspect, losses
from xla_flags import xla_flags

from maxlm.config import Context, Experts, RunConfig, ShardingConfig, SlicesAxis, TopKRouter
from maxlm.models import init_parameters
from maxlm.sharding import Layout, make_layout


@dataclass(frozen=True)
class Case:
    """A layout, and the mesh axes along which it has neighbours in different processes."""

    sharding: ShardingConfig
    crosses: set[str]
    interleaved: bool = False
    """Take devices from the processes in turn, so that the last axes of the mesh cross, too."""
    experts: bool = False
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        model = small_model(n_layers=4)
        if self.experts:
            moe = Experts(n_experts=4, d_ff=16, router=TopKRouter(top_k=2, load_balance=0.1), router_z_loss=0.01)
            (block,) = model.blocks
            model = small_model(n_layers=4, blocks=(type(block)(attention=block.attention, mlp=moe),))
        return small_run(model, self.sharding, z_loss=1e-3, batch_size=16, **self.train)

    def layout(self) -> Layout:
        devices = jax.devices()
        if self.interleaved:
            devices = [device for pair in zip(devices[:4], devices[4:], strict=True) for device in pair]
        return make_layout(self.sharding, devices)


STAGE = SlicesAxis.STAGE
CASES = {
    "data x fsdp": Case(ShardingConfig(slices=2, data=2, fsdp=4), {"data"}),
    "fsdp across": Case(ShardingConfig(data=1, fsdp=4, tensor=2), {"fsdp"}),
    "stage 2 across": Case(
        ShardingConfig(slices=2, slices_axis=STAGE, stage=2, fsdp=2, data=2), {"stage"}, train={"micro_batches": 4}
    ),
    "stage 4, circular": Case(
        ShardingConfig(slices=2, slices_axis=STAGE, stage=4, data=2), {"stage"}, train={"micro_batches": 4}
    ),
    "ring across": Case(ShardingConfig(data=2, seq=4, context=Context.RING), {"seq"}, interleaved=True),
    "ulysses across": Case(ShardingConfig(data=4, seq=2, context=Context.ULYSSES), {"seq"}, interleaved=True),
    "expert 2 across": Case(ShardingConfig(data=2, fsdp=2, expert=2), {"expert"}, interleaved=True, experts=True),
    "tensor across": Case(ShardingConfig(data=2, fsdp=2, tensor=2), {"tensor"}, interleaved=True),
}
QUICK = {"data x fsdp"}
RARE = {"stage 4, circular", "ulysses across"}
"""For the nightly tests: what they send is that of "stage 2 across" and of "expert 2 across"."""


def crossing(layout: Layout) -> set[str]:
    where = np.vectorize(lambda device: device.process_index)(layout.mesh.devices)
    return {axis for i, axis in enumerate(layout.mesh.axis_names) if np.diff(where, axis=i).any()}


def work(name: str, index: int, port: str, file: str) -> None:
    """One of the two processes: loss and gradients of a case, whole, as the arrays of a file."""
    jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
    case = CASES[name]
    config, layout = case.config, case.layout()
    config.validate(8)
    assert crossing(layout) == case.crosses, crossing(layout)
    parameters = jax.jit(lambda key: init_parameters(config.model, key))(jax.random.key(1))
    cut = layout.sharding(layout.activation("batch", "seq"))
    values = packed_batch(config)
    batch = {key: jax.make_array_from_callback(value.shape, cut, value.__getitem__) for key, value in values.items()}
    found = jax.jit(gradient_function(config, layout))(parameters, batch)
    whole = multihost_utils.process_allgather(found, tiled=True)
    count = float(values["loss_mask"].sum())
    np.savez(file, *(np.asarray(leaf) / count for leaf in jax.tree.leaves(whole)))


def in_two_processes(name: str, folder: Path) -> list[list[np.ndarray]]:
    """What both processes of a case found."""
    port = free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4), "PYTHONPATH": str(ROOT)}
    files = [folder / f"{index}.npz" for index in range(2)]
    with contextlib.ExitStack() as stack:
        processes = []
        for index, file in enumerate(files):
            command = [sys.executable, __file__, name, str(index), str(port), str(file)]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    return [[arrays[f"arr_{i}"] for i in range(len(arrays))] for arrays in map(np.load, files)]


@functools.cache
def on_one_device(experts: bool) -> list[np.ndarray]:
    """The model is the same in all cases with experts, and in all without."""
    sums, gradients = loss_and_gradients(Case(ShardingConfig(), set(), experts=experts).config, one_device())
    leaves = jax.tree.leaves((sums, gradients))
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-2, "gradients too small to compare"
    return leaves


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow] + [pytest.mark.nightly] * (n in RARE))
        for n in CASES
    ],
)
def test_a_layout_across_processes_equals_one_device(name: str, tmp_path: Path) -> None:
    leaves = on_one_device(CASES[name].experts)
    for found in in_two_processes(name, tmp_path):
        assert_close(dict(enumerate(found)), dict(enumerate(leaves)), 1e-5)


@pytest.mark.slow
def test_saved_by_two_processes_and_continued_by_one(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """On another number of processes and devices, with another layout: the losses are those of a run never stopped."""
    bench = Bench.of_session(tmp_path_factory)
    with contextlib.ExitStack() as stack:
        first, second = bench.start_two(stack, tmp_path / "run", "--sharding.fsdp=4", "--sharding.slices=2")
        first.read_steps(2)
        first.send(signal.SIGTERM)
        assert [first.end().code, second.end().code] == [75, 75]
    stopped = inspect(tmp_path / "run", "--verify")
    assert stopped["steps"][-1]["status"] == "ok" and 2 <= stopped["latest"] < STEPS
    ended = bench.run(tmp_path / "run", "--sharding.fsdp=2", devices=2)
    assert ended.code == 0, ended.err
    for (at, loss), (at_one, expected) in zip(losses(tmp_path / "run"), losses(bench.reference), strict=True):
        assert at == at_one
        assert loss == pytest.approx(expected, abs=1e-5)


if __name__ == "__main__":
    name, index, port, file = sys.argv[1:]
    work(name, int(index), port, file)
