"""What supervised fine-tuning adds to the loss of the next token: noise on the embeddings, and weights of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.config import Gold, RunConfig, Sft
from maxlm.models import Decoder, Tokens
from maxlm.sharding import Layout
from maxlm.training.losses import LossSums, token_log_probs
from maxlm.training.objective import Batch, NextToken

_NOISE = "noise_seeds"


class Answers(NextToken):
    """Cross-entropy of the targets that the mask counts, which are the assistant's.

    Every one of them weighs the same, whatever text, micro-batch or device it is in.
    """

    def __init__(self, config: RunConfig, task: Sft, layout: Layout) -> None:
        super().__init__(config, layout)
        self._task = task

    def draw(self, batch: Batch, key: jax.Array) -> Batch:
        """As of pre-training, and seeds of the noise, uint32 [B]. Where nothing is drawn, as on held-out text, there is
        no noise."""
        batch = super().draw(batch, key)
        if not self._task.neftune_alpha:
            return batch
        seeds = jax.random.bits(jax.random.fold_in(key, 1), batch["inputs"].shape[:1], jnp.uint32)
        return {**batch, _NOISE: self._layout.constrain(seeds, "batch")}

    def _embeddings(self, model: Decoder, batch: Batch, tokens: Tokens) -> jax.Array:
        x = super()._embeddings(model, batch, tokens)
        if _NOISE not in batch:
            return x
        with jax.named_scope("noise"):
            of_row = lambda seed: jax.random.uniform(jax.random.key(seed), x.shape[1:], jnp.float32, -1, 1)
            noise = jax.vmap(of_row)(batch[_NOISE])
            size = self._task.neftune_alpha * (_lengths(batch["segment_ids"]) * x.shape[-1]) ** -0.5
            noise = self._layout.constrain(noise * size[..., None], "batch", "residual_seq", "embed")
            return x + noise.astype(x.dtype)

    def _cross_entropy(self, model: Decoder, hidden: jax.Array, batch: Batch) -> LossSums:
        match self._task.gold:
            case None:
                return super()._cross_entropy(model, hidden, batch)
            case Gold(alpha=alpha, beta=beta):
                log_probs = token_log_probs(
                    self._layout, hidden, model.unembedding, batch["targets"], chunk=self._config.train.loss_chunk
                )
                weights = jax.lax.stop_gradient(jnp.maximum(jnp.exp(alpha * log_probs), beta))
                loss = -(batch["loss_mask"] * log_probs)
                return LossSums((weights * loss).sum(), jax.lax.stop_gradient(loss.sum()), jnp.float32(0))


def _lengths(segment_ids: jax.Array) -> jax.Array:
    """Of each token the length of its text: int32 [B, T] -> float32 [B, T]."""
    T = segment_ids.shape[1]
    of_row = lambda ids: jnp.zeros(T + 2, jnp.float32).at[ids].add(1)[ids]
    return jax.vmap(of_row)(segment_ids)
