"""A number or a class for each text, of the state of its last token: reward models and classifiers."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp

from maxlm.config import BinaryReward, BradleyTerry, Classify, Reward, RunConfig
from maxlm.models import Decoder, DecoderOutput
from maxlm.sharding import Layout
from maxlm.training import preference_losses as losses
from maxlm.training.objective import Batch, Params, Sums
from maxlm.training.text_objective import TextObjective


class Rewards(TextObjective):
    """How good people find a completion. A batch weighs as many as it has records with a pair; with labels, as many as
    it has texts."""

    def __init__(self, config: RunConfig, layout: Layout, texts: int, task: Reward) -> None:
        super().__init__(config, layout, texts)
        self._task = task

    def weight(self, batch: Batch) -> jax.Array:
        match self._task.loss:
            case BradleyTerry():
                return losses.pair_weights(batch["text_record"], batch["text_value"]).sum()
            case BinaryReward():
                return super().weight(batch)
            case _:
                assert_never(self._task.loss)

    def _of_texts(self, model: Decoder, output: DecoderOutput, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return {"reward": model.scalars(self._last(output, batch))}

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        batch = self._in_order(batch)
        model, output = self._read(self._config.model, params, batch)
        with jax.named_scope("loss"):
            reward = model.scalars(self._last(output, batch))
            objective, good, means = self._judged(reward, batch)
            if self._task.lm_weight:
                of_texts = self._log_probs(self._token_log_probs(model, output, batch), batch["loss_mask"], batch)
                means["lm_loss"] = (good * -of_texts.mean).sum()
                objective += self._task.lm_weight * means["lm_loss"]
            return self._sums(objective, self.weight(batch), means, output, counted)

    def _judged(self, reward: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """The loss; how much each text's own loss counts, as it is a good one, [B, S]; figures."""
        value = batch["text_value"]
        match self._task.loss:
            case BradleyTerry(margin=margin):
                weights = losses.pair_weights(batch["text_record"], value)
                # [b, i, j]: of i, better than j.
                apart, asked = (x[:, :, None] - x[:, None, :] for x in (reward, margin * value))
                objective = (weights * losses.bradley_terry(apart, jnp.float32(0), asked)).sum()
                means = {
                    "reward_chosen": (weights * reward[:, :, None]).sum(),
                    "reward_rejected": (weights * reward[:, None, :]).sum(),
                    "reward_margin": (weights * apart).sum(),
                    "reward_accuracy": (weights * (jnp.sign(apart) + 1) / 2).sum(),
                }
                return objective, weights.sum(2), means
            case BinaryReward():
                there = batch["text_record"] >= 0
                right = there & ((reward > 0) == (value > 0.5))
                means = {"reward_accuracy": right.sum().astype(jnp.float32)}
                return (there * losses.binary(reward, value)).sum(), there * (value > 0.5), means
            case _:
                assert_never(self._task.loss)


class Classes(TextObjective):
    """Cross-entropy of each text's class; with `lm_weight` beside the text's own loss (GPT-1, Radford et al. 2018,
    section 3.2). A batch weighs as many as it has texts."""

    def __init__(self, config: RunConfig, layout: Layout, texts: int, task: Classify) -> None:
        super().__init__(config, layout, texts)
        self._task = task

    def _of_texts(self, model: Decoder, output: DecoderOutput, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return {"logits": model.class_logits(self._last(output, batch))}

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        batch = self._in_order(batch)
        model, output = self._read(self._config.model, params, batch)
        with jax.named_scope("loss"):
            logits = model.class_logits(self._last(output, batch))
            there, wanted = batch["text_record"] >= 0, batch["text_value"].astype(jnp.int32)
            of_wanted = jnp.take_along_axis(logits, wanted[..., None], -1)[..., 0]
            objective = (there * (jax.nn.logsumexp(logits, -1) - of_wanted)).sum()
            right = there & (logits.argmax(-1) == wanted)
            means = {"class_loss": objective, "accuracy": right.sum().astype(jnp.float32)}
            if self._task.lm_weight:
                of_texts = self._log_probs(self._token_log_probs(model, output, batch), batch["loss_mask"], batch)
                means["lm_loss"] = (there * -of_texts.mean).sum()
                objective += self._task.lm_weight * means["lm_loss"]
            return self._sums(objective, self.weight(batch), means, output, counted)
