"""Where drafts come from: tokens that are guessed, so that one step of the model reads several of a text at once."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import Positive, Range, config

Drafts = Annotated[int, Range(ge=1, le=64)]


@config("engine.speculation.")
class PromptLookup:
    """What came after the text's last tokens when they stood there before (Saxena 2023, "Prompt Lookup Decoding"):
    costs no memory, and helps where a text repeats its prompt or itself."""

    drafts: Drafts = 7
    """Tokens that are guessed at a time."""
    ngram: Positive[int] = 3
    """Last tokens that are looked for, at first; then fewer and fewer."""
    shortest: Positive[int] = 1
    """The fewest that are looked for."""

    def __post_init__(self) -> None:
        if self.shortest > self.ngram:
            raise UserError(
                f"engine.speculation.shortest = {self.shortest} is more than engine.speculation.ngram = {self.ngram}; "
                "use less"
            )


Speculation = PromptLookup
