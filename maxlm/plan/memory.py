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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from maxlm import shapes
from maxlm.config import ACTIVATION_DIMS, BlockConfig, RunConfig, StatePart, Zero, pipeline_ticks
from maxlm.plan.block_memory import BlockMemory, block_memory
from maxlm.plan.machines import Platform
from maxlm.plan.work import layer_runs, local_tokens, loss_tokens
from maxlm.shapes import FLOAT32, Array, Part, device_bytes, device_shape


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    parameters: int
    """Float32."""
    optimizer: int
    """Adam's two moments, or Adafactor's factors."""
    batch: int
    """Tokens, targets, positions, documents and mask of the whole step."""
    gradients: int
    """Float32, of the micro-batch at work and, where there are several, the sum of the earlier ones."""
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

    @property
    def at_peak(self) -> dict[str, int]:
        """The parts that are there when the device is fullest, by name: those of the loss, or those of the layers."""
        always = {name: getattr(self, name) for name in ("parameters", "optimizer", "batch", "copies", "activations")}
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
    return _Step(config, config.sharding.sizes(n_devices), platform).estimate()


def cache_bytes(config: RunConfig, n_devices: int) -> int:
    """Keys and values of `train.batch_size` sequences of `model.max_seq_len` tokens on a device, in the compute dtype.

    As `Decoder.empty_cache` makes them: rows cut as a batch, heads over tensor; the seq axis cuts nothing.
    """
    sizes = config.sharding.sizes(n_devices)
    cut = lambda size, dim: math.ceil(size / math.prod(sizes[axis] for axis in ACTIVATION_DIMS[dim]))
    attentions = [block.attention for block in config.model.layers]
    numbers = sum(cut(attention.n_kv_heads, "kv_heads") * attention.head_dim for attention in attentions)
    rows = cut(config.train.batch_size, "batch")
    return 2 * rows * config.model.max_seq_len * numbers * config.execution.dtype.itemsize


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    sizes: dict[str, int]
    platform: Platform

    def estimate(self) -> MemoryEstimate:
        arrays = shapes.arrays(self.config.model)
        bytes_of = lambda part: sum(device_bytes(array, self.sizes, self.zero, part) for array in arrays)
        # Under ZeRO-2 TPUs scatter each layer's gradients at once, GPUs those of all layers after the loop.
        tpu = self.platform is Platform.TPU
        gradients, accumulated = bytes_of(StatePart.GRADIENTS if tpu else StatePart.PARAMETERS), 0
        if self.sizes["stage"] > 1:
            accumulated = self._stacked(arrays)  # the pipeline's turns add up, layer by layer
        elif self.config.train.micro_batches > 1:
            # Also under ZeRO-1: the compiler cuts the sum as the optimizer, its only reader, wants it.
            accumulated = bytes_of(StatePart.OPTIMIZER)
        moved = self._stacked(arrays) if self.config.sharding.virtual_stages > 1 else 0  # to the stages they run on
        return MemoryEstimate(
            parameters=bytes_of(StatePart.PARAMETERS),
            optimizer=sum(self._optimizer(array) for array in arrays),
            batch=5 * 4 * local_tokens(self.config, self.sizes),
            gradients=gradients + accumulated,
            accumulated=accumulated if self.sizes["stage"] == 1 else 0,
            copies=self._hoisted(arrays) + moved,
            activations=self._activations(),
            logits=self._logits(),
            working=self._working(arrays),
        )

    @property
    def zero(self) -> Zero:
        return self.config.sharding.zero

    @property
    def itemsize(self) -> int:
        """Of the compute dtype."""
        return self.config.execution.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a device, in the layers."""
        return layer_runs(self.config, self.sizes)[-1].tokens

    @property
    def loss_tokens(self) -> int:
        """Those that embedding and loss have at one time."""
        return loss_tokens(self.config, self.sizes)[1]

    def _stacked(self, arrays: Sequence[Array], size: int = FLOAT32) -> int:
        """Bytes of the stacks of layers among the parameters, with numbers of that size."""
        stacks = [array for array in arrays if array.dims[0] == "layers"]
        return sum(device_bytes(array, self.sizes, self.zero, StatePart.PARAMETERS, size) for array in stacks)

    def _optimizer(self, array: Array) -> int:
        state = self.config.optimizer.state(array.shape, self.config.model.repeats)
        whole = lambda itemsize: device_bytes(array, self.sizes, self.zero, StatePart.OPTIMIZER, itemsize)
        return sum(map(whole, state.like_parameter)) + state.everywhere

    def _hoisted(self, arrays: Sequence[Array]) -> int:
        """What XLA moves out of the loop over the layers, because it does not depend on the turn."""
        match self.platform:
            case Platform.CPU:
                return self._stacked(arrays)  # seen in every program, not explained
            case Platform.TPU:
                # Products take the compute dtype, and the cast of the whole stack is done once.
                return 0 if self.itemsize == FLOAT32 else self._stacked(arrays, self.itemsize)
            case Platform.GPU:
                # A gather needs its dim first: the float32 stack of what fsdp cuts along its last dim is turned round.
                gathered = self.zero is Zero.PARAMETERS and self.sizes["fsdp"] > 1
                return self._stacked([array for array in arrays if array.dims[-1] == "embed"]) if gathered else 0
            case _:
                assert_never(self.platform)

    # Saved for the backward pass.

    def _activations(self) -> int:
        model, sharding = self.config.model, self.config.sharding
        layers, stages = self._layers(model.blocks), self.sizes["stage"]
        repeat = sum(layer.saved for layer in layers)
        first = sum(layer.saved for layer in self._layers(model.first_blocks))
        if stages == 1:
            return self.tokens * (first + model.repeats * repeat)
        ticks = pipeline_ticks(stages, sharding.virtual_stages, self.config.train.micro_batches)
        group = model.repeats // (stages * sharding.virtual_stages) * repeat
        turns = ticks * layers[0].input + group if sharding.remat_stages else ticks * group
        return self.tokens * turns + self.loss_tokens * first

    def _layers(self, blocks: Sequence[BlockConfig]) -> list[BlockMemory]:
        return [block_memory(self.config, self.sizes, self.platform, block, self.tokens) for block in blocks]

    # There for a while.

    def _logits(self) -> int:
        model, train = self.config.model, self.config.train
        table = model.vocab_size // self.sizes["tensor"]
        chunk = min(train.loss_chunk, self.loss_tokens)
        tables = table * model.d_model * (self.itemsize + FLOAT32)
        hidden = 2 * self.loss_tokens * model.d_model * self.itemsize
        logits = chunk * table * FLOAT32
        if self.platform is not Platform.TPU:
            # TPUs make the logits' gradient in their place, and add to the table's as they multiply. Other compilers
            # write both beside what they come from.
            gradient = chunk * table * self.itemsize
            logits = max(logits + gradient, gradient + table * model.d_model * FLOAT32)
        return tables + logits + hidden

    def _working(self, arrays: Sequence[Array]) -> int:
        """Of the block whose backward pass needs most."""
        model = self.config.model
        layers = enumerate(self._layers(model.blocks))
        most = max(self._weights(arrays, f"blocks/{i}/") + self.tokens * layer.backward for i, layer in layers)
        # The table's gradient waits, in the compute dtype, for devices to sum it up.
        return most + model.vocab_size * model.d_model // self.sizes["tensor"] * self.itemsize

    def _weights(self, arrays: Sequence[Array], prefix: str) -> int:
        """Gathered weights of one layer that are there at one time, in the compute dtype."""
        whole = {**self.sizes, "fsdp": 1, "stage": 1}
        own = [array for array in arrays if array.name.startswith(prefix) and array.part is not Part.NORMS]
        numbers = lambda array: math.prod(device_shape(array, whole, self.zero)) // array.stacked
        attention = sum(numbers(array) for array in own if array.part is Part.ATTENTION)
        mlp = [numbers(array) for array in own if array.part is not Part.ATTENTION]
        if any(array.part is Part.EXPERTS for array in own):
            # Experts are gathered by hand, all three matrices at once, and so are their gradients.
            return self.itemsize * 2 * sum(mlp)
        return self.itemsize * max(attention, 2 * max(mlp))
