"""Bytes of a device while a step runs, by arithmetic on the config alone: no jax, milliseconds.

What is counted, and where it comes from in the code:

* the state, which is exact: `maxlm/shapes/arrays.py` for parameters, gradients and moments, cut as `config/dims.py`
  says;
* what the backward pass finds saved, which follows from `execution.remat` (`maxlm/models/decoder.py`);
* what is there for a while only: the loss's logits and its gradient of the table (`maxlm/training/losses.py`), and
  weights, intermediates and their gradients of the layer at work. Compilers decide these, so each rule says of which
  compiler it is; docs/plan_memory.md compares the sums with what the real compilers say.

A step is fullest either in the loss, when everything is saved and the table's gradient is summed up, or in the backward
pass of the last layer, when everything still is saved and the gradients of all layers have their room already.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from maxlm import shapes
from maxlm.config import (
    ACTIVATION_DIMS,
    BlockConfig,
    Dtype,
    EngineConfig,
    Grpo,
    ModelConfig,
    OptimizerConfig,
    Ppo,
    Reinforced,
    RunConfig,
    StatePart,
    Zero,
    pipeline_ticks,
)
from maxlm.config.task_rules import reference_beside
from maxlm.plan.block_memory import BlockMemory, block_memory
from maxlm.plan.machines import Platform
from maxlm.plan.work import layer_runs, local_tokens, loss_tokens, trained, unembeddings
from maxlm.shapes import FLOAT32, Array, Part, device_shape


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    parameters: int
    """Float32, or as `optimizer.parameter_format` says; the base under an adapter as it is held."""
    reference: int
    """Parameters of the model that a policy is held to, or that is told a context: as large as the policy's without an
    adapter."""
    critic: int
    """Parameters and moments of PPO's critic, taken to be of the policy's own kind; its gradients and activations count
    with the policy's."""
    optimizer: int
    """Moments and averages of what is trained."""
    batch: int
    """Tokens, targets, positions, documents and mask of the whole step, and what is known of tokens that were
    rewarded."""
    gradients: int
    """In the format of the parameters, of the micro-batch at work; and, where there are several, the sum of the earlier
    ones in float32."""
    accumulated: int
    """Of the gradients, that sum, as far as it is there during the loss: a pipeline's is not."""
    copies: int
    """Parameters that the compiler has in another format or order from a step's begin to its end."""
    activations: int
    """What is saved for the backward pass."""
    logits: int
    """While the loss is at work: a chunk's logits and their gradient, the table, its gradient, the hidden states'."""
    working: int
    """While a layer's backward pass is at work: gathered weights, intermediates and their gradients."""

    engine: int
    """Weights and cache of the engine that writes rollouts, which keeps them while a step runs. They are no part of the
    step's program."""

    @property
    def at_peak(self) -> dict[str, int]:
        """The parts that are there when the device is fullest, by name: those of the loss, or those of the layers."""
        names = (
            "parameters",
            *(name for name in ("reference", "critic") if getattr(self, name)),
            "optimizer",
            "batch",
            "copies",
            "activations",
            *(["engine"] if self.engine else []),
        )
        always = {name: getattr(self, name) for name in names}
        loss = {"gradients": self.accumulated, "logits": self.logits}
        layers = {"gradients": self.gradients, "working": self.working}
        return always | max(loss, layers, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """Most at one time."""
        return sum(self.at_peak.values())


def estimate_memory(config: RunConfig, n_devices: int, platform: Platform) -> MemoryEstimate:
    """Memory of a device during a step of `maxlm.train`.

    Args:
        config: the run; its rules hold (`config.validate(n_devices)`).
        n_devices: on the mesh.
        platform: whose compiler makes the program.

    Raises:
        UserError: the mesh does not have so many devices.
    """
    policy, *others = (_Step(one, config.sharding.sizes(n_devices), platform).estimate() for one in trained(config))
    found = functools.reduce(_with_critic, others, policy)
    if isinstance(config.task, Ppo) and config.task.text_weight:
        found = _with_text(found, policy)
    return dataclasses.replace(found, engine=_engine_bytes(config, n_devices, platform))


def cache_bytes(config: RunConfig, n_devices: int) -> int:
    """What decoding keeps of `train.batch_size` sequences of `model.max_seq_len` tokens, on a device, in bytes.

    As `maxlm.models.kv_cache.empty_cache` makes it: in the compute dtype, in whole blocks of the engine's default size
    and one that is nobody's; texts cut as a batch, heads over tensor; the seq axis cuts nothing. Layers with a window
    count as if they looked back to the beginning: the engine gives their older blocks to others.
    """
    sizes, C = config.sharding.sizes(n_devices), EngineConfig().block_size
    texts = math.ceil(config.train.batch_size / math.prod(sizes[axis] for axis in ACTIVATION_DIMS["batch"]))
    blocks = texts * math.ceil(config.model.max_seq_len / C) + 1
    pools = dict.fromkeys(shapes.windows(config.model), blocks)
    return shapes.pools_bytes(config.model, pools, C, dtype=config.execution.dtype, tensor=sizes["tensor"])


def _with_critic(policy: MemoryEstimate, critic: MemoryEstimate) -> MemoryEstimate:
    """Of both in one step, which goes back through one after the other."""
    both = ("gradients", "accumulated", "copies", "activations")
    return dataclasses.replace(
        policy,
        critic=critic.parameters + critic.optimizer,
        **{name: getattr(policy, name) + getattr(critic, name) for name in both},
    )


def _with_text(all_of_it: MemoryEstimate, policy: MemoryEstimate) -> MemoryEstimate:
    """With running text that the policy learns beside: what is saved of it, and its gradients before they are added."""
    return dataclasses.replace(
        all_of_it,
        activations=all_of_it.activations + policy.activations,
        gradients=all_of_it.gradients + policy.gradients - policy.accumulated,
    )


def _engine_bytes(config: RunConfig, n_devices: int, platform: Platform) -> int:
    """As `maxlm.inference.held.held` and `maxlm.models.kv_cache.empty_cache` make weights and cache."""
    if not isinstance(config.task, Reinforced):
        return 0
    model, dtype, engine = config.model, config.execution.dtype, config.task.rollouts.engine(config.train.seq_len + 1)
    sharding = config.sharding.for_decoding(n_devices, model.d_model)
    sizes = sharding.sizes(n_devices)
    assert engine.cache_tokens is not None
    blocks = shapes.cache_blocks(
        model,
        positions=engine.cache_tokens,
        slots=engine.slots,
        tokens_per_step=engine.most_tokens(on_cpu=platform is Platform.CPU),
        block_size=engine.block_size,
    )
    cache = shapes.pools_bytes(model, blocks, engine.block_size, dtype=dtype, tensor=sizes["tensor"])
    weights = (shapes.decoding_bytes(model, array, sizes, sharding.zero, dtype) for array in shapes.arrays(model))
    return cache + sum(weights)


class _State(NamedTuple):
    """Bytes of what has the size of parameters, whatever remat and micro-batches are; see `MemoryEstimate`."""

    parameters: int
    optimizer: int
    gradients: int
    """Of one micro-batch."""
    moment: int
    """Float32 numbers of every parameter, cut as the optimizer's."""
    stacked: int
    """The stacks of layers among the parameters that are trained."""
    held: int
    """All stacks of layers."""
    hoisted: int
    """What XLA moves out of the loop over the layers, because it does not depend on the turn."""
    gathered: tuple[int, ...]
    """Weights of a layer of each block of the pattern that are there at one time, in the compute dtype."""


@functools.cache  # a search asks for it with all remat policies and micro-batches
def _state(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    sizes: tuple[tuple[str, int], ...],
    zero: Zero,
    dtype: Dtype,
    platform: Platform,
) -> _State:
    arrays, axes, itemsize = shapes.arrays(model), dict(sizes), dtype.itemsize
    numbers = {
        part: [math.prod(device_shape(array, axes, zero, part)) for array in arrays]
        for part in (StatePart.PARAMETERS, StatePart.GRADIENTS, StatePart.OPTIMIZER)
    }
    of_trained = lambda part: [n if a.trained else 0 for a, n in zip(arrays, numbers[part], strict=True)]
    stacks = {a.name: n for a, n in zip(arrays, numbers[StatePart.PARAMETERS], strict=True) if a.dims[0] == "layers"}
    bytes_of = {a.name: shapes.held_bytes(model, a, axes, zero, optimizer.parameter_format) for a in arrays}
    held = {name: size for name, size in bytes_of.items() if name in stacks}
    wide = [name for name, size in held.items() if size == FLOAT32 * stacks[name]]
    match platform:
        case Platform.CPU:
            hoisted = sum(held.values())  # seen in every program, not explained
        case Platform.TPU:
            # Products take the compute dtype, and the cast of the whole stack is done once.
            hoisted = 0 if itemsize == FLOAT32 else itemsize * sum(stacks[name] for name in wide)
        case Platform.GPU:
            # A gather needs its dim first: the float32 stack of what fsdp cuts along its last dim is turned round.
            turned = zero is Zero.PARAMETERS and axes["fsdp"] > 1
            embed = [array.name for array in arrays if array.dims[-1] == "embed"]
            hoisted = sum(held.get(name, 0) for name in embed) if turned else 0
        case _:
            assert_never(platform)
    # Under ZeRO-2 TPUs scatter each layer's gradients at once, GPUs those of all layers after the loop.
    gradients = StatePart.GRADIENTS if platform is Platform.TPU else StatePart.PARAMETERS
    return _State(
        parameters=sum(bytes_of.values()),
        optimizer=shapes.optimizer_bytes(model, optimizer, sizes, zero),
        gradients=sum(
            n * (optimizer.parameter_format.itemsize if shapes.is_rounded(a) else FLOAT32)
            for a, n in zip(arrays, of_trained(gradients), strict=True)
        ),
        moment=FLOAT32 * sum(of_trained(StatePart.OPTIMIZER)),
        stacked=FLOAT32 * sum(stacks[array.name] for array in arrays if array.name in stacks and array.trained),
        held=sum(held.values()),
        hoisted=hoisted,
        gathered=tuple(itemsize * _gathered(arrays, f"blocks/{i}/", axes, zero) for i in range(len(model.blocks))),
    )


def _gathered(arrays: Sequence[Array], prefix: str, sizes: Mapping[str, int], zero: Zero) -> int:
    """Gathered weights of one layer that are there at one time: numbers."""
    whole = {**sizes, "fsdp": 1, "stage": 1}
    own = [array for array in arrays if array.name.startswith(prefix) and array.part is not Part.NORMS]
    numbers = lambda array: math.prod(device_shape(array, whole, zero)) // array.stacked
    attention = sum(numbers(array) for array in own if array.part is Part.ATTENTION)
    mlp = [numbers(array) for array in own if array.part is not Part.ATTENTION]
    if any(array.part is Part.EXPERTS for array in own):
        # Experts are gathered by hand, all three matrices at once, and so are their gradients.
        return 2 * sum(mlp)
    return max(attention, 2 * max(mlp))


def _arrays_of_batch(config: RunConfig) -> int:
    """With a number for each token, as `NextToken` and `PolicyGradient` have them."""
    match config.task:
        case Grpo(kl_weight=kl_weight):
            return 5 + 3 + (kl_weight > 0)
        case Ppo(text_weight=text_weight):
            return 5 + 5 + 5 * (text_weight > 0)
        case _:
            return 5


@functools.cache
def _trains(model: ModelConfig, part: Part) -> bool:
    """Whether the table of this part has a gradient. Of Medusa heads each has one; a tied table is both."""
    if model.medusa is not None:
        return True
    parts = {Part.EMBEDDING, Part.UNEMBEDDING} if model.tied else {part}
    return any(array.trained and array.part in parts for array in shapes.arrays(model))


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    sizes: dict[str, int]
    platform: Platform

    def estimate(self) -> MemoryEstimate:
        config, accumulated = self.config, 0
        state = _state(
            config.model,
            config.optimizer,
            tuple(self.sizes.items()),
            config.sharding.zero,
            config.execution.dtype,
            self.platform,
        )
        if self.sizes["stage"] > 1 and config.model.medusa is None:
            accumulated = state.stacked  # the pipeline's turns add up, layer by layer
        elif config.train.micro_batches > 1:
            # Also under ZeRO-1: the compiler cuts the sum as the optimizer, its only reader, wants it.
            accumulated = state.moment
        moved = state.held if config.sharding.virtual_stages > 1 else 0  # to the stages they run on
        layers = self._layers(config.model.blocks)
        return MemoryEstimate(
            parameters=state.parameters,
            reference=self._reference(),
            critic=0,
            optimizer=state.optimizer,
            batch=4 * _arrays_of_batch(config) * local_tokens(config, self.sizes),
            gradients=state.gradients + accumulated,
            accumulated=accumulated if self.sizes["stage"] == 1 else 0,
            copies=state.hoisted + moved,
            activations=self._activations(layers),
            logits=self._logits(),
            working=self._working(layers, state.gathered),
            engine=0,
        )

    def _reference(self) -> int:
        if not reference_beside(self.config.task, self.config.model):
            return 0
        model, zero = dataclasses.replace(self.config.model, adapter=None), self.config.sharding.zero
        return sum(shapes.held_bytes(model, array, self.sizes, zero) for array in shapes.arrays(model))

    @property
    def itemsize(self) -> int:
        """Of the compute dtype."""
        return self.config.execution.dtype.itemsize

    @functools.cached_property
    def tokens(self) -> int:
        """Of a micro-batch on a device, in the layers."""
        return layer_runs(self.config, self.sizes)[-1].tokens

    @functools.cached_property
    def loss_tokens(self) -> int:
        """Those that embedding and loss have at one time."""
        return loss_tokens(self.config, self.sizes)[1]

    # Saved for the backward pass.

    def _activations(self, layers: Sequence[BlockMemory]) -> int:
        model, sharding, stages = self.config.model, self.config.sharding, self.sizes["stage"]
        if model.medusa is not None:
            return 0  # nothing goes back into the layers
        repeat = sum(layer.saved for layer in layers)
        outside = sum(layer.saved for layer in self._layers(model.first_blocks))
        if model.mtp is not None:  # each module has an embedding beside what a layer has
            outside += model.mtp.depth * (layers[-1].saved + model.d_model * self.itemsize)
        if stages == 1:
            return self.tokens * (outside + model.repeats * repeat)
        ticks = pipeline_ticks(stages, sharding.virtual_stages, self.config.train.micro_batches)
        group = model.repeats // (stages * sharding.virtual_stages) * repeat
        turns = ticks * layers[0].input + group if sharding.remat_stages else ticks * group
        return self.tokens * turns + self.loss_tokens * outside

    def _layers(self, blocks: Sequence[BlockConfig]) -> list[BlockMemory]:
        return [block_memory(self.config, self.sizes, self.platform, block, self.tokens) for block in blocks]

    # There for a while.

    def _logits(self) -> int:
        model, train = self.config.model, self.config.train
        table = model.vocab_size // self.sizes["tensor"]
        chunk = min(train.loss_chunk, self.loss_tokens)
        losses = unembeddings(model)  # whose gradients all wait
        copies = losses if model.medusa is not None else 1
        learns = _trains(model, Part.UNEMBEDDING)
        tables = table * model.d_model * (copies * self.itemsize + losses * FLOAT32 * learns)
        hidden = 2 * losses * self.loss_tokens * model.d_model * self.itemsize
        logits = chunk * table * FLOAT32
        if self.platform is not Platform.TPU:
            # TPUs make the logits' gradient in their place, and add to the table's as they multiply. Other compilers
            # write both beside what they come from.
            gradient = chunk * table * self.itemsize
            logits = max(logits + gradient, gradient + table * model.d_model * FLOAT32 * learns)
        return tables + logits + hidden

    def _working(self, layers: Sequence[BlockMemory], gathered: Sequence[int]) -> int:
        """Of the block whose backward pass needs most; a bound where only the forward pass runs."""
        model = self.config.model
        most = max(weights + self.tokens * one.backward for weights, one in zip(gathered, layers, strict=True))
        if not _trains(model, Part.EMBEDDING):
            return most
        # The table's gradient waits, in the compute dtype, for devices to sum it up.
        return most + model.vocab_size * model.d_model // self.sizes["tensor"] * self.itemsize
