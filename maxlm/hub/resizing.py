"""A model for another vocabulary: rows of its tables selected, or made for new ids."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.config import UserError
from maxlm.config.json_file import parse_object
from maxlm.data.tokenizers import Tokenizer
from maxlm.hub.converting import Opened
from maxlm.hub.folder import copy_tokenizer
from maxlm.hub.models import find_tokenizer, no_tokenizer
from maxlm.hub.names import Piece
from maxlm.hub.token_sets import JSON, SENTENCEPIECE, Edited, TokenSet

RowSource = tuple[int, ...] | None
"""Old rows whose mean a new row is; none: that of all."""


class Resizing:
    """A model, and its tokenizer's files in a scratch folder, where they are changed."""

    def __init__(self, opened: Opened, scratch: Path, *, multiple: int = 1) -> None:
        """`scratch`: an empty folder, which must stay until what is made here is written; `multiple`: the new
        `vocab_size` is a multiple of it.

        Raises:
            UserError: the model has no tokenizer, one that cannot be changed, or with more ids than it has rows.
        """
        if opened.tokenizer is None:
            raise no_tokenizer(opened.place)
        self.tokenizer: Tokenizer = opened.tokenizer
        self._opened, self._multiple = opened, multiple
        self._before, self._after = scratch / "before", scratch / "after"
        for folder in (self._before, self._after):
            folder.mkdir()
            opened.copy_tokenizer(folder)
        if not any((self._before / name).is_file() for name in (JSON, SENTENCEPIECE)):
            raise UserError(
                f"{opened.place}: its tokenizer is neither a {JSON} nor a sentencepiece {SENTENCEPIECE}, which can be "
                "changed; name a model with one of them"
            )
        found = TokenSet.read(self._before)
        self.vocabulary = dataclasses.replace(found, file=opened.place / found.file.name)  # for messages
        if self.tokenizer.vocab_size > opened.model.vocab_size:
            raise UserError(
                f"{opened.place}: its tokenizer has ids up to {self.tokenizer.vocab_size - 1}, the model "
                f"{opened.model.vocab_size} rows; put the tokenizer that it was trained with there"
            )

    def extended(self, other: Path, *, mean_rows: bool) -> Opened:
        """With the tokens of another tokenizer that the model's own lacks; see `TokenSet.extended`.

        Args:
            other: a tokenizer of the same kind, or the folder that it lies in.
            mean_rows: new rows are the mean of all, so that new tokens are as likely as others on average (Hewitt
                2021); else of those that spelled the token before (Gee et al. 2022, arXiv:2402.09977).
        """
        edited = self.vocabulary.extended(TokenSet.read(other))
        sources: list[RowSource] = list(edited.sources)
        if mean_rows:
            sources[self.tokenizer.vocab_size :] = [None] * (len(sources) - self.tokenizer.vocab_size)
        # Rows that the model had for no token stay behind the new ones, as far as there were more of them.
        sources += [(i,) for i in range(len(sources), self._opened.model.vocab_size)]
        return self._with(edited, sources)

    def pruned(self, used: set[int]) -> Opened:
        """Without the tokens that are not used; see `TokenSet.kept`. What the model says of a text of used tokens,
        among these, does not change."""
        edited = self.vocabulary.kept(used)
        return self._with(edited, edited.sources)

    def used_in(self, texts: Iterable[str]) -> set[int]:
        """The tokens of these texts."""
        return {i for text in texts for i in self.tokenizer.encode(text)}

    def all_but(self, listed: Path) -> set[int]:
        """All tokens but those of a file that lists them, one a line.

        Raises:
            UserError: it cannot be read, or lists what is no token.
        """
        try:
            lines = listed.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{listed}: cannot be read ({error}); name a text file with a token on each line"
            ) from error
        return set(range(self.tokenizer.vocab_size)) - self.vocabulary.ids_of(filter(None, lines))

    def _with(self, edited: Edited, sources: Sequence[RowSource]) -> Opened:
        opened, size = self._opened, -(-len(sources) // self._multiple) * self._multiple
        model = dataclasses.replace(opened.model, vocab_size=size)
        old = {array.name: array for array in shapes.arrays(opened.model)}

        def changed(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            """An array, or a part of it, of which the vocabulary is the first dim if it has that dim."""
            return self._rows(values, sources, size) if "vocab" in old[name].dims else values

        def pieces(parts: Sequence[Piece]) -> list[npt.NDArray[Any]]:
            found = opened.pieces([Piece(old[part.array.name], part.at) for part in parts])
            return [changed(part.array.name, values) for part, values in zip(parts, found, strict=True)]

        def parameters() -> Any:
            def one(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> Any:
                values = changed("/".join(str(key.key) for key in path), leaf)
                return values if values is leaf else jax.device_put(values, leaf.sharding)

            return jax.tree_util.tree_map_with_path(one, opened.parameters())

        self._write(edited)
        return dataclasses.replace(
            opened,
            model=model,
            pieces=pieces,
            layer=lambda array, number: changed(array.name, opened.layer(old[array.name], number)),
            parameters=parameters,
            tokenizer=find_tokenizer(self._after),
            copy_tokenizer=partial(copy_tokenizer, self._after),
            config=dataclasses.replace(opened.config, model=model),
        )

    def _rows(self, values: Any, sources: Sequence[RowSource], size: int) -> npt.NDArray[Any]:
        """Of a table [V, ...], in its number format; zeros where `multiple` asks for more rows."""
        values = np.asarray(values)
        found = np.zeros((size, *values.shape[1:]), values.dtype)
        of_all = values[: self.tokenizer.vocab_size].mean(0, dtype=np.float64)
        for i, source in enumerate(sources):
            if not source:  # or nothing spelled it
                found[i] = of_all
            else:
                found[i] = values[source[0]] if len(source) == 1 else values[list(source)].mean(0, dtype=np.float64)
        return found

    def _write(self, edited: Edited) -> None:
        """The tokenizer's files with ids as they are now; the other of its two forms would not know of it."""
        for name in (JSON, SENTENCEPIECE):
            (self._after / name).unlink(missing_ok=True)
        (self._after / self.vocabulary.file.name).write_bytes(edited.definition)
        place: dict[int, int] = {}
        for new, old in enumerate(edited.sources):
            if len(old) == 1:
                place.setdefault(old[0], new)  # a new token that one old one spells comes after that one
        for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json"):
            if (self._after / name).is_file():
                source = self._opened.place / name  # for messages
                values = parse_object((self._after / name).read_bytes(), source, "an object, as the model came with it")
                try:
                    if name == "added_tokens.json":
                        values = {token: place[i] for token, i in values.items() if i in place}
                    values = _moved(values, place)
                except (AttributeError, TypeError, ValueError) as error:
                    raise UserError(f"{source}: its ids must be whole numbers ({error}); restore the file") from error
                (self._after / name).write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n")


def _moved(values: dict[str, Any], place: dict[int, int]) -> dict[str, Any]:
    """With ids as they are now: keys of `added_tokens_decoder`, values of NAME_token_id and of lists of tokens.

    Raises:
        AttributeError, TypeError, ValueError: these are of other kinds.
    """
    found = dict(values)
    for key, value in values.items():
        if key == "added_tokens_decoder":
            found[key] = {str(place[int(i)]): token for i, token in value.items() if int(i) in place}
        elif key.endswith("_token_id") or key in ("suppress_tokens", "begin_suppress_tokens"):
            found[key] = [place[i] for i in value if i in place] if isinstance(value, list) else place.get(value)
    return found
