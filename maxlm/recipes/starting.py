"""What a new run may start from (`checkpoint.init_from`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maxlm.hub.folder import ModelFolder
from maxlm.hub.models import find_tokenizer
from maxlm.training.warm_start import Origin, RunSource, Source

PUBLISHED = "hf:"


def open_source(place: str) -> Source:
    """`hf:` and the folder of a published model, or a run."""
    return PublishedSource(Path(place.removeprefix(PUBLISHED))) if place.startswith(PUBLISHED) else RunSource(place)


class PublishedSource:
    """The folder of a published model."""

    def __init__(self, folder: Path) -> None:
        self._folder = ModelFolder(folder)
        self.model = self._folder.model

    def read(self, shapes: dict[str, Any]) -> Origin:
        tokenizer = find_tokenizer(self._folder.folder)
        return Origin(
            parameters=self._folder.parameters(shapes),
            model=self.model,
            tokenizer=None if tokenizer is None else tokenizer.fingerprint,
        )
