"""What a new run may start from (`checkpoint.init_from`), and what an adapter is laid on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from maxlm.config import RunConfig, UserError
from maxlm.config.changes import changes
from maxlm.hub.folder import write_origin
from maxlm.hub.models import KINDS, PublishedModel, open_base
from maxlm.inference.bases import BaseReference, open_again, read_base
from maxlm.models.adapters import base_of
from maxlm.models.base import begun, laid, own
from maxlm.sharding import Layout
from maxlm.training.state import TrainState
from maxlm.training.step import Trainer
from maxlm.training.warm_start import Origin, RunSource, Source, Start, WarmStart, check_tokenizer, warm_start


def starting(config: RunConfig, layout: Layout, tokenizer: str) -> Start | None:
    """What reads `checkpoint.init_from` for a run whose data has the tokenizer of this fingerprint; None: it names
    nothing."""
    place = config.checkpoint.init_from
    if place is None:
        return None
    if config.model.adapter is not None:
        return functools.partial(_on_base, place, config, layout, tokenizer)
    return lambda trainer, state, base: warm_start(place, open_source, config.model, layout, trainer, tokenizer)


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


def _on_base(
    place: str,
    config: RunConfig,
    layout: Layout,
    tokenizer: str,
    trainer: Trainer,
    state: TrainState | None,
    saved: Mapping[str, str] | None,
) -> WarmStart:
    """The state of a run with an adapter, whose base is at `place`.

    Raises:
        UserError: the base is not there, does not fit the model, has another tokenizer, or is not what the run began
            with.
    """
    model = config.model
    try:
        base = open_base(place) if saved is None else open_again(saved, open_base, instead=place)
        check_tokenizer(base.tokenizer, tokenizer)
        under = read_base(base, model, layout)
        fingerprint = base.fingerprint() if saved is None else saved["fingerprint"]
    except UserError as error:
        raise UserError(f"checkpoint.init_from = {place}: {error}") from error
    if state is None:
        key = jax.random.key(config.train.seed)
        places = own(model, jax.tree.map(lambda leaf: leaf.sharding, trainer.state.parameters))
        new = jax.jit(functools.partial(begun, model, key=key), out_shardings=places)(under)
        state = trainer.begin(laid(model, under, new))
    else:
        state = dataclasses.replace(state, parameters=laid(model, under, state.parameters))
    return WarmStart(
        state=state,
        step=base.step,
        changes=tuple(str(one) for one in changes(base.model, base_of(model), "model.")) if saved is None else (),
        keep=base.keep,
        base=BaseReference(place=base.place, fingerprint=fingerprint).to_json(),
    )
