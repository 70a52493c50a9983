"""Where drafts come from: tokens that are guessed, so that one step of the model reads several of a text at once."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import PathName, Positive, Range, config

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


@config("engine.speculation.")
class DraftModel:
    """A smaller model with the same tokenizer goes on with the text first, with the text's own settings and noise, so
    that it mostly draws what the model draws (arXiv:2408.07978): costs its memory and time, and helps any text that it
    knows."""

    run: PathName
    """Folder of a training run or of a published model, or a GGUF file."""
    drafts: Drafts = 4
    """Tokens that are guessed at a time."""


Speculation = PromptLookup | DraftModel

_KINDS: dict[str, type[Speculation]] = {"lookup": PromptLookup, "draft": DraftModel}
"""As command lines call them."""


def speculation(words: str) -> Speculation:
    """What a command line says: `lookup`, `lookup:ngram=4,drafts=10`, `draft:run=DIR`.

    Raises:
        UserError: there is no such kind, or it has no such field or value.
    """
    kind, _, rest = words.partition(":")
    if (cls := _KINDS.get(kind)) is None:
        raise UserError(f"speculation = {words!r} must be {' or '.join(_KINDS)}; for example lookup:drafts=7")
    fields = {one.name: one for one in dataclasses.fields(cls)}
    values: dict[str, int | str] = {}
    for pair in re.split(r",(?=\w+=)", rest) if rest else []:
        key, equals, value = pair.partition("=")
        if not equals or key not in fields:
            raise UserError(f"speculation = {words!r}: {pair!r} must be one of {', '.join(f'{k}=...' for k in fields)}")
        values[key] = int(value) if re.fullmatch(r"-?\d+", value) and key != "run" else value
    if missing := [key for key, one in fields.items() if one.default is dataclasses.MISSING and key not in values]:
        raise UserError(f"speculation = {words!r} lacks {missing[0]}; write {kind}:{missing[0]}=...")
    return cls(**values)  # type: ignore[arg-type] # the class checks them
