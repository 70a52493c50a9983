"""A quantised model beside the full one: bytes, perplexity, divergence, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.config import ModelConfig
from maxlm.data.packing import Batch
from maxlm.models import Execution, Tokens, bind, declared, ops
from maxlm.models.weights.kinds import Weight
from maxlm.shapes import Array

_RESAMPLES = 2000
_SEED = 0


class Bounds(NamedTuple):
    """A figure, and where it lies with 95 % over windows of text such as these."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """On held-out text."""

    perplexity: Bounds
    change: Bounds
    """Of the perplexity, relative to the full model's on the same windows: 0.01 is 1 % more."""
    divergence: Bounds
    """KL(full || quantised), nats a token."""
    tokens: int
    """Tokens predicted."""


class WindowSums(NamedTuple):
    """Of each window, float64 [n]."""

    nats: npt.NDArray[np.float64]
    """Of the quantised model's cross-entropy."""
    full_nats: npt.NDArray[np.float64]
    divergence: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]


def measure(model: ModelConfig, how: Execution, full: Any, held: Any, windows: Sequence[Batch]) -> WindowSums:
    """Both models on every window, one program for both, so that logits of one window alone are in memory.

    Args:
        model: of both.
        how: they run.
        full: parameters as nested dicts.
        held: the quantised ones; a fold in the norms before may make its plain arrays other ones.
        windows: as of `maxlm.data.packing.pack`, of one shape.
    """

    @jax.jit
    def program(full: Any, held: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        exact, found = (_log_probs(model, how, parameters, batch) for parameters in (full, held))
        target = lambda of: -jnp.take_along_axis(of, batch["targets"][..., None], -1)[..., 0]
        divergence = jnp.sum(jnp.exp(exact) * (exact - found), -1)
        mask = batch["loss_mask"]
        return tuple(jnp.sum(one * mask, -1) for one in (target(found), target(exact), divergence, jnp.ones_like(mask)))

    rows = [[np.asarray(one, np.float64) for one in program(full, held, _arrays(window))] for window in windows]
    return WindowSums(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def _arrays(window: Batch) -> dict[str, jax.Array]:
    return {name: jnp.asarray(values) for name, values in window.items()}


def _log_probs(model: ModelConfig, how: Execution, parameters: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B, T, V]."""
    decoder, tokens = bind(model, parameters), Tokens(batch["positions"], batch["segment_ids"])
    output = decoder(decoder.embeddings(batch["inputs"], tokens, how), tokens, how)
    return jax.nn.log_softmax(ops.logits(output.hidden, decoder.unembedding), -1)


def fidelity(sums: WindowSums) -> Fidelity:
    """The figures, with intervals from windows drawn anew, 2000 times (percentile bootstrap, Efron 1979)."""
    over = lambda of: Bounds(*_bootstrap(sums, of))
    mean = lambda values: values.sum(-1)
    return Fidelity(
        perplexity=over(lambda s: np.exp(mean(s.nats) / mean(s.tokens))),
        change=over(lambda s: np.exp((mean(s.nats) - mean(s.full_nats)) / mean(s.tokens)) - 1),
        divergence=over(lambda s: mean(s.divergence) / mean(s.tokens)),
        tokens=int(sums.tokens.sum()),
    )


def _bootstrap(sums: WindowSums, of: Callable[[WindowSums], npt.NDArray[np.float64]]) -> tuple[float, float, float]:
    n = len(sums.tokens)
    drawn = np.random.default_rng(_SEED).integers(0, n, (_RESAMPLES, n))
    found = of(WindowSums(*(column[drawn] for column in sums)))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(of(sums)), float(low), float(high)


def bytes_of(model: ModelConfig, parameters: Any, dtype: jnp.dtype) -> tuple[int, float]:
    """Bytes of all arrays as decoding holds them, with plain products and tables in `dtype`; and bits for each number
    of the weights that are products or tables."""

    def size(array: Array, weight: Weight) -> int:
        if isinstance(weight, jax.Array):
            return math.prod(weight.shape) * (jnp.dtype(dtype).itemsize if array.role.casts else weight.dtype.itemsize)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(weight))

    arrays = jax.tree.leaves(declared(model))
    sizes = jax.tree.leaves(jax.tree.map(size, declared(model), parameters))
    matrices = [(array.size, n) for array, n in zip(arrays, sizes, strict=True) if array.role.casts]
    return sum(sizes), 8 * sum(n for _, n in matrices) / sum(numbers for numbers, _ in matrices)
