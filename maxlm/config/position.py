"""How a model knows where a token stands: in its attention scores, in its queries and keys, or in its embedding."""

from __future__ import annotations

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Positive, config


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


@config("model.blocks[].attention.position.", changes=Changes.IDENTITY)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) on every head dimension."""

    theta: Positive[float] = 10_000.0
    """Base of the geometric series of wavelengths."""
    scaling: Llama3RopeScaling | None = None
    """How a model learns longer contexts than those it began with; None: not at all."""


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


Position = Rope | Alibi | RelativeBias
"""What attention does with positions."""


@config("model.embedded_position.", changes=Changes.IDENTITY)
class Learned:
    """A learned vector for each of max_seq_len positions, added to the embedding (GPT-2)."""


@config("model.embedded_position.", changes=Changes.IDENTITY)
class Sinusoidal:
    """sin and cos of the position at wavelengths from 2 pi to 10,000 * 2 pi, added to the embedding (Vaswani et al.
    2017, arXiv:1706.03762, section 3.5). No parameters."""


EmbeddedPosition = Learned | Sinusoidal
"""What is added to a token's embedding."""
