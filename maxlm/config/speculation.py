"""Where drafts come from: tokens that are guessed, so that one step of the model reads several of a text at once."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import NotEmpty, PathName, Positive, Range, config, shown

Drafts = Annotated[int, Range(ge=1, le=64)]
_MOST_NODES = 31
"""With the newest token as many as a row has bits for."""


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


@config("engine.speculation.")
class Medusa:
    """The guesses of the model's own Medusa heads, several for a place, as a tree of which all paths are tried at once
    (arXiv:2401.10774, section 2.1.2): costs what the heads do. The model has `model.medusa`."""

    tree: NotEmpty[str] = "0,00,000,1,01,2,10"
    """The nodes, each after the one that it follows, at most 31. "01": the second best guess of the second head, where
    the best one of the first came before. The default are the first nodes that the authors' search found for
    Vicuna 7B, by how often such a path came true (their code, medusa_choices.py); the best path stands first, since its
    keys are where they are to stay."""

    def __post_init__(self) -> None:
        where = f"engine.speculation.tree = {shown(self.tree)}"
        nodes = self.tree.split(",")
        if wrong := [node for node in nodes if not re.fullmatch("[0-9]+", node)]:
            raise UserError(
                f"{where}: {shown(wrong[0])} is no node; write digits, one for each head on its way, as in 0,00,1"
            )
        if len(nodes) > _MOST_NODES or len(set(nodes)) < len(nodes):
            raise UserError(f"{where} has {len(nodes)} nodes; use at most {_MOST_NODES}, and none twice")
        if lost := [node for n, node in enumerate(nodes) if node[:-1] and node[:-1] not in nodes[:n]]:
            raise UserError(
                f"{where}: {shown(lost[0])} comes before what it follows; put {shown(lost[0][:-1])} in front"
            )

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """Of each node: which guess of each head leads to it, 0 for the best."""
        return [tuple(map(int, node)) for node in self.tree.split(",")]

    @property
    def parents(self) -> tuple[int, ...]:
        """Of each node: the number of the one that it follows; -1: the text's newest token."""
        numbers = {(): -1} | {path: n for n, path in enumerate(self.paths)}
        return tuple(numbers[path[:-1]] for path in self.paths)

    @property
    def drafts(self) -> int:
        """Tokens that are guessed at a time."""
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Heads that it needs."""
        return max(map(len, self.paths))

    @property
    def guesses(self) -> int:
        """Of each head."""
        return 1 + max(max(path) for path in self.paths)


Speculation = PromptLookup | DraftModel | Medusa

_KINDS: dict[str, type[Speculation]] = {"lookup": PromptLookup, "draft": DraftModel, "medusa": Medusa}
"""As command lines call them."""


def speculation(words: str) -> Speculation:
    """What a command line says: `lookup`, `lookup:ngram=4,drafts=10`, `draft:run=DIR`, `medusa`.

    Raises:
        UserError: there is no such kind, or it has no such field or value.
    """
    kind, _, rest = words.partition(":")
    if (cls := _KINDS.get(kind)) is None:
        raise UserError(f"speculation = {shown(words)} must be {' or '.join(_KINDS)}; for example lookup:drafts=7")
    fields = {one.name: one for one in dataclasses.fields(cls)}
    values: dict[str, int | str] = {}
    for pair in re.split(r",(?=\w+=)", rest) if rest else []:
        key, equals, value = pair.partition("=")
        if not equals or key not in fields:
            raise UserError(
                f"speculation = {shown(words)}: {shown(pair)} must be one of {', '.join(f'{k}=...' for k in fields)}"
            )
        values[key] = int(value) if re.fullmatch(r"-?\d+", value) and key not in ("run", "tree") else value
    if missing := [key for key, one in fields.items() if one.default is dataclasses.MISSING and key not in values]:
        raise UserError(f"speculation = {shown(words)} lacks {missing[0]}; write {kind}:{missing[0]}=...")
    return cls(**values)  # type: ignore[arg-type] # the class checks them
