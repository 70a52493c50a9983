"""How a model knows where a token stands: in its attention scores, in its queries and keys, or in its embedding."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Filled, NotNegative, Positive, Range, config

PairFactors = Annotated[tuple[Positive[float], ...], Filled(note="give a number for each pair of rotated dims")]


@config("model.blocks[].attention.position.scaling.", changes=Changes.IDENTITY)
class LinearScaling:
    """All positions divided by a factor (Chen et al. 2023, arXiv:2306.15595, section 2.3)."""

    factor: Positive[float]
    """The new context length over that of training."""


@config("model.blocks[].attention.position.scaling.", changes=Changes.IDENTITY)
class NtkScaling:
    """theta * factor^(R / (R - 2)) with R rotated dims: the slowest pair turns `factor` times slower, the fastest as
    before ("NTK-aware", Peng et al. 2023, arXiv:2309.00071, section 3.1)."""

    factor: Positive[float]
    """The new context length over that of training."""


@config("model.blocks[].attention.position.scaling.", changes=Changes.IDENTITY)
class DynamicNtkScaling:
    """NtkScaling by a factor that grows with the length T of a token's document: by factor * T / original_max_len -
    (factor - 1) where T is more than original_max_len, by 1 else ("Dynamic NTK", arXiv:2309.00071, section 3.3).

    Earlier tokens depend on how long their document becomes. So a model whose max_seq_len is more than original_max_len
    has a forward pass but cannot decode with a cache; NtkScaling by that factor of one length can.
    """

    factor: Positive[float]
    """How fast the stretching grows with the length; at factor 1 it is the length over original_max_len."""
    original_max_len: Positive[int]
    """Longest document, in tokens, that is not stretched."""
    doubling: bool = False
    """T counts as the next of original_max_len times 1, 2, 4, ...: between two of them nothing changes (the released
    code of Qwen, arXiv:2309.16609, with factor 2)."""


@config("model.blocks[].attention.position.scaling.", changes=Changes.IDENTITY)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4): fast pairs stay, slow ones turn `factor` times
    slower, between them a ramp; and queries and keys are longer by a factor, which sharpens attention.

    The ramp is linear in the pair's number, as in the authors' code; in the paper it is in the number of turns.
    """

    factor: Positive[float]
    """The new context length over that of training."""
    original_max_len: Positive[int]
    """Context length, in tokens, of the model before stretching."""
    beta_fast: Positive[float] = 32.0
    """Pairs that turn at least so often over original_max_len stay as they are."""
    beta_slow: Positive[float] = 1.0
    """Pairs that turn at most so often over original_max_len turn `factor` times slower."""
    truncate: bool = True
    """Both ends of the ramp lie at whole pairs: it begins at or before its exact place, and ends at or after it."""
    attention_factor: Positive[float] | None = None
    """Rotated dims of queries and of keys are multiplied by it; None: (0.1 mscale ln(factor) + 1) /
    (0.1 mscale_all_dim ln(factor) + 1), which at the defaults is the paper's equation 22."""
    mscale: NotNegative[float] = 1.0
    """As above (DeepSeek-V2, arXiv:2405.04434, released code)."""
    mscale_all_dim: NotNegative[float] = 0.0
    """As above; DeepSeek-V2 has `GroupedQuery.scale` grow by the square of this denominator instead."""

    def __post_init__(self) -> None:
        slow, fast = self.beta_slow, self.beta_fast
        if fast <= slow:
            raise UserError(
                f"model.blocks[].attention.position.scaling.beta_fast = {fast} must be more than beta_slow = {slow}; "
                f"use for example {32 * slow}"
            )


@config("model.blocks[].attention.position.scaling.", changes=Changes.IDENTITY)
class LongRopeScaling:
    """Each pair of dims turns slower by a factor of its own (Ding et al. 2024, arXiv:2402.13753; Phi-3,
    arXiv:2404.14219), and queries and keys are longer by one for all.

    A model with a max_seq_len above original_max_len uses the long factors, at every length, so that a cache and a
    forward pass agree. For the short ones give max_seq_len = original_max_len and the attention_factor.
    """

    short_factors: PairFactors
    """For each pair, up to original_max_len."""
    long_factors: PairFactors
    """For each pair, beyond it."""
    original_max_len: Annotated[int, Range(ge=2)]
    """Context length, in tokens, of the model before stretching."""
    attention_factor: Positive[float] | None = None
    """Rotated dims of queries and of keys are multiplied by it; None: sqrt(1 + ln(s) / ln(original_max_len)) for a
    model.max_seq_len of s times original_max_len, 1 where s is less than 1."""

    def __post_init__(self) -> None:
        short, long = len(self.short_factors), len(self.long_factors)
        if short != long:
            raise UserError(
                f"model.blocks[].attention.position.scaling.long_factors has {long} numbers, short_factors {short}; "
                "give one for each pair of rotated dims in both"
            )


