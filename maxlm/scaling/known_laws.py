"""Laws that papers have published: constants, what they count, where they stand, and what is misprinted."""

from __future__ import annotations

from typing import NamedTuple

from maxlm.scaling.laws import FrontierLaw, ParametricLaw, PowerLaw, SplittingLaw

PF_DAY = 1e15 * 24 * 3600
"""FLOPs of a petaFLOP/s for a day, the unit of Kaplan et al."""

GOPHER_FLOPS = 5.76e23
"""The budget at which arXiv:2203.15556 compares its approaches."""


class KnownLaw(NamedTuple):
    """A published law."""

    law: SplittingLaw
    parameters: str
    """Which parameters its N counts."""
    source: str


_CHINCHILLA = "arXiv:2203.15556"

KNOWN: dict[str, KnownLaw] = {
    "chinchilla1": KnownLaw(
        FrontierLaw.split(PowerLaw.through(GOPHER_FLOPS, 67e9, 0.50)),
        "total",
        f"{_CHINCHILLA}, table 2 (a = 0.50), through table 3: 67e9 at 5.76e23",
    ),
    "chinchilla2": KnownLaw(
        FrontierLaw.split(PowerLaw.through(GOPHER_FLOPS, 63e9, 0.49)),
        "total",
        f"{_CHINCHILLA}, table 2 (a = 0.49), through figure 3: 63e9 at 5.76e23",
    ),
    "chinchilla3": KnownLaw(
        ParametricLaw(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849),
        "total",
        f"{_CHINCHILLA}, equation 10 with the digits of its TeX source, as arXiv:2404.10102 gives them",
    ),
    "chinchilla3_rounded": KnownLaw(
        ParametricLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
        "total",
        f"{_CHINCHILLA}, equation 10 as printed; too few digits: not the optimum of the paper's own table A3",
    ),
    "besiroglu": KnownLaw(
        ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "total",
        "arXiv:2404.10102, the runs of arXiv:2203.15556 read off its figure and fitted again",
    ),
    "kaplan": KnownLaw(
        FrontierLaw.split(
            PowerLaw.through(PF_DAY, 1.3e9, 0.73), lowest_loss=PowerLaw.through(3.1e8 * PF_DAY, 1.0, -0.050)
        ),
        "non-embedding",
        "arXiv:2001.08361, equation 1.3 and table 6, for batches far below the critical one",
    ),
    "llama3": KnownLaw(
        FrontierLaw(
            tokens=PowerLaw(coefficient=0.299, exponent=0.537),
            parameters=PowerLaw(coefficient=1 / (6 * 0.299), exponent=1 - 0.537),
        ),
        "total",
        "arXiv:2407.21783, section 3.2.1, digits of figure 3: tokens = 0.299 C^0.537",
    ),
}
"""By the name that --law takes."""
