"""Weights of prepared folders by their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from maxlm.config.weighting import capped_weights, temperature_weights
from maxlm.data.shards import Split, open_prepared


@dataclass(frozen=True)
class SizeWeights:
    """Of each folder, in their order."""

    folders: tuple[str, ...]
    tokens: tuple[int, ...]
    """To train on."""
    weights: tuple[float, ...]
    """They sum to 1."""
    epochs: tuple[float, ...] | None
    """Of a run of so many tokens; None: of how many is not said."""


def weigh(folders: Sequence[str], alpha: float, budget: float | None, most_epochs: float | None) -> SizeWeights:
    """By tokens^alpha (`temperature_weights`); with a budget no folder more than `most_epochs` times, if that is said.

    Raises:
        UserError: a folder is not prepared, or all are too small for the budget.
    """
    sizes = tuple(open_prepared(Path(name), verify=False).info.tokens(Split.TRAIN) for name in folders)
    weights = temperature_weights(sizes, alpha)
    if budget is None:
        return SizeWeights(tuple(folders), sizes, weights, None)
    if most_epochs is not None:
        weights = capped_weights(weights, sizes, budget, most_epochs)
    epochs = tuple(weight * budget / size for weight, size in zip(weights, sizes, strict=True))
    return SizeWeights(tuple(folders), sizes, weights, epochs)


def table_of(found: SizeWeights) -> Table:
    """A row for each folder."""
    table = Table("source")
    for name in ("tokens", "share of tokens", "weight", *([] if found.epochs is None else ["epochs"])):
        table.add_column(name, justify="right")
    for i, name in enumerate(found.folders):
        share = found.tokens[i] / sum(found.tokens)
        more = [] if found.epochs is None else [f"{found.epochs[i]:.3f}"]
        table.add_row(Text(name), f"{found.tokens[i]:,}", f"{share:.2%}", f"{found.weights[i]:.6g}", *more)
    return table
