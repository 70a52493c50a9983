"""What a new run may start from (`checkpoint.init_from`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maxlm.hub.converting import write_origin
from maxlm.hub.models import KINDS, PublishedModel
from maxlm.training.warm_start import Origin, RunSource, Source


def open_source(place: str) -> Source:
    """A published model, as `hf:DIR` or `gguf:FILE`, or a run, which may be `run:DIR`, as in maxlm.convert."""
    kind, _, path = place.partition(":")
    if kind == "run":
        return RunSource(path)
    return PublishedSource(KINDS[kind](Path(path))) if kind in KINDS else RunSource(place)


class PublishedSource:
    """A published model."""

    def __init__(self, published: PublishedModel) -> None:
        self._published = published
        self.model = published.weights.model

    def read(self, shapes: dict[str, Any]) -> Origin:
        tokenizer = self._published.find_tokenizer()
        return Origin(
            parameters=self._published.weights.parameters(shapes),
            model=self.model,
            tokenizer=None if tokenizer is None else tokenizer.fingerprint,
        )

    def keep(self, run_dir: Path) -> None:
        write_origin(run_dir, self._published.weights.family, self._published.copy_tokenizer)
