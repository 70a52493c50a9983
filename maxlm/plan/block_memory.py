"""What one block of the decoder holds of each token: saved for the backward pass, and at work in it.

Bytes a token on a device. What is saved follows from the blocks' code and from what jax saves of it, and a test
compares the two; what is at work is the compilers' choice, learnt from the buffers of compiled programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from maxlm.config import (
    BlockConfig,
    Capacity,
    Context,
    Dropless,
    ExpertChoiceRouter,
    Experts,
    GatedMlp,
    Mlp,
    Remat,
    RunConfig,
)
from maxlm.plan.targets import Platform
from maxlm.shapes import FLOAT32, block_norms


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes a token on a device of one block's intermediates."""

    config: RunConfig
    sizes: Mapping[str, int]
    """Mesh axis -> size."""
    platform: Platform
    block: BlockConfig

    @property
    def itemsize(self) -> int:
        """Of the compute dtype."""
        return self.config.execution.dtype.itemsize

    @property
    def tensor(self) -> int:
        """Parts that heads and d_ff are cut into."""
        return self.sizes["tensor"]

    @property
    def residual(self) -> int:
        """Parts that the residual stream of a device's tokens is cut into."""
        return self.tensor if self.config.sharding.sequence_parallel else 1

    @property
    def input(self) -> int:
        """What enters the block."""
        return self.width // self.residual

    @property
    def width(self) -> int:
        """A vector of the residual stream, whole."""
        return self.config.model.d_model * self.itemsize

    @property
    def query(self) -> int:
        attention = self.block.attention
        return attention.n_heads * attention.head_dim * self.itemsize // self.tensor

    @property
    def key_value(self) -> int:
        attention = self.block.attention
        return 2 * attention.n_kv_heads * attention.head_dim * self.itemsize // self.tensor

    @property
    def inputs(self) -> int:
        """Query, key and value of the attention kernel, as they are saved."""
        if self.platform is not Platform.TPU and self.config.sharding.context is Context.ALL_GATHER:
            # Every device needs all keys, and XLA for GPUs then computes all of the three everywhere.
            return (self.query + self.key_value) * self.sizes["seq"]
        return self.query + self.key_value

    @property
    def named(self) -> int:
        """These, and attention's output with the logarithm of its sum."""
        return self.inputs + self.query + FLOAT32 * self.block.attention.n_heads // self.tensor

    @property
    def glu(self) -> int:
        """Both inputs of a gated MLP's product, of all experts that every token uses; the one of a plain MLP."""
        return self._hidden if isinstance(self.block.mlp, Mlp) else 2 * self._hidden

    @property
    def _hidden(self) -> int:
        """What an MLP's last product reads, of all experts that every token uses."""
        mlp = self.block.mlp
        d_ff = mlp.n_shared_experts * mlp.d_ff if isinstance(mlp, Experts) else mlp.d_ff
        return d_ff * self.itemsize // self.tensor

    @property
    def products(self) -> int:
        """Other results of weights: the output projection's, those before a norm of heads, and the MLP's."""
        before_norm = self.query + self.key_value // 2 if self.block.attention.qk_norm else 0
        return self.width // self.residual + before_norm + self._mlp_products

    @property
    def everything(self) -> int:
        """What jax saves where nothing says what to save: of each norm its input, the normalised input, both in
        float32, and its output; of attention the named arrays; of the MLP what `_mlp_everything` says."""
        model, attention = self.config.model, self.block.attention
        norms = len(block_norms(self.block)) * (2 * FLOAT32 * model.d_model // self.residual + self.width)
        if attention.qk_norm:
            norms += 2 * FLOAT32 * (self.query + self.key_value // 2) // self.itemsize
        return norms + self.named + self._mlp_everything

    @property
    def backward(self) -> int:
        """The fullest moment of the block's backward pass, without what is saved anyhow: the MLP's products and their
        gradients, four vectors of the residual stream, and attention at work."""
        kernels = self.platform is Platform.TPU
        # On TPUs our kernels read and write the arrays as they are; elsewhere attention turns its operands round, and
        # sums gradients in float32, and experts' rows have their gradients beside them.
        products = self._gate_up if kernels else self._mlp_products
        mlp = products * (1 if self._mlp_saved else 2) + self._moved * (1 if kernels else 2)
        attention = 2 * self.query + self._keys if kernels else 5 * self.query + 2 * self._keys
        return mlp + 4 * self.width // self.residual + attention

    @property
    def _keys(self) -> int:
        """Keys and values, or their gradients, that a device has at one time for each of its own tokens."""
        match self.config.sharding.context:
            case Context.ALL_GATHER:
                return self.key_value * self.sizes["seq"]
            case Context.RING | Context.ULYSSES:
                return self.key_value
            case _:
                assert_never(self.config.sharding.context)

    @property
    def _mlp_products(self) -> int:
        """Gate and up; of experts also what comes out of them, which their gates' gradients need."""
        mlp = self.block.mlp
        match mlp:
            case Mlp() | GatedMlp():
                return self._gate_up
            case Experts():
                return self._gate_up + round(self._slots * self.width) + FLOAT32 * mlp.n_experts
            case _:
                assert_never(mlp)

    @property
    def _gate_up(self) -> int:
        mlp = self.block.mlp
        match mlp:
            case Mlp() | GatedMlp():
                return self.glu
            case Experts():
                return self.glu + round(self._slots * 2 * mlp.d_ff * self.itemsize / self.tensor)
            case _:
                assert_never(mlp)

    @property
    def _mlp_saved(self) -> bool:
        """Whether the backward pass finds the MLP's products."""
        remat = self.config.execution.remat
        return remat in (Remat.NONE, Remat.DOTS) or (remat is Remat.GLU and not isinstance(self.block.mlp, Experts))

    @property
    def _mlp_everything(self) -> int:
        """Gate, up and what the last product reads. Experts, whose gated unit is plain float32, save five arrays of it,
        their rows, the router's input and every choice's result, and what the last product reads."""
        mlp, d_model = self.block.mlp, self.config.model.d_model
        dense = self.glu + self._hidden
        match mlp:
            case Mlp() | GatedMlp():
                return dense
            case Experts():
                gated = (5 * FLOAT32 + self.itemsize) * mlp.d_ff // self.tensor
                rows = self._slots * (gated + self.width)
                return dense + round(rows) + FLOAT32 * d_model * (1 + _choices(mlp))
            case _:
                assert_never(mlp)

    @property
    def _moved(self) -> int:
        """Tokens on their way to experts and back: the rows that leave, that arrive, that return, and each choice's."""
        mlp = self.block.mlp
        match mlp:
            case Mlp() | GatedMlp():
                return 0
            case Experts():
                return round((2 * self._slots + _choices(mlp)) * self.width)
            case _:
                assert_never(mlp)

    @property
    def _slots(self) -> float:
        """Rows of the buffer that a device's experts read, for each of the device's tokens (`ops/experts.py`)."""
        mlp, devices = self.block.mlp, self.sizes["expert"]
        assert isinstance(mlp, Experts)
        choices = _choices(mlp)
        match mlp.dispatch:
            case Capacity(factor=factor):
                return factor * choices
            case Dropless(buffer=buffer):
                if devices == 1:
                    return choices
                # Each device has room for what every other one may send it.
                room = float(min(choices, mlp.n_experts // devices))
                if buffer is not None:
                    room = min(room, buffer * choices / devices)
                return devices * room
            case _:
                assert_never(mlp.dispatch)


def _choices(mlp: Experts) -> int:
    """Experts of a token; where experts choose, `Capacity` alone tells how many."""
    return 1 if isinstance(mlp.router, ExpertChoiceRouter) else mlp.router.top_k
