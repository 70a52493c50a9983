"""Few parameters that are trained in place of all: what is added to a model that is there already, its base."""

from __future__ import annotations

import enum
from dataclasses import field

from maxlm.config.fields import BelowOne, Changes, NotEmpty, Positive, config

ALL_LINEAR = "all-linear"
"""In place of a pattern: every matrix of attention and of dense MLPs, shared experts included."""


class BaseFormat(enum.Enum):
    """How the base's matrices are held while an adapter is trained. Everything else of it is float32."""

    FLOAT32 = "float32"
    """4 bytes a number, as in its checkpoint."""
    BFLOAT16 = "bfloat16"
    """2 bytes, tables included."""
    INT8 = "int8"
    """8 bits, with a float32 scale for each output, as `WeightFormat.INT8`."""
    NF4 = "nf4"
    """4 bits, as `WeightFormat.NF4` (QLoRA, arXiv:2305.14314); tables have 8."""


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class Lora:
    """W x + scale B A x for a matrix W of the base, with A: inputs -> rank and B: rank -> outputs (Hu et al. 2021,
    arXiv:2106.09685, equation 3). B begins as zeros, A with variance 1 / (3 inputs), as that of their code.
    """

    rank: Positive[int] = 8
    """Inner size of B A."""
    alpha: Positive[float] = 16.0
    """scale = alpha / rank."""
    rank_stabilized: bool = False
    """scale = alpha / sqrt(rank) in place of that (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """The direction of each output's weights comes from W + scale B A, their length is an array of its own that begins
    as W's (DoRA, arXiv:2402.09353, equation 5). The length in the denominator has no gradient (section 4.3)."""
    dropout: BelowOne = 0.0
    """Chance that a number of x is 0 on its way to A, and others are divided by 1 - dropout; never in evaluation."""
    targets: NotEmpty[tuple[NotEmpty[str], ...]] = ("q_proj", "v_proj")
    """Which matrices: ends of their names in `maxlm.inspect`, with * and ? for parts, as q_proj, mlp/*, blocks/0/*; or
    "all-linear"."""

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


AdapterKind = Lora
"""The union of the kinds."""


@config("model.adapter.", changes=Changes.IDENTITY)
class Adapter:
    """What is trained beside a base that is not. The base is what `checkpoint.init_from` names."""

    kind: AdapterKind = field(default_factory=Lora)
    """What is added, and where."""
    full: tuple[NotEmpty[str], ...] = ()
    """Arrays of the base that are trained too, as a whole: ends of names, as in `targets` (PEFT's modules_to_save).
    embed, unembed: the tables."""
    base: BaseFormat = BaseFormat.FLOAT32
    """How the rest of the base is held."""
