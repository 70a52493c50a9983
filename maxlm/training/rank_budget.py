"""What AdaLoRA does in a step beside the loss: triplets that stay orthogonal, and those of least importance that go
(arXiv:2303.10512, section 3 and algorithm 1). See `config.AdaLora`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import AdaLora, RunConfig, UserError
from maxlm.models.adapters import at, replaced, targets

_PARTS = ("a", "b", "diagonal")
"""Rows of Q, columns of P, and the numbers between them."""


@dataclasses.dataclass(frozen=True)
class RankBudget:
    """Of a run."""

    kind: AdaLora
    names: tuple[str, ...]
    """Of the matrices of the base; each is a stack of layers, or one."""
    steps: int

    @staticmethod
    def of(config: RunConfig) -> RankBudget | None:
        """None where its adapter has no such budget.

        Raises:
            UserError: the run is too short for its schedule.
        """
        adapter = config.model.adapter
        if adapter is None or not isinstance(kind := adapter.kind, AdaLora):
            return None
        if kind.warmup + kind.final >= config.train.steps:
            raise UserError(
                f"model.adapter.kind.warmup = {kind.warmup} and final = {kind.final} leave none of train.steps = "
                f"{config.train.steps} for triplets to go; use smaller ones"
            )
        return RankBudget(kind, tuple(array.name for array in targets(config.model)), config.train.steps)

    def penalty(self, parameters: Any) -> jax.Array:
        """The sum over matrices of |P^T P - 1|^2 + |Q Q^T - 1|^2, without its weight."""
        total = jnp.float32(0)
        for _, own in self._own(parameters):
            for triplets in (_rows(own["a"], own, last=True), _rows(own["b"], own, last=False)):
                gram = jnp.einsum("lri,lsi->lrs", triplets, triplets)
                total += jnp.sum((gram - jnp.eye(gram.shape[-1])) ** 2)
        return total

    def penalise(self, parameters: Any, gradients: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Gradients of the mean loss with that of the penalty, and a figure to log."""
        arrays = parameters[shapes.PREFIX]
        penalty, more = jax.value_and_grad(lambda arrays: self.penalty({shapes.PREFIX: arrays}))(arrays)
        added = jax.tree.map(lambda g, d: g + self.kind.orthogonality * d, gradients[shapes.PREFIX], more)
        return {**gradients, shapes.PREFIX: added}, {"orthogonality": penalty}

    def settle(self, before: Any, gradients: Any, after: Any, step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        """Parameters after an update without the triplets that are too many, and a figure to log.

        Args:
            before: the parameters, of which the gradients are.
            gradients: of them.
            after: the parameters after the update.
            step: int32: how many updates came before.
        """
        scores = list[jax.Array]()
        for name, own in self._own(before):
            slopes, score = at(gradients[shapes.PREFIX], name), jnp.float32(0)
            for part in _PARTS:
                sensitivity = jnp.abs(own[part] * slopes[part])
                mean = _average(self.kind.beta1, own[f"{part}_importance"], sensitivity)
                deviation = _average(self.kind.beta2, own[f"{part}_uncertainty"], jnp.abs(sensitivity - mean))
                for which, value in (("importance", mean), ("uncertainty", deviation)):
                    after = replaced(after, [shapes.PREFIX, *name.split("/"), f"{part}_{which}"], value)
                of_triplets = mean * deviation
                if part != "diagonal":
                    of_triplets = _rows(of_triplets, own, last=part == "a").mean(-1)
                score += of_triplets.reshape(own["diagonal"].shape)
            scores.append(score)
        kind, n_left = self.kind, jnp.float32(0)
        n = sum(score.size for score in scores) // kind.rank
        ranked = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores]), descending=True)
        least = ranked[jnp.round(n * self.rank(step)).astype(jnp.int32) - 1]
        last = self.steps - kind.final
        choosing = (step >= kind.warmup) & (((step % kind.every == 0) & (step < last)) | (step == last))
        for (name, own), score in zip(self._own(before), scores, strict=True):
            # Between two choices triplets may come back, in the last steps no more.
            stays = jnp.where(choosing, score >= least, ~((step >= last) & (own["diagonal"] == 0)))
            path = [shapes.PREFIX, *name.split("/"), "diagonal"]
            diagonal = jnp.where(stays, at(after, "/".join(path)), 0)
            n_left += jnp.sum(diagonal != 0)
            after = replaced(after, path, diagonal)
        return after, {"adapter_rank": n_left / n}

    def rank(self, step: jax.Array) -> jax.Array:
        """How many triplets of a matrix may stay in the mean (equation 13)."""
        kind = self.kind
        done = (step - kind.warmup) / (self.steps - kind.warmup - kind.final)
        left = (1 - jnp.clip(done, 0, 1)) ** 3
        return kind.target_rank + (kind.rank - kind.target_rank) * left

    def _own(self, parameters: Any) -> Iterator[tuple[str, Any]]:
        for name in self.names:
            yield name, at(parameters[shapes.PREFIX], name)


def _rows(x: jax.Array, own: Any, *, last: bool) -> jax.Array:
    """[L, *inputs, r], where r is the last dim, or [L, r, *outputs] -> [L, r, numbers]; L is 1 outside of stacks."""
    layers, r = own["diagonal"].size // own["diagonal"].shape[-1], own["diagonal"].shape[-1]
    return x.reshape(layers, -1, r).swapaxes(1, 2) if last else x.reshape(layers, r, -1)


def _average(beta: float, mean: jax.Array, new: jax.Array) -> jax.Array:
    return beta * mean + (1 - beta) * new
