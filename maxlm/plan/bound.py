"""The least time that a step can take, from the data sheet's figures: the roofline (Williams et al. 2009,
doi:10.1145/1498765.1498785) of compute, memory and every link.

Computing, memory and links are taken to work side by side, without ever waiting for each other, each at its full speed:
so a real step takes longer, and its MFU is lower, than what stands here. `docs/kernels.md` and the benchmarks tell what
our kernels reach of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maxlm import shapes
from maxlm.config import (
    Dtype,
    Experts,
    RunConfig,
    StatePart,
    UserError,
    Zero,
    pipeline_bubble,
)
from maxlm.hardware import Chip
from maxlm.plan.machines import Machine
from maxlm.plan.traffic import AxisTraffic, Link
from maxlm.plan.work import LayerRuns, layer_runs, loss_tokens, only_read, trained, turns, unembeddings
from maxlm.shapes import (
    FLOAT32,
    FlopsPerToken,
    Part,
    Role,
    device_shape,
    flops_per_token,
    mfu,
    parameter_count,
    reading_flops,
)

_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class TimeBound:
    """The least time of a training step; what a policy writes before it is no part of that (`plan/rollout_time.py`)."""

    compute_seconds: float
    """Multiplications of a device, recomputed ones too, and those of models that a step only reads (`only_read`), such
    as a reference, over its peak in the compute dtype. Of attention only what the causal mask leaves, as our kernels
    skip the rest; the scores once more in the backward pass, as they do."""
    memory_seconds: float
    """Bytes to and from a device's memory over its bandwidth; `memory_bytes` says which."""
    traffic_seconds: Mapping[str, float]
    """Mesh axis -> seconds of what it sends over its links, with nothing else on them."""
    bubble: float
    """Share of the time that a pipeline's stages have nothing to compute, 0..1."""
    step_seconds: float
    """compute_seconds / (1 - bubble), or the memory's or a link's if longer. Those of the memory and of the links count
    the pipeline's empty turns already. Axes over NVLink, or the network, share it; over ICI each has its own links."""
    limited_by: str
    """"compute", "memory", or "axis NAME over LINK"; of axes that share a link, the one that sends the longest."""
    mfu_ceiling: float
    """At most, 0..1 (`shapes.mfu`, of `FlopsPerToken.causal`): attention counts as its mask leaves it, which is what
    our kernels compute. A run's own MFU counts it whole, by PaLM's rule."""
    intensity: float
    """FLOPs of a device for each byte to or from its memory."""
    tokens_per_day: float
    """Of all devices, at most."""
    days: float
    """Of train.steps steps, at least; without evaluations and checkpoints."""
    device_hours: float
    """The same times the devices: TPU 7x chips are two devices."""


def estimate_time(config: RunConfig, target: Machine, traffic: Sequence[AxisTraffic]) -> TimeBound | None:
    """The least time of the config's step on a target, whose traffic is `estimate_traffic`'s; None: of a processor.

    Raises:
        UserError: the target has no unit for the config's compute dtype.
    """
    device = target.hardware
    if device is None:
        return None
    train, devices = config.train, target.devices
    sizes = config.sharding.sizes(devices)
    peak, tokens = peak_flops(config, target, device), train.batch_size * train.seq_len
    work, moved, bubble = _work(config, sizes, devices), memory_bytes(config, sizes), _bubble(config, sizes)
    limits = {"compute": work / peak / (1 - bubble), "memory": moved / device.bandwidth}
    limits |= _link_limits(traffic)
    limited_by, step_seconds = max(limits.items(), key=lambda pair: pair[1])
    causal, tokens_per_s = step_flops(config, sizes).causal, tokens / step_seconds
    days = train.steps * step_seconds / _DAY
    by_axis: dict[str, float] = defaultdict(float)
    for one in traffic:
        by_axis[one.axis] += one.seconds or 0.0
    return TimeBound(
        compute_seconds=work / peak,
        memory_seconds=moved / device.bandwidth,
        traffic_seconds=dict(by_axis),
        bubble=bubble,
        step_seconds=step_seconds,
        limited_by=limited_by,
        mfu_ceiling=mfu(flops_per_token=causal, tokens_per_s=tokens_per_s, n_devices=devices, peak_flops=peak),
        intensity=work / moved,
        tokens_per_day=tokens_per_s * _DAY,
        days=days,
        device_hours=days * 24 * devices,
    )


