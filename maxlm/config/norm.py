"""Normalisation of the residual stream and of query and key heads."""

from __future__ import annotations

from typing import ClassVar

from maxlm.config.fields import Changes, NotNegative, config


@config("model.norm.", changes=Changes.IDENTITY)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: NotNegative[float] = 1e-5
    """Keeps a vector of zeros from being divided by zero."""
    bias: ClassVar[bool] = False


@config("model.norm.", changes=Changes.IDENTITY)
class LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, arXiv:1607.06450)."""

    eps: NotNegative[float] = 1e-5
    """Keeps a constant vector from being divided by zero."""
    bias: bool = True
    """Without one as in PaLM (arXiv:2204.02311) and MPT."""


Norm = RmsNorm | LayerNorm
