"""What objectives about whole texts share: their arrays, and what a model says of each text."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import RunConfig
from maxlm.models import Decoder, DecoderOutput
from maxlm.sharding import Layout
from maxlm.training.losses import token_log_probs
from maxlm.training.objective import Batch, BatchArray, NextToken, Params, in_parts
from maxlm.training.text_sums import text_sums

OF_TEXTS = ("text_record", "text_value", "text_number")
"""Names of the arrays [B, S] of a batch."""


class TextLogProbs(NamedTuple):
    """Of each text, float32 [B, S]."""

    total: jax.Array
    """The sum over its counted tokens, nats."""
    tokens: jax.Array
    """How many those are."""

    @property
    def mean(self) -> jax.Array:
        """Of its counted tokens; 0 where there are none."""
        return self.total / jnp.maximum(self.tokens, 1)


class TextObjective(NextToken):
    """Of texts, each whole in its row, and those of a record in one row.

    Beside those of `NextToken` a batch has `text_ends` float32 [B, T], 1 at each text's last token, and `text_record`
    int32, `text_value` float32, `text_number` int32 [B, S]: the record of its row, value and number in the data set of
    the text that is segment s + 1; record and number are -1 where there is none.
    """

    def __init__(self, config: RunConfig, layout: Layout, texts: int) -> None:
        """texts: S, the most texts of a row."""
        super().__init__(config, layout)
        self._texts, self._n_tokens = texts, config.train.batch_size * config.train.seq_len
        tokens, rows = (config.train.batch_size, config.train.seq_len), (config.train.batch_size, texts)
        of_rows = {name: BatchArray(rows, jnp.int32, ("batch", None)) for name in OF_TEXTS}
        self.arrays = (
            dict(self.arrays)
            | of_rows
            | {
                "text_value": BatchArray(rows, jnp.float32, ("batch", None)),
                "text_ends": BatchArray(tokens, jnp.float32, ("batch", "seq")),
            }
        )

    def weight(self, batch: Batch) -> jax.Array:
        """`Sums.weight` of some rows: the texts, unless a class says otherwise."""
        return (batch["text_record"] >= 0).sum().astype(jnp.float32)

    def by_text(self, params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        """What the model says of each text, as arrays [B, S, ...], with those of the batch beside them, all with their
        rows in one order."""
        batch = self._in_order(batch)
        model, output = self._read(self._config.model, params, batch)
        return {name: batch[name] for name in OF_TEXTS} | self._of_texts(model, output, frozen, batch)

    @abc.abstractmethod
    def _of_texts(self, model: Decoder, output: DecoderOutput, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        """Arrays [B, S, ...] by name."""

    def counted(self, params: Params, frozen: Any, batch: Batch) -> Any:
        """The batch's weight for each of its tokens."""
        return self.weight(batch) / self._n_tokens

    @property
    def _at_once(self) -> bool:
        """Whether the loss sees the whole batch."""
        return self._config.train.micro_batches == 1 or self._layout.mesh.shape["stage"] > 1

    def _in_order(self, batch: Batch) -> Batch:
        """As the mesh cuts it."""
        return self._how.arrange(batch, [name for name, array in self.arrays.items() if array.dims[1] is None])

    def _of_all_rows(self, of_rows: Any, batch: Batch) -> Any:
        """A tree of arrays [B, ...], from a function of some rows, a micro-batch at a time."""
        if self._at_once:
            return of_rows(batch)
        found = jax.lax.map(of_rows, in_parts(self, self._layout, batch, self._config.train.micro_batches))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)

    def _token_log_probs(self, model: Decoder, output: DecoderOutput, batch: Batch) -> jax.Array:
        """Of each target, float32 [B, T]."""
        chunk = self._config.train.loss_chunk
        return token_log_probs(self._layout, output.hidden, model.unembedding, batch["targets"], chunk=chunk)

    def _log_probs(self, of_tokens: jax.Array, mask: jax.Array, batch: Batch) -> TextLogProbs:
        """[B, T] and [B, T] -> of each text."""
        return TextLogProbs(self._totals(of_tokens * mask, batch), self._totals(mask, batch))

    def _totals(self, values: jax.Array, batch: Batch) -> jax.Array:
        """[B, T] or [B, T, D] -> the sums of each text, float32 [B, S] or [B, S, D]."""
        return text_sums(values, batch["segment_ids"], self._texts)

    def _last(self, output: DecoderOutput, batch: Batch) -> jax.Array:
        """The state of each text's last token, [B, S, D] in the compute dtype."""
        states = self._totals(output.hidden * batch["text_ends"][..., None].astype(output.hidden.dtype), batch)
        return states.astype(output.hidden.dtype)
