"""Vectors of texts: each query near its own passage, far from all others of the batch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from maxlm.config import EmbedHead, Pooling, RunConfig
from maxlm.models import Decoder, DecoderOutput
from maxlm.sharding import Layout
from maxlm.training import preference_losses as losses
from maxlm.training.objective import Batch, Params, Sums
from maxlm.training.text_objective import TextObjective

_ROW = "row"
"""Array int32 [B] that a step adds: the number of each row in the whole batch."""


class _Pulls(NamedTuple):
    """The loss of the whole batch, and which way it pulls."""

    found: losses.InfoNce
    """[B, P], of each row's pairs."""
    vectors: jax.Array
    """Gradient for each text's vector, [B, S, D]."""
    log_scale: jax.Array
    """Gradient, a scalar."""


class Vectors(TextObjective):
    """InfoNCE, to which all other pairs of the batch, over all micro-batches and devices, are negatives
    (arXiv:2103.00020).

    A record has a query, of value 1, its passage, of value 0, and perhaps passages that are no query's own, of value
    -1; a batch weighs as many as it has queries. In micro-batches the vectors of all rows are computed first, then the
    loss's gradient for them, then that for the parameters, a micro-batch at a time (GradCache, Gao et al. 2021,
    arXiv:2101.06983): that of the whole batch.
    """

    def __init__(self, config: RunConfig, layout: Layout, texts: int) -> None:
        super().__init__(config, layout, texts)
        assert isinstance(config.model.head, EmbedHead)
        self._pooling = config.model.head.pooling

    def weight(self, batch: Batch) -> jax.Array:
        """The pairs."""
        return _matches(batch).sum()

    def draw(self, batch: Batch, key: jax.Array) -> Batch:
        """Beside what is random, the numbers of the rows."""
        rows = jnp.arange(len(batch["inputs"]), dtype=jnp.int32)
        return super().draw(batch, key) | {_ROW: self._layout.constrain(rows, "batch")}

    def _of_texts(self, model: Decoder, output: DecoderOutput, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return {"vectors": self._vectors(output, batch)}

    def _vectors(self, output: DecoderOutput, batch: Batch) -> jax.Array:
        """float32 [B, S, D]."""
        match self._pooling:
            case Pooling.MEAN:
                tokens = self._totals(jnp.ones(batch["inputs"].shape, jnp.float32), batch)
                return self._totals(output.hidden, batch) / jnp.maximum(tokens, 1)[..., None]
            case Pooling.LAST:
                return self._last(output, batch).astype(jnp.float32)
            case _:
                assert_never(self._pooling)

    def counted(self, params: Params, frozen: Any, batch: Batch) -> Any:
        """Beside the share the pulls of the whole batch, unless the loss sees it itself."""
        share = super().counted(params, frozen, batch)
        if self._at_once:
            return share, None

        def of_rows(batch: Batch) -> jax.Array:
            batch = self._in_order(batch)
            return self._vectors(self._read(self._config.model, params, batch)[1], batch)

        def whole(vectors: jax.Array, log_scale: jax.Array) -> tuple[jax.Array, losses.InfoNce]:
            found = self._info_nce(vectors, log_scale, batch)
            return found.loss.sum(), found

        gradient = jax.grad(whole, (0, 1), has_aux=True)
        (of_vectors, of_scale), found = gradient(self._of_all_rows(of_rows, batch), params["log_scale"][0])
        return share, _Pulls(found, of_vectors, of_scale)

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        share, pulls = counted
        batch = self._in_order(batch)
        _, output = self._read(self._config.model, params, batch)
        with jax.named_scope("loss"):
            vectors, log_scale, weight = self._vectors(output, batch), params["log_scale"][0], self.weight(batch)
            if pulls is None:
                found = self._info_nce(vectors, log_scale, batch)
                objective = found.loss.sum()
            else:
                rows = batch[_ROW]
                found = jax.tree.map(lambda x: x[rows], pulls.found)
                # Its gradient is that of the whole batch's loss, as far as these rows have a part in it; of the scale
                # each micro-batch has its share.
                pulled = (vectors * pulls.vectors[rows]).sum()
                pulled += log_scale * pulls.log_scale * weight / (share * self._n_tokens)
                objective = found.loss.sum() + pulled - jax.lax.stop_gradient(pulled)
            means = {"loss": found.loss.sum(), "accuracy": found.right.sum()}
            return self._sums(objective, weight, means, output, share)

    def _info_nce(self, vectors: jax.Array, log_scale: jax.Array, batch: Batch) -> losses.InfoNce:
        """Of each row's pairs, [B, P] with P = S // 2, in the order of their queries."""
        matches, value = _matches(batch), batch["text_value"]
        rows, most, constrain = len(matches), self._texts // 2, self._layout.constrain
        own = jnp.einsum("bij,bjd->bid", matches, vectors, precision="highest")
        at_queries = functools.partial(_first, matches.sum(2) > 0, most)
        # A row has as many hard negatives as a query and its passage leave room for.
        is_negative = (batch["text_record"] >= 0) & (value < 0)
        at_negatives = functools.partial(_first, is_negative, self._texts - 2)
        found = losses.info_nce(
            constrain(at_queries(vectors), "batch", None),
            constrain(at_queries(own), None, None),
            log_scale,
            at_queries(matches.sum(2)) > 0,
            *((constrain(at_negatives(vectors), None, None), at_negatives(is_negative)) if self._texts > 2 else ()),
        )
        return jax.tree.map(lambda x: x.reshape(rows, most), found)

    def settle(self, params: Params, router: Any) -> tuple[Params, dict[str, jax.Array]]:
        """Beside the routers, the factor of the cosines, kept at or below 100."""
        params, figures = super().settle(params, router)
        log_scale = jnp.minimum(params["log_scale"], losses.MOST_SCALE)
        return params | {"log_scale": log_scale}, figures | {"cosine_scale": jnp.exp(log_scale[0])}


def _matches(batch: Batch) -> jax.Array:
    """float32 [B, S, S]: 1 where text i is the query of passage j."""
    record, value = batch["text_record"], batch["text_value"]
    same = (record[:, :, None] == record[:, None, :]) & (record[:, :, None] >= 0)
    return (same & (value[:, :, None] > 0) & (value[:, None, :] == 0)).astype(jnp.float32)


def _first(chosen: jax.Array, most: int, x: jax.Array) -> jax.Array:
    """[B, S, ...] -> [B * most, ...], in each row those that are chosen first."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    taken = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), 1)
    return taken.reshape(-1, *x.shape[2:])
