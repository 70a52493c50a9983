"""Meshes over several slices or hosts: which devices are neighbours. The devices are stand-ins."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from aot import Case, compile_all, complaints, require_compiler
from helpers import small_model, small_run
from jax.experimental import topologies

from maxlm.config import MESH_AXES, ShardingConfig, SlicesAxis, UserError
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

STAGE = SlicesAxis.STAGE


@dataclass(frozen=True)
class Chip:
    """What the making of a mesh reads of a device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0


def slices_of_v5p(slices: int, shape: tuple[int, int, int]) -> list[Chip]:
    """Chips in an order that says nothing of where they are."""
    corners = itertools.product(*map(range, shape))
    chips = [(s, xyz) for xyz in corners for s in range(slices)]
    return [
        Chip(id=i, process_index=s * 100 + sum(xyz) // 2, slice_index=s, coords=(xyz[0], xyz[1], xyz[2]))
        for i, (s, xyz) in enumerate(chips)
    ]


def hosts_of_gpus(hosts: int, gpus: int) -> list[Chip]:
    return [
        Chip(id=h * gpus + g, process_index=h, slice_index=0, coords=(0, 0, 0), platform="gpu", device_kind="H100")
        for g in range(gpus)
        for h in range(hosts)
    ]


def grid(config: ShardingConfig, chips: list[Chip]) -> np.ndarray:
    stand_ins: Any = chips
    made: Any = make_layout(config, stand_ins)
    assert made.mesh.axis_names == MESH_AXES
    assert sorted(chip.id for chip in made.mesh.devices.flat) == sorted(chip.id for chip in chips)
    return made.mesh.devices


def crossing(devices: np.ndarray, attribute: str) -> set[str]:
    """The mesh axes along which some neighbours are in different slices or hosts."""
    where = np.vectorize(lambda chip: getattr(chip, attribute))(devices)
    return {axis for i, axis in enumerate(MESH_AXES) if np.diff(where, axis=i).any()}


@pytest.mark.parametrize(
    ("config", "slices", "shape", "axis"),
    [
        (ShardingConfig(slices=2, data=2, fsdp=-1), 2, (2, 2, 2), "data"),
        (ShardingConfig(slices=2, data=4, fsdp=2, tensor=2), 2, (2, 2, 2), "data"),
        (ShardingConfig(slices=4, data=4, seq=2, tensor=4), 4, (2, 2, 2), "data"),
        (ShardingConfig(slices=3, data=3, expert=4), 3, (2, 2, 1), "data"),
        (ShardingConfig(slices=2, slices_axis=STAGE, stage=2, fsdp=-1), 2, (2, 2, 2), "stage"),
        (ShardingConfig(slices=2, slices_axis=STAGE, data=2, stage=4, tensor=2), 2, (2, 2, 2), "stage"),
        (ShardingConfig(slices=4, slices_axis=STAGE, stage=4, fsdp=4, tensor=2), 4, (2, 2, 2), "stage"),
    ],
)
def test_one_axis_alone_crosses_between_slices(
    config: ShardingConfig, slices: int, shape: tuple[int, int, int], axis: str
) -> None:
    devices = grid(config, slices_of_v5p(slices, shape))
    assert crossing(devices, "slice_index") == {axis}
    # Along that axis the slices come in runs: as few steps as can be leave a slice.
    along = np.moveaxis(devices, MESH_AXES.index(axis), 0).reshape(devices.shape[MESH_AXES.index(axis)], -1)
    for line in along.T:
        assert sum(a.slice_index != b.slice_index for a, b in itertools.pairwise(line)) == slices - 1


@pytest.mark.parametrize("axis", list(SlicesAxis))
def test_hosts_of_gpus_as_slices(axis: SlicesAxis) -> None:
    sizes = ShardingConfig(data=2, fsdp=2, tensor=2) if axis is SlicesAxis.DATA else ShardingConfig(stage=2, fsdp=4)
    devices = grid(dataclasses.replace(sizes, slices=2, slices_axis=axis), hosts_of_gpus(2, 4))
    assert crossing(devices, "process_index") == {axis.value}


def test_hosts_of_gpus_need_not_be_slices() -> None:
    assert grid(ShardingConfig(data=1, fsdp=8), hosts_of_gpus(2, 4)).shape == (1, 8, 1, 1, 1, 1)


def test_the_fastest_axis_stays_on_neighbouring_chips() -> None:
    devices = grid(ShardingConfig(slices=2, data=2, fsdp=2, tensor=4), slices_of_v5p(2, (2, 2, 2)))
    for ring in devices.reshape(-1, 4):
        for a, b in itertools.pairwise(ring):
            assert sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)) == 1


