"""What a run that is taught with conversations keeps beside its parameters, so that it is asked as it was taught."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import DataConfig, DistillContext, Preference, Reward, Task, UserError
from maxlm.data.chat import ChatError, ChatTemplate, find_chat_template
from maxlm.data.shards import CHAT
from maxlm.data.text_ends import TextEnds, published_ends
from maxlm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Taught:
    """A tokenizer, and how conversations become text. As `training.loop.Vocabulary`."""

    tokenizer: Tokenizer
    chat_folder: Path
    """With the template, as data sets of conversations have it."""

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer; which template it was is seen in the data."""
        return self.tokenizer.fingerprint

    @property
    def chat(self) -> ChatTemplate | None:
        """How the model is asked."""
        return find_chat_template(self.chat_folder)

    @property
    def ends(self) -> TextEnds:
        """What ends its answers."""
        return published_ends(self.chat_folder, self.tokenizer)

    def save(self, folder: Path) -> None:
        """The tokenizer into `folder`, and the template beside it."""
        self.tokenizer.save(folder)
        shutil.copytree(self.chat_folder, folder.parent / CHAT, dirs_exist_ok=True)


def taught(data: DataConfig, tokenizer: Tokenizer) -> Taught:
    """As the data sets that are of conversations say.

    Raises:
        UserError: none is, or two have different templates.
    """
    folders = [folder for one in data.datasets if (folder := Path(one.path) / CHAT).is_dir()]
    if not folders:
        raise UserError(
            f"{data.datasets[0].path}: is running text, and the task learns from conversations; prepare it with "
            "documents = Conversations(paths=...)"
        )
    templates = [find_chat_template(folder) for folder in folders]
    for folder, template in zip(folders, templates, strict=True):
        if template is None or templates[0] is None or template.sources != templates[0].sources:
            raise UserError(
                f"{folder}: its chat template is not that of {folders[0]}; prepare both with the same template"
            )
    return Taught(tokenizer, folders[0])


class Known(NamedTuple):
    """What a model knows of conversations, before a run goes on with it."""

    chat: ChatTemplate
    ends: TextEnds


def otherwise(task: Task, taught: Taught, known: Known) -> list[str]:
    """A line for each thing that conversations of the data have otherwise than the model knows them."""
    there, here = known.chat, taught.chat
    assert here is not None, "data of conversations has a template"
    found = list[str]()
    if (parted := _parted(there, here)) is not None:
        found.append(f"chat template: {there.place} writes {parted[0]}, {here.place} writes {parted[1]}")
    name = lambda i: repr(taught.tokenizer.name_of(i) or i)
    if (end := taught.ends.last[0]) not in known.ends.last:
        ends = " or ".join(map(name, known.ends.last))
        found.append(f"end of an answer: the model knows {ends}, the data has {name(end)}")
    if isinstance(task, DistillContext | Preference | Reward):  # about what the model says already
        name_of_task = type(task).__name__
        advice = (
            f"for task = {name_of_task} that is nearly always a mistake, prepare the data with the model's template"
        )
        found = [f"{one}; {advice}" for one in found]
    return found


_HELLO: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "Hi"},)
_TALKS: Sequence[Sequence[Mapping[str, Any]]] = (
    _HELLO,
    (
        {"role": "system", "content": "Be brief."},
        *_HELLO,
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
    ),
)
"""Templates that write these alike ask a model alike, whatever their sources look like."""
_SHOWN = 40


def _parted(one: ChatTemplate, other: ChatTemplate) -> tuple[str, str] | None:
    """What each writes of the first conversation where they part, from the line on; None: they never do."""
    if one.sources == other.sources and _names(one) == _names(other):
        return None
    texts = [[_written(template, talk) for talk in _TALKS] for template in (one, other)]
    for mine, its in zip(*texts, strict=True):
        if mine is None or its is None:
            if mine is not its:
                return _said(mine, 0), _said(its, 0)
        elif mine != its:
            same = next(
                (i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its))
            )
            line = mine.rfind("\n", 0, same) + 1
            return _said(mine, line), _said(its, line)
    return None


def _names(template: ChatTemplate) -> dict[str, str]:
    """Of the tokens that it writes."""
    used = "".join(template.sources.values())
    return {key: name for key, name in template.tokens.items() if key in used and name}


def _written(template: ChatTemplate, talk: Sequence[Mapping[str, Any]]) -> str | None:
    """None: it refuses them."""
    try:
        return template.render(talk, now=0.0)
    except ChatError:
        return None


def _said(text: str | None, start: int) -> str:
    return "nothing" if text is None else repr(text[start : start + _SHOWN])