@config("model.blocks[].attention.position.scaling.", changes=Changes.IDENTITY)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the slow RoPE frequencies (arXiv:2407.21783; numbers from the released configs)."""

    factor: Positive[float] = 8.0
    """Wavelengths longer than original_max_len / low_freq_factor grow by this factor."""
    low_freq_factor: Positive[float] = 1.0
    """Where the longest wavelengths begin; between the two, frequencies pass over smoothly."""
    high_freq_factor: Positive[float] = 4.0
    """Wavelengths shorter than original_max_len / high_freq_factor stay as they are."""
    original_max_len: Positive[int] = 8192
    """Context length, in tokens, of the model before stretching."""

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise UserError(
                f"model.blocks[].attention.position.scaling.high_freq_factor = {high} must be more than "
                f"low_freq_factor = {low}; use for example {4 * low}"
            )


RopeScaling = LinearScaling | NtkScaling | DynamicNtkScaling | YarnScaling | LongRopeScaling | Llama3RopeScaling
"""How RoPE learns longer contexts than those it began with."""


@config("model.blocks[].attention.position.", changes=Changes.IDENTITY)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

    theta: Positive[float] = 10_000.0
    """Base of the geometric series of wavelengths."""
    scaling: RopeScaling | None = None
    """How a model learns longer contexts than those it began with; None: not at all."""
    dims: Positive[int] | None = None
    """The first so many dims of a head are rotated, the others know no position (GPT-J, GPT-NeoX, Phi); None: all."""
    interleaved: bool = False
    """Dims (2i, 2i + 1) are a pair, as in the paper, GPT-J and GLM; False: (i, i + half), as in GPT-NeoX and LLaMA."""

    decay: Positive[float] | None = None
    """xPos (Sun et al. 2022, arXiv:2212.10554, section 3, where it is 512): what pair i of R/2 adds to the score of a
    key n tokens back shrinks by ((2i / R + 0.4) / 1.4)^(n / decay); None: it does not."""

    def __post_init__(self) -> None:
        if self.dims is not None and self.dims % 2:
            raise UserError(
                f"model.blocks[].attention.position.dims = {self.dims} is odd, but RoPE rotates pairs; "
                f"use {self.dims + 1}"
            )
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            raise UserError(
                f"model.blocks[].attention.position.theta = {self.theta} must be more than 1, as YarnScaling looks for "
                "slower pairs after faster ones; use for example 10000.0"
            )


@config("model.blocks[].attention.position.", changes=Changes.IDENTITY)
class Alibi:
    """Scores fall with the distance, by a slope for each head (Press et al. 2022, arXiv:2108.12409). No parameters."""


@config("model.blocks[].attention.position.", changes=Changes.IDENTITY)
class RelativeBias:
    """T5's learned bias by bucket of the distance, for each head (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Each layer has its own table; T5 itself shares the first layer's.
    """

    buckets: Positive[int] = 32
    """Half of them for one distance each, the others ever wider."""
    max_distance: Positive[int] = 128
    """Distances from here on share the last bucket."""

    def __post_init__(self) -> None:
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"model.blocks[].attention.position.max_distance = {self.max_distance} must be more than half of "
                f"buckets = {self.buckets}; use at least {self.buckets // 2 + 1}"
            )


@config("model.blocks[].attention.position.", changes=Changes.IDENTITY)
class RelativeSinusoids:
    """Transformer-XL's scores (q + u) k + (q + v) W r(n) of a key n tokens back, with u, v and W learned for each head
    and r(n) the sinusoids of n (Dai et al. 2019, arXiv:1901.02860, section 3.3; Gopher, arXiv:2112.11446).

    Each layer has its own u and v; Transformer-XL shares them.
    """

    dims: Annotated[int, Range(ge=2)]
    """Numbers in r(n), half of them sines; d_model in Transformer-XL. Queries and keys are longer by as many."""

    def __post_init__(self) -> None:
        if self.dims % 2:
            raise UserError(
                f"model.blocks[].attention.position.dims = {self.dims} is odd, but half are sines; use {self.dims + 1}"
            )


@config("model.blocks[].attention.position.", changes=Changes.IDENTITY)
class GlmRope:
    """RoPE in two dims (Du et al. 2021, arXiv:2103.10360, section 2.3; ChatGLM-6B's code): the first half of a head's
    dims is rotated by the position in the context, the second by the place in the block that is being written.

    A context sees itself whole; its tokens have place 0. Those of a block have places 1, 2, ..., all at the position in
    the context where the block goes, and see what is before them. `Tokens.places` has both numbers; without them a
    document is one block after an empty context, at position 0.
    """

    theta: Positive[float] = 10_000.0
    """Base of the geometric series of wavelengths, in each half."""


Position = Rope | GlmRope | Alibi | RelativeBias | RelativeSinusoids
"""What attention does with positions."""


@config("model.embedded_position.", changes=Changes.IDENTITY)
class Learned:
    """A learned vector for each of max_seq_len positions, added to the embedding (GPT-2)."""

    offset: NotNegative[int] = 0
    """Rows of the table before that of the first position, which no token uses (2 in OPT, arXiv:2205.01068)."""


@config("model.embedded_position.", changes=Changes.IDENTITY)
class Sinusoidal:
    """sin and cos of the position at wavelengths from 2 pi to 10,000 * 2 pi, added to the embedding (Vaswani et al.
    2017, arXiv:1706.03762, section 3.5). No parameters."""


EmbeddedPosition = Learned | Sinusoidal
"""What is added to a token's embedding."""
