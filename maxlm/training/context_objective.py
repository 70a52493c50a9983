"""To answer as a model does that is told a context (context distillation)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models import Decoder, DecoderOutput
from maxlm.training.losses import divergence_sum
from maxlm.training.objective import Batch, Params, Sums
from maxlm.training.preference_objective import Referenced

_PLACE = "counted_before"
"""Array int32 [B, T]: how many tokens of the row count before each."""


class UntoldTexts(Referenced):
    """The sum over the answers' tokens of KL(told || untold), in nats (Askell et al. 2021, arXiv:2112.00861, section
    2.2). A record has a conversation, value 1, which the model reads, and the same with a context, value 0, which the
    reference reads; the n-th token that counts in one is the n-th in the other. A batch weighs as many as it has of
    them.

    Both texts lie in the row that both models read: each also reads what it says nothing of.
    """

    def weight(self, batch: Batch) -> jax.Array:
        return self._untold(batch).sum()

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        mask = batch["loss_mask"].astype(jnp.int32)
        batch = self._in_order(batch | {_PLACE: jnp.cumsum(mask, 1) - mask})
        teacher, told = self._told(self._held_to(params, frozen), batch)
        model, output = self._read(self._config.model, params, batch)
        with jax.named_scope("loss"):
            untold, chunk = self._untold(batch), self._config.train.loss_chunk
            states = (output.hidden, model.unembedding, told, teacher.unembedding)
            found = divergence_sum(self._layout, *states, untold, chunk=chunk)
            return self._sums(found, untold.sum(), {}, output, counted)

    def _of_texts(self, model: Decoder, output: DecoderOutput, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return {}

    def _untold(self, batch: Batch) -> jax.Array:
        """Weights of the answers' tokens in the conversations alone, float32 [B, T]."""
        return batch["loss_mask"] * self._at_tokens(batch["text_value"] > 0, batch)

    def _told(self, held: Any, batch: Batch) -> tuple[Decoder, jax.Array]:
        """The reference, and its states where it is told the context, [B, T, D], each in the place of the token that is
        the same in the conversation alone; elsewhere states of any token."""
        assert self._reference is not None
        without_noise = {name: x for name, x in batch.items() if name != "seeds"}
        teacher, output = self._read_other(self._reference, held, without_noise)
        place, counts = batch[_PLACE], batch["loss_mask"] > 0
        # How many count in the row before each text, and how much later the other of its record begins.
        before = self._totals(place * batch["text_ends"], batch) - self._totals(batch["loss_mask"], batch)
        same = batch["text_record"][:, :, None] == batch["text_record"][:, None, :]
        other = same & (batch["text_value"][:, :, None] > 0) & (batch["text_value"][:, None, :] == 0)
        later = (other * (before[:, None, :] - before[:, :, None])).sum(2)
        # Where the row's n-th token that counts lies; those that do not count fall off.
        rows, T = jnp.arange(len(place))[:, None], place.shape[1]
        lies = jnp.zeros(place.shape, jnp.int32)
        lies = lies.at[rows, jnp.where(counts, place, T)].set(jnp.arange(T, dtype=jnp.int32), mode="drop")
        wanted = place + self._at_tokens(later, batch).astype(jnp.int32)
        at = jnp.take_along_axis(lies, jnp.clip(wanted, 0, T - 1), 1)
        told = jnp.take_along_axis(jax.lax.stop_gradient(output.hidden), at[..., None], 1)
        return teacher, self._layout.constrain(told, "batch", "seq", None)

    def _at_tokens(self, values: jax.Array, batch: Batch) -> jax.Array:
        """[B, S] -> of each token what its text has, float32 [B, T]; 0 where it is of none."""
        member = batch["segment_ids"][:, :, None] == jnp.arange(1, self._texts + 1)
        return jnp.where(member, values[:, None, :].astype(jnp.float32), 0).sum(2)
