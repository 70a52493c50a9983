"""What Medusa heads learn: the tokens after the next one, on a model that stays as it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config import RunConfig, TrainMedusa
from maxlm.models import Tokens, Unembedding, bind, ops
from maxlm.sharding import Layout
from maxlm.training.ahead import ahead
from maxlm.training.losses import cross_entropy_sums
from maxlm.training.objective import Batch, NextToken, Params, Sums, loss_options


class LaterTokens(NextToken):
    """The sum over heads k of weight^k times the cross-entropy of the token k places after the next ("Medusa-1",
    arXiv:2401.10774, section 2.2.1, with lambda_k = weight^k). Nothing goes back into the model beneath the heads."""

    def __init__(self, config: RunConfig, task: TrainMedusa, layout: Layout) -> None:
        super().__init__(config, layout)
        self._weight = task.weight

    def draw(self, batch: Batch, key: jax.Array) -> Batch:
        """Nothing: routers that are noisy in training are not trained."""
        return batch

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        layout, train, medusa = self._layout, self._config.train, self._config.model.medusa
        assert medusa is not None
        model = bind(self._config.model, params)
        # Before the columns are put in another order.
        later = {k: ahead(batch, k) for k in range(1, medusa.n_heads + 1)}
        shifted = {f"targets_{k}": one.targets for k, one in later.items()}
        shifted |= {f"mask_{k}": one.mask for k, one in later.items()}
        batch = self._how.arrange(batch | shifted)
        tokens = Tokens(batch["positions"], batch["segment_ids"])
        output = model(model.embeddings(batch["inputs"], tokens, self._how), tokens, self._how)
        hidden = jax.lax.stop_gradient(output.hidden)
        with jax.named_scope("loss"):
            objective, means = jnp.float32(0), {}
            for k, (states, unembedding) in enumerate(model.later(hidden, self._how), start=1):
                targets, mask = batch[f"targets_{k}"], batch[f"mask_{k}"]
                sums = cross_entropy_sums(layout, states, unembedding, targets, mask, **loss_options(train))
                objective += self._weight**k * sums.objective
                means[f"medusa_{k}_loss"] = sums.cross_entropy
            return Sums(objective, jnp.sum(batch["loss_mask"]), means)

    def ranks(self, params: Params, batch: Batch, most: int) -> jax.Array:
        """How often each head has the token that came as its best guess, its second best, and so on: float32
        [heads, most + 1], of which the last is the number of tokens that it guessed at."""
        medusa = self._config.model.medusa
        assert medusa is not None
        model, how = bind(self._config.model, params), self._how
        later = [ahead(batch, k) for k in range(1, medusa.n_heads + 1)]
        pairs = {f"later_{k}": jnp.stack([one.targets, one.mask], -1) for k, one in enumerate(later)}
        batch = how.arrange(batch | pairs)
        tokens = Tokens(batch["positions"], batch["segment_ids"])
        hidden = model(model.embeddings(batch["inputs"], tokens, how), tokens, how).hidden

        def of_head(states: jax.Array, unembedding: Unembedding, later: jax.Array) -> jax.Array:
            def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
                logits, (targets, counts) = ops.logits(row[0], unembedding), row[1].T
                at_target = jnp.take_along_axis(logits, targets.astype(jnp.int32)[:, None], -1)
                rank = (logits > at_target).sum(-1)
                hits = (rank[:, None] == jnp.arange(most)) * counts[:, None]
                return jnp.append(hits.sum(0), counts.sum())

            return jax.lax.map(of_row, (states, later)).sum(0)

        heads = enumerate(model.later(hidden, how))
        return jnp.stack([of_head(*head, batch[f"later_{k}"]) for k, head in heads])

    def settle(self, params: Params, router: Any) -> tuple[Params, dict[str, jax.Array]]:
        """As they are: nothing follows the load of experts that are not trained."""
        return params, {}
