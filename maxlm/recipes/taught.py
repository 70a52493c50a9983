"""What a run that is taught with conversations keeps beside its parameters, so that it is asked as it was taught."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from maxlm.config import DataConfig, UserError
from maxlm.data.chat import ChatTemplate, find_chat_template
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
