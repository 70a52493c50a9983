"""Weights of a mixture's data sets, as papers say them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from maxlm.config.data import Dataset
from maxlm.config.errors import UserError
from maxlm.config.fields import shown

LLAMA: Mapping[str, float] = MappingProxyType(
    {
        "commoncrawl": 0.67,
        "c4": 0.15,
        "github": 0.045,
        "wikipedia": 0.045,
        "books": 0.045,
        "arxiv": 0.025,
        "stackexchange": 0.02,
    }
)
"""Sampling proportions of LLaMA (Touvron et al. 2023, arXiv:2302.13971, table 1)."""

LLAMA3: Mapping[str, float] = MappingProxyType(
    {"general": 0.5, "mathematics": 0.25, "code": 0.17, "multilingual": 0.08}
)
"""Of the tokens of Llama 3, those of general knowledge, of mathematics and reasoning, of code, and in several languages
(Llama Team 2024, arXiv:2407.21783, section 3.1.2)."""


def datasets_of(shares: Mapping[str, float], folders: Mapping[str, str]) -> tuple[Dataset, ...]:
    """A data set for each kind, weighted by its share: a weight here is a share of windows, all of one length, so it is
    one of tokens too, as papers give it.

    Args:
        shares: such as `LLAMA3`.
        folders: the prepared folder of each kind.

    Raises:
        UserError: a kind has no folder, or a folder no kind.
    """
    if missing := [kind for kind in shares if kind not in folders]:
        raise UserError(f"datasets_of: {shown(missing[0])} has no folder; give one for each of {', '.join(shares)}")
    if strange := [kind for kind in folders if kind not in shares]:
        raise UserError(f"datasets_of: {shown(strange[0])} is no kind of this mixture; use {', '.join(shares)}")
    return tuple(Dataset(path=folders[kind], weight=share) for kind, share in shares.items())


def temperature_weights(sizes: Sequence[float], alpha: float) -> tuple[float, ...]:
    """n_i^alpha / sum_j n_j^alpha: 1 draws each source in proportion to its size, 0 all alike.

    For languages of very different sizes: XLM-R (arXiv:1911.02116) and mT5 (arXiv:2010.11934) take alpha = 0.3,
    T5 (arXiv:1910.10683, section 3.5.2) calls 1 / alpha the temperature.

    Args:
        sizes: tokens of each source.
        alpha: from 0 to 1.

    Raises:
        UserError: a size or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"temperature_weights: alpha = {alpha} must be in [0, 1]; use for example 0.3")
    _refuse_bad("temperature_weights: sizes", sizes, above=0)
    powers = [size**alpha for size in sizes]
    return tuple(power / math.fsum(powers) for power in powers)


def capped_weights(
    weights: Sequence[float], sizes: Sequence[float], budget: float, most_epochs: float
) -> tuple[float, ...]:
    """Weights under which no source is read more than so many times: what a source would be read beyond that is drawn
    from the others, in proportion to their weights. They sum to 1; those of which no source is too small stay in
    proportion.

    Muennighoff et al. 2023 (arXiv:2305.16264): up to four epochs are almost as good as new text.

    Args:
        weights: as they are meant.
        sizes: tokens of each source.
        budget: tokens that are drawn in all.
        most_epochs: of each source.

    Raises:
        UserError: a number is out of range, or all sources of a weight above 0 together are too small.
    """
    _refuse_bad("capped_weights: weights", weights, above=None)
    _refuse_bad("capped_weights: sizes", sizes, above=0)
    _refuse_bad("capped_weights: budget and most_epochs", (budget, most_epochs), above=0)
    most = [most_epochs * size / budget for size in sizes]
    there = math.fsum(size for size, weight in zip(sizes, weights, strict=True) if weight)
    if there * most_epochs < budget:
        raise UserError(
            f"{budget:,.0f} tokens are more than {most_epochs:g} times the {there:,.0f} of the sources with a weight; "
            f"use at most {there * most_epochs:,.0f} tokens, at least {budget / there:.3g} epochs, or more sources"
        )
    full: set[int] = set()
    while True:
        left = 1 - math.fsum(most[i] for i in full)
        rest = math.fsum(weight for i, weight in enumerate(weights) if i not in full)
        shares = [most[i] if i in full else left * weight / rest if weight else 0.0 for i, weight in enumerate(weights)]
        above = {i for i, share in enumerate(shares) if share > most[i] and i not in full}
        if not above:
            return tuple(shares)
        full |= above


def _refuse_bad(what: str, values: Sequence[float], *, above: float | None) -> None:
    """Raises UserError where one is not finite, or not above that; None: where one is below 0, or all are 0."""
    if above is not None and not all(math.isfinite(value) and value > above for value in values):
        raise UserError(f"{what} = {shown(tuple(values))} must all be above {above:g}")
    if above is None and not (all(math.isfinite(value) and value >= 0 for value in values) and any(values)):
        raise UserError(f"{what} = {shown(tuple(values))} must be 0 or more, one of them above 0")