def compute_time(config: RunConfig, target: Machine) -> float:
    """Seconds of a step's products, bubble included: the first of the limits of `estimate_time`. The target is no
    processor.

    Raises:
        UserError: the target has no unit for the config's compute dtype.
    """
    assert target.hardware is not None
    sizes = config.sharding.sizes(target.devices)
    work, peak = _work(config, sizes, target.devices), peak_flops(config, target, target.hardware)
    return work / peak / (1 - _bubble(config, sizes))


def step_flops(config: RunConfig, sizes: Mapping[str, int]) -> FlopsPerToken:
    """Of a token, with what remat and the pipeline compute again."""
    staged = sizes["stage"] > 1 and config.sharding.remat_stages
    return flops_per_token(config.model, config.train.seq_len, config.execution.remat, remat_stages=staged)


def peak_flops(config: RunConfig, target: Machine, device: Chip) -> float:
    """FLOP/s of the target's devices in the compute dtype.

    Raises:
        UserError: they have no unit for it.
    """
    if (peak := device.peak.of(config.execution.dtype)) is None:
        known = ", ".join(one.value for one in Dtype if device.peak.of(one) is not None)
        raise UserError(
            f"execution.dtype = {config.execution.dtype.value}, but {target} has no unit for it; use one of {known}"
        )
    return peak


def memory_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Bytes that a step moves between a device and its memory.

    Each product reads its factors and writes its result, in the compute dtype: forward, twice as many of the same size
    backward, and as many as remat repeats. Attention reads q, k, v and writes its output. Gathered parameters are
    written once each time. The loss writes and reads a chunk's logits, and adds to the table's gradient, in float32.
    Micro-batches add up gradients. The optimizer reads and writes parameters and moments, and reads gradients, twice if
    it clips them. What is elementwise is taken to happen on the way, and costs nothing; padding moves nothing.
    """
    return sum(_learning_bytes(one, sizes) for one in trained(config)) + _read_bytes(config, sizes)


def _learning_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    moved = sum(_layer_bytes(config, sizes, layer, backward=True) for layer in layer_runs(config, sizes))
    return moved + _loss_bytes(config, sizes) + _state_bytes(config, sizes)


def _read_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Of models that a step only reads: the same, forward; of the loss hidden states and table once, and logits written
    and read."""
    moved, dtype = 0.0, config.execution.dtype.itemsize
    parts, tokens = loss_tokens(config, sizes)
    chunk, D, V = min(config.train.loss_chunk, tokens), config.model.d_model, config.model.vocab_size / sizes["tensor"]
    for one in only_read(config, sizes):
        moved += sum(_layer_bytes(one, sizes, layer, backward=False) for layer in layer_runs(one, sizes))
        moved += _gathered(one, sizes) * turns(one, sizes)
        if one.model.lm_head is not None:
            moved += parts * math.ceil(tokens / chunk) * (dtype * (chunk * D + V * D) + FLOAT32 * 2 * chunk * V)
    return moved


def _work(config: RunConfig, sizes: Mapping[str, int], devices: int) -> float:
    """FLOPs of a device in a step, as they are computed: flash attention's backward pass has five products of the size
    of the scores, where 12 N H T has four (Dao 2023, arXiv:2307.08691, section 3.1)."""
    every = [step_flops(one, sizes) for one in trained(config)]
    done = sum(flops.causal + flops.causal_recompute + flops.causal_attention_term / 6 for flops in every)
    done += sum(reading_flops(one.model, config.train.seq_len) for one in only_read(config, sizes))
    return done * (config.train.batch_size * config.train.seq_len) / devices


def _bubble(config: RunConfig, sizes: Mapping[str, int]) -> float:
    return pipeline_bubble(sizes["stage"], config.sharding.virtual_stages, config.train.micro_batches)


def _link_limits(traffic: Sequence[AxisTraffic]) -> dict[str, float]:
    """Seconds by what is said of a step that they limit."""
    limits = {}
    for link in Link:
        if on_link := [(one.seconds, one.axis) for one in traffic if one.link is link and one.seconds]:
            longest, axis = max(on_link)
            shared = longest if link is Link.ICI else sum(seconds for seconds, _ in on_link)
            limits[f"axis {axis} over {link.value}"] = shared
    return limits


