"""Bytes that each mesh axis moves in a step, counted from the config alone, and the links that carry them.

Counted is what the train step asks for: the gathers, scatters and sums of parameters, gradients and activations, each
as the bytes that a device sends in the bandwidth-optimal ring algorithms (`Collective.sent_each`). Left out is what is
small: scalars, token ids, counts of routed tokens. A sum over several axes is one over the fastest, then one over the
next of what is left, and so on, which sends as much as one ring over all of them.

Compilers deviate, within what `tests/test_plan_traffic.py` allows. Of activations that sequence_parallel or seq gathers
the GPU's takes some in float32, before they are rounded. The TPU's sums where a scatter along a narrow dim would do
(docs/plan.md). And a pipeline sums gradients over the other axes in every turn, empty ones too; with a single layer a
stage there is no loop left over layers, and the compiler finds one sum enough.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from maxlm import shapes
from maxlm.config import (
    MESH_AXES,
    Context,
    Experts,
    Remat,
    RunConfig,
    StatePart,
    Zero,
)
from maxlm.hardware import Switched, Torus
from maxlm.plan.machines import TPUS, GpuMachine, Machine, TpuMachine
from maxlm.plan.work import LayerRuns, layer_runs, local_tokens, lookups, loss_tokens, only_read, trained, turns
from maxlm.shapes import FLOAT32, Array, Part, device_bytes, device_shape


class Link(enum.Enum):
    """What carries an axis's bytes."""

    ICI = "ICI"
    """Between the TPUs of a slice."""
    NVLINK = "NVLink"
    """Between the GPUs of a host."""
    NETWORK = "network"
    """Between slices, or hosts of GPUs."""
    LOCAL = "local"
    """Memory of this machine, of which nothing is known."""


@dataclass(frozen=True, kw_only=True)
class AxisTraffic:
    """What one mesh axis sends over one link in a step. An axis that crosses hosts or slices has two of them."""

    axis: str
    link: Link
    sent: int
    """Bytes, of one device."""
    seconds: float | None
    """That the link takes for them at its data sheet's speed, with nothing else on it; None: not known."""
    what: str
    """In words."""


def estimate_traffic(config: RunConfig, target: Machine) -> list[AxisTraffic]:
    """Bytes and seconds of every axis longer than 1, in the order of MESH_AXES.

    Seconds are bytes over bandwidth: of a GPU's links, or the part that crosses hosts over its share of the network; of
    a TPU's, see `_ici_seconds`.

    Raises:
        UserError: the sizes of the axes do not suit the number of devices.
    """
    sizes = config.sharding.sizes(target.devices)
    ledger = _Ledger(sizes, doubled=whole_torus(target, sizes["fsdp"]))
    for one in trained(config):
        _count(ledger, one)
    for one in only_read(config, sizes):
        _count(replace(ledger, backward=False), one)
    inner = _within(config, target)
    return [one for axis in MESH_AXES if sizes[axis] > 1 for one in _over_links(ledger, axis, inner, target)]


def gather_seconds(config: RunConfig, target: Machine, size: float) -> float:
    """Seconds that links take, at least, to gather arrays of so many bytes from the fsdp axis of a config; the target
    is no processor."""
    sizes = config.sharding.sizes(target.devices)
    ledger = _Ledger(sizes, doubled=whole_torus(target, sizes["fsdp"]))
    ledger.over_fsdp(size, "gathers parameters")
    return max(one.seconds or 0.0 for one in _over_links(ledger, "fsdp", _within(config, target), target))


def _count(ledger: _Ledger, config: RunConfig) -> None:
    """One model's, in the sums of the ledger."""
    _count_parameters(ledger, config)
    for layer in layer_runs(config, ledger.sizes):
        _count_tensor(ledger, config, layer)
        _count_context(ledger, config, layer)
        _count_experts(ledger, config, layer)
    _count_vocabulary(ledger, config)
    _count_stages(ledger, config)


def gradient_bytes(config: RunConfig) -> int:
    """Bytes in which one number of a gradient is summed over devices."""
    return FLOAT32 if config.sharding.float32_gradients else config.execution.dtype.itemsize


def whole_torus(target: Machine, size: int) -> bool:
    """Whether an axis is a whole 3-D torus of 64 chips or more, where the TPU compiler (jax 0.10.2) makes a sum of
    whole arrays of each gather and each scatter: twice the bytes (docs/plan.md)."""
    if not isinstance(target, TpuMachine) or len(target.sides) < 3:
        return False
    return math.prod(target.sides) >= 64 and size == target.devices // target.slices


