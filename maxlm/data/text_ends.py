"""Where the texts that a model goes on with begin and end.

Of a run that is how documents begin and end in its data. Of a published model its folder says it, which may be another
token than the end of a document: a model that answers ends its turn with one of its own, or with one of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import tokenizers

from maxlm.config.json_file import read_object
from maxlm.data.named_ends import eos_ids_beside
from maxlm.data.tokenizers import Tokenizer

_ANY = "aA1. \n\u4e00"
"""Some of it is an ordinary token of any vocabulary."""


class TextEnds(NamedTuple):
    """Ids around a text."""

    first: tuple[int, ...]
    """Before a prompt."""
    last: tuple[int, ...]
    """Each of them ends a text; never empty."""

    @staticmethod
    def of_documents(tokenizer: Tokenizer) -> TextEnds:
        """As in data that is prepared with it."""
        return TextEnds(() if tokenizer.bos_id is None else (tokenizer.bos_id,), (tokenizer.eos_id,))

    def prompt_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """What a continuation of `text` starts from; never empty, as `Tokenizer.prompt_ids` says."""
        return [*self.first, *tokenizer.encode(text)] or [tokenizer.eos_id]


def published_ends(folder: Path, tokenizer: Tokenizer) -> TextEnds:
    """What the folder of a published model says, as transformers reads it.

    A text ends with any `eos_token_id` of generation_config.json (if it says none, of config.json), and with the
    `eos_token` of tokenizer_config.json. It begins with what tokenizer.json puts before a text, or with `bos_token`
    where `add_bos_token` says so. What nothing is said of is as in documents.

    Raises:
        UserError: such a file is damaged, or its ids are no whole numbers.
    """
    usual = TextEnds.of_documents(tokenizer)
    definition = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(definition)) if definition.is_file() else None
    file = folder / "tokenizer_config.json"
    said = read_object(file, "an object, as the model came with it") if file.is_file() else {}

    def id_of(key: str) -> int | None:
        token = said.get(key)
        name = token.get("content") if isinstance(token, dict) else token
        return model.token_to_id(name) if model is not None and isinstance(name, str) else None

    last = [i for i in dict.fromkeys([*eos_ids_beside(folder), id_of("eos_token")]) if i is not None]

    bos, adds_bos = id_of("bos_token"), said.get("add_bos_token")
    if adds_bos is False:
        first: tuple[int, ...] = ()
    elif adds_bos is True and bos is not None:
        first = (bos,)
    elif model is not None:
        text = model.encode(_ANY)
        first = tuple(text.ids[: text.special_tokens_mask.index(0)]) if 0 in text.special_tokens_mask else ()
    else:
        first = usual.first
    return TextEnds(first, tuple(last) or usual.last)
