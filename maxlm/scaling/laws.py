"""Forms of scaling laws. N: parameters; D: tokens; C: training FLOPs, for which C = 6ND stands wherever the formulas of
papers have it; L: loss, nats a token."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Quantity = TypeVar("Quantity", float, Floats)
"""A number, or many at once."""

FLOPS_PER_PARAMETER_TOKEN = 6.0
"""Forward and backward (arXiv:2001.08361, section 2.1; arXiv:2203.15556, section 3.3)."""


class Optimum(NamedTuple):
    """How a law would spend a budget."""

    parameters: float
    tokens: float
    loss: float | None
    """None: the law does not know it."""

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = coefficient * x^exponent."""

    coefficient: float
    exponent: float

    @classmethod
    def through(cls, x: float, y: float, exponent: float) -> PowerLaw:
        """The one of that exponent through a point."""
        return cls(coefficient=y * x**-exponent, exponent=exponent)

    def __call__(self, x: float) -> float:
        return self.coefficient * x**self.exponent

    def numbers(self) -> dict[str, float]:
        """Its constants as Kaplan et al. write a loss, (scale / x)^alpha (arXiv:2001.08361, equations 1.1 to 1.3)."""
        return {"alpha": -self.exponent, "scale": self.coefficient ** (-1 / self.exponent)}

    @classmethod
    def of(cls, numbers: dict[str, float]) -> PowerLaw:
        """What `numbers` gave."""
        return cls(coefficient=numbers["scale"] ** numbers["alpha"], exponent=-numbers["alpha"])


def _log_G(log_A: float, alpha: float, log_B: float, beta: float) -> float:
    """log (alpha A / (beta B))^(1 / (alpha + beta))."""
    return (math.log(alpha) + log_A - math.log(beta) - log_B) / (alpha + beta)


@dataclass(frozen=True, kw_only=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (arXiv:2203.15556, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Quantity, tokens: Quantity) -> Quantity:
        """L(N, D)."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, flops: float) -> Optimum:
        """The least loss with 6ND = C (arXiv:2203.15556, equation 4)."""
        parameters = math.exp(self.log_G) * (flops / FLOPS_PER_PARAMETER_TOKEN) ** self.a
        tokens = flops / FLOPS_PER_PARAMETER_TOKEN / parameters
        return Optimum(parameters, tokens, self.loss(parameters, tokens))

    @property
    def a(self) -> float:
        """Exponent of N_opt. The slope of the *other* term stands above: where loss falls faster with data (beta is
        large), little data is enough and parameters get the budget."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of D_opt."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def log_G(self) -> float:
        """N_opt = G (C/6)^a, D_opt = (C/6)^b / G."""
        return _log_G(math.log(self.A), self.alpha, math.log(self.B), self.beta)

    def numbers(self) -> dict[str, float]:
        """Its constants, and those of the optimum."""
        return {**dataclasses.asdict(self), "a": self.a, "b": self.b, "G": math.exp(self.log_G)}

    @classmethod
    def of(cls, numbers: dict[str, float]) -> ParametricLaw:
        """What `numbers` gave."""
        return cls(**{one.name: numbers[one.name] for one in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class JointLaw:
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (arXiv:2001.08361, equation 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float

    def loss(self, parameters: Quantity, tokens: Quantity) -> Quantity:
        """L(N, D)."""
        return ((self.N_c / parameters) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D

    def optimum(self, flops: float) -> Optimum:
        """The least loss with 6ND = C: what is in brackets is a `ParametricLaw` with beta = 1."""
        paid = flops / FLOPS_PER_PARAMETER_TOKEN
        parameters = math.exp(self.log_G) * paid ** (1 / (1 + self.alpha_N / self.alpha_D))
        tokens = paid / parameters
        return Optimum(parameters, tokens, self.loss(parameters, tokens))

    @property
    def log_G(self) -> float:
        """As of a `ParametricLaw`."""
        ratio = self.alpha_N / self.alpha_D
        return _log_G(ratio * math.log(self.N_c), ratio, math.log(self.D_c), 1.0)

    def numbers(self) -> dict[str, float]:
        """Its constants, and the exponents of the optimum."""
        ratio = self.alpha_N / self.alpha_D
        return {**dataclasses.asdict(self), "a": 1 / (1 + ratio), "b": ratio / (1 + ratio)}

    @classmethod
    def of(cls, numbers: dict[str, float]) -> JointLaw:
        """What `numbers` gave."""
        return cls(**{one.name: numbers[one.name] for one in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class FrontierLaw:
    """N_opt and D_opt as power laws of C, found without a formula for L(N, D) (arXiv:2203.15556, section 3)."""

    parameters: PowerLaw
    tokens: PowerLaw
    lowest_loss: PowerLaw | None = None
    """L(C); None: it is not known."""

    @classmethod
    def split(cls, parameters: PowerLaw, lowest_loss: PowerLaw | None = None) -> FrontierLaw:
        """With D_opt = C / (6 N_opt)."""
        tokens = PowerLaw(
            coefficient=1 / (FLOPS_PER_PARAMETER_TOKEN * parameters.coefficient), exponent=1 - parameters.exponent
        )
        return cls(parameters=parameters, tokens=tokens, lowest_loss=lowest_loss)

    def optimum(self, flops: float) -> Optimum:
        loss = None if self.lowest_loss is None else self.lowest_loss(flops)
        return Optimum(self.parameters(flops), self.tokens(flops), loss)

    def numbers(self) -> dict[str, float]:
        """N_opt = N_0 C^a, D_opt = D_0 C^b. Of fits alone, which know no loss."""
        return {
            "N_0": self.parameters.coefficient,
            "a": self.parameters.exponent,
            "D_0": self.tokens.coefficient,
            "b": self.tokens.exponent,
        }

    @classmethod
    def of(cls, numbers: dict[str, float]) -> FrontierLaw:
        """What `numbers` gave."""
        return cls(
            parameters=PowerLaw(coefficient=numbers["N_0"], exponent=numbers["a"]),
            tokens=PowerLaw(coefficient=numbers["D_0"], exponent=numbers["b"]),
        )


SplittingLaw = ParametricLaw | JointLaw | FrontierLaw
"""Says how a budget is best split."""
Law = SplittingLaw | PowerLaw