def _within(config: RunConfig, target: Machine) -> dict[str, int]:
    """Devices of each axis's group that share a slice or host with each other; the axis's size if it crosses none.

    Without `sharding.slices` GPUs are taken in their order, a host at a time, the last axis of MESH_AXES fastest.
    """
    sizes = config.sharding.sizes(target.devices)
    slices, axis = config.sharding.slices, config.sharding.slices_axis.value
    if slices > 1:
        return sizes | {axis: max(1, sizes[axis] // slices)}
    if isinstance(target, GpuMachine):
        room = target.per_host
        for axis in reversed(MESH_AXES):
            sizes[axis], room = min(sizes[axis], max(1, room)), room // sizes[axis]
    return sizes


class _Pattern(enum.Enum):
    """Who sends to whom, which decides how many links are busy."""

    RING = enum.auto()
    """Gathers, scatters and sums."""
    EXCHANGE = enum.auto()
    """All-to-all."""
    SHIFT = enum.auto()
    """To the next one, all in one direction."""
    CHAIN = enum.auto()
    """The pipeline's three permutes a turn: one in one direction, two in the other."""


@dataclass(frozen=True)
class _Ledger:
    """Bytes that a device sends along each axis, added up."""

    sizes: Mapping[str, int]
    doubled: bool
    """fsdp sums whole arrays to gather or scatter parameters: see `whole_torus`."""
    sent: dict[tuple[str, _Pattern], float] = field(default_factory=lambda: defaultdict(float))
    words: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    """Each once, in order."""
    backward: bool = True
    """Whether there is a backward pass, and an update."""

    def add(self, axis: str, sent: float, words: str, pattern: _Pattern = _Pattern.RING) -> None:
        if self.sizes[axis] == 1 or sent == 0:
            return
        self.sent[axis, pattern] += sent
        self.words[axis][words] = None

    def gather(self, axis: str, size: float, words: str, pattern: _Pattern = _Pattern.RING) -> None:
        """Gather arrays of `size` bytes when whole; scattering or exchanging them sends as much."""
        n = self.sizes[axis]
        self.add(axis, size * (n - 1) / n, words, pattern)

    def over_fsdp(self, size: float, words: str) -> None:
        """Gather or scatter parameters, or their gradients, of `size` bytes when whole."""
        self.gather("fsdp", size * (2 if self.doubled else 1), words)

    def sum(self, axes: Sequence[str], size: float, words: str) -> None:
        """Sum arrays of `size` bytes over all axes together, the fastest first."""
        for axis in sorted(axes, key=MESH_AXES.index, reverse=True):
            self.gather(axis, 2 * size, words)
            size /= self.sizes[axis]


def _count_parameters(ledger: _Ledger, config: RunConfig) -> None:
    """Parameters to where they are used, gradients to where they are kept (ZeRO, arXiv:1910.02054).

    With ZeRO-3 each run of a layer gathers its parameters in the compute dtype, for the forward pass and again for the
    backward pass, and scatters their gradients. With ZeRO-1 and 2 the optimizer's float32 updates are gathered once.
    What is not trained has neither gradient nor update.
    """
    for array in shapes.arrays(config.model):
        size = math.prod(device_shape(array, ledger.sizes, Zero.OPTIMIZER))  # numbers, as if the fsdp axis cut nothing
        table = array.part in (Part.EMBEDDING, Part.UNEMBEDDING) and "embed" in array.dims
        count = _count_table if table else _count_matrix
        count(ledger, config, array, size)
        if ledger.backward and array.trained and "embed" in array.dims and config.sharding.zero is not Zero.PARAMETERS:
            ledger.gather("fsdp", size * FLOAT32, "gathers updates")


def _count_matrix(ledger: _Ledger, config: RunConfig, array: Array, size: int) -> None:
    """Of a layer, or a norm or bias outside of them. Each run counts, the pipeline's empty turns too. A gradient is a
    sum over all axes but those that cut the array."""
    sizes, zero, stacked = ledger.sizes, config.sharding.zero, array.dims[0] == "layers"
    others = ["data", "seq"] + ["stage"] * (not stacked) + ["expert"] * (array.part is not Part.EXPERTS)
    runs = turns(config, sizes) if stacked else loss_tokens(config, sizes)[0]
    small, wide = config.execution.dtype.itemsize, gradient_bytes(config) if ledger.backward and array.trained else 0
    if "embed" not in array.dims or sizes["fsdp"] == 1 or zero is Zero.OPTIMIZER:
        ledger.sum([*others, "fsdp"], size * wide * runs, "sums gradients")
        return
    if zero is Zero.PARAMETERS:
        forwards = 1 + (stacked and sizes["stage"] > 1 and config.sharding.remat_stages)
        # Products that take float32 parameters cast them again for the gradient, when the gathered ones are gone.
        again = config.sharding.float32_gradients and config.execution.remat is not Remat.NONE and array.trained
        backward = ledger.backward * (2 if again else 1)
        ledger.over_fsdp(size * small * runs * (forwards + backward), "gathers parameters")
    ledger.over_fsdp(size * wide * runs, "scatters gradients")
    ledger.sum(others, size / sizes["fsdp"] * wide * runs, "sums gradients")


def _count_table(ledger: _Ledger, config: RunConfig, array: Array, size: int) -> None:
    """A table of the vocabulary. One that is looked up is float32, and its gradient; a tied one is gathered once."""
    zero, sizes, others = config.sharding.zero, ledger.sizes, ["data", "seq", "stage", "expert"]
    runs, _ = loss_tokens(config, sizes)
    if zero is Zero.PARAMETERS:
        item = FLOAT32 if array.part is Part.EMBEDDING else config.execution.dtype.itemsize
        ledger.over_fsdp(size * item * runs, "gathers parameters")
    if not ledger.backward or not array.trained:
        return
    for use in (Part.EMBEDDING, Part.UNEMBEDDING) if config.model.tied else (array.part,):
        sent = size * (FLOAT32 if use is Part.EMBEDDING else gradient_bytes(config))
        whole = sizes["fsdp"] == 1 or (use is Part.UNEMBEDDING and zero is Zero.OPTIMIZER)
        if whole or (use is Part.EMBEDDING and any(sizes[axis] > 1 for axis in others if axis != "data")):
            # Once, behind the loop over micro-batches. Of a lookup's gradient compilers make one sum over all axes
            # where fsdp is not the last of them.
            ledger.sum([*others, "fsdp"], sent, "sums gradients")
        elif use is Part.UNEMBEDDING:
            # training/losses.py sums over the other axes first, while the array is whole.
            times = runs * lookups(config.model)
            ledger.sum(others, sent * times, "sums gradients")
            ledger.over_fsdp(sent * times, "scatters gradients")
        else:
            times = 1 if zero is Zero.OPTIMIZER else runs
            ledger.over_fsdp(sent * times, "scatters gradients")
            ledger.sum(others, sent / sizes["fsdp"] * times, "sums gradients")


def _count_tensor(ledger: _Ledger, config: RunConfig, layer: LayerRuns) -> None:
    """Two sums of activations forward and two backward (Megatron-LM, arXiv:1909.08053, section 3), or as many pairs of
    a gather and a scatter (arXiv:2205.05198, section 4.2.2); inputs are gathered again for the weights' gradients.

    Every remat policy but "none" and "dots" computes attention's output, and so its sum, again.
    """
    remat = config.execution.remat
    sums = 2 * layer.forwards + 2 * ledger.backward + (remat not in (Remat.NONE, Remat.DOTS))
    size = layer.tokens * config.model.d_model * config.execution.dtype.itemsize * layer.runs
    if config.sharding.sequence_parallel:
        gathers = 2 * layer.forwards + 2 * ledger.backward + (0 if remat is Remat.NONE else 2)
        ledger.gather("tensor", (gathers + sums) * size, "gathers and scatters activations")
    else:
        ledger.sum(["tensor"], sums * size, "sums activations")


def _count_vocabulary(ledger: _Ledger, config: RunConfig) -> None:
    """Looked-up rows and the gradient of the hidden states are summed over the parts of the vocabulary."""
    tokens = local_tokens(config, ledger.sizes) * lookups(config.model)
    size = tokens * config.model.d_model * config.execution.dtype.itemsize
    if config.sharding.sequence_parallel:
        # rows, hidden states, and the gradient of the rows
        ledger.gather("tensor", (2 + ledger.backward) * size, "gathers and scatters activations")
    else:
        ledger.sum(["tensor"], size, "sums activations")
    if ledger.backward:
        ledger.sum(["tensor"], size, "sums hidden states' gradient")
    ledger.sum(["tensor"], 3 * FLOAT32 * tokens, "sums softmax")


def _count_context(ledger: _Ledger, config: RunConfig, layer: LayerRuns) -> None:
    """Keys and values over the parts of a sequence: gathered (arXiv:2407.21783, section 3.3.2), passed round
    (arXiv:2310.01889), or exchanged against heads (arXiv:2309.14509)."""
    n, attention, remat = ledger.sizes["seq"], layer.block.attention, config.execution.remat
    of_head = layer.tokens * (attention.key_head_dim + attention.value_head_dim) / ledger.sizes["tensor"] * layer.runs
    for_keys, for_queries = of_head * attention.n_kv_heads, of_head * attention.n_heads  # with values, and with outputs
    small = config.execution.dtype.itemsize
    again = 0 if remat is Remat.NONE else 1
    match config.sharding.context:
        case Context.ALL_GATHER:
            passes = layer.forwards + again + ledger.backward  # the last one scatters gradients
            ledger.gather("seq", n * for_keys * small * passes, "gathers keys and values, scatters their gradients")
        case Context.RING:
            again = remat in (Remat.FULL, Remat.QKV)  # the others keep attention's output, and need not go round again
            chunk = config.train.seq_len // (2 * n)
            reach = n if attention.window is None else -(-(attention.window - 1) // chunk)
            short = 2 * reach + 1 < n
            stops = 2 * reach if short else n - 1
            hops = stops + short  # to the first stop
            passes = layer.forwards + again + ledger.backward
            ledger.add("seq", for_keys * small * hops * passes, "passes keys and values round", _Pattern.SHIFT)
            # Sums for keys follow them to every stop, the first one too, and then go home.
            sums = ledger.backward * for_keys * FLOAT32 * (stops + 2)
            ledger.add("seq", sums, "and their gradients in float32", _Pattern.SHIFT)
        case Context.ULYSSES:
            size = (for_queries + for_keys) * small * (layer.forwards + again + ledger.backward)
            ledger.gather("seq", size, "exchanges heads for tokens", _Pattern.EXCHANGE)
        case _:
            assert_never(config.sharding.context)


def _count_experts(ledger: _Ledger, config: RunConfig, layer: LayerRuns) -> None:
    """Tokens to their experts and back (GShard, arXiv:2006.16668): twice forward, backward and, but for remat "none",
    once more. What travels are whole buffers, full or not."""
    mlp, n = layer.block.mlp, ledger.sizes["expert"]
    if not isinstance(mlp, Experts):
        return
    rows = mlp.buffer_rows(layer.tokens, seq_len=config.train.seq_len, devices=n)
    size = rows * config.model.d_model * config.execution.dtype.itemsize
    passes = layer.forwards + ledger.backward + (config.execution.remat is not Remat.NONE)
    ledger.gather("expert", 2 * size * passes * layer.runs, "exchanges tokens with experts", _Pattern.EXCHANGE)


def _count_stages(ledger: _Ledger, config: RunConfig) -> None:
    """Three activations a turn and direction: what goes on, what comes from its home, what goes home
    (models/pipeline.py). With virtual stages the float32 parameters go to their stages, and their gradients back."""
    sizes, groups = ledger.sizes, config.sharding.virtual_stages
    tokens = local_tokens(config, sizes) * sizes["stage"] / config.train.micro_batches
    if config.sharding.sequence_parallel:
        tokens /= sizes["tensor"]
    size = tokens * config.model.d_model * config.execution.dtype.itemsize * turns(config, sizes) * groups
    ledger.add("stage", (1 + ledger.backward) * 3 * size, "passes activations on", _Pattern.CHAIN)
    if groups > 1:
        for array in shapes.arrays(config.model):
            moved = (StatePart.PARAMETERS, StatePart.GRADIENTS) if ledger.backward else (StatePart.PARAMETERS,)
            for part in moved if array.dims[0] == "layers" else ():
                size = device_bytes(array, sizes, config.sharding.zero, part)
                ledger.gather("stage", size, "brings parameters in order", _Pattern.EXCHANGE)


def _over_links(ledger: _Ledger, axis: str, inner: Mapping[str, int], target: Machine) -> list[AxisTraffic]:
    """An axis's bytes, parted in those that stay within a host or slice and those that do not.

    Collectives over h hosts with g devices each run within the hosts first: of each (n - 1) / n of an array (h - 1) / n
    cross. An all-to-all sends each device the same. Permutes cross where they must, and the slowest one counts.
    """
    n, near = ledger.sizes[axis], inner[axis]
    far, close, seconds = 0.0, 0.0, 0.0
    for pattern in _Pattern:
        sent = ledger.sent[axis, pattern]
        match pattern:
            case _Pattern.RING:
                share = (-(-n // near) - 1) / (n - 1)
            case _Pattern.EXCHANGE:
                share = (n - near) / (n - 1)
            case _Pattern.SHIFT | _Pattern.CHAIN:
                share = float(near < n)
        far, close = far + sent * share, close + sent * (1 - share)
        seconds += _ici_seconds(target, inner, axis, sent * (1 - share), pattern)
    what = ", ".join(ledger.words[axis]) or "nothing"
    match target.hardware and target.hardware.network:
        case None:
            return [AxisTraffic(axis=axis, link=Link.LOCAL, sent=round(far + close), seconds=None, what=what)]
        case Torus(between_slices=network):
            link = Link.ICI
        case Switched(within_host=within_host, between_hosts=network):
            link, seconds = Link.NVLINK, close / within_host
    found = [
        AxisTraffic(axis=axis, link=link, sent=round(close), seconds=seconds, what=what),
        AxisTraffic(axis=axis, link=Link.NETWORK, sent=round(far), seconds=far / network, what=what),
    ]
    return [one for one in found if one.sent] or found[:1]


def _ici_seconds(target: Machine, inner: Mapping[str, int], axis: str, sent: float, pattern: _Pattern) -> float:
    """Time of what an axis sends within a slice of TPUs ("How to Scale Your Model", jax-ml.github.io/scaling-book,
    sharding). Gathers, scatters and sums keep both links of a ring busy, those of every dim of the torus that the axis
    covers; an all-to-all over a ring of n takes n / 4 times as long a byte, since bytes cross n / 4 links on average;
    permutes use one link, the pipeline's one in each direction.
    """
    if not isinstance(target, TpuMachine) or not sent:
        return 0.0
    dims, link = torus_dims(target, inner)[axis] or ((2, 1),), TPUS[target.chip].link
    every = sent / (link * sum(links for _, links in dims))
    match pattern:
        case _Pattern.RING:
            return every
        case _Pattern.EXCHANGE:
            return max(every, *(sent * length / (4 * links * link) for length, links in dims))
        case _Pattern.SHIFT:
            return sent / link
        case _Pattern.CHAIN:
            return sent * 2 / 3 / link


def torus_dims(target: Machine, inner: Mapping[str, int]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Axis -> length and links of a device, for each dim of the torus that the axis covers.

    As jax's `mesh_utils` lays a mesh out: from the fastest axis on, each takes the most whole dims whose product is its
    size; those that find none share dims, of which a part is a line, with one link each way. A whole dim is a ring,
    with two links, if its length is a multiple of `Torus.ring`. The two devices of a TPU 7x chip count as a dim
    of length 2.
    """
    found: dict[str, tuple[tuple[int, int], ...]] = dict.fromkeys(MESH_AXES, ())
    if not isinstance(target, TpuMachine):
        return found
    ring, left = TPUS[target.chip].ring, [*target.sides, TPUS[target.chip].devices_per_chip]
    whole, unplaced = [True] * len(left), []
    for axis in reversed(MESH_AXES):
        places = [i for i, length in enumerate(left) if length > 1]
        subsets = [few for count in (4, 3, 2, 1) for few in itertools.combinations(places, count)]
        fits = next((few for few in subsets if math.prod(left[i] for i in few) == inner[axis]), None)
        if inner[axis] > 1 and fits is None:
            unplaced.append(axis)
        for i in fits or ():
            found[axis] += ((left[i], 2 if left[i] % ring == 0 else 1),)
            left[i], whole[i] = 1, False
    for axis in unplaced:
        rest = inner[axis]
        for i, length in enumerate(left):
            if (part := math.gcd(rest, length)) > 1:
                is_ring = whole[i] and part == length and length % ring == 0
                found[axis] += ((part, 2 if is_ring else 1),)
                left[i], whole[i], rest = length // part, False, rest // part
    return found
