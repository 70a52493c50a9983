"""How a model runs, as it travels with every call: mesh, number format, kernels. What the model is, its config says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from maxlm.config import ExecutionConfig, KernelConfig, Remat, RunConfig
from maxlm.models.ops.ring import in_ring_order
from maxlm.models.pipeline import in_pipeline_order
from maxlm.sharding import Layout


@dataclass(frozen=True)
class Execution:
    """Static under jit."""

    layout: Layout
    config: ExecutionConfig = field(default_factory=ExecutionConfig)
    micro_batches: int = 1
    """Parts of a batch that flow through the pipeline, where there is one."""

    @staticmethod
    def of(config: RunConfig, layout: Layout) -> Execution:
        """As a run's config says."""
        return Execution(layout, config.execution, config.train.micro_batches)

    def decoding(self, layout: Layout) -> Execution:
        """For single tokens: nothing is saved for a backward pass, and kernels are those that suit."""
        config = dataclasses.replace(self.config, remat=Remat.NONE, kernels=KernelConfig())
        return Execution(layout, config)

    def arrange(self, batch: dict[str, jax.Array], of_texts: Collection[str] = ()) -> dict[str, jax.Array]:
        """A batch of arrays [B] or [B, T] in the order in which this mesh cuts it: rows as a pipeline's micro-batches,
        columns as a ring's chunks. All that knows rows and columns by number comes before.

        Args:
            batch: it.
            of_texts: names of arrays [B, S] in it, whose columns are not tokens but a row's texts.
        """
        by_token = {name: x for name, x in batch.items() if name not in of_texts}
        by_text = {name: batch[name] for name in of_texts}
        order = functools.partial(in_pipeline_order, self.layout, micro_batches=self.micro_batches)
        return in_ring_order(self.layout, order(by_token)) | order(by_text, columns=None)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and products."""
        return jnp.dtype(self.config.dtype.value)

    @property
    def kernels(self) -> KernelConfig:
        return self.config.kernels
