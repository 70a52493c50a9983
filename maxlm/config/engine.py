"""How many texts are decoded at once, and in how much memory."""

from __future__ import annotations

import enum
from typing import Annotated, assert_never

from maxlm.config.errors import UserError
from maxlm.config.execution import Dtype
from maxlm.config.fields import Positive, Range, config
from maxlm.config.speculation import Medusa, Speculation


class CacheFormat(enum.Enum):
    """How keys and values, or the latents of both, are kept."""

    DTYPE = "dtype"
    """In `execution.dtype`."""
    INT8 = "int8"
    """8 bits, with a bfloat16 scale for each head of each token: half of bfloat16's memory, at the price of a little
    quality."""

    def bytes_of(self, width: int, dtype: Dtype) -> int:
        """Of a head of a token."""
        match self:
            case CacheFormat.DTYPE:
                return width * dtype.itemsize
            case CacheFormat.INT8:
                return width + Dtype.BFLOAT16.itemsize
            case _:
                assert_never(self)


@config("engine.")
class EngineConfig:
    """Of one device, or of each shard of the batch on a mesh that cuts it."""

    slots: Positive[int] = 32
    """Texts that are decoded at once."""
    tokens_per_step: Positive[int] | None = None
    """The most tokens of one step: one for each text that goes on, the rest of prompts. None: 32 on a CPU (8 for
    up to 8 slots), 512 elsewhere, and at least `slots`."""
    block_size: Positive[int] = 16
    """Positions of a block of the cache. Beginnings are shared in whole blocks."""
    cache_tokens: Positive[int] | None = None
    """Positions that the cache has room for; None: half of all slots at the model's full length, as far as the memory
    that is free allows."""
    kv_cache: CacheFormat = CacheFormat.DTYPE
    """Number format of the cache. Our kernel for TPUs reads int8 in blocks of 128 positions; in others it runs as
    XLA operations."""
    queue: Positive[int] = 1024
    """Requests that may wait; the next one is refused."""
    decode_steps: Annotated[int, Range(ge=1, le=64)] = 8
    """Tokens of each text that come without a look from outside when nobody waits. It changes no token."""
    speculation: Speculation | None = None
    """Where drafts come from: tokens that are guessed, so that a step reads several of a text, as far as it has rows
    that no text needs. It changes no token. An engine with drafts looks at every step: `decode_steps` is not used."""

    def __post_init__(self) -> None:
        if self.tokens_per_step is not None and self.tokens_per_step < self.slots:
            raise UserError(
                f"engine.tokens_per_step = {self.tokens_per_step} is less than engine.slots = {self.slots}; each text "
                "that is being decoded has a token in every step"
            )

    @property
    def drafts(self) -> int:
        """Of a text in a step, at most."""
        return 0 if self.speculation is None else self.speculation.drafts

    @property
    def parents(self) -> tuple[int, ...] | None:
        """Of each draft that may stand in a tree, the one that it follows, as `Medusa.parents`; None: drafts follow one
        another."""
        return self.speculation.parents if isinstance(self.speculation, Medusa) else None

    @property
    def guesses(self) -> int:
        """Of each Medusa head, that are looked at."""
        return self.speculation.guesses if isinstance(self.speculation, Medusa) else 0

    @property
    def most_steps(self) -> int:
        """Tokens of each text that come without a look from outside."""
        return self.decode_steps if self.speculation is None else 1

    def most_tokens(self, *, on_cpu: bool) -> int:
        """Of a step: `tokens_per_step`, where it says a number."""
        usual = 512 if not on_cpu else 8 if self.slots <= 8 else 32
        return self.tokens_per_step or max(usual, self.slots, 1 + self.drafts)
