"""Documents that a model answers from."""

from __future__ import annotations

from typing import Annotated

import tyro

from maxlm.config.errors import UserError
from maxlm.config.fields import PathName, Range, config


@config("--")
class DocumentsConfig:
    """Which, and how they are searched."""

    docs: Annotated[PathName | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of documents to answer from: Markdown, text, HTML and PDF. Passages that are near to a question go before
    it, and the answer tells which they were."""
    docs_run: Annotated[PathName | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """Training run whose model says how near they are; None: the model that answers."""
    docs_top: Annotated[int, Range(ge=1, le=50)] = 4
    """Passages for a question."""

    def __post_init__(self) -> None:
        if self.docs is None and self.docs_run is not None:
            raise UserError(f"--docs_run {self.docs_run} searches documents, and there are none; add --docs DIR")