@pytest.mark.parametrize(
    ("config", "chips", "words"),
    [
        (ShardingConfig(slices=4, data=4, fsdp=-1), slices_of_v5p(2, (2, 2, 2)), "devices come in 2 slice(s); use 2"),
        (ShardingConfig(fsdp=-1), slices_of_v5p(2, (2, 2, 2)), "slices = 1, but the devices come in 2 slice(s); use 2"),
        (ShardingConfig(slices=4, data=4, fsdp=-1), hosts_of_gpus(2, 4), "devices come in 2 host(s); use 2"),
        (ShardingConfig(slices=2, data=2, fsdp=-1), slices_of_v5p(2, (2, 2, 2))[:-2] + slices_of_v5p(1, (2, 1, 1)),
         "the slices have [7, 9] devices; all must have as many"),
    ],
)  # fmt: skip
def test_slices_that_are_not_there(config: ShardingConfig, chips: list[Chip], words: str) -> None:
    with pytest.raises(UserError) as caught:
        grid(config, chips)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ShardingConfig(slices=2, data=1, fsdp=8), "sharding.slices = 2 does not divide sharding.data = 1, which spans "
         "the slices; sharding.data may be one of [2, 4, 8]"),
        (ShardingConfig(slices=3), "sharding.slices = 3 does not divide sharding.data = 8, which spans the slices; "
         "sharding.slices may be one of [1, 2, 4, 8]"),
        (ShardingConfig(slices=2, slices_axis=STAGE), "sharding.slices = 2 does not divide sharding.stage = 1, which "
         "spans the slices; sharding.stage may be one of [2, 4, 8]"),
    ],
)  # fmt: skip
def test_an_axis_that_cannot_span_the_slices(config: ShardingConfig, words: str) -> None:
    with pytest.raises(UserError) as caught:
        small_run(small_model(n_layers=8), config).validate(8)
    assert words in str(caught.value)


def test_the_sizes_that_were_named_work() -> None:
    small_run(sharding=ShardingConfig(slices=2, data=2, fsdp=4)).validate(8)
    small_run(sharding=ShardingConfig(slices=2, slices_axis=STAGE, stage=2)).validate(8)
    with pytest.raises(UserError, match=r"sharding\.slices = 0 must be positive"):
        ShardingConfig(slices=0)


def cases(chip: str) -> dict[str, Case]:
    """The train step on two real slices of four chips, one layout for each axis that may cross between them."""
    layouts = {
        "data": ShardingConfig(slices=2, data=2, fsdp=4),
        "stage": ShardingConfig(slices=2, slices_axis=STAGE, data=1, stage=2, fsdp=4),
    }
    # Gradients are summed over slices, and activations handed on. Of another slice's arrays only token ids and the like
    # are gathered, 4 bytes a token, to put the rows of the batch in the pipeline's order.
    crossing = {"data": {"ALL_REDUCE"}, "stage": {"ALL_REDUCE", "ONE_TO_ONE", "ALL_GATHER"}}
    within = {"data": {"all-gather", "all-reduce"}, "stage": {"all-gather", "all-reduce", "collective-permute"}}

    def lower(name: str, _: Sequence[Any]) -> jax.stages.Lowered:
        both = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices
        config = small_run(sharding=layouts[name], micro_batches=2, batch_size=16)
        trainer = make_trainer(config, make_layout(config.sharding, both))
        lowered = trainer.step.lower(trainer.state, trainer.batch)
        transfer = r' = \(\w+\[([\d,]*)\].* recv\(.*xla_megascale_transfer_type="(\w+)"'
        found = re.findall(transfer, lowered.compile().as_text() or "")
        assert {kind for _, kind in found} == crossing[name], f"{found} cross between the slices"
        gathered = [math.prod(map(int, shape.split(","))) for shape, kind in found if kind == "ALL_GATHER"]
        assert max(gathered, default=0) <= config.train.batch_size * config.train.seq_len, f"{found} cross"
        return lowered

    return {name: Case(functools.partial(lower, name), (), 64 << 20, collectives=within[name]) for name in layouts}


@pytest.mark.slow
def test_what_crosses_slices_in_the_compiled_step() -> None:
    require_compiler("tpu_v5p")
    reports = compile_all("tpu_v5p", "test_slices", cases("tpu_v5p"))
    found = [line for name, case in cases("tpu_v5p").items() for line in complaints(case, reports[name])]
    assert not found, "\n".join(found)
