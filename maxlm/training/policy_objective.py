"""A policy that learns from what its own texts are worth: with a critic (PPO), or without one (GRPO and its kin).

What a text is worth is known before a step: batches have it as arrays of each token (`maxlm/recipes/rollouts.py`).
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import Grpo, ModelConfig, Ppo, Reinforced, RunConfig
from maxlm.models import abstract_parameters, declared, init_parameters
from maxlm.models.adapters import base_of, parameters_of_base
from maxlm.sharding import Layout
from maxlm.training import policy_losses as losses
from maxlm.training.losses import TokenScores, token_scores
from maxlm.training.objective import Batch, BatchArray, NextToken, Params, Sums, in_parts
from maxlm.training.state import CRITIC, of_model

_TEXT = "text_"
"""What names of arrays of running text begin with."""


class _OfTokens(NamedTuple):
    """What an objective makes of each token, float32 [B, T]."""

    surrogate: losses.Clipped
    beside: jax.Array
    """Further losses."""
    figures: dict[str, jax.Array]
    """To log the weighted means of."""


class PolicyGradient(NextToken):
    """Beside those of `NextToken` a batch has, float32 [B, T]: `token_weights`, what each counted token weighs and 0
    for others, `old_log_probs` of the policy as it wrote them, `advantages`; and `row_weights` [B, 1], which together
    are what the sums are divided by (`policy_losses.token_weights`)."""

    _more: tuple[str, ...] = ()
    """Names of further arrays of tokens."""

    def __init__(
        self,
        config: RunConfig,
        task: Reinforced,
        layout: Layout,
        *,
        tokens: int | None = None,
        reference: ModelConfig | None = None,
        under: bool = False,
    ) -> None:
        """
        Args:
            config, task, layout: of the run.
            tokens: ids that the policy may draw, the first so many; None: all.
            reference: the model whose parameters are `frozen`; None: there is none.
            under: the reference is the base under the model's adapter, instead.
        """
        super().__init__(config, layout)
        self._rollouts, self._entropy_weight = task.rollouts, task.entropy_weight
        self._tokens = tokens or config.model.vocab_size
        self._reference, self._under = base_of(config.model) if under else reference, under
        self.frozen = None if reference is None else abstract_parameters(reference, layout)
        rows, columns = config.train.batch_size, config.train.seq_len
        names = ("token_weights", "old_log_probs", "advantages", *self._more)
        of_tokens = BatchArray((rows, columns), jnp.float32, ("batch", "seq"))
        self.arrays = (
            dict(self.arrays)
            | dict.fromkeys(names, of_tokens)
            | {"row_weights": BatchArray((rows, 1), jnp.float32, ("batch", None))}
        )

    def counted(self, params: Params, frozen: Any, batch: Batch) -> Any:
        """The batch's weight."""
        return batch["row_weights"].sum()

    def scores(self, params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is said of the tokens of a batch of `NextToken` before it is learned from, float32 [B, T], a micro-batch
        at a time: `old_log_probs`, the `entropy` of each distribution, and `reference_log_probs`, if there is one.

        By the very operations of `loss`, on as many rows: until the parameters change, both say the same.
        """
        shape = batch["inputs"].shape
        batch = batch | {"place": jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)}

        def of_rows(part: Batch) -> dict[str, jax.Array]:
            part = self._how.arrange(part)
            return {"place": part["place"]} | self._scores(params, frozen, part)

        parts = 1 if self._layout.mesh.shape["stage"] > 1 else self._config.train.micro_batches
        found = jax.lax.map(of_rows, in_parts(self, self._layout, batch, parts))
        at = found.pop("place").ravel()
        return {name: jnp.zeros(at.shape).at[at].set(x.ravel()).reshape(shape) for name, x in found.items()}

    def _scores(self, params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        policy = self._policy(params, batch)
        found = {"old_log_probs": policy.log_probs, "entropy": policy.entropy}
        if (model := self._reference) is None:
            return found
        held_to = parameters_of_base(of_model(params)) if self._under else frozen
        return found | {
            "reference_log_probs": self._of_targets(self._read_other(model, held_to, batch), batch).log_probs
        }

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        batch = self._how.arrange(batch, ["row_weights"])
        model, output = self._read(self._config.model, of_model(params), batch)
        with jax.named_scope("loss"):
            policy, weights = self._of_targets((model, output), batch), batch["token_weights"]
            of_tokens = self._of_tokens(params, policy, batch)
            mean = lambda values: jnp.where(weights > 0, weights * values, 0).sum()
            moved = jnp.where(weights > 0, policy.log_probs - batch["old_log_probs"], 0)
            ratio = jnp.exp(moved)
            figures = of_tokens.figures | {
                "policy_loss": of_tokens.surrogate.loss,
                "clip_fraction": of_tokens.surrogate.clipped,
                "entropy": policy.entropy,
                "moved_kl": -moved,
                "ratio": ratio,
            }
            objective = mean(of_tokens.surrogate.loss + of_tokens.beside - self._entropy_weight * policy.entropy)
            means, weight = {name: mean(values) for name, values in figures.items()}, batch["row_weights"].sum()
            sums = self._sums(objective, weight, means, output, counted / self._n_tokens)
            return sums._replace(largest={"largest_ratio": jnp.where(weights > 0, ratio, 0).max()})

    @property
    def _n_tokens(self) -> int:
        return self._config.train.batch_size * self._config.train.seq_len

    @abc.abstractmethod
    def _of_tokens(self, params: Params, policy: TokenScores, batch: Batch) -> _OfTokens: ...

    def _policy(self, params: Params, batch: Batch) -> TokenScores:
        return self._of_targets(self._read(self._config.model, of_model(params), batch), batch)

    def _of_targets(self, states: Any, batch: Batch) -> TokenScores:
        """Of a model's states: each target under the distribution that tokens are drawn from."""
        (model, output), chunk = states, self._config.train.loss_chunk
        unembedding = model.unembedding.cooled(self._rollouts.temperature).only(self._tokens)
        return token_scores(self._layout, output.hidden, unembedding, batch["targets"], chunk=chunk)


class GroupPolicy(PolicyGradient):
    """GRPO and its kin. With a distance to the reference in the loss a batch has `reference_log_probs`, too."""

    def __init__(self, config: RunConfig, task: Grpo, layout: Layout, **reference: Any) -> None:
        """As of `PolicyGradient`."""
        self._task = task
        if task.kl_weight:
            self._more = ("reference_log_probs",)
        super().__init__(config, task, layout, **reference)

    def _of_tokens(self, params: Params, policy: TokenScores, batch: Batch) -> _OfTokens:
        task, old = self._task, batch["old_log_probs"]
        surrogate = losses.clipped_surrogate(policy.log_probs, old, batch["advantages"], task.clip_low, task.clip_high)
        if not task.kl_weight:
            return _OfTokens(surrogate, jnp.float32(0), {})
        kl = losses.kl_estimate(policy.log_probs, batch["reference_log_probs"], task.kl_estimator)
        return _OfTokens(surrogate, task.kl_weight * kl, {"reference_kl": kl})


class ActorCritic(PolicyGradient):
    """PPO. The parameters under `CRITIC` are of a model with a `ScalarHead`. Batches have `old_values` and `returns`,
    too, and running text, if it is learned beside: its arrays as `NextToken` has them, their names after `text_`."""

    _more = ("old_values", "returns")

    def __init__(self, config: RunConfig, task: Ppo, layout: Layout, critic: ModelConfig, **reference: Any) -> None:
        """critic: the model that says what is still to come; the others as of `PolicyGradient`."""
        super().__init__(config, task, layout, **reference)
        self._task, self._critic = task, critic
        self.declared = {**self.declared, CRITIC: declared(critic)}
        if task.text_weight:
            of_text = NextToken(config, layout).arrays
            self.arrays |= {_TEXT + name: array for name, array in of_text.items()}

    def init(self, key: jax.Array) -> Params:
        """The critic says 0 at first."""
        critic = init_parameters(self._critic, jax.random.fold_in(key, 1))
        critic["score"] = jnp.zeros_like(critic["score"])
        return super().init(key) | {CRITIC: critic}

    def counted(self, params: Params, frozen: Any, batch: Batch) -> Any:
        """The batch's weight, and the tokens of its running text."""
        weight = super().counted(params, frozen, batch)
        return weight, batch[f"{_TEXT}loss_mask"].sum() if self._task.text_weight else jnp.float32(1)

    def loss(self, params: Params, frozen: Any, batch: Batch, counted: Any) -> Sums:
        weight, n_text = counted
        own = {name: x for name, x in batch.items() if not name.startswith(_TEXT)}
        sums = super().loss(params, frozen, own, weight)
        if not self._task.text_weight:
            return sums
        text = {name.removeprefix(_TEXT): x for name, x in batch.items() if name.startswith(_TEXT)}
        if "seeds" in own:
            text["seeds"] = own["seeds"]
        text = self._how.arrange(text)
        model, output = self._read(self._config.model, of_model(params), text)
        found = self._cross_entropy(model, output.hidden, text)
        each = weight / jnp.maximum(n_text, 1)  # so that its mean is beside that of the texts
        return sums._replace(
            objective=sums.objective + self._task.text_weight * each * found.objective,
            means=sums.means | {"text_loss": each * found.cross_entropy},
        )

    def accepts(self, sums: Sums) -> jax.Array | bool:
        """Unless the policy has moved too far from the one that wrote the texts."""
        if self._task.largest_kl is None:
            return True
        return sums.means["moved_kl"] <= self._task.largest_kl * sums.weight

    def _scores(self, params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return super()._scores(params, frozen, batch) | {"old_values": self._values(params, batch)}

    def _of_tokens(self, params: Params, policy: TokenScores, batch: Batch) -> _OfTokens:
        task = self._task
        surrogate = losses.clipped_surrogate(
            policy.log_probs, batch["old_log_probs"], batch["advantages"], task.clip, task.clip
        )
        values = self._values(params, batch)
        of_values = losses.clipped_value_loss(values, batch["old_values"], batch["returns"], task.value_clip)
        figures = {"value_loss": of_values.loss, "value_clip_fraction": of_values.clipped, "value": values}
        return _OfTokens(surrogate, task.value_weight * of_values.loss, figures)

    def _values(self, params: Params, batch: Batch) -> jax.Array:
        """What is still to come before each target is drawn, float32 [B, T]."""
        model, output = self._read_other(self._critic, params[CRITIC], batch)
        return model.scalars(output.hidden)
