"""Which of several completions of a prompt is better: DPO and its kin, and KTO, which needs no pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from maxlm.config import Dpo, Ipo, Kto, ModelConfig, Orpo, RunConfig, SimPo
from maxlm.models import Decoder, DecoderOutput, abstract_parameters, ops
from maxlm.models.adapters import base_of, parameters_of_base
from maxlm.sharding import Layout
from maxlm.training import preference_losses as losses
from maxlm.training.objective import Batch, BatchArray, Params, Sums
from maxlm.training.text_objective import TextLogProbs, TextObjective

PairLoss = Dpo | Ipo | Orpo | SimPo

AHEAD = "text_reference"
"""Array float32 [B, S] of a batch: the reference's log-probability of each text, computed before."""
DIVERGENCE = "kl_estimate"
"""Figure: a mean over answers, chosen and rejected alike, of `losses.divergence_estimate`, a mean over tokens."""


class Ratios(NamedTuple):
    """How far a model is from its reference on each text, float32 [B, S]."""

    log_ratio: jax.Array
    divergence: jax.Array | None
    """`losses.divergence_estimate` of the text; None where nobody knows the reference's single tokens."""


class Referenced(TextObjective):
    """With a model beside that is not trained."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        texts: int,
        *,
        reference: ModelConfig | None = None,
        under: bool = False,
        ahead: bool = False,
        special_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            config, layout, texts: as of `TextObjective`.
            reference: the model whose parameters are `frozen`; None: there is none.
            under: the reference is the base under the model's adapter, instead.
            ahead: batches have `AHEAD` instead.
            special_ids: ids that log-ratios leave out.
        """
        super().__init__(config, layout, texts)
        self._reference = base_of(config.model) if under else reference
        self._under, self._special_ids = under, jnp.asarray(special_ids, jnp.int32)
        self.frozen = None if reference is None else abstract_parameters(reference, layout)
        if ahead:
            self.arrays |= {AHEAD: BatchArray((config.train.batch_size, texts), jnp.float32, ("batch", None))}

    def reference_log_probs(self, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What the reference says of each text, as log-ratios take it: the texts' numbers, int32 [B, S], and float32
        [B, S]."""
        batch = self._in_order(batch)
        return batch["text_number"], self._totals(self._reference_tokens(frozen, batch) * self._mask(batch), batch)

    def _of_texts(self, model: Decoder, output: DecoderOutput, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        of_tokens = self._token_log_probs(model, output, batch)
        of_texts = self._log_probs(of_tokens, batch["loss_mask"], batch)
        found = {"log_prob": of_texts.total, "tokens": of_texts.tokens}
        if self._reference is not None:
            other = self._read_other(self._reference, frozen, batch)
            found["kl"] = self._totals(_divergence((model, output), other) * batch["loss_mask"], batch)
        if self._reference is not None or AHEAD in self.arrays:
            found["log_ratio"] = self._ratios(of_tokens, frozen, batch).log_ratio
        return found

    def _reference_tokens(self, frozen: Any, batch: Batch) -> jax.Array:
        """The log-probabilities of the targets, float32 [B, T]."""
        assert self._reference is not None
        without_noise = {name: x for name, x in batch.items() if name != "seeds"}
        model, output = self._read_other(self._reference, frozen, without_noise)
        return jax.lax.stop_gradient(self._token_log_probs(model, output, batch))

    def _ratios(self, of_tokens: jax.Array, frozen: Any, batch: Batch) -> Ratios:
        mask = self._mask(batch)
        if AHEAD in self.arrays:
            return Ratios(self._totals(of_tokens * mask, batch) - batch[AHEAD], None)
        apart = (of_tokens - self._reference_tokens(frozen, batch)) * mask
        tokens = jnp.maximum(self._totals(mask, batch), 1)
        return Ratios(self._totals(apart, batch), self._totals(losses.divergence_estimate(apart), batch) / tokens)

    def _held_to(self, params: Params, frozen: Any) -> Any:
        """The reference's parameters."""
        return jax.lax.stop_gradient(parameters_of_base(params)) if self._under else frozen

    def by_text(self, params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return super().by_text(params, self._held_to(params, frozen), batch)

    def _mask(self, batch: Batch) -> jax.Array:
        """Of the tokens that log-ratios are about."""
        if not len(self._special_ids):
            return batch["loss_mask"]
        return batch["loss_mask"] * ~jnp.isin(batch["targets"], self._special_ids)


class PairedTexts(Referenced):
    """Losses of pairs. Those of a record weigh 1 together, and a batch weighs as many as it has records with a pair."""

    def __init__(self, config: RunConfig, layout: Layout, texts: int, loss: PairLoss, **reference: Any) -> None:
        """loss: what is learned; the others as of `Referenced`."""
        super().__init__(config, layout, texts, **reference)
        self._loss = loss

    def weight(self, batch: Batch) -> jax.Array:
        return losses.pair_weights(batch["text_record"], batch["text_value"]).sum()

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        batch = self._in_order(batch)
        frozen = self._held_to(params, frozen)
        model, output = self._read(self._config.model, params, batch)
        weights = losses.pair_weights(batch["text_record"], batch["text_value"])
        with jax.named_scope("loss"):
            of_tokens = self._token_log_probs(model, output, batch)
            of_texts = self._log_probs(of_tokens, batch["loss_mask"], batch)
            of_pairs, reward, divergence = self._of_pairs(of_tokens, of_texts, frozen, batch)
            mean = lambda values: (weights * values).sum()
            margin = _chosen(reward) - _rejected(reward)
            means = {
                "reward_chosen": mean(_chosen(reward)),
                "reward_rejected": mean(_rejected(reward)),
                "reward_margin": mean(margin),
                "reward_accuracy": mean((jnp.sign(margin) + 1) / 2),
                "nll_chosen": mean(-_chosen(of_texts.mean)),
                "nll_rejected": mean(-_rejected(of_texts.mean)),
            }
            if divergence is not None:
                means[DIVERGENCE] = mean((_chosen(divergence) + _rejected(divergence)) / 2)
            return self._sums(mean(of_pairs), weights.sum(), means, output, counted)

    def _of_pairs(
        self, of_tokens: jax.Array, of_texts: TextLogProbs, frozen: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The loss of each pair [B, S, S], each text's implied reward [B, S], in the unit of the loss's margin, and
        `Ratios.divergence`."""
        pair = lambda values: (_chosen(values), _rejected(values))
        match self._loss:
            case Dpo(beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight):
                ratios, divergence = self._ratios(of_tokens, frozen, batch)
                of_pairs = losses.dpo(*pair(ratios), beta=beta, label_smoothing=label_smoothing)
                return of_pairs - nll_weight * _chosen(of_texts.mean), beta * ratios, divergence
            case Ipo(tau=tau):
                ratios, divergence = self._ratios(of_tokens, frozen, batch)
                return losses.ipo(*pair(ratios), tau=tau), tau * ratios, divergence
            case Orpo(weight=weight):
                return weight * losses.orpo(*pair(of_texts.mean)) - _chosen(of_texts.mean), of_texts.mean, None
            case SimPo(beta=beta, gamma=gamma):
                return losses.simpo(*pair(of_texts.mean), beta=beta, gamma=gamma), beta * of_texts.mean, None
            case _:
                assert_never(self._loss)


class LabelledTexts(Referenced):
    """KTO. A record has a completion with its label, 1 or -1, and one that belongs to another prompt, of value 0; a
    batch weighs as many as it has labels."""

    def __init__(self, config: RunConfig, layout: Layout, texts: int, loss: Kto, **reference: Any) -> None:
        """loss: what is learned; the others as of `Referenced`."""
        super().__init__(config, layout, texts, **reference)
        self._loss = loss

    def weight(self, batch: Batch) -> jax.Array:
        """The labels."""
        return _labelled(batch).sum().astype(jnp.float32)

    def counted(self, params: Params, frozen: Any, batch: Batch) -> Any:
        """Beside the share the log-ratios of all rows, unless the loss sees them itself."""
        share = super().counted(params, frozen, batch)
        if self._at_once:
            return share, None
        frozen = self._held_to(params, frozen)

        def of_rows(batch: Batch) -> tuple[jax.Array, jax.Array]:
            batch = self._in_order(batch)
            model, output = self._read(self._config.model, params, batch)
            ratios = self._ratios(self._token_log_probs(model, output, batch), frozen, batch)
            return ratios.log_ratio, _mismatched(batch)

        return share, losses.kto_reference(*self._of_all_rows(of_rows, batch))

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        (share, reference), frozen = counted, self._held_to(params, frozen)
        batch = self._in_order(batch)
        model, output = self._read(self._config.model, params, batch)
        with jax.named_scope("loss"):
            ratios, divergence = self._ratios(self._token_log_probs(model, output, batch), frozen, batch)
            if reference is None:
                reference = losses.kto_reference(ratios, _mismatched(batch))
            labelled, desired = _labelled(batch), batch["text_value"] > 0
            beta = self._loss.beta
            of_texts = losses.kto(
                ratios,
                desired,
                reference,
                beta=beta,
                desired_weight=self._loss.desired_weight,
                undesired_weight=self._loss.undesired_weight,
            )
            weight = labelled.sum().astype(jnp.float32)
            means = {"kl": reference * weight}
            if divergence is not None:
                means[DIVERGENCE] = (labelled * divergence).sum()
            sums = self._sums((labelled * of_texts).sum(), weight, means, output, share)
            of_labels = {
                name: (beta * (some * ratios).sum(), some.sum().astype(jnp.float32))
                for name, some in (("desired", labelled & desired), ("undesired", labelled & ~desired))
            }
            return sums._replace(router=(sums.router, of_labels))

    def settle(self, params: Params, router: Any) -> tuple[Params, dict[str, jax.Array]]:
        """Beside the routers the mean reward of desired and of other texts, each over its own number."""
        routers, of_labels = router
        params, figures = super().settle(params, routers)
        return params, figures | {
            f"reward_{name}": total / jnp.maximum(count, 1) for name, (total, count) in of_labels.items()
        }


def _divergence(one: tuple[Decoder, DecoderOutput], other: tuple[Decoder, DecoderOutput]) -> jax.Array:
    """sum over the vocabulary of p (log p - log q) at each token, float32 [B, T], a row at a time. Not for training."""

    def of_row(states: tuple[jax.Array, jax.Array]) -> jax.Array:
        tables = (one[0].unembedding, other[0].unembedding)
        log_p, log_q = (jax.nn.log_softmax(ops.logits(x, table)) for x, table in zip(states, tables, strict=True))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    return jax.lax.map(of_row, (one[1].hidden, other[1].hidden))


def _chosen(values: jax.Array) -> jax.Array:
    """[B, S] -> of each pair's better text, [B, S, 1]."""
    return values[:, :, None]


def _rejected(values: jax.Array) -> jax.Array:
    """[B, S] -> of each pair's worse text, [B, 1, S]."""
    return values[:, None, :]


def _labelled(batch: Batch) -> jax.Array:
    """bool [B, S]."""
    return (batch["text_record"] >= 0) & (batch["text_value"] != 0)


def _mismatched(batch: Batch) -> jax.Array:
    """Texts whose completion belongs to another prompt: bool [B, S]."""
    return (batch["text_record"] >= 0) & (batch["text_value"] == 0)
