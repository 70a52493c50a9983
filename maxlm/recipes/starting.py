"""What a new run may start from (`checkpoint.init_from`), and what an adapter is laid on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from maxlm.checkpoint.reference import run_and_step
from maxlm.config import Embed, RunConfig, UserError
from maxlm.config.changes import changes
from maxlm.data.chat import find_chat_template
from maxlm.data.text_ends import published_ends
from maxlm.hub.folder import write_origin
from maxlm.hub.models import KINDS, PublishedModel, open_base
from maxlm.inference.bases import BaseReference, open_again, read_base
from maxlm.inference.load import told_in
from maxlm.models.adapters import base_of
from maxlm.models.base import begun, laid, own
from maxlm.recipes.taught import Known, Taught, otherwise
from maxlm.sharding import Layout
from maxlm.training.state import TrainState
from maxlm.training.step import Trainer
from maxlm.training.warm_start import Origin, RunSource, Source, Start, WarmStart, check_tokenizer, warm_start


def starting(config: RunConfig, layout: Layout, tokenizer: str, taught: Taught | None) -> Start | None:
    """What reads `checkpoint.init_from`; None: it names nothing.

    Args:
        config: of the run.
        layout: of the run.
        tokenizer: fingerprint of the data's.
        taught: how the data has conversations, if it is of any.
    """
    place = config.checkpoint.init_from
    if place is None:
        return None

    def start(trainer: Trainer, state: TrainState | None, saved: Mapping[str, str] | None) -> WarmStart:
        if config.model.adapter is None:
            found = warm_start(place, open_source, config.model, layout, trainer, tokenizer)
        else:
            found = _on_base(place, config, layout, tokenizer, trainer, state, saved)
        if state is not None or taught is None or isinstance(config.task, Embed):  # whose texts are in no conversation
            return found
        known = _known(place, taught)
        more = [] if known is None else otherwise(config.task, taught, known)
        return dataclasses.replace(found, changes=(*found.changes, *more))

    return start


def _known(place: str, taught: Taught) -> Known | None:
    """What the model there knows of conversations, in the tokenizer that it shares with the data; None: nothing.

    Raises:
        UserError: what says it is damaged.
    """
    kind, _, path = place.partition(":")
    try:
        if kind in KINDS:
            published = KINDS[kind](Path(path))
            chat, ends = published.find_chat(), published.find_ends(taught.tokenizer)
        else:
            told = told_in(run_and_step(path if kind == "run" else place)[0])
            if told is None:
                return None
            chat, ends = find_chat_template(told), published_ends(told, taught.tokenizer)
    except UserError as error:
        raise UserError(f"checkpoint.init_from = {place}: {error}") from error
    return None if chat is None else Known(chat, ends)


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
