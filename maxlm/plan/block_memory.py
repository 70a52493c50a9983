"""What one block of the decoder holds of each token: saved for the backward pass, and at work in it.

Bytes a token on a device. What is saved follows from the blocks' code and from what jax saves of it, and a test
compares the two; what is at work is the compilers' choice, learnt from the buffers of compiled programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from maxlm.config import BlockConfig, Capacity, Context, Dropless, Experts, Mlp, Remat, RunConfig
from maxlm.config.remat import SAVED_NAMES
from maxlm.plan.machines import Platform
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
    def input(self) -> int:
        """What enters the block: a vector of the residual stream, of which sequence_parallel leaves a part."""
        return self._width // (self.sizes["tensor"] if self.config.sharding.sequence_parallel else 1)

    @property
    def saved(self) -> int:
        """What `execution.remat` keeps on the device for the backward pass, the input included."""
        match self.config.execution.remat:
            case Remat.NONE:
                return self._everything
            case Remat.OFFLOAD:
                return self.input
            case remat:
                sizes = self._named
                return self.input + sum(sizes[name] for name in SAVED_NAMES[remat])

    @property
    def backward(self) -> int:
        """The fullest moment of the block's backward pass, without what is saved anyhow: the MLP's products and their
        gradients, four vectors of the residual stream, and attention at work."""
        remat, dense = self.config.execution.remat, not isinstance(self.block.mlp, Experts)
        found = remat in (Remat.NONE, Remat.DOTS) or (remat is Remat.GLU and dense)  # the MLP's products
        keys = self._key_value * (self.sizes["seq"] if self.config.sharding.context is Context.ALL_GATHER else 1)
        times = 1 if found else 2
        if self.platform is Platform.TPU:
            # Our kernels read and write the arrays as they are; elsewhere attention turns its operands round, and sums
            # gradients in float32, and experts' rows have their gradients beside them.
            mlp, attention = self._gate_up * times + self._moved, 2 * self._query + keys
        else:
            mlp, attention = self._mlp_products * times + 2 * self._moved, 5 * self._query + 2 * keys
        return mlp + 4 * self.input + attention

    @property
    def _named(self) -> dict[str, int]:
        """By the names of `SAVED_NAMES`; under "grouped_out" all products that only Remat.DOTS keeps."""
        # Where every device needs all keys, XLA for GPUs computes queries, keys and values everywhere, too.
        gathered = self.platform is not Platform.TPU and self.config.sharding.context is Context.ALL_GATHER
        copies = self.sizes["seq"] if gathered else 1
        before_norm = self._query + self._key_value // 2 if self.block.attention.qk_norm else 0
        return {
            "query": self._query * copies,
            "key": self._key_value // 2 * copies,
            "value": self._key_value // 2 * copies,
            "attention_out": self._query,
            "attention_lse": self._cut(FLOAT32 * self.block.attention.n_heads),
            "glu_gate": self._hidden,
            "glu_up": self._glu - self._hidden,
            "grouped_out": self.input + before_norm + self._mlp_products,
        }

    @property
    def _everything(self) -> int:
        """What jax saves where nothing says what to save: of each norm its input, the normalised input, both in
        float32, and its output; of attention the named arrays; of the MLP gate, up and what the last product reads."""
        model, names = self.config.model, self._named
        norms = len(block_norms(self.block)) * (2 * FLOAT32 * self.input // self._itemsize + self._width)
        if self.block.attention.qk_norm:
            norms += 2 * FLOAT32 * (self._query + self._key_value // 2) // self._itemsize
        products = self._glu + self._hidden
        if isinstance(mlp := self.block.mlp, Experts):
            # Experts, whose gated unit is plain float32, save five arrays of it and what the last product reads, their
            # rows, the router's input, and every choice's result.
            rows = self._slots(mlp) * (self._cut((5 * FLOAT32 + self._itemsize) * mlp.d_ff) + self._width)
            products += round(rows) + FLOAT32 * model.d_model * (1 + mlp.top_k)
        return norms + sum(names[name] for name in SAVED_NAMES[Remat.NAMES]) + products

    # Parts.

    @property
    def _itemsize(self) -> int:
        return self.config.execution.dtype.itemsize

    def _cut(self, size: int) -> int:
        """A device's part of heads or of d_ff."""
        return size // self.sizes["tensor"]

    @property
    def _width(self) -> int:
        """A vector of the residual stream, whole."""
        return self.config.model.d_model * self._itemsize

    @property
    def _query(self) -> int:
        return self._cut(self.block.attention.n_heads * self.block.attention.head_dim * self._itemsize)

    @property
    def _key_value(self) -> int:
        return self._cut(2 * self.block.attention.n_kv_heads * self.block.attention.head_dim * self._itemsize)

    @property
    def _glu(self) -> int:
        """Both inputs of a gated MLP's product, of all experts that every token uses; the one of a plain MLP."""
        return self._hidden if isinstance(self.block.mlp, Mlp) else 2 * self._hidden

    @property
    def _hidden(self) -> int:
        """What an MLP's last product reads, of all experts that every token uses."""
        mlp = self.block.mlp
        d_ff = mlp.n_shared_experts * mlp.d_ff if isinstance(mlp, Experts) else mlp.d_ff
        return self._cut(d_ff * self._itemsize)

    @property
    def _gate_up(self) -> int:
        """The same with the experts that a token is sent to."""
        mlp = self.block.mlp
        if not isinstance(mlp, Experts):
            return self._glu
        return self._glu + round(self._slots(mlp) * 2 * mlp.d_ff * self._itemsize / self.sizes["tensor"])

    @property
    def _mlp_products(self) -> int:
        """Gate and up; of experts also what comes out of them, which their gates' gradients need."""
        mlp = self.block.mlp
        if not isinstance(mlp, Experts):
            return self._gate_up
        return self._gate_up + round(self._slots(mlp) * self._width) + FLOAT32 * mlp.n_experts

    @property
    def _moved(self) -> int:
        """Tokens on their way to experts and back: the rows that leave, that arrive, that return, and each choice's."""
        mlp = self.block.mlp
        return 0 if not isinstance(mlp, Experts) else round((2 * self._slots(mlp) + mlp.top_k) * self._width)

    def _slots(self, mlp: Experts) -> float:
        """Rows of the buffer that a device's experts read, for each of the device's tokens (`ops/experts.py`)."""
        devices = self.sizes["expert"]
        match mlp.dispatch:
            case Capacity(factor=factor):
                return factor * mlp.top_k
            case Dropless() as dispatch:
                if devices == 1:
                    return mlp.top_k
                return devices * dispatch.room(mlp.top_k, top_k=mlp.top_k, n_experts=mlp.n_experts, devices=devices)
            case _:
                assert_never(mlp.dispatch)
