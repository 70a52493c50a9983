"""Normalisation of the residual stream and of query and key heads."""

from __future__ import annotations

from typing import ClassVar

from maxlm.config.fields import Changes, NotNegative, config


@config("model.norm.", changes=Changes.IDENTITY)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: NotNegative[float] = 1e-5
    """Keeps a vector of zeros from being divided by zero."""
    one_plus: bool = False
    """What is stored is the scale's difference from 1, which begins as 0, as in Gemma's code (arXiv:2403.08295)."""
    bias: ClassVar[bool] = False

    @property
    def initial_scale(self) -> float | None:
        """What every number of the scale's array begins with; None: there is no such array."""
        return 0.0 if self.one_plus else 1.0


@config("model.norm.", changes=Changes.IDENTITY)
class LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, arXiv:1607.06450)."""

    eps: NotNegative[float] = 1e-5
    """Keeps a constant vector from being divided by zero."""
    scale: bool = True
    """A learned scale; OLMo 1 has neither it nor a bias (arXiv:2402.00838, section 2.1)."""
    bias: bool = True
    """A learned bias; none in PaLM (arXiv:2204.02311) and MPT."""

    @property
    def initial_scale(self) -> float | None:
        """As of RmsNorm."""
        return 1.0 if self.scale else None


Norm = RmsNorm | LayerNorm