def _layer_bytes(config: RunConfig, sizes: Mapping[str, int], layer: LayerRuns, *, backward: bool) -> float:
    """Of all runs of one block config: forward, and, with `backward`, again and backward."""
    numbers, attention, D = 0.0, layer.block.attention, config.model.d_model
    forward = layer.forwards + (_repeated(config) if backward else 0)
    for array in shapes.block(layer.block, config.model):
        if array.role not in (Role.PRODUCT, Role.ROUTER):
            continue
        weights = math.prod(device_shape(array, {**sizes, "fsdp": 1}, config.sharding.zero))
        rows, matrices = float(layer.tokens), 1
        if isinstance(mlp := layer.block.mlp, Experts) and array.part is Part.EXPERTS:
            buffer = mlp.buffer_rows(layer.tokens, seq_len=config.train.seq_len, devices=sizes["expert"])
            rows, matrices = min(rows * mlp.experts_per_token, buffer), mlp.n_experts // sizes["expert"]
        # One side of each is the residual stream. Backward there are two of the size; without its own gradient, one.
        passes = forward + backward * (2 if config.model.adapter is None else 1)
        numbers += passes * (weights + rows * (D + weights / matrices / D))
    heads = attention.n_heads + attention.n_kv_heads  # what attention reads and writes
    scores = layer.tokens * heads * (attention.key_head_dim + attention.value_head_dim) / sizes["tensor"]
    return (numbers + (forward + 2 * backward) * scores) * config.execution.dtype.itemsize * layer.runs


def _repeated(config: RunConfig) -> float:
    """Share of the layers' forward pass that `execution.remat` computes again, by FLOPs."""
    count = parameter_count(config.model)
    flops = flops_per_token(config.model, config.train.seq_len, config.execution.remat)
    layers = count.matmul - config.model.vocab_size * config.model.d_model
    return flops.causal_recompute / (2 * layers + flops.causal_attention_term / 3)


def _loss_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Three products for each chunk of tokens (training/losses.py): logits, and the gradients of what made them."""
    D, V, small = config.model.d_model, config.model.vocab_size / sizes["tensor"], config.execution.dtype.itemsize
    parts, tokens = loss_tokens(config, sizes)
    chunk = min(config.train.loss_chunk, tokens)
    # Hidden states and table twice, logits' gradient once written and twice read; logits in float32.
    of_chunk = small * (4 * chunk * D + 2 * V * D + 3 * chunk * V) + FLOAT32 * 2 * (chunk * V + V * D)
    return unembeddings(config.model) * parts * math.ceil(tokens / chunk) * of_chunk


def _state_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Gathered parameters, summed gradients, and the optimizer."""
    zero, parts = config.sharding.zero, config.train.micro_batches
    changes = [array for array in shapes.arrays(config.model) if array.trained]
    numbers = lambda arrays, kind, part: sum(math.prod(device_shape(array, sizes, kind, part)) for array in arrays)
    gradient = FLOAT32 if config.optimizer.clip_norm is None else 2 * FLOAT32
    moved: float = numbers(changes, zero, StatePart.OPTIMIZER) * gradient
    held = config.optimizer.parameter_format.itemsize
    for array in changes:
        item = held if shapes.is_rounded(array) else FLOAT32
        moved += 2 * item * numbers([array], zero, StatePart.OPTIMIZER)
    moved += 2 * shapes.optimizer_bytes(config.model, config.optimizer, tuple(sizes.items()), zero)
    moved += 2 * _gathered(config, sizes) * turns(config, sizes)
    if parts > 1 and sizes["stage"] == 1:
        moved += 2 * FLOAT32 * numbers(changes, zero, StatePart.GRADIENTS) * parts
    return moved


def _gathered(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """All parameters that are gathered for their use, in the compute dtype; 0: they are whole."""
    if config.sharding.zero is not Zero.PARAMETERS or sizes["fsdp"] == 1:
        return 0
    whole = (device_shape(one, sizes, Zero.OPTIMIZER, StatePart.PARAMETERS) for one in shapes.arrays(config.model))
    return sum(map(math.prod, whole)) * config.execution.dtype.itemsize
